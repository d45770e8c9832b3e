"""Blocks of one half float and few levels, as GGUF stores them: TQ1_0, TQ2_0 (-1, 0, 1), Q1_0 (-1, 1), Q2_0 (-1 .. 2).

Codes are the levels counted from 0::

    TQ1_0  54 bytes  five trits a byte 48 | four trits a byte 4 | d f16    256 weights    w = d (c - 1)
    TQ2_0  66 bytes  two-bit codes 64 | d f16                              256 weights    w = d (c - 1)
    Q1_0   18 bytes  d f16 | bits 16, bit k % 8 of byte k / 8 for w[k]     128 weights    w = d or -d
    Q2_0   18 bytes  d f16 | two-bit codes 16                               64 weights    w = d (c - 1)

TQ2_0's byte 32 h + k holds w[128 h + k] in its lowest two bits, then w[.. + 32], w[.. + 64], w[.. + 96]; Q2_0's byte k
holds w[4 k] .. w[4 k + 3] in the same way. TQ1_0's bytes are three stretches, each like this: its byte k holds
w[first + k], w[first + width + k], ..., the first as the most significant trit; (first, width, trits) are (0, 32, 5),
(160, 16, 5) and (240, 4, 4), and the missing fifth trit is 0. Of the number n so written, 0..242, the byte is
ceil(256 n / 243): multiplied by 3, what carries over the byte is the first trit, and what stays holds the next ones in
the same way.

llama.cpp (``quantize_row_tq1_0_ref``, ``quantize_row_q1_0_ref`` in ggml-quants.c) takes the largest |w| of a block for
d, for Q1_0 the mean of |w|, and no importance. Here d is the weighted least squares' solution: for Q1_0 the mean by
importance, which no search betters; for ternary levels that over the weights beyond d / 2. On level `plain` this is
iterated a few times; on level `search` all 256 sets of largest weights are compared, so d is the best there is, but for
its rounding to a half float. Q2_0 takes d of either sign; on level `search` it is searched as Q4_0 is.

Source: block_tq1_0 to block_q2_0 in llama.cpp's ggml-common.h. Decoding multiplies in gguf-py's order.
"""

import numpy as np

from dynq.kernels._jit import kernel
from dynq.kernels.fit import ONE, ZERO
from dynq.kernels.floats import get_half, half, half_table, single
from dynq.kernels.legacy import fit_block_symmetric
from dynq.kernels.plans import Plan, pairs

STEPS = 3  # of least squares; dynq.reference does as many
HALF = np.float32(0.5)
# Q2_0, a name that gguf 0.19 does not know yet: where a largest w > 0 would be sent on level `plain`, and the search
SENT = np.array([1.9, -1.9, 1], np.float32)
Q2_0 = Plan(False, 64, 64, -1, 2, tuple((s * t, 0) for s in (-1, 1) for t in (1, 1.3, 1.6, 1.9, 2.2, 2.5, 3, 4)))
# importance as integers up to FULL, and importance x |w| as well: 256 of them sum to less than 2^31
FULL = np.float32(1 << 21)


@kernel
def _unit(x, b):
    """The power of two that brings block b's largest |x| between 1 and 2, as dynq.kernels.fit.load has it."""
    largest = np.uint32(0)
    for i in range(x.shape[1]):
        bits = np.uint32(np.float32(x[b, i]).view(np.uint32) & np.uint32(0x7FFFFFFF))
        largest = bits if bits > largest else largest
    exponent = min(np.uint32(largest >> np.uint32(23)), np.uint32(253))
    scale = np.uint32((np.uint32(254) - exponent) << np.uint32(23)).view(np.float32)
    return scale, np.uint32(largest).view(np.float32) * scale


@kernel
def _beyond(a, p, v, threshold):
    """Sums of p and v over the weights whose a is above the threshold. Integers: any order gives the same."""
    above, below = np.int32(0), np.int32(0)
    for i in range(256):
        above = np.int32(above + (p[i] if a[i] > threshold else np.int32(0)))
        below = np.int32(below + (v[i] if a[i] > threshold else np.int32(0)))
    return above, below


