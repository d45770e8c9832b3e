"""Super-blocks of 256 weights as GGUF stores them: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

In a field of two-bit codes, byte 32 h + k (h the half of 128 weights, k in 0..31) holds four weights, 32 apart::

    bits  7 6        5 4        3 2        1 0
          w[128h     w[128h     w[128h     w[128h
           +96+k]     +64+k]     +32+k]     +k]

    Q2_K   84 bytes  scales 16 x (min : 4, scale : 4) | two-bit codes 64 | d f16 | dmin f16     w = d s q - dmin m
    Q3_K  110 bytes  third bits 32 | two-bit codes 64 | scales 12 | d f16                       w = d (s - 32) (q - 4)
    Q4_K  144 bytes  d f16 | dmin f16 | scales 12 | nibbles 128                                 w = d s q - dmin m
    Q5_K  176 bytes  d f16 | dmin f16 | scales 12 | fifth bits 32 | nibbles 128                 w = d s q - dmin m
    Q6_K  210 bytes  low nibbles 128 | upper two bits 64 | scales 16 x int8 | d f16             w = d s (q - 32)

Q3_K's third bits and Q5_K's fifth bits: bit j of byte k belongs to w[32 j + k]. Q4_K's and Q5_K's nibbles: byte
32 j + k holds w[64 j + k] below and w[64 j + 32 + k] above. Q6_K's low nibbles: byte 64 h + k holds w[128 h + k] below
and w[128 h + 64 + k] above. The twelve bytes of 6-bit scales, S[0..] being scales and M[0..] minima::

    Q4_K, Q5_K (8 + 8), j < 4                       Q3_K (16), j < 8 and i < 4
    byte j       S[j+4] upper 2 : S[j] 6            byte j       S[j+8] lower 4 : S[j] lower 4
    byte 4 + j   M[j+4] upper 2 : M[j] 6            byte 8 + i   upper 2 of S[i+12], S[i+8], S[i+4], S[i],
    byte 8 + j   M[j+4] lower 4 : S[j+4] lower 4                 from the highest bits down

After the search for each sub-block (dynq.kernels.fit) come the super-block's floats, then a descent over the stored
numbers, which llama.cpp does not have.

Source: block_q2_K to block_q6_K in llama.cpp's ggml-common.h. Decoding multiplies and subtracts in gguf-py's order.
"""

from collections.abc import Callable

import numpy as np

from dynq.kernels._jit import call, kernel
from dynq.kernels.errors import block_errors
from dynq.kernels.fit import (
    INFINITY,
    ONE,
    SINGULAR,
    TWO,
    ZERO,
    assign,
    load,
    measure,
    search_affine,
    search_symmetric,
    stored,
)
from dynq.kernels.floats import get_half, half, half_table, put_half
from dynq.kernels.plans import Plan, pairs, plan_of

GROUP = 8  # super-blocks side by side: x and importance then take 16 KiB, half of a small L1 cache


@kernel
def _level_scale(v, weight, low, high, deltas, unit, out):
    """Per super-block: the stored d that about minimises sum weight (v - d q)^2, q integers in low..high.

    v, weight [lanes], out [GROUP]. The largest |v| is sent to a few places about the end of the range (about `low`
    where that is negative, so that d's sign follows the largest, as llama.cpp has it); least squares gives each d.
    """
    subs = v.shape[0] // GROUP
    end = low if low < ZERO else high
    for g in range(GROUP):
        largest = ZERO
        for s in range(subs):
            value = v[s * GROUP + g]
            largest = value if abs(value) > abs(largest) else largest
        best = ZERO
        scale = ZERO
        if largest != ZERO:
            for t in range(deltas.shape[0]):
                inverse = (end + deltas[t]) / largest
                vq, qq = ZERO, ZERO
                for s in range(subs):
                    value = v[s * GROUP + g]
                    q = np.rint(value * inverse)
                    q = q if q > low else low
                    q = q if q < high else high
                    wq = weight[s * GROUP + g] * q
                    vq += wq * value
                    qq += wq * q
                if qq > ZERO and vq / qq * vq > best:
                    scale = vq / qq
                    best = scale * vq
        out[g] = stored(scale, unit[g])


