"""The choice of scales, minima and codes for the block formats: the part of encoding that decides the error.

``fit_affine`` and ``fit_symmetric`` serve the K formats: super-blocks of 256 weights, cut into sub-blocks whose scales
are themselves stored in a few bits. ``fit_block_*`` serve the older formats (one half float, or two, for 32 weights);
``round_*`` are their quick form for weights without importance. dynq.kernels.kquants and dynq.kernels.legacy lay the
results out as GGUF has them. The search is llama.cpp's idea (``make_qkx3_quants`` and
``make_qx_quants`` in ggml-quants.c: try several roundings of the scale, solve least squares for each) with the exact
weighted error as its objective, followed by a descent over the stored numbers, which llama.cpp does not have.

GROUP super-blocks are worked on side by side: arrays are [weight in sub-block, lane], a lane is one sub-block of one
super-block (lane = sub-block * GROUP + super-block), and every inner loop runs over lanes. So the loops vectorise
without reordering any sum, and the NumPy twins in dynq.reference give the same bytes. Weights are multiplied by a
power of two per super-block, so that no sum overflows or vanishes. Helpers stay in this file because numba's cache
watches only a kernel's own file.
"""

import numpy as np

from dynq.kernels._jit import kernel

GROUP = 8  # super-blocks side by side: x and importance then take 16 KiB, half of a small L1 cache
LANES = 64  # blocks of 32 side by side
ROUNDS = 2  # descents over the stored numbers; dynq.reference does as many

U = np.uint32
ZERO = np.float32(0)
ONE = np.float32(1)
HALF = np.float32(0.5)
TWO = np.float32(2)
INFINITY = np.float32(np.inf)
TO_NORMAL = np.float32(2.0**112)  # a half float's exponent bias against a float32's


@kernel
def _half(value):
    """Bits of the half float nearest to a float32, ties to even; beyond the largest, the largest. Without branches."""
    bits = np.float32(value).view(U)
    magnitude = U(bits & U(0x7FFFFFFF))
    odd = U(U(magnitude >> U(13)) & U(1))
    normal = U(U(U(U(magnitude + U(0xFFF)) + odd) - U(0x38000000)) >> U(13))
    # below 2^-14 a half float is a multiple of 2^-24, which is what the sum with one half is rounded to
    tiny = U(np.float32(U(magnitude).view(np.float32) + HALF).view(U) - U(0x3F000000))
    result = tiny if magnitude < U(0x38800000) else normal
    result = result if result < U(0x7BFF) else U(0x7BFF)
    return np.uint16(result | U(U(bits >> U(16)) & U(0x8000)))


@kernel
def _single(bits):
    """The float32 of a finite half float's bits."""
    h = U(bits)
    magnitude = U(U(h & U(0x7FFF)) << U(13)).view(np.float32) * TO_NORMAL
    return U(np.float32(magnitude).view(U) | U(U(h & U(0x8000)) << U(16))).view(np.float32)