@kernel
def iterate_scale(x, v, sums, d):
    """The scale of each ternary block, by STEPS of least squares from 1.5 times the mean of |x|.

    Or by one from the largest |x|, where that does better: so the error is never above that of llama.cpp's scale.

    x float32 [blocks, 256]; v int32 [blocks of a row, 256] of importance, up to FULL; sums: of each row of v. Out: d
    uint16 [blocks], bits of half floats.
    """
    a = np.empty(256, np.float32)
    p = np.empty(256, np.int32)
    for b in range(x.shape[0]):
        unit, largest = _unit(x, b)
        row = v[b % v.shape[0]]
        total = np.int32(0)
        for i in range(256):
            a[i] = abs(x[b, i] * unit)
            p[i] = np.int32(np.rint(np.float32(row[i]) * a[i] * HALF))
            total = np.int32(total + p[i])
        best, kept = ZERO, ZERO
        scale = np.float32(3) * np.float32(total) / sums[b % v.shape[0]]
        for step in range(STEPS + 1):
            if step == STEPS:
                scale = largest
            above, below = _beyond(a, p, row, scale * HALF)
            scale = np.float32(2) * np.float32(above) / np.float32(below)
            gain = scale * np.float32(above)
            if gain > best:
                best, kept = gain, scale
        d[b] = half(kept / unit)


@kernel
def iterate_q2_0(x, v, codes, d):
    """d of each Q2_0 block, by least squares from each place of SENT, then from the best. As iterate_scale.

    One of them is llama.cpp's scale, so the error is never above its. Out also: codes uint8 [blocks, 64].
    """
    a = np.empty(64, np.float32)
    p = np.empty(64, np.int32)
    low, high, two = np.float32(-1), np.float32(2), np.float32(2)
    for b in range(x.shape[0]):
        unit, largest = _unit(x, b)
        row = v[b % v.shape[0]]
        for i in range(64):
            a[i] = x[b, i] * unit
            p[i] = np.int32(np.rint(np.float32(row[i]) * a[i] * HALF))
        best, kept = ZERO, ONE
        for step in range(SENT.shape[0] + 1):
            inverse = SENT[step] / largest if step < SENT.shape[0] else ONE / kept
            above, below = np.int32(0), np.int32(0)
            for k in range(64):
                q = np.rint(a[k] * inverse)
                q = q if q > low else low
                q = q if q < high else high
                level = np.int32(q)
                above = np.int32(above + np.int32(p[k] * level))
                below = np.int32(below + np.int32(row[k] * np.int32(level * level)))
            scale = two * np.float32(above) / np.float32(below)
            gain = scale * np.float32(above)
            if gain > best:
                best, kept = gain, scale
        d[b] = half(kept / unit) if best > ZERO else np.uint16(0)
        stored = single(d[b])
        inverse = ONE / stored if stored != ZERO else ZERO
        for k in range(64):
            q = np.rint(x[b, k] * inverse)
            q = q if q > low else low
            q = q if q < high else high
            codes[b, k] = np.uint8(np.int32(q) + np.int32(1))


@kernel
def round_ternary(x, d, codes):
    """Codes uint8 [blocks, 256] of the levels nearest to x for the scales d."""
    for b in range(x.shape[0]):
        high = single(d[b]) * HALF
        low = -high
        for i in range(256):
            codes[b, i] = np.uint8(np.int32(x[b, i] > high) + np.int32(x[b, i] >= low))


@kernel
def fill_keys(x, v, keys):
    """Per weight |x| (its float32's bits, times the block's unit) above v: uint64 like x, which sorts by |x|."""
    for b in range(x.shape[0]):
        unit, _ = _unit(x, b)
        row = v[b % v.shape[0]]
        for i in range(256):
            bits = np.uint32(np.float32(abs(x[b, i] * unit)).view(np.uint32))
            keys[b, i] = np.uint64(np.uint64(bits) << np.uint64(32)) | np.uint64(row[i])


@kernel
def best_scale(x, keys, d):
    """The best scale of each ternary block from its sorted keys (fill_keys). As iterate_scale.

    Whatever d is, the weights that get a sign are the largest ones, so one of the 256 sets of largest weights is best.
    """
    p = np.empty(256, np.int32)
    v = np.empty(256, np.int32)
    gain = np.empty(256, np.int32)
    for b in range(keys.shape[0]):
        for i in range(256):
            v[i] = np.int32(keys[b, i] & np.uint64(0xFFFFFFFF))
            a = np.uint32(keys[b, i] >> np.uint64(32)).view(np.float32)
            p[i] = np.int32(np.rint(np.float32(v[i]) * a * HALF))
        above, below = np.int32(0), np.int32(0)
        for i in range(255, -1, -1):
            above = np.int32(above + p[i])
            below = np.int32(below + v[i])
            p[i] = above
            v[i] = below
        best = np.int32(0)
        for i in range(256):
            above_f = np.float32(p[i])
            gain[i] = np.float32(above_f * (above_f / np.float32(v[i]))).view(np.int32)
            best = gain[i] if gain[i] > best else best
        i = 255
        while gain[i] != best:
            i -= 1
        unit, _ = _unit(x, b)
        d[b] = half(np.float32(2) * np.float32(p[i]) / np.float32(v[i]) / unit)


