"""Four-bit floats as GGUF stores them: MXFP4 and NVFP4.

A weight is an E2M1 code (sign 1, exponent 2, mantissa 1: 0, 0.5, 1, 1.5, 2, 3, 4, 6) times the scale of its group. Byte
k of a group's codes holds weight k below and weight k + half the group above::

    MXFP4  17 bytes  scale E8M0 | 16 x (w[k+16] : 4, w[k] : 4)                one group of 32 weights
    NVFP4  36 bytes  4 scales UE4M3 | 4 x 8 x (w[k+8] : 4, w[k] : 4)          four groups of 16 weights

    E8M0   eeeeeeee   2^(e - 127)
    UE4M3  0eeeemmm   2^(e - 7) (1 + m / 8); 2^-6 m / 8 where e is 0; 0x7F counts as 0, the upper bit as 0

There are so few scales that the encoder tries, with the exact weighted error, all that may be the best: on level
`plain` a few about the one that llama.cpp takes, on level `search` every one that no bound rules out, so that it finds
the best there is. Two bounds: what is cut off beyond code 6 only grows as the scale falls; and where the largest weight
is below 2.5 scales, half that scale has every value that can be used, and more.

As in dynq.kernels.fit, groups lie side by side, [weight in group, lane], and inner loops run over lanes. Errors are
measured in units of the scale, so no power of two is needed to keep the sums in range.

Source: block_mxfp4, block_nvfp4 in llama.cpp's ggml-common.h, quantize_row_mxfp4_ref and quantize_row_nvfp4_ref; OCP
Microscaling Formats (MX) v1.0. Decoding multiplies as gguf-py does, twice the code's value by half the scale.
"""

import numpy as np

from dynq.kernels._jit import kernel
from dynq.kernels._once import once

U = np.uint32
TILE = 2048  # weights side by side

ZERO = np.float32(0)
HALF = np.float32(0.5)
ONE = np.float32(1)
SIX = np.float32(6)
INFINITY = np.float32(np.inf)
ONE_BITS = U(0x3F800000)
STEP = np.float32(1.5 * 2.0**22)  # p + STEP p, p a power of two, is a float whose last bit is worth p / 2
SPARE = np.float32(2.5)  # a largest weight of fewer scales than this leaves codes 3 to 6 unused
LOWEST_NORMAL = np.float32(2.0**-6)  # of UE4M3

# by format: least and last scale that are tried (of larger E8M0 code 6 is beyond float32); the first scale from which
# on half of each is a scale too; how many below and above the first guess are tried on level `plain`
BOUNDS = {"MXFP4": (0, 252, 1, 1, 1), "NVFP4": (1, 126, 16, 1, 8)}


@kernel
def _parts(t):
    """For t >= 0: bits of p, one of 1, 2, 4, whose half is E2M1's step there; STEP p; t + STEP p, that is t rounded."""
    t = t if t < SIX else SIX
    bits = U(np.float32(t).view(U) & U(0x7F800000))
    bits = U(bits if bits > ONE_BITS else ONE_BITS)
    shift = np.float32(U(bits).view(np.float32) * STEP)
    return bits, shift, np.float32(t + shift)


@kernel
def _nearest(t):
    """The E2M1 value nearest to t >= 0, without branches."""
    _, shift, rounded = _parts(t)
    return np.float32(rounded - shift)


@kernel
def _code(x, inverse):
    """The E2M1 code of x inverse: the sign, and the steps within p's octave counted on from the octave's first."""
    bits, shift, rounded = _parts(abs(x) * inverse)
    steps = U(np.float32(rounded).view(U) - np.float32(shift).view(U))
    octaves = U(U(bits - ONE_BITS) >> U(22))
    return U(U(steps + octaves) | U(U(np.float32(x).view(U) >> U(28)) & U(8)))


@kernel
def _load(x, first, X, largest):
    """Groups from `first` on into X [width, lanes], zeros beyond the last; the largest |x| of each in `largest`."""
    width, lanes = X.shape
    count = min(lanes, x.shape[0] - first)
    for j in range(count):
        for i in range(width):
            X[i, j] = x[first + j, i]
    for i in range(width):
        for j in range(count, lanes):
            X[i, j] = ZERO
    largest[:] = ZERO
    for i in range(width):
        for j in range(lanes):
            size = abs(X[i, j])
            largest[j] = size if size > largest[j] else largest[j]


