"""What the searches of all scalar formats share: loading blocks, trying scales, measuring, assigning codes.

The search is llama.cpp's idea (``make_qkx3_quants`` and ``make_qx_quants`` in ggml-quants.c: try several roundings of
the scale, solve least squares for each) with the exact weighted error as its objective.

Blocks are worked on side by side: arrays are [weight in sub-block, lane], a lane is one sub-block of one block (lane =
sub-block * group + block), and every inner loop runs over lanes. So the loops vectorise without reordering any sum,
and the NumPy twins in dynq.reference give the same bytes. Weights are multiplied by a power of two per block, so that
no sum overflows or vanishes.
"""

import numpy as np

from dynq.kernels._jit import kernel
from dynq.kernels.floats import half, single

ZERO = np.float32(0)
ONE = np.float32(1)
TWO = np.float32(2)
INFINITY = np.float32(np.inf)
# Least determinant of a least squares problem, of the product it is a difference of: float32 sums have no more digits,
# and where all codes are equal (a constant block) what remains is noise.
SINGULAR = np.float32(4e-6)


@kernel
def load(x, w, first, sub, X, W, unit):
    """Blocks from `first` on into X, W [sub, lanes], scaled by powers of two, left in `unit` [blocks in a group]."""
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
        for s in range(width // sub):
            for i in range(sub):
                X[i, s * group + g] = x[b, s * sub + i] * scale
        if per_row > 1 or first == 0:  # where a row is one block W stays as it is
            column = b % per_row
            for s in range(width // sub):
                for i in range(sub):
                    W[i, s * group + g] = w[column, s * sub + i]


@kernel
def stored(value, unit):
    """A super-block's float as the decoder will see it: rounded to a half float, in the scaled world."""
    return single(half(value / unit)) * unit


@kernel
def search_affine(X, W, high, signed, tries, moves, S, M, A):
    """Per lane: scale S and offset M (<= 0 unless `signed`) with x ~ S q + M, q in 0..high. A is scratch [10, lanes].

    Each try starts ``tries[t, 1]`` of the range above its lowest weight, spreads the range over ``tries[t, 0]`` steps
    instead of `high`, rounds, and solves least squares: so weights at both ends may be cut off. Then each move
    stretches the best line's codes by ``moves[r, 0]``, starts them ``moves[r, 1]`` steps higher, and does the same: (1,
    0) is a plain refinement. Least squares' own gain ranks them all.
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
    for t in range(tries.shape[0] + moves.shape[0]):
        if t < tries.shape[0]:
            for j in range(lanes):
                offset[j] = lowest[j] + tries[t, 1] * spread[j]
                inverse[j] = tries[t, 0] / spread[j] if spread[j] > ZERO else ZERO
        else:
            r = t - tries.shape[0]
            for j in range(lanes):
                offset[j] = M[j] + moves[r, 1] * S[j]
                inverse[j] = moves[r, 0] / S[j] if S[j] > ZERO else ZERO
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
            better = (determinant > SINGULAR * sw[j] * sll[j]) & (scale > ZERO) & (gain > best[j])
            best[j] = gain if better else best[j]
            S[j] = scale if better else S[j]
            M[j] = minimum if better else M[j]


@kernel
def search_symmetric(X, W, low, high, tries, moves, S, A):
    """Per lane: scale S with x ~ S q, q in low..high. A is scratch [5, lanes].

    Each try sends the largest |x| to -tries[t, 0], as llama.cpp does; moves are those of search_affine.
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
    for t in range(tries.shape[0] + moves.shape[0]):
        if t < tries.shape[0]:
            for j in range(lanes):
                inverse[j] = -tries[t, 0] / largest[j] if largest[j] != ZERO else ZERO
        else:
            for j in range(lanes):
                inverse[j] = moves[t - tries.shape[0], 0] / S[j] if S[j] != ZERO else ZERO
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
def measure(X, W, low, high, S, M, E, sl, sll, sxl):
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
def assign(X, first, low, high, S, M, unit, Q, codes):
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