@kernel
def _range(x, b):
    """Smallest and largest of the 32 weights of block b, by integers of the same order: such a reduction vectorises."""
    lowest, highest = np.int32(0x7FFFFFFF), np.int32(-0x80000000)
    for i in range(32):
        bits = np.float32(x[b, i]).view(np.int32)
        key = np.int32(bits ^ np.int32(np.int32(bits >> np.int32(31)) & np.int32(0x7FFFFFFF)))
        lowest = key if key < lowest else lowest
        highest = key if key > highest else highest
    lowest = np.int32(lowest ^ np.int32(np.int32(lowest >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    highest = np.int32(highest ^ np.int32(np.int32(highest >> np.int32(31)) & np.int32(0x7FFFFFFF)))
    return lowest.view(np.float32), highest.view(np.float32)


@kernel
def _load(x, w, first, sub, X, W, unit):
    """Blocks from `first` on into X, W [sub, lanes], scaled by powers of two, left in `unit` [blocks]."""
    blocks, width = x.shape
    per_row, group = w.shape[0], unit.shape[0]
    for g in range(group):
        b = first + g
        if b >= blocks:
            unit[g] = ONE
            X[:, g::group] = ZERO
            W[:, g::group] = ONE
            continue
        largest = np.uint32(0)
        for i in range(width):
            bits = np.uint32(np.float32(x[b, i]).view(np.uint32) & np.uint32(0x7FFFFFFF))
            largest = bits if bits > largest else largest
        exponent = min(np.uint32(largest >> np.uint32(23)), np.uint32(253))
        scale = np.uint32((np.uint32(254) - exponent) << np.uint32(23)).view(np.float32)
        unit[g] = scale
        column = b % per_row
        for s in range(width // sub):
            for i in range(sub):
                X[i, s * group + g] = x[b, s * sub + i] * scale
                W[i, s * group + g] = w[column, s * sub + i]


@kernel
def _stored(value, unit):
    """A super-block's float as the decoder will see it: rounded to a half float, in the scaled world."""
    return _single(_half(value / unit)) * unit


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
        out[g] = _stored(scale, unit[g])


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
            wish = (sw[j] * sxl[j] - sx[j] * sl[j]) / determinant if determinant > ZERO else S[j]
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
        if determinant > ZERO:
            scale = (bb * ax - ab * bx) / determinant
            minimum = (ab * ax - aa * bx) / determinant
            if scale > ZERO and minimum > ZERO:
                D[g] = _stored(scale, unit[g])
                DM[g] = _stored(minimum, unit[g])
        elif aa > ZERO and bb == ZERO and ax > ZERO:
            D[g] = _stored(ax / aa, unit[g])


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
            D[g] = _stored(ax / aa, unit[g])


@kernel
def _search_affine(X, W, high, signed, tries, refinements, S, M, A):
    """Per lane: scale S and offset M (<= 0 unless `signed`) with x ~ S q + M, q in 0..high. A is scratch [10, lanes].

    Each try spreads the range over ``tries[t]`` steps instead of `high`, rounds, and solves least squares; then
    `refinements` times the best line so far gives new codes. Least squares' own gain ranks the tries.
    """
    n, lanes = X.shape
    lowest, spread, sw, sx, best = A[0], A[1], A[2], A[3], A[4]
    sl, sll, sxl = A[5], A[6], A[7]
    offset, inverse = A[8], A[9]
    for j in range(lanes):
        lowest[j] = X[0, j] if signed else ZERO
        spread[j] = X[0, j]
        sw[j] = ZERO
        sx[j] = ZERO
    for i in range(n):
        for j in range(lanes):
            value = X[i, j]
            lowest[j] = value if value < lowest[j] else lowest[j]
            spread[j] = value if value > spread[j] else spread[j]
            sw[j] += W[i, j]
            sx[j] += W[i, j] * value
    for j in range(lanes):
        spread[j] = spread[j] - lowest[j]
        S[j] = spread[j] / high
        M[j] = lowest[j]
        best[j] = -INFINITY
    for t in range(tries.shape[0] + refinements):
        if t < tries.shape[0]:
            for j in range(lanes):
                offset[j] = lowest[j]
                inverse[j] = tries[t] / spread[j] if spread[j] > ZERO else ZERO
        else:
            for j in range(lanes):
                offset[j] = M[j]
                inverse[j] = ONE / S[j] if S[j] > ZERO else ZERO
        for j in range(lanes):
            sl[j] = ZERO
            sll[j] = ZERO
            sxl[j] = ZERO
        for i in range(n):
            for j in range(lanes):
                q = np.rint((X[i, j] - offset[j]) * inverse[j])
                q = q if q > ZERO else ZERO
                q = q if q < high else high
                wq = W[i, j] * q
                sl[j] += wq
                sll[j] += wq * q
                sxl[j] += wq * X[i, j]
        for j in range(lanes):
            determinant = sw[j] * sll[j] - sl[j] * sl[j]
            scale = (sw[j] * sxl[j] - sx[j] * sl[j]) / determinant
            minimum = (sll[j] * sx[j] - sl[j] * sxl[j]) / determinant
            free = signed | (minimum <= ZERO)
            scale = scale if free else sxl[j] / sll[j]
            minimum = minimum if free else ZERO
            gain = scale * sxl[j] + minimum * sx[j]
            better = (determinant > ZERO) & (scale > ZERO) & (gain > best[j])
            best[j] = gain if better else best[j]
            S[j] = scale if better else S[j]
            M[j] = minimum if better else M[j]


@kernel
def _search_symmetric(X, W, low, high, tries, refinements, S, A):
    """Per lane: scale S with x ~ S q, q in low..high. A is scratch [5, lanes].

    Each try sends the largest |x| to -tries[t], as llama.cpp does.
    """
    n, lanes = X.shape
    largest, best, sll, sxl, inverse = A[0], A[1], A[2], A[3], A[4]
    for j in range(lanes):
        largest[j] = ZERO
        best[j] = ZERO
        S[j] = ZERO
    for i in range(n):
        for j in range(lanes):
            largest[j] = X[i, j] if abs(X[i, j]) > abs(largest[j]) else largest[j]
    for t in range(tries.shape[0] + refinements):
        if t < tries.shape[0]:
            for j in range(lanes):
                inverse[j] = -tries[t] / largest[j] if largest[j] != ZERO else ZERO
        else:
            for j in range(lanes):
                inverse[j] = ONE / S[j] if S[j] != ZERO else ZERO
        for j in range(lanes):
            sll[j] = ZERO
            sxl[j] = ZERO
        for i in range(n):
            for j in range(lanes):
                q = np.rint(X[i, j] * inverse[j])
                q = q if q > low else low
                q = q if q < high else high
                wq = W[i, j] * q
                sll[j] += wq * q
                sxl[j] += wq * X[i, j]
        for j in range(lanes):
            scale = sxl[j] / sll[j]
            gain = scale * sxl[j]
            better = (sll[j] > ZERO) & (gain > best[j])
            best[j] = gain if better else best[j]
            S[j] = scale if better else S[j]


@kernel
def _measure(X, W, low, high, S, M, E, sl, sll, sxl):
    """Round with the stored scales S and offsets M; per lane the error E and the sums that least squares needs."""
    n, lanes = X.shape
    inverse = np.empty(lanes, np.float32)
    for j in range(lanes):
        inverse[j] = ONE / S[j] if S[j] != ZERO else ZERO
        E[j] = ZERO
        sl[j] = ZERO
        sll[j] = ZERO
        sxl[j] = ZERO
    for i in range(n):
        for j in range(lanes):
            q = np.rint((X[i, j] - M[j]) * inverse[j])
            q = q if q > low else low
            q = q if q < high else high
            miss = (X[i, j] - M[j]) - q * S[j]
            wq = W[i, j] * q
            E[j] += W[i, j] * miss * miss
            sl[j] += wq
            sll[j] += wq * q
            sxl[j] += wq * X[i, j]


@kernel
def _codes(X, first, low, high, S, M, unit, Q, codes):
    """Codes, less `low` so from 0, for the stored scales and offsets: uint8, in the order of x. Q is scratch like X."""
    sub, lanes = X.shape
    group = unit.shape[0]
    inverse = np.empty(lanes, np.float32)
    for j in range(lanes):
        inverse[j] = ONE / S[j] if S[j] != ZERO else ZERO
    for i in range(sub):
        for j in range(lanes):
            q = np.rint((X[i, j] - M[j]) * inverse[j])
            q = q if q > low else low
            q = q if q < high else high
            Q[i, j] = np.uint8(np.int32(q - low))
    for g in range(min(group, codes.shape[0] - first)):
        for s in range(lanes // group):
            for i in range(sub):
                codes[first + g, s * sub + i] = Q[i, s * group + g]


@kernel
def fit_affine(x, w, sub, high, top, tries, refinements, deltas, codes, scales, mins, d, dmin):
    """Choose everything a block of Q2_K, Q4_K or Q5_K stores: w ~ d scale q - dmin min.

    x float32 [blocks, 256]; w float32 [blocks of a row, 256], the importance; sub: 16 or 32; high: largest code;
    top: largest scale and min; tries, deltas: float32, the roundings to try. Out: codes uint8 [blocks, 256];
    scales, mins uint8 [blocks, 256 / sub]; d, dmin uint16 [blocks], bits of half floats.
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
        _load(x, w, first, sub, X, W, unit)
        _search_affine(X, W, high, False, tries, refinements, S, M, A)
        for j in range(lanes):
            N[j] = -M[j]
        _level_scale(S, sw, ZERO, top, deltas, unit, D)
        _level_scale(N, sw, ZERO, top, deltas, unit, DM)
        _levels(S, D, ZERO, top, ls)
        _levels(N, DM, ZERO, top, lm)
        best[:] = INFINITY
        for r in range(ROUNDS + 1):
            for s in range(subs):
                for g in range(GROUP):
                    S[s * GROUP + g] = D[g] * ls[s * GROUP + g]
                    M[s * GROUP + g] = -(DM[g] * lm[s * GROUP + g])
            _measure(X, W, ZERO, high, S, M, E, sl, sll, sxl)
            for g in range(GROUP):
                total = ZERO
                for s in range(subs):
                    total += E[s * GROUP + g]
                if total < best[g]:
                    best[g], best_D[g], best_DM[g] = total, D[g], DM[g]
                    for s in range(subs):
                        best_ls[s * GROUP + g] = ls[s * GROUP + g]
                        best_lm[s * GROUP + g] = lm[s * GROUP + g]
            if r < ROUNDS:
                _descend_affine(top, sw, sx, sl, sll, sxl, S, ls, lm, unit, D, DM)
        for s in range(subs):
            for g in range(GROUP):
                S[s * GROUP + g] = best_D[g] * best_ls[s * GROUP + g]
                M[s * GROUP + g] = -(best_DM[g] * best_lm[s * GROUP + g])
        _codes(X, first, ZERO, high, S, M, unit, Q, codes)
        for g in range(min(GROUP, x.shape[0] - first)):
            d[first + g] = _half(best_D[g] / unit[g])
            dmin[first + g] = _half(best_DM[g] / unit[g])
            for s in range(subs):
                scales[first + g, s] = np.uint8(best_ls[s * GROUP + g])
                mins[first + g, s] = np.uint8(best_lm[s * GROUP + g])


@kernel
def fit_symmetric(x, w, low, high, bottom, top, tries, refinements, deltas, codes, scales, d):
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
        _load(x, w, first, 16, X, W, unit)
        _search_symmetric(X, W, low, high, tries, refinements, S, A)
        sw[:] = ZERO
        for i in range(16):
            for j in range(lanes):
                sw[j] += W[i, j]
        _level_scale(S, sw, bottom, top, deltas, unit, D)
        _levels(S, D, bottom, top, ls)
        best[:] = INFINITY
        for r in range(ROUNDS + 1):
            for s in range(16):
                for g in range(GROUP):
                    S[s * GROUP + g] = D[g] * ls[s * GROUP + g]
            _measure(X, W, low, high, S, M, E, sl, sll, sxl)
            for g in range(GROUP):
                total = ZERO
                for s in range(16):
                    total += E[s * GROUP + g]
                if total < best[g]:
                    best[g], best_D[g] = total, D[g]
                    for s in range(16):
                        best_ls[s * GROUP + g] = ls[s * GROUP + g]
            if r < ROUNDS:
                _descend_symmetric(bottom, top, sll, sxl, ls, unit, D)
        for s in range(16):
            for g in range(GROUP):
                S[s * GROUP + g] = best_D[g] * best_ls[s * GROUP + g]
        _codes(X, first, low, high, S, M, unit, Q, codes)
        for g in range(min(GROUP, x.shape[0] - first)):
            d[first + g] = _half(best_D[g] / unit[g])
            for s in range(16):
                scales[first + g, s] = np.int8(best_ls[s * GROUP + g])


@kernel
def fit_block_affine(x, w, high, tries, refinements, codes, d, m):
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
        _load(x, w, first, 32, X, W, unit)
        _search_affine(X, W, high, True, tries, refinements, S, M, A)
        best[:] = INFINITY
        for _ in range(ROUNDS + 1):
            for j in range(LANES):
                S[j] = _stored(S[j], unit[j])
                M[j] = _stored(M[j], unit[j])
            _measure(X, W, ZERO, high, S, M, E, sl, sll, sxl)
            for j in range(LANES):
                if E[j] < best[j]:
                    best[j], best_S[j], best_M[j] = E[j], S[j], M[j]
                determinant = sw[j] * sll[j] - sl[j] * sl[j]
                if determinant > ZERO:
                    S[j] = (sw[j] * sxl[j] - sx[j] * sl[j]) / determinant
                    M[j] = (sll[j] * sx[j] - sl[j] * sxl[j]) / determinant
        _codes(X, first, ZERO, high, best_S, best_M, unit, Q, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            d[first + j] = _half(best_S[j] / unit[j])
            m[first + j] = _half(best_M[j] / unit[j])


@kernel
def fit_block_symmetric(x, w, low, high, tries, refinements, codes, d):
    """Choose everything a block of Q4_0 or Q5_0 stores: w ~ d q, q in low..high. As fit_block_affine."""
    X = np.empty((32, LANES), np.float32)
    W = np.empty((32, LANES), np.float32)
    Q = np.empty((32, LANES), np.uint8)
    A = np.empty((5, LANES), np.float32)
    B = np.empty((9, LANES), np.float32)
    S, M, E, sl, sll, sxl, unit, best, best_S = B[0], B[1], B[2], B[3], B[4], B[5], B[6], B[7], B[8]
    M[:] = ZERO
    for first in range(0, x.shape[0], LANES):
        _load(x, w, first, 32, X, W, unit)
        _search_symmetric(X, W, low, high, tries, refinements, S, A)
        best[:] = INFINITY
        for _ in range(ROUNDS + 1):
            for j in range(LANES):
                S[j] = _stored(S[j], unit[j])
            _measure(X, W, low, high, S, M, E, sl, sll, sxl)
            for j in range(LANES):
                if E[j] < best[j]:
                    best[j], best_S[j] = E[j], S[j]
                if sll[j] > ZERO:
                    S[j] = sxl[j] / sll[j]
        _codes(X, first, low, high, best_S, M, unit, Q, codes)
        for j in range(min(LANES, x.shape[0] - first)):
            d[first + j] = _half(best_S[j] / unit[j])


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
            bits = _half(abs(largest) / high if upward else largest / low)
            d[first + j] = bits
            scale = _single(bits)
            inverse[j] = ONE / scale if scale != ZERO else ZERO
        for j in range(count):
            for i in range(32):
                q = np.rint(x[first + j, i] * inverse[j])
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
        for j in range(count):
            lowest[j], highest[j] = _range(x, first + j)
        for j in range(count):
            bits, start = _half(highest[j] / high - lowest[j] / high), _half(lowest[j])
            d[first + j] = bits
            m[first + j] = start
            scale = _single(bits)
            offset[j] = _single(start)
            inverse[j] = ONE / scale if scale != ZERO else ZERO
        for j in range(count):
            for i in range(32):
                q = np.rint((x[first + j, i] - offset[j]) * inverse[j])
                q = q if q > ZERO else ZERO
                q = q if q < high else high
                codes[first + j, i] = np.uint8(np.int32(q))
