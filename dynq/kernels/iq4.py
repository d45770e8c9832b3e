"""Blocks of 4-bit codes into a book of sixteen uneven levels, as GGUF stores them: IQ4_NL, IQ4_XS.

``w = scale * LEVELS[code]``; a nibble field of 16 bytes holds weight k of 32 below and weight k + 16 above::

    IQ4_NL   18 bytes  d f16 | 16 x (c[k+16] : 4, c[k] : 4)                                scale = d
    IQ4_XS  136 bytes  d f16 | upper u16 | lower 4 bytes | 8 nibble fields, 32 weights     scale = d (s - 32)

Of IQ4_XS's 6-bit s, bits 2 j and 2 j + 1 of `upper` are sub-block j's upper two; byte j of `lower` holds the lower four
of sub-block 2 j below and of 2 j + 1 above.

The levels reach from -127 to 113, so the sign of a scale matters: llama.cpp (``quantize_row_iq4_nl_impl`` in
ggml-quants.c) sends the largest weight to about -127 and tries a few roundings; here it is sent to both ends, and
nearer and farther. Then come the stored numbers, improved in turn under the exact weighted error.

Source: block_iq4_nl and block_iq4_xs in llama.cpp's ggml-common.h. The levels are gguf-py's.
"""

from collections.abc import Callable

import numpy as np
from gguf.quants import IQ4_NL

from dynq.kernels._jit import call, kernel
from dynq.kernels.fit import INFINITY, ONE, ZERO, load, stored
from dynq.kernels.floats import half, half_table

LANES = 64  # blocks of IQ4_NL side by side
GROUP = 8  # super-blocks of IQ4_XS side by side
ROUNDS = 2  # descents over the stored numbers; dynq.reference does as many

LEVELS = np.array(IQ4_NL.kvalues, np.float32)
LOWEST = LEVELS[0]
MIDDLES = (LEVELS[1:] + LEVELS[:-1]) / np.float32(2)
GAPS = np.diff(LEVELS)


def _spread(below: tuple[float, float, int], above: tuple[float, float, int]) -> np.ndarray:
    return np.concatenate([np.geomspace(*below), np.geomspace(*above)]).astype(np.float32)


# Where the largest |w| of 32 is sent. Measured on trained weights, against the least error that any scale allows a
# block of IQ4_NL: the 58 tries come within 0.1 % of it on average, with any importance; the 22 do too without one or
# with a mild one, and within 2 % with a heavy-tailed one.
TRIES = {
    "plain": _spread((-145, -90, 13), (95, 135, 9)),
    "search": _spread((-220, -80, 32), (80, 200, 26)),
}
# Where a super-block's scale of largest magnitude is sent: the eight then fall on its integers in other ways. One line
# for each start of a descent.
ENDS = {
    "plain": np.linspace(-33, -24, 36, dtype=np.float32).reshape(1, 36),
    "search": np.linspace(-33, -18, 60, dtype=np.float32).reshape(4, 15),
}


@kernel
def nearest(y):
    """The level nearest to y, as the sum of the gaps that y lies beyond: no branch, no gather, so it vectorises."""
    level = LOWEST
    for k in range(15):
        level += GAPS[k] if y > MIDDLES[k] else ZERO
    return level


@kernel
def nearest_code(y):
    """The code of the level nearest to y, 0..15."""
    code = np.int32(0)
    for k in range(15):
        code += np.int32(1) if y > MIDDLES[k] else np.int32(0)
    return code