@kernel
def _guess(largest, power_of_two, lowest, last, base):
    """llama.cpp's scale for each lane, or the next below: the largest |x| is sent between 4 and 8, or to about 6."""
    for j in range(base.shape[0]):
        if power_of_two:
            value = np.int32(U(np.float32(largest[j]).view(U)) >> U(23)) - np.int32(2)
        else:
            wish = largest[j] / SIX
            tiny = np.int32((wish if wish < ONE else ONE) * np.float32(512))
            normal = np.int32(np.int32(U(np.float32(wish).view(U)) >> U(20)) - np.int32(960))
            value = tiny if wish < LOWEST_NORMAL else normal
        value = value if value > lowest else lowest
        base[j] = value if value < last else last


@kernel
def _error(X, W, inverse, E):
    """Per lane the sum of w (t - nearest(t))^2, t = |x| inverse."""
    E[:] = ZERO
    for i in range(X.shape[0]):
        for j in range(X.shape[1]):
            t = abs(X[i, j]) * inverse[j]
            miss = t - _nearest(t)
            E[j] += W[i, j] * miss * miss


@kernel
def _excess(X, W, inverse, E):
    """What of _error lies beyond code 6."""
    E[:] = ZERO
    for i in range(X.shape[0]):
        for j in range(X.shape[1]):
            over = abs(X[i, j]) * inverse[j] - SIX
            over = over if over > ZERO else ZERO
            E[j] += W[i, j] * over * over


@kernel
def _try(X, W, values, offset, lowest, last, base, live, inverse, ratio, E, best, found):
    """Measure the scales `offset` away from `base`, in units of base's; keep what is better where a lane is live."""
    _step(values, offset, lowest, last, base, inverse, ratio)
    _error(X, W, inverse, E)
    for j in range(E.shape[0]):
        error = E[j] * ratio[j]
        if live[j] and error < best[j]:
            best[j] = error
            found[j] = min(max(base[j] + offset, lowest), last)


@kernel
def _step(values, offset, lowest, last, base, inverse, ratio):
    """1 / scale, and the square of scale / base's scale, of the scale `offset` away from `base`."""
    for j in range(base.shape[0]):
        scale = values[min(max(base[j] + offset, lowest), last)]
        inverse[j] = ONE / scale
        quotient = scale / values[base[j]]
        ratio[j] = quotient * quotient


