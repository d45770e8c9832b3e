"""Blocks of 32 weights as GGUF stores them: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Half floats are little-endian; byte k of a nibble field holds weight k below and weight k + 16 above::

    Q4_0  18 bytes   d f16 | 16 x (w[k+16] : 4, w[k] : 4)                      w = d (q - 8)
    Q4_1  20 bytes   d f16 | m f16 | 16 nibble pairs                           w = d q + m
    Q5_0  22 bytes   d f16 | fifth bits, bit k of 32 for w[k] | nibble pairs   w = d (q - 16)
    Q5_1  24 bytes   d f16 | m f16 | fifth bits | nibble pairs                 w = d q + m
    Q8_0  34 bytes   d f16 | 32 x int8                                         w = d q

Without importance the range of a block, or its largest weight, decides the scale, as llama.cpp has it; with importance,
and on level `search`, scales are searched (dynq.kernels.fit).

Source: block_q4_0 to block_q8_0 in llama.cpp's ggml-common.h. Decoding multiplies and adds in gguf-py's order.
"""

from collections.abc import Callable

import numpy as np

from dynq.kernels._jit import call, kernel
from dynq.kernels.fit import (
    INFINITY,
    ONE,
    SINGULAR,
    ZERO,
    assign,
    load,
    measure,
    search_affine,
    search_symmetric,
    stored,
)
from dynq.kernels.floats import half, half_table, single
from dynq.kernels.plans import pairs, plan_of

LANES = 64  # blocks side by side
BIT = (np.uint32(1) << np.arange(32, dtype=np.uint32)).view(np.int32)