@kernel
def search_levels(X, W, tries, S, C, A):
    """Per lane: scale S with x ~ S level, and the curvature C = sum w level^2 of the error about it.

    Each try sends the largest |x| to ``tries[t]``, rounds and solves least squares; the last one starts from the best
    scale so far. A is scratch [5, lanes].
    """
    n, lanes = X.shape
    largest, best, sll, sxl, inverse = A[0], A[1], A[2], A[3], A[4]
    for j in range(lanes):
        largest[j] = ZERO
        best[j] = ZERO
        S[j] = ZERO
        C[j] = ZERO
    for i in range(n):
        for j in range(lanes):
            largest[j] = X[i, j] if abs(X[i, j]) > abs(largest[j]) else largest[j]
    for t in range(tries.shape[0] + 1):
        if t < tries.shape[0]:
            for j in range(lanes):
                inverse[j] = tries[t] / largest[j] if largest[j] != ZERO else ZERO
        else:
            for j in range(lanes):
                inverse[j] = ONE / S[j] if S[j] != ZERO else ZERO
        for j in range(lanes):
            sll[j] = ZERO
            sxl[j] = ZERO
        for i in range(n):
            for j in range(lanes):
                level = nearest(X[i, j] * inverse[j])
                wl = W[i, j] * level
                sll[j] += wl * level
                sxl[j] += wl * X[i, j]
        for j in range(lanes):
            scale = sxl[j] / sll[j]
            gain = scale * sxl[j]
            better = gain > best[j]
            best[j] = gain if better else best[j]
            S[j] = scale if better else S[j]
            C[j] = sll[j] if better else C[j]


@kernel
def measure(X, W, S, E, sll, sxl):
    """Round with the stored scales S; per lane the error E and the sums that least squares needs."""
    n, lanes = X.shape
    inverse = np.empty(lanes, np.float32)
    for j in range(lanes):
        inverse[j] = ONE / S[j] if S[j] != ZERO else ZERO
        E[j] = ZERO
        sll[j] = ZERO
        sxl[j] = ZERO
    for i in range(n):
        for j in range(lanes):
            level = nearest(X[i, j] * inverse[j])
            miss = X[i, j] - S[j] * level
            wl = W[i, j] * level
            E[j] += W[i, j] * miss * miss
            sll[j] += wl * level
            sxl[j] += wl * X[i, j]