@kernel
def _levels(v, d, low, high, out):
    """The integers in low..high nearest to v / d; 0 where d is 0."""
    for s in range(v.shape[0] // GROUP):
        for g in range(GROUP):
            q = np.rint(v[s * GROUP + g] / d[g]) if d[g] != ZERO else ZERO
            q = q if q > low else low
            out[s * GROUP + g] = q if q < high else high


@kernel
def _descend_affine(top, sw, sx, sl, sll, sxl, S, ls, lm, unit, D, DM):
    """Codes fixed, improve the stored numbers: per sub-block the best (scale, min), then the best (D, DM) of all."""
    subs = ls.shape[0] // GROUP
    for s in range(subs):
        for g in range(GROUP):
            j = s * GROUP + g
            determinant = sw[j] * sll[j] - sl[j] * sl[j]
            wish = (sw[j] * sxl[j] - sx[j] * sl[j]) / determinant if determinant > SINGULAR * sw[j] * sll[j] else S[j]
            middle = np.rint(wish / D[g]) if D[g] > ZERO else ZERO
            least = INFINITY
            for step in (-ONE, ZERO, ONE):
                level = middle + step
                level = level if level > ZERO else ZERO
                level = level if level < top else top
                scale = D[g] * level
                low = np.rint((scale * sl[j] - sx[j]) / sw[j] / DM[g]) if DM[g] > ZERO else ZERO
                low = low if low > ZERO else ZERO
                low = low if low < top else top
                offset = -(DM[g] * low)
                error = scale * (scale * sll[j] + TWO * (offset * sl[j] - sxl[j])) + offset * (
                    offset * sw[j] - TWO * sx[j]
                )
                if error < least:
                    least, ls[j], lm[j] = error, level, low
    for g in range(GROUP):
        aa, ab, bb, ax, bx = ZERO, ZERO, ZERO, ZERO, ZERO
        for s in range(subs):
            j = s * GROUP + g
            aa += ls[j] * ls[j] * sll[j]
            ab += ls[j] * lm[j] * sl[j]
            bb += lm[j] * lm[j] * sw[j]
            ax += ls[j] * sxl[j]
            bx += lm[j] * sx[j]
        determinant = aa * bb - ab * ab
        if determinant > SINGULAR * aa * bb:
            scale = (bb * ax - ab * bx) / determinant
            minimum = (ab * ax - aa * bx) / determinant
            if scale > ZERO and minimum > ZERO:
                D[g] = stored(scale, unit[g])
                DM[g] = stored(minimum, unit[g])
        elif aa > ZERO and bb == ZERO and ax > ZERO:
            D[g] = stored(ax / aa, unit[g])


@kernel
def _descend_symmetric(bottom, top, sll, sxl, ls, unit, D):
    """Codes fixed, improve the stored numbers: per sub-block the best scale, then the best D of all."""
    subs = ls.shape[0] // GROUP
    for g in range(GROUP):
        aa, ax = ZERO, ZERO
        for s in range(subs):
            j = s * GROUP + g
            if sll[j] > ZERO and D[g] != ZERO:
                level = np.rint(sxl[j] / sll[j] / D[g])
                level = level if level > bottom else bottom
                ls[j] = level if level < top else top
            aa += ls[j] * ls[j] * sll[j]
            ax += ls[j] * sxl[j]
        if aa > ZERO:
            D[g] = stored(ax / aa, unit[g])


@kernel
def fit_affine(x, w, sub, high, top, tries, moves, rounds, deltas, codes, scales, mins, d, dmin):
    """Choose everything a block of Q2_K, Q4_K or Q5_K stores: w ~ d scale q - dmin min.

    x float32 [blocks, 256]; w float32 [blocks of a row, 256], the importance; sub: 16 or 32; high: largest code; top:
    largest scale and min; tries, moves float32 [n, 2], rounds, deltas float32 [n]: those of dynq.kernels.plans. Out:
    codes uint8 [blocks, 256]; scales, mins uint8 [blocks, 256 / sub]; d, dmin uint16 [blocks], bits of half floats.
    """
    subs = 256 // sub
    lanes = subs * GROUP
    X = np.empty((sub, lanes), np.float32)
    W = np.empty((sub, lanes), np.float32)
    Q = np.empty((sub, lanes), np.uint8)
    A = np.empty((10, lanes), np.float32)
    B = np.empty((11, lanes), np.float32)
    S, M, E, sl, sll, sxl, N = B[0], B[1], B[2], B[3], B[4], B[5], B[6]
    ls, lm, best_ls, best_lm = B[7], B[8], B[9], B[10]
    sw, sx = A[2], A[3]
    C = np.empty((6, GROUP), np.float32)
    unit, D, DM, best, best_D, best_DM = C[0], C[1], C[2], C[3], C[4], C[5]
    for first in range(0, x.shape[0], GROUP):
        load(x, w, first, sub, X, W, unit)
        search_affine(X, W, high, False, tries, moves, S, M, A)
        for j in range(lanes):
            N[j] = -M[j]
        _level_scale(S, sw, ZERO, top, deltas, unit, D)
        _level_scale(N, sw, ZERO, top, deltas, unit, DM)
        _levels(S, D, ZERO, top, ls)
        _levels(N, DM, ZERO, top, lm)
        best[:] = INFINITY
        for r in range(rounds + 1):
            for s in range(subs):
                for g in range(GROUP):
                    S[s * GROUP + g] = D[g] * ls[s * GROUP + g]
                    M[s * GROUP + g] = -(DM[g] * lm[s * GROUP + g])
            measure(X, W, ZERO, high, S, M, E, sl, sll, sxl)
            for g in range(GROUP):
                total = ZERO
                for s in range(subs):
                    total += E[s * GROUP + g]
                if total < best[g]:
                    best[g], best_D[g], best_DM[g] = total, D[g], DM[g]
                    for s in range(subs):
                        best_ls[s * GROUP + g] = ls[s * GROUP + g]
                        best_lm[s * GROUP + g] = lm[s * GROUP + g]
            if r < rounds:
                _descend_affine(top, sw, sx, sl, sll, sxl, S, ls, lm, unit, D, DM)
        for s in range(subs):
            for g in range(GROUP):
                S[s * GROUP + g] = best_D[g] * best_ls[s * GROUP + g]
                M[s * GROUP + g] = -(best_DM[g] * best_lm[s * GROUP + g])
        assign(X, first, ZERO, high, S, M, unit, Q, codes)
        for g in range(min(GROUP, x.shape[0] - first)):
            d[first + g] = half(best_D[g] / unit[g])
            dmin[first + g] = half(best_DM[g] / unit[g])
            for s in range(subs):
                scales[first + g, s] = np.uint8(best_ls[s * GROUP + g])
                mins[first + g, s] = np.uint8(best_lm[s * GROUP + g])


@kernel
def fit_symmetric(x, w, low, high, bottom, top, tries, moves, rounds, deltas, codes, scales, d):
    """Choose everything a block of Q3_K or Q6_K stores: w ~ d scale q with q in low..high and scale in bottom..top.

    As fit_affine; scales int8 [blocks, 16] (sub-blocks of 16); codes are stored less `low`, so from 0.
    """
    lanes = 16 * GROUP
    X = np.empty((16, lanes), np.float32)
    W = np.empty((16, lanes), np.float32)
    Q = np.empty((16, lanes), np.uint8)
    A = np.empty((5, lanes), np.float32)
    B = np.empty((9, lanes), np.float32)
    S, M, E, sl, sll, sxl, ls, best_ls, sw = B[0], B[1], B[2], B[3], B[4], B[5], B[6], B[7], B[8]
    M[:] = ZERO
    C = np.empty((4, GROUP), np.float32)
    unit, D, best, best_D = C[0], C[1], C[2], C[3]
    for first in range(0, x.shape[0], GROUP):
        load(x, w, first, 16, X, W, unit)
        search_symmetric(X, W, low, high, tries, moves, S, A)
        sw[:] = ZERO
        for i in range(16):
            for j in range(lanes):
                sw[j] += W[i, j]
        _level_scale(S, sw, bottom, top, deltas, unit, D)
        _levels(S, D, bottom, top, ls)
        best[:] = INFINITY
        for r in range(rounds + 1):
            for s in range(16):
                for g in range(GROUP):
                    S[s * GROUP + g] = D[g] * ls[s * GROUP + g]
            measure(X, W, low, high, S, M, E, sl, sll, sxl)
            for g in range(GROUP):
                total = ZERO
                for s in range(16):
                    total += E[s * GROUP + g]
                if total < best[g]:
                    best[g], best_D[g] = total, D[g]
                    for s in range(16):
                        best_ls[s * GROUP + g] = ls[s * GROUP + g]
            if r < rounds:
                _descend_symmetric(bottom, top, sll, sxl, ls, unit, D)
        for s in range(16):
            for g in range(GROUP):
                S[s * GROUP + g] = best_D[g] * best_ls[s * GROUP + g]
        assign(X, first, low, high, S, M, unit, Q, codes)
        for g in range(min(GROUP, x.shape[0] - first)):
            d[first + g] = half(best_D[g] / unit[g])
            for s in range(16):
                scales[first + g, s] = np.int8(best_ls[s * GROUP + g])


@kernel
def pack_q2_k(codes, scales, mins, d, dmin, out):
    """codes uint8 [blocks, 256] in 0..3; scales, mins uint8 [blocks, 16] in 0..15; d, dmin uint16; out [blocks, 84]."""
    for b in range(codes.shape[0]):
        for s in range(16):
            out[b, s] = scales[b, s] | np.uint8(mins[b, s] << 4)
        for h in range(2):
            for k in range(32):
                c = 128 * h + k
                upper = (codes[b, c + 64] << 4) | (codes[b, c + 96] << 6)
                out[b, 16 + 32 * h + k] = np.uint8(codes[b, c] | (codes[b, c + 32] << 2) | upper)
        put_half(d[b], out, b, 80)
        put_half(dmin[b], out, b, 82)


@kernel
def pack_q3_k(codes, scales, d, out):
    """codes uint8 [blocks, 256] in 0..7 (q + 4); scales int8 [blocks, 16] in -32..31; d uint16; out [blocks, 110]."""
    for b in range(codes.shape[0]):
        for k in range(32):
            bits = np.uint8(0)
            for j in range(8):
                bits |= np.uint8((codes[b, 32 * j + k] >> 2) << j)
            out[b, k] = bits
        for h in range(2):
            for k in range(32):
                c = 128 * h + k
                upper = ((codes[b, c + 64] & 3) << 4) | ((codes[b, c + 96] & 3) << 6)
                out[b, 32 + 32 * h + k] = np.uint8((codes[b, c] & 3) | ((codes[b, c + 32] & 3) << 2) | upper)
        for j in range(8):
            out[b, 96 + j] = np.uint8(((scales[b, j] + 32) & 15) | (((scales[b, j + 8] + 32) & 15) << 4))
        for j in range(4):
            bits = np.uint8(0)
            for i in range(4):
                bits |= np.uint8(((scales[b, 4 * i + j] + 32) >> 4) << (2 * i))
            out[b, 104 + j] = bits
        put_half(d[b], out, b, 108)


@kernel
def pack_q45_k(codes, scales, mins, d, dmin, five, out):
    """codes uint8 [blocks, 256]; scales, mins uint8 [blocks, 8] in 0..63; out [blocks, 144], or 176 with fifth bits."""
    for b in range(codes.shape[0]):
        put_half(d[b], out, b, 0)
        put_half(dmin[b], out, b, 2)
        for j in range(4):
            out[b, 4 + j] = np.uint8(scales[b, j] | ((scales[b, j + 4] >> 4) << 6))
            out[b, 8 + j] = np.uint8(mins[b, j] | ((mins[b, j + 4] >> 4) << 6))
            out[b, 12 + j] = np.uint8((scales[b, j + 4] & 15) | ((mins[b, j + 4] & 15) << 4))
        at = 16
        if five:
            for k in range(32):
                bits = np.uint8(0)
                for j in range(8):
                    bits |= np.uint8((codes[b, 32 * j + k] >> 4) << j)
                out[b, 16 + k] = bits
            at = 48
        for j in range(4):
            for k in range(32):
                c = 64 * j + k
                out[b, at + 32 * j + k] = np.uint8((codes[b, c] & 15) | ((codes[b, c + 32] & 15) << 4))


@kernel
def pack_q6_k(codes, scales, d, out):
    """codes uint8 [blocks, 256] in 0..63 (q + 32); scales int8 [blocks, 16]; d uint16 [blocks]; out [blocks, 210]."""
    for b in range(codes.shape[0]):
        for h in range(2):
            for k in range(64):
                c = 128 * h + k
                out[b, 64 * h + k] = np.uint8((codes[b, c] & 15) | ((codes[b, c + 64] & 15) << 4))
            for k in range(32):
                c = 128 * h + k
                upper = ((codes[b, c + 64] >> 4) << 4) | ((codes[b, c + 96] >> 4) << 6)
                out[b, 128 + 32 * h + k] = np.uint8((codes[b, c] >> 4) | ((codes[b, c + 32] >> 4) << 2) | upper)
        for s in range(16):
            out[b, 192 + s] = np.uint8(scales[b, s])
        put_half(d[b], out, b, 208)


@kernel
def decode_q2_k(data, half, out):
    """Blocks uint8 [blocks, 84] to float32 [blocks, 256]; `half` is the float32 of every half float, by its bits.

    First all codes, in loops of 32 bytes, then all products. The counts come from `out`: a loop of a known 16 is
    unrolled, and then not vectorised.
    """
    codes = np.empty(256, np.uint8)
    n, sub = out.shape[1] // 8, out.shape[1] // 16
    for b in range(data.shape[0]):
        d, dmin = get_half(data, b, 80, half), get_half(data, b, 82, half)
        for c in (0, 128):
            at = 16 + c // 4
            for k in range(n):
                four = data[b, at + k]
                codes[c + k] = four & np.uint8(3)
                codes[c + k + 32] = (four >> np.uint8(2)) & np.uint8(3)
                codes[c + k + 64] = (four >> np.uint8(4)) & np.uint8(3)
                codes[c + k + 96] = four >> np.uint8(6)
        for s in range(16):
            scale = d * np.float32(data[b, s] & np.uint8(15))
            offset = dmin * np.float32(data[b, s] >> np.uint8(4))
            for k in range(sub):
                out[b, 16 * s + k] = scale * np.float32(np.int32(codes[16 * s + k])) - offset


@kernel
def decode_q3_k(data, half, out):
    """As decode_q2_k, for Q3_K."""
    codes = np.empty(256, np.uint8)
    n, sub = out.shape[1] // 8, out.shape[1] // 16
    for b in range(data.shape[0]):
        d = get_half(data, b, 108, half)
        for h in range(2):
            at, c = 32 + 32 * h, 128 * h
            for k in range(n):
                four = data[b, at + k]
                third = data[b, k] >> np.uint8(4 * h)
                codes[c + k] = (four & np.uint8(3)) | ((third & np.uint8(1)) << np.uint8(2))
                codes[c + k + 32] = ((four >> np.uint8(2)) & np.uint8(3)) | ((third & np.uint8(2)) << np.uint8(1))
                codes[c + k + 64] = ((four >> np.uint8(4)) & np.uint8(3)) | (third & np.uint8(4))
                codes[c + k + 96] = (four >> np.uint8(6)) | ((third & np.uint8(8)) >> np.uint8(1))
        for s in range(16):
            lower = (data[b, 96 + s % 8] >> (4 * (s // 8))) & 15
            upper = (data[b, 104 + s % 4] >> (2 * (s // 4))) & 3
            scale = d * np.float32(np.int32(lower | (upper << 4)) - np.int32(32))
            for k in range(sub):
                out[b, 16 * s + k] = scale * np.float32(np.int32(np.int32(codes[16 * s + k]) - np.int32(4)))


@kernel
def decode_q45_k(data, half, five, out):
    """As decode_q2_k, for Q4_K, or for Q5_K where `five`."""
    start = 48 if five else 16
    for b in range(data.shape[0]):
        d, dmin = get_half(data, b, 0, half), get_half(data, b, 2, half)
        for s in range(8):
            if s < 4:
                scale, minimum = data[b, 4 + s] & 63, data[b, 8 + s] & 63
            else:
                scale = (data[b, 8 + s] & 15) | ((data[b, s] >> 6) << 4)
                minimum = (data[b, 8 + s] >> 4) | ((data[b, 4 + s] >> 6) << 4)
            step, offset = d * np.float32(scale), dmin * np.float32(minimum)
            at, shift, bit = start + 32 * (s // 2), np.uint8(4 * (s % 2)), np.uint8(s)
            if five:
                for k in range(32):
                    code = np.int32(np.uint8(data[b, at + k] >> shift) & np.uint8(15))
                    fifth = np.int32(np.uint8(data[b, 16 + k] >> bit) & np.uint8(1))
                    out[b, 32 * s + k] = step * np.float32(code + fifth * np.int32(16)) - offset
            else:
                for k in range(32):
                    code = np.int32(np.uint8(data[b, at + k] >> shift) & np.uint8(15))
                    out[b, 32 * s + k] = step * np.float32(code) - offset


@kernel
def decode_q6_k(data, half, out):
    """As decode_q2_k, for Q6_K."""
    codes = np.empty(256, np.uint8)
    n, sub = out.shape[1] // 8, out.shape[1] // 16
    for b in range(data.shape[0]):
        d = get_half(data, b, 208, half)
        for h in range(2):
            low, at, c = 64 * h, 128 + 32 * h, 128 * h
            for k in range(n):
                pair, other, upper = data[b, low + k], data[b, low + k + 32], data[b, at + k]
                codes[c + k] = (pair & np.uint8(15)) | ((upper & np.uint8(3)) << np.uint8(4))
                codes[c + k + 32] = (other & np.uint8(15)) | ((upper & np.uint8(12)) << np.uint8(2))
                codes[c + k + 64] = (pair >> np.uint8(4)) | (upper & np.uint8(48))
                codes[c + k + 96] = (other >> np.uint8(4)) | ((upper & np.uint8(192)) >> np.uint8(2))
        for s in range(16):
            scale = d * np.float32(np.int8(data[b, 192 + s]))
            for k in range(sub):
                out[b, 16 * s + k] = scale * np.float32(np.int32(np.int32(codes[16 * s + k]) - np.int32(32)))


def encode(
    name: str, x: np.ndarray, w: np.ndarray | None, level: str, out: np.ndarray, run: Callable[..., None] = call
) -> None:
    """Fill `out` [blocks, block_bytes] from float32 x [blocks, 256]; w [blocks of a row, 256] or None.

    Better lines of the sub-blocks need not be better ones once their scales share a float: on level `search` every
    block keeps what `plain` makes of it where that errs less.
    """
    weight = np.ones((1, 256), np.float32) if w is None else w
    _encode(name, x, weight, plan_of(name, level, w is not None), out, run)
    if level == "search":
        plain, decoded = np.empty_like(out), np.empty_like(x)
        _encode(name, x, weight, plan_of(name, "plain", w is not None), plain, run)
        ours, theirs = np.empty((2, len(x)))
        for data, errors in ((out, ours), (plain, theirs)):
            decode(name, data, decoded)
            block_errors(x, weight, decoded, errors)
        out[theirs < ours] = plain[theirs < ours]


def _encode(name: str, x: np.ndarray, w: np.ndarray, plan: Plan, out: np.ndarray, run: Callable[..., None]) -> None:
    codes = np.empty(x.shape, np.uint8)
    d, m = np.empty((2, x.shape[0]), np.uint16)
    low, high, bottom, top = (np.float32(v) for v in (plan.low, plan.high, plan.bottom, plan.top))
    search = pairs(plan.tries), pairs(plan.moves), plan.rounds, np.array(plan.deltas, np.float32)
    if plan.affine:
        scales, mins = np.empty((2, x.shape[0], 256 // plan.sub), np.uint8)
        run(fit_affine, x, w, plan.sub, high, top, *search, codes, scales, mins, d, m)
        if name == "Q2_K":
            pack_q2_k(codes, scales, mins, d, m, out)
        else:
            pack_q45_k(codes, scales, mins, d, m, name == "Q5_K", out)
    else:
        levels = np.empty((x.shape[0], 16), np.int8)
        run(fit_symmetric, x, w, low, high, bottom, top, *search, codes, levels, d)
        (pack_q3_k if name == "Q3_K" else pack_q6_k)(codes, levels, d, out)


def decode(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` float32 [blocks, 256] from uint8 data [blocks, block_bytes]."""
    if name in ("Q4_K", "Q5_K"):
        decode_q45_k(data, half_table(), name == "Q5_K", out)
    else:
        {"Q2_K": decode_q2_k, "Q3_K": decode_q3_k, "Q6_K": decode_q6_k}[name](data, half_table(), out)