@kernel
def mean_scale(x, w, codes, d):
    """Q1_0: codes uint8 [blocks, 128] by sign, and d the mean of |x| by importance, with which they do best."""
    for b in range(x.shape[0]):
        unit, _ = _unit(x, b)
        row = w[b % w.shape[0]]
        total, weight = ZERO, ZERO
        for i in range(128):
            total += row[i] * abs(x[b, i] * unit)
            weight += row[i]
            codes[b, i] = np.uint8(x[b, i] >= ZERO)
        d[b] = half(total / weight / unit)


@kernel
def _pack_trits(codes, b, first, at, width, trits, out):
    """One of the three stretches of block b, from byte `at` on."""
    for k in range(width):
        number = np.uint32(0)
        for t in range(5):
            trit = np.uint32(codes[b, first + t * width + k]) if t < trits else np.uint32(0)
            number = np.uint32(number * np.uint32(3) + trit)
        out[b, at + k] = np.uint8(np.uint32(number * np.uint32(256) + np.uint32(242)) // np.uint32(243))


@kernel
def pack_codes_tq1_0(codes, out):
    """codes uint8 [blocks, 256], 0..2, into blocks of TQ1_0."""
    for b in range(codes.shape[0]):
        _pack_trits(codes, b, 0, 0, 32, 5, out)
        _pack_trits(codes, b, 160, 32, 16, 5, out)
        _pack_trits(codes, b, 240, 48, 4, 4, out)


@kernel
def pack_codes_tq2_0(codes, out):
    """As pack_codes_tq1_0, for TQ2_0."""
    for b in range(codes.shape[0]):
        for h in range(2):
            for k in range(32):
                c = 128 * h + k
                upper = (codes[b, c + 64] << 4) | (codes[b, c + 96] << 6)
                out[b, 32 * h + k] = np.uint8(codes[b, c] | (codes[b, c + 32] << 2) | upper)


@kernel
def pack_codes_q1_0(codes, out):
    """As pack_codes_tq1_0, for Q1_0: codes uint8 [blocks, 128], 0 or 1."""
    for b in range(codes.shape[0]):
        for byte in range(16):
            bits = np.uint8(0)
            for k in range(8):
                bits |= np.uint8(codes[b, 8 * byte + k] << k)
            out[b, 2 + byte] = bits


@kernel
def pack_codes_q2_0(codes, out):
    """As pack_codes_tq1_0, for Q2_0: codes uint8 [blocks, 64], 0..3."""
    for b in range(codes.shape[0]):
        for k in range(16):
            upper = (codes[b, 4 * k + 2] << 4) | (codes[b, 4 * k + 3] << 6)
            out[b, 2 + k] = np.uint8(codes[b, 4 * k] | (codes[b, 4 * k + 1] << 2) | upper)


@kernel
def decode_tq1_0(data, half, out):
    """Blocks uint8 [blocks, 54] to float32 [blocks, 256]; `half` is the float32 of every half float, by its bits.

    The three stretches are written out because only literal bounds let the loops over bytes vectorise.
    """
    for b in range(data.shape[0]):
        scale = get_half(data, b, 52, half)
        for k in range(32):
            rest = np.uint32(data[b, k])
            for t in range(5):
                rest = np.uint32(rest * np.uint32(3))
                out[b, 32 * t + k] = scale * np.float32(np.int32(rest >> np.uint32(8)) - np.int32(1))
                rest = np.uint32(rest & np.uint32(255))
        for k in range(16):
            rest = np.uint32(data[b, 32 + k])
            for t in range(5):
                rest = np.uint32(rest * np.uint32(3))
                out[b, 160 + 16 * t + k] = scale * np.float32(np.int32(rest >> np.uint32(8)) - np.int32(1))
                rest = np.uint32(rest & np.uint32(255))
        for k in range(4):
            rest = np.uint32(data[b, 48 + k])
            for t in range(4):
                rest = np.uint32(rest * np.uint32(3))
                out[b, 240 + 4 * t + k] = scale * np.float32(np.int32(rest >> np.uint32(8)) - np.int32(1))
                rest = np.uint32(rest & np.uint32(255))


@kernel
def decode_tq2_0(data, half, out):
    """As decode_tq1_0, for TQ2_0."""
    for b in range(data.shape[0]):
        scale = get_half(data, b, 64, half)
        for h in range(2):
            for k in range(32):
                rest = np.int32(data[b, 32 * h + k])
                for t in range(4):
                    out[b, 128 * h + 32 * t + k] = scale * np.float32((rest & np.int32(3)) - np.int32(1))
                    rest = np.int32(rest >> np.int32(2))


@kernel
def decode_q1_0(data, half, out):
    """As decode_tq1_0, for Q1_0: float32 [blocks, 128]."""
    for b in range(data.shape[0]):
        scale = get_half(data, b, 0, half)
        for byte in range(16):
            for k in range(8):
                bit = np.uint8(data[b, 2 + byte] >> np.uint8(k)) & np.uint8(1)
                out[b, 8 * byte + k] = scale if bit else -scale


@kernel
def decode_q2_0(data, half, out):
    """As decode_tq1_0, for Q2_0: float32 [blocks, 64]."""
    for b in range(data.shape[0]):
        scale = get_half(data, b, 0, half)
        for k in range(16):
            for t in range(4):
                code = np.int32(np.uint8(data[b, 2 + k] >> np.uint8(2 * t)) & np.uint8(3))
                out[b, 4 * k + t] = scale * np.float32(code - np.int32(1))


def encode(name: str, x: np.ndarray, w: np.ndarray | None, level: str, out: np.ndarray) -> None:
    """Fill `out` [blocks, block_bytes] from float32 x [blocks, block]; w [blocks of a row, block] or None."""
    w = np.ones((1, x.shape[1]), np.float32) if w is None else w
    codes, d = np.empty(x.shape, np.uint8), np.empty(len(x), np.uint16)
    if name == "Q1_0":
        mean_scale(x, w, codes, d)
    elif name == "Q2_0" and level == "search":
        low, high = np.float32(Q2_0.low), np.float32(Q2_0.high)
        fit_block_symmetric(x, w, low, high, pairs(Q2_0.tries), pairs(Q2_0.moves), Q2_0.rounds, codes, d)
    elif name == "Q2_0":
        iterate_q2_0(x, integers(w), codes, d)
    else:
        v = integers(w)
        if level == "plain":
            iterate_scale(x, v, v.sum(axis=1).astype(np.float32), d)
        else:
            keys = np.empty(x.shape, np.uint64)
            fill_keys(x, v, keys)
            keys.sort(axis=1)
            best_scale(x, keys, d)
        round_ternary(x, d, codes)
    pack(name, codes, d, out)


def integers(w: np.ndarray) -> np.ndarray:
    """Importance float32 [blocks, block] as integers, the largest of each block as FULL: int32."""
    return np.rint(w * (FULL / w.max(axis=1, keepdims=True))).astype(np.int32)


def decode(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` float32 [blocks, block] from uint8 data [blocks, block_bytes]."""
    _DECODERS[name](data, half_table(), out)


def pack(name: str, codes: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` [blocks, block_bytes] from codes uint8 [blocks, block] and d, bits of half floats, uint16 [blocks]."""
    at = _HALF_AT[name]
    out[:, at : at + 2] = d[:, None].view(np.uint8)
    _PACKERS[name](codes, out)


def unpack_scales(name: str, data: np.ndarray) -> np.ndarray:
    """What the levels of each block are multiplied with: float32 [blocks]."""
    at = _HALF_AT[name]
    return half_table()[np.ascontiguousarray(data[:, at : at + 2]).view(np.uint16)[:, 0]]


_HALF_AT = {"TQ1_0": 52, "TQ2_0": 64, "Q1_0": 0, "Q2_0": 0}  # the first byte of a block's half float
_PACKERS = {"TQ1_0": pack_codes_tq1_0, "TQ2_0": pack_codes_tq2_0, "Q1_0": pack_codes_q1_0, "Q2_0": pack_codes_q2_0}
_DECODERS = {"TQ1_0": decode_tq1_0, "TQ2_0": decode_tq2_0, "Q1_0": decode_q1_0, "Q2_0": decode_q2_0}