@kernel
def assign(X, first, S, group, Q, codes):
    """Codes for the stored scales: uint8 [blocks, block], in the order of x. Q is scratch like X."""
    sub, lanes = X.shape
    inverse = np.empty(lanes, np.float32)
    for j in range(lanes):
        inverse[j] = ONE / S[j] if S[j] != ZERO else ZERO
    for i in range(sub):
        for j in range(lanes):
            Q[i, j] = np.uint8(nearest_code(X[i, j] * inverse[j]))
    for g in range(min(group, codes.shape[0] - first)):
        for s in range(lanes // group):
            for i in range(sub):
                codes[first + g, s * sub + i] = Q[i, s * group + g]


@kernel
def fit_blocks(x, w, tries, codes, d):
    """Choose everything a block of IQ4_NL stores.

    x float32 [blocks, 32]; w float32 [blocks of a row, 32]. Out: codes uint8 [blocks, 32]; d uint16 [blocks].
    """
    X = np.empty((32, LANES), np.float32)
    W = np.empty((32, LANES), np.float32)
    Q = np.empty((32, LANES), np.uint8)
    A = np.empty((5, LANES), np.float32)
    B = np.empty((7, LANES), np.float32)
    S, E, sll, sxl, unit, best, best_S = B[0], B[1], B[2], B[3], B[4], B[5], B[6]
    for first in range(0, x.shape[0], LANES):
        load(x, w, first, 32, X, W, unit)
        search_levels(X, W, tries, S, E, A)
        best[:] = INFINITY
        for _ in range(ROUNDS + 1):
            for j in range(LANES):
                S[j] = stored(S[j], unit[j])
            measure(X, W, S, E, sll, sxl)
            for j in range(LANES):
                if E[j] < best[j]:
                    best[j], best_S[j] = E[j], S[j]
                S[j] = sxl[j] / sll[j]
        assign(X, first, best_S, LANES, Q, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            d[first + j] = half(best_S[j] / unit[j])


@kernel
def _integer(scale, d):
    """The integer in -32..31 nearest to scale / d; 0 where d is 0."""
    s = np.rint(scale / d) if d != ZERO else ZERO
    s = s if s > np.float32(-32) else np.float32(-32)
    return s if s < np.float32(31) else np.float32(31)


@kernel
def share_scale(S, C, ends, unit, D, A):
    """Per super-block: the stored D for which sum C (S - D s)^2 is about least, s integers in -32..31.

    S, C [lanes], D [GROUP]. The S of largest magnitude is sent to each of `ends`; least squares gives D. A is scratch
    [5, GROUP].
    """
    largest, best, ss, vs, step = A[0], A[1], A[2], A[3], A[4]
    for g in range(GROUP):
        largest[g] = ZERO
        best[g] = ZERO
        D[g] = ZERO
    for s in range(8):
        for g in range(GROUP):
            value = S[s * GROUP + g]
            largest[g] = value if abs(value) > abs(largest[g]) else largest[g]
    for t in range(ends.shape[0]):
        for g in range(GROUP):
            step[g] = largest[g] / ends[t]
            ss[g] = ZERO
            vs[g] = ZERO
        for s in range(8):
            for g in range(GROUP):
                j = s * GROUP + g
                integer = _integer(S[j], step[g])
                ws = C[j] * integer
                ss[g] += ws * integer
                vs[g] += ws * S[j]
        for g in range(GROUP):
            scale = vs[g] / ss[g]
            gain = scale * vs[g]
            better = (ss[g] > ZERO) & (gain > best[g])
            best[g] = gain if better else best[g]
            D[g] = scale if better else D[g]
    for g in range(GROUP):
        D[g] = stored(D[g], unit[g])


@kernel
def fit_super_blocks(x, w, tries, ends, codes, integers, d):
    """Choose everything a block of IQ4_XS stores.

    The descent starts from what share_scale finds among ``ends[p]``, for each p, and the best seen is kept.

    x float32 [blocks, 256]; w float32 [blocks of a row, 256]. Out: codes uint8 [blocks, 256]; integers int8 [blocks,
    8], -32..31; d uint16 [blocks].
    """
    lanes = 8 * GROUP
    X = np.empty((32, lanes), np.float32)
    W = np.empty((32, lanes), np.float32)
    Q = np.empty((32, lanes), np.uint8)
    A = np.empty((5, lanes), np.float32)
    B = np.empty((8, lanes), np.float32)
    S, C, T, E, sll, sxl, N, best_N = B[0], B[1], B[2], B[3], B[4], B[5], B[6], B[7]
    G = np.empty((4, GROUP), np.float32)
    unit, D, best, best_D = G[0], G[1], G[2], G[3]
    for first in range(0, x.shape[0], GROUP):
        load(x, w, first, 32, X, W, unit)
        search_levels(X, W, tries, S, C, A)
        best[:] = INFINITY
        for r in range(ends.shape[0] * (ROUNDS + 1)):
            if r % (ROUNDS + 1) == 0:
                share_scale(S, C, ends[r // (ROUNDS + 1)], unit, D, A)
                for j in range(lanes):
                    T[j] = S[j]
            for s in range(8):
                for g in range(GROUP):
                    j = s * GROUP + g
                    N[j] = _integer(T[j], D[g])
                    T[j] = D[g] * N[j]
            measure(X, W, T, E, sll, sxl)
            for g in range(GROUP):
                total, ss, vs = ZERO, ZERO, ZERO
                for j in range(g, lanes, GROUP):
                    total += E[j]
                    ss += N[j] * N[j] * sll[j]
                    vs += N[j] * sxl[j]
                    T[j] = sxl[j] / sll[j]
                if total < best[g]:
                    best[g], best_D[g] = total, D[g]
                    for j in range(g, lanes, GROUP):
                        best_N[j] = N[j]
                if ss > ZERO:
                    D[g] = stored(vs / ss, unit[g])
        for s in range(8):
            for g in range(GROUP):
                S[s * GROUP + g] = best_D[g] * best_N[s * GROUP + g]
        assign(X, first, S, GROUP, Q, codes)
        for g in range(min(GROUP, x.shape[0] - first)):
            d[first + g] = half(best_D[g] / unit[g])
            for s in range(8):
                integers[first + g, s] = np.int8(best_N[s * GROUP + g])


@kernel
def pack_codes(codes, at, out):
    """codes uint8 [blocks, 32 or 256] into the nibbles of blocks uint8 [blocks, block_bytes], from byte `at` on."""
    for b in range(codes.shape[0]):
        for s in range(codes.shape[1] // 32):
            for k in range(16):
                c = 32 * s + k
                out[b, at + 16 * s + k] = codes[b, c] | np.uint8(codes[b, c + 16] << np.uint8(4))


@kernel
def pack_integers(integers, out):
    """integers int8 [blocks, 8], -32..31, into blocks of IQ4_XS."""
    for b in range(integers.shape[0]):
        upper = np.uint32(0)
        for j in range(8):
            upper |= np.uint32(np.uint32(integers[b, j] + 32) >> np.uint32(4)) << np.uint32(2 * j)
        out[b, 2] = np.uint8(upper)
        out[b, 3] = np.uint8(upper >> np.uint32(8))
        for j in range(4):
            out[b, 4 + j] = np.uint8(((integers[b, 2 * j] + 32) & 15) | (((integers[b, 2 * j + 1] + 32) & 15) << 4))


@kernel
def _unpack_integer(data, b, j):
    """The integer of sub-block j of IQ4_XS block b, -32..31."""
    lower = np.uint32(data[b, 4 + j // 2] >> np.uint8(4 * (j % 2))) & np.uint32(15)
    upper = np.uint32(data[b, 2 + j // 4] >> np.uint8(2 * (j % 4))) & np.uint32(3)
    return np.int32(lower | (upper << np.uint32(4))) - np.int32(32)


@kernel
def unpack_integers(data, out):
    """The inverse of pack_integers: uint8 [blocks, 136] to int8 [blocks, 8]."""
    for b in range(data.shape[0]):
        for j in range(8):
            out[b, j] = np.int8(_unpack_integer(data, b, j))


@kernel
def unpack_weights(data, half, at, out):
    """Blocks to weights float32 [blocks, 32 or 256]; `half` is the float32 of every half float, by its bits.

    at: the first byte of the nibbles.
    """
    for b in range(data.shape[0]):
        d = half[np.uint32(data[b, 0]) | (np.uint32(data[b, 1]) << np.uint32(8))]
        for s in range(out.shape[1] // 32):
            step = d * np.float32(_unpack_integer(data, b, s)) if at == 8 else d
            for k in range(16):
                pair = np.int32(data[b, at + 16 * s + k])
                out[b, 32 * s + k] = step * LEVELS[pair & np.int32(15)]
                out[b, 32 * s + k + 16] = step * LEVELS[pair >> np.int32(4)]


def encode(
    name: str, x: np.ndarray, w: np.ndarray | None, level: str, out: np.ndarray, run: Callable[..., None] = call
) -> None:
    """Fill `out` [blocks, block_bytes] from float32 x [blocks, 32 or 256]; w [blocks of a row, ...] or None."""
    w = np.ones((1, x.shape[1]), np.float32) if w is None else w
    codes, integers, d = np.empty(x.shape, np.uint8), np.empty((len(x), 8), np.int8), np.empty(len(x), np.uint16)
    if name == "IQ4_NL":
        run(fit_blocks, x, w, TRIES[level], codes, d)
    else:
        run(fit_super_blocks, x, w, TRIES[level], ENDS[level], codes, integers, d)
    pack(name, codes, integers, d, out)


def decode(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` float32 [blocks, 32 or 256] from uint8 data [blocks, block_bytes]."""
    unpack_weights(data, half_table(), 2 if name == "IQ4_NL" else 8, out)


def pack(name: str, codes: np.ndarray, integers: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` uint8 [blocks, block_bytes] from codes uint8 [blocks, 32 or 256] and scales.

    d: bits of half floats, uint16 [blocks]; integers: int8 [blocks, 8] of IQ4_XS, not looked at for IQ4_NL.
    """
    out[:, :2] = d[:, None].view(np.uint8)
    if name == "IQ4_XS":
        pack_integers(integers, out)
    pack_codes(codes, 2 if name == "IQ4_NL" else 8, out)


def unpack_scales(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """d float32 [blocks] and integers int8 [blocks, 1 or 8], for 32 weights each: their product is the step."""
    d = half_table()[np.ascontiguousarray(data[:, :2]).view(np.uint16)[:, 0]]
    if name == "IQ4_NL":
        return d, np.ones((len(data), 1), np.int8)
    integers = np.empty((len(data), 8), np.int8)
    unpack_integers(data, integers)
    return d, integers