@kernel
def fit(x, w, values, power_of_two, bounds, exact, out):
    """Choose the scale and the codes of each group and write them to `out`, uint8 [blocks, block_bytes].

    x float32 [groups, width]; w float32 [width, lanes + groups of a row], repeating with the row; values float32
    [256], the scale of each byte; bounds: BOUNDS.
    """
    width = x.shape[1]
    groups = x.shape[0] // out.shape[0]  # of a block
    lanes = TILE // width
    per_row = w.shape[1] - lanes
    lowest, last, paired, below, above = bounds
    X = np.empty((width, lanes), np.float32)
    W = np.empty((width, lanes), np.float32)
    P = np.empty((width // 2, lanes), np.uint8)
    A = np.empty((5, lanes), np.float32)
    largest, inverse, ratio, E, best = A[0], A[1], A[2], A[3], A[4]
    base, found, live = np.empty(lanes, np.int32), np.empty(lanes, np.int32), np.empty(lanes, np.bool_)
    for first in range(0, x.shape[0], lanes):
        column = first % per_row
        for i in range(width):
            for j in range(lanes):
                W[i, j] = w[i, column + j]
        _load(x, first, X, largest)
        _guess(largest, power_of_two, lowest, last, base)
        for j in range(lanes):
            best[j], found[j], live[j] = INFINITY, base[j], True
        for offset in range(above + 1):
            _try(X, W, values, offset, lowest, last, base, live, inverse, ratio, E, best, found)
        for offset in range(-1, -below - 1, -1):
            _try(X, W, values, offset, lowest, last, base, live, inverse, ratio, E, best, found)
        offset = above
        search = exact
        while search:
            offset += 1
            search = False
            for j in range(lanes):
                u = base[j] + offset
                live[j] = u <= last and (u < paired or values[u] * SPARE < largest[j])
                search |= live[j]
            if search:
                _try(X, W, values, offset, lowest, last, base, live, inverse, ratio, E, best, found)
        for j in range(lanes):
            live[j] = True
        offset = -below
        search = exact
        while search:
            offset -= 1
            _step(values, offset, lowest, last, base, inverse, ratio)
            _excess(X, W, inverse, E)
            search = False
            for j in range(lanes):
                live[j] &= base[j] + offset >= lowest and E[j] * ratio[j] < best[j]
                search |= live[j]
            if search:
                _try(X, W, values, offset, lowest, last, base, live, inverse, ratio, E, best, found)
        for j in range(lanes):
            inverse[j] = ONE / values[found[j]]
        for k in range(width // 2):
            for j in range(lanes):
                P[k, j] = np.uint8(U(_code(X[k, j], inverse[j]) | U(_code(X[k + width // 2, j], inverse[j]) << U(4))))
        for b in range(first // groups, min((first + lanes) // groups, out.shape[0])):
            for s in range(groups):
                j = b * groups + s - first
                at = groups + s * (width // 2)
                out[b, s] = np.uint8(found[j])
                for k in range(width // 2):
                    out[b, at + k] = P[k, j]


@kernel
def _twice(code):
    """Twice the value of an E2M1 code, int32: 0, 1, 2, 3, 4, 6, 8, 12 as the sum of three lines."""
    m = np.int32(np.int32(code) & np.int32(7))
    beyond4 = np.int32(m - np.int32(4))
    beyond6 = np.int32(m - np.int32(6))
    beyond4 = beyond4 if beyond4 > np.int32(0) else np.int32(0)
    beyond6 = beyond6 if beyond6 > np.int32(0) else np.int32(0)
    value = np.int32(np.int32(m + beyond4) + np.int32(beyond6 + beyond6))
    sign = np.int32(-np.int32(np.int32(np.int32(code) >> np.int32(3)) & np.int32(1)))
    return np.int32(np.int32(value ^ sign) - sign)


@kernel
def decode_mxfp4(data, halves, out):
    """Blocks uint8 [blocks, 17] to float32 [blocks, 32]; halves float32 [256], half the scale of each byte."""
    for b in range(data.shape[0]):
        half = halves[data[b, 0]]
        for k in range(16):
            pair = data[b, 1 + k]
            out[b, k] = np.float32(_twice(pair)) * half
            out[b, k + 16] = np.float32(_twice(pair >> np.uint8(4))) * half


@kernel
def decode_nvfp4(data, halves, out):
    """As decode_mxfp4, for NVFP4: uint8 [blocks, 36] to float32 [blocks, 64].

    Loops of 8, the codes that share a scale, would not be vectorised: so all nibbles at once, then their order by
    words of 8, then all products at once.
    """
    nibbles = np.empty((2, 4), np.uint64)
    order = np.empty((4, 2), np.uint64)
    apart, twice = nibbles.view(np.int8), order.view(np.int8).reshape(64)
    half = np.empty(64, np.float32)
    for b in range(data.shape[0]):
        for k in range(32):
            pair = data[b, 4 + k]
            apart[0, k] = _twice(pair)
            apart[1, k] = _twice(pair >> np.uint8(4))
        for s in range(4):
            order[s, 0], order[s, 1] = nibbles[0, s], nibbles[1, s]
            scale = halves[data[b, s]]
            for k in range(16):
                half[16 * s + k] = scale
        for i in range(64):
            out[b, i] = np.float32(twice[i]) * half[i]


@once
def half_scales(name: str) -> np.ndarray:
    """Half the scale of each byte, float32 [256]: all of E8M0 are then finite."""
    byte = np.arange(256)
    if name == "MXFP4":
        return np.ldexp(np.float32(1), byte - 128)
    exponent, mantissa = byte >> 3 & 15, (byte & 7).astype(np.float32) / np.float32(8)
    half = np.ldexp(np.where(exponent > 0, ONE + mantissa, mantissa), np.maximum(exponent, 1) - 8)
    return np.where(byte == 0x7F, ZERO, half)


def encode(name: str, x: np.ndarray, w: np.ndarray | None, level: str, out: np.ndarray) -> None:
    """Fill `out` [blocks, block_bytes] from float32 x [blocks, block]; w [blocks of a row, block] or None."""
    width = 32 if name == "MXFP4" else 16
    groups = x.reshape(-1, width)
    columns = np.ones((width, 1), np.float32) if w is None else w.reshape(-1, width).T
    extended = np.take(columns, np.arange(columns.shape[1] + TILE // width), axis=1, mode="wrap")
    values = half_scales(name)[:254] * np.float32(2)
    fit(groups, extended, values, name == "MXFP4", BOUNDS[name], level == "search", out)


def decode(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` float32 [blocks, block] from uint8 data [blocks, block_bytes]."""
    (decode_mxfp4 if name == "MXFP4" else decode_nvfp4)(data, half_scales(name), out)