@kernel
def _range(x, b):
    """Smallest and largest of the 32 weights of block b, by integers of the same order: such a reduction vectorises.

    Here as below counts come from an array's shape: a loop of few known steps is unrolled, and then not vectorised.
    """
    lowest, highest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(x.shape[1]):
        bits = np.float32(x[b, i]).view(np.int32)
        key = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        lowest = key if key < lowest else lowest
        highest = key if key > highest else highest
    lowest = np.int32(lowest ^ np.int32(np.int32(lowest >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    highest = np.int32(highest ^ np.int32(np.int32(highest >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return lowest.view(np.float32), highest.view(np.float32)


@kernel
def fit_block_affine(x, w, high, tries, moves, rounds, codes, d, m):
    """Choose everything a block of Q4_1 or Q5_1 stores: w ~ d q + m.

    x float32 [blocks, 32]; w float32 [blocks of a row, 32]. Out: codes uint8 [blocks, 32]; d, m uint16 [blocks].
    """
    X = np.empty((32, LANES), np.float32)
    W = np.empty((32, LANES), np.float32)
    Q = np.empty((32, LANES), np.uint8)
    A = np.empty((10, LANES), np.float32)
    B = np.empty((10, LANES), np.float32)
    S, M, E, sl, sll, sxl, unit, best, best_S, best_M = B[0], B[1], B[2], B[3], B[4], B[5], B[6], B[7], B[8], B[9]
    sw, sx = A[2], A[3]
    for first in range(0, x.shape[0], LANES):
        load(x, w, first, 32, X, W, unit)
        search_affine(X, W, high, True, tries, moves, S, M, A)
        best[:] = INFINITY
        for _ in range(rounds + 1):
            for j in range(LANES):
                S[j] = stored(S[j], unit[j])
                M[j] = stored(M[j], unit[j])
            measure(X, W, ZERO, high, S, M, E, sl, sll, sxl)
            for j in range(LANES):
                if E[j] < best[j]:
                    best[j], best_S[j], best_M[j] = E[j], S[j], M[j]
                determinant = sw[j] * sll[j] - sl[j] * sl[j]
                if determinant > SINGULAR * sw[j] * sll[j]:
                    S[j] = (sw[j] * sxl[j] - sx[j] * sl[j]) / determinant
                    M[j] = (sll[j] * sx[j] - sl[j] * sxl[j]) / determinant
        assign(X, first, ZERO, high, best_S, best_M, unit, Q, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            d[first + j] = half(best_S[j] / unit[j])
            m[first + j] = half(best_M[j] / unit[j])


@kernel
def fit_block_symmetric(x, w, low, high, tries, moves, rounds, codes, d):
    """Choose everything a block of Q4_0 or Q5_0 stores: w ~ d q, q in low..high. As fit_block_affine, of any width."""
    width = x.shape[1]
    X = np.empty((width, LANES), np.float32)
    W = np.empty((width, LANES), np.float32)
    Q = np.empty((width, LANES), np.uint8)
    A = np.empty((5, LANES), np.float32)
    B = np.empty((9, LANES), np.float32)
    S, M, E, sl, sll, sxl, unit, best, best_S = B[0], B[1], B[2], B[3], B[4], B[5], B[6], B[7], B[8]
    M[:] = ZERO
    for first in range(0, x.shape[0], LANES):
        load(x, w, first, width, X, W, unit)
        search_symmetric(X, W, low, high, tries, moves, S, A)
        best[:] = INFINITY
        for _ in range(rounds + 1):
            for j in range(LANES):
                S[j] = stored(S[j], unit[j])
            measure(X, W, low, high, S, M, E, sl, sll, sxl)
            for j in range(LANES):
                if E[j] < best[j]:
                    best[j], best_S[j] = E[j], S[j]
                if sll[j] > ZERO:
                    S[j] = sxl[j] / sll[j]
        assign(X, first, low, high, best_S, M, unit, Q, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            d[first + j] = half(best_S[j] / unit[j])


@kernel
def round_symmetric(x, low, high, upward, codes, d):
    """Send the largest |w| of each block to `low` and round: Q4_0 and Q5_0 without importance, as llama.cpp does.

    With `upward` its magnitude is sent to `high`, so that both signs fit: Q8_0.

    x float32 [blocks, 32]. Out: codes uint8 [blocks, 32], less `low`; d uint16 [blocks].
    """
    A = np.empty((3, LANES), np.float32)
    lowest, highest, inverse = A[0], A[1], A[2]
    for first in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - first)
        for j in range(count):
            lowest[j], highest[j] = _range(x, first + j)
            if -lowest[j] == highest[j] > ZERO:  # both signs: follow the first, as llama.cpp does
                i = 0
                while abs(x[first + j, i]) != highest[j]:
                    i += 1
                if x[first + j, i] > ZERO:
                    lowest[j] = ZERO
        for j in range(count):
            largest = highest[j] if highest[j] > -lowest[j] else lowest[j]
            bits = half(abs(largest) / high if upward else largest / low)
            d[first + j] = bits
            scale = single(bits)
            inverse[j] = ONE / scale if scale != ZERO else ZERO
        for j in range(count):
            factor = inverse[j]
            for i in range(x.shape[1]):
                q = np.rint(x[first + j, i] * factor)
                q = q if q > low else low
                q = q if q < high else high
                codes[first + j, i] = np.uint8(np.int32(q - low))


@kernel
def round_affine(x, high, codes, d, m):
    """Spread each block's range over 0..high and round: Q4_1, Q5_1 without importance. As round_symmetric."""
    A = np.empty((4, LANES), np.float32)
    lowest, highest, inverse, offset = A[0], A[1], A[2], A[3]
    for first in range(0, x.shape[0], LANES):
        count = min(LANES, x.shape[0] - first)
        scales, starts = d[first : first + count], m[first : first + count]
        for j in range(count):
            lowest[j], highest[j] = _range(x, first + j)
        for j in range(count):
            bits, lower = half(highest[j] / high - lowest[j] / high), half(lowest[j])
            scales[j] = bits
            starts[j] = lower
            scale = single(bits)
            offset[j] = single(lower)
            inverse[j] = ONE / scale if scale != ZERO else ZERO
        for j in range(count):
            start, factor = offset[j], inverse[j]
            for i in range(x.shape[1]):
                q = np.rint((x[first + j, i] - start) * factor)
                q = q if q > ZERO else ZERO
                q = q if q < high else high
                codes[first + j, i] = np.uint8(np.int32(q))


@kernel
def pack(codes, d, m, affine, five, out):
    """Codes from 0 (uint8 [blocks, 32]) and half floats (uint16 [blocks]) to Q4_0 .. Q5_1 blocks in `out`."""
    n = codes.shape[1] // 2
    for b in range(codes.shape[0]):
        out[b, 0] = np.uint8(d[b])
        out[b, 1] = np.uint8(d[b] >> 8)
        at = 2
        if affine:
            out[b, 2] = np.uint8(m[b])
            out[b, 3] = np.uint8(m[b] >> 8)
            at = 4
        if five:
            fifth = np.uint32(0)
            for k in range(codes.shape[1]):
                fifth |= np.uint32(np.uint32(codes[b, k] >> np.uint8(4)) << np.uint32(k))
            for byte in range(4):
                out[b, at + byte] = np.uint8(fifth >> np.uint32(8 * byte))
            at += 4
        for k in range(n):
            out[b, at + k] = np.uint8((codes[b, k] & np.uint8(15)) | (codes[b, k + 16] << np.uint8(4)))


@kernel
def pack_q8_0(codes, d, out):
    """Codes from 0 (q + 128) and half floats to Q8_0 blocks."""
    for b in range(codes.shape[0]):
        out[b, 0] = np.uint8(d[b])
        out[b, 1] = np.uint8(d[b] >> 8)
        for k in range(codes.shape[1]):
            out[b, 2 + k] = codes[b, k] ^ np.uint8(128)


@kernel
def decode_nibbles(data, half, affine, five, out):
    """Blocks uint8 [blocks, bytes] to float32 [blocks, 32]; `half` is the float32 of every half float, by its bits."""
    low = np.int32(0 if affine else (16 if five else 8))
    n = out.shape[1] // 2
    for b in range(data.shape[0]):
        d = half[np.uint32(data[b, 0]) | (np.uint32(data[b, 1]) << np.uint32(8))]
        at = 2
        m = np.float32(0)
        if affine:
            m = half[np.uint32(data[b, 2]) | (np.uint32(data[b, 3]) << np.uint32(8))]
            at = 4
        fifth = np.int32(0)
        if five:
            for byte in range(4):
                fifth |= np.int32(data[b, at + byte]) << np.int32(8 * byte)
            at += 4
        for k in range(n):
            pair = np.int32(data[b, at + k])
            below = (pair & np.int32(15)) | (np.int32(16) if fifth & BIT[k] else np.int32(0))
            above = (pair >> np.int32(4)) | (np.int32(16) if fifth & BIT[k + 16] else np.int32(0))
            first, second = d * np.float32(np.int32(below - low)), d * np.float32(np.int32(above - low))
            out[b, k] = first + m if affine else first
            out[b, k + 16] = second + m if affine else second


@kernel
def decode_q8_0(data, half, out):
    """As decode_nibbles, for Q8_0."""
    for b in range(data.shape[0]):
        d = half[np.uint32(data[b, 0]) | (np.uint32(data[b, 1]) << np.uint32(8))]
        for k in range(out.shape[1]):
            out[b, k] = np.float32(np.int32(np.int8(data[b, 2 + k]))) * d


def encode(
    name: str, x: np.ndarray, w: np.ndarray | None, level: str, out: np.ndarray, run: Callable[..., None] = call
) -> None:
    """Fill `out` [blocks, block_bytes] from float32 x [blocks, 32]; w [blocks of a row, 32] or None."""
    plan = plan_of(name, level, w is not None)
    codes = np.empty(x.shape, np.uint8)
    d, m = np.empty((2, x.shape[0]), np.uint16)
    low, high = np.float32(plan.low), np.float32(plan.high)
    if name == "Q8_0" or (w is None and level == "plain"):
        if plan.affine:
            round_affine(x, high, codes, d, m)
        else:
            round_symmetric(x, low, high, name == "Q8_0", codes, d)
    else:
        w = np.ones((1, 32), np.float32) if w is None else w
        search = pairs(plan.tries), pairs(plan.moves), plan.rounds
        if plan.affine:
            run(fit_block_affine, x, w, high, *search, codes, d, m)
        else:
            run(fit_block_symmetric, x, w, low, high, *search, codes, d)
    if name == "Q8_0":
        pack_q8_0(codes, d, out)
    else:
        pack(codes, d, m, plan.affine, name[1] == "5", out)


def decode(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` float32 [blocks, 32] from uint8 data [blocks, block_bytes]."""
    if name == "Q8_0":
        decode_q8_0(data, half_table(), out)
    else:
        decode_nibbles(data, half_table(), name[3] == "1", name[1] == "5", out)
