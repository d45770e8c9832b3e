"""The search for IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S: the super-block's float and the levels of its sub-blocks.

A group of 8 (IQ2) or 4 (IQ3) weights is stored as one entry g of a code book (dynq.kernels.grids) and signs. For a
fixed entry the error at scale s is s^2 B - 2 s A plus a constant, with A = sum w |x| g (less what a wrong sign costs)
and B = sum w g^2. So A and B of the entries near a first scale are found once, and many scales tried for little: for
each of 16 values of the super-block's float and each sub-block, a few stored levels. The best float is kept with its
levels; then entries (dynq.kernels.nearest) and float take turns, with the exact error.

Sub-blocks are worked on side by side: arrays are [weight in sub-block, lane], lane = sub-block * group + block, as in
dynq.kernels.fit; candidates are worked on sixteen at a time. No sum is reordered by that, so the twin in
dynq.reference.iquants gives the same bytes.

Source of the format's idea: quantize_row_iq2_xxs_impl and its siblings in llama.cpp's ggml-quants.c, which try scales
for each sub-block alone and derive the super-block's float from the largest.
"""

import numpy as np

from dynq.kernels._jit import kernel
from dynq.kernels.fit import INFINITY, ONE, TWO, ZERO, load, stored
from dynq.kernels.floats import half
from dynq.kernels.nearest import TINY, F, assign, number, points

LANES = 32  # sub-blocks side by side
TRIALS = 16  # values of a super-block's float
# where things are in the scratch of _trials
INVERSE, TOTAL, LEAST, LEVEL, MORE, SCALES = (TRIALS * i for i in range(1, 7))
HALF = np.float32(0.5)
TOP = np.float32(15)


@kernel
def _magnitudes(X, even, signs, odd):
    """X to |X|. Out, uint8 [sub / 8, lanes]: eight signs, the first lowest; whether an odd number of them is minus."""
    n, lanes = X.shape
    for o in range(n // 8):
        for j in range(lanes):
            signs[o, j] = 0
            odd[o, j] = 0
        for i in range(8):
            for j in range(lanes):
                negative = np.uint8(np.float32(X[8 * o + i, j]).view(np.uint32) >> np.uint32(31))
                signs[o, j] |= np.uint8(negative << np.uint8(i))
                odd[o, j] ^= np.uint8(negative & even)
                X[8 * o + i, j] = abs(X[8 * o + i, j])


@kernel
def _scales(X, W, low, spacing, top, tries, S, A):
    """Per lane: a scale S for which the values low, low + spacing, ... fit |x| best, the code book left aside.

    A float32 [6, lanes]: all but the first row is scratch.
    """
    n, lanes = X.shape
    per = ONE / spacing
    largest, best, sll, sxl, inverse = A[1], A[2], A[3], A[4], A[5]
    for j in range(lanes):
        S[j] = ZERO
        best[j] = ZERO
        largest[j] = ZERO
    for i in range(n):
        for j in range(lanes):
            largest[j] = X[i, j] if X[i, j] > largest[j] else largest[j]
    for t in range(tries.shape[0]):
        for j in range(lanes):
            inverse[j] = tries[t] / largest[j] if largest[j] > TINY else ZERO
            sll[j] = ZERO
            sxl[j] = ZERO
        for i in range(n):
            for j in range(lanes):
                q = np.rint((X[i, j] * inverse[j] - low) * per)
                q = q if q > ZERO else ZERO
                q = q if q < top else top
                value = low + q * spacing
                wv = W[i, j] * value
                sll[j] += wv * value
                sxl[j] += wv * X[i, j]
        for j in range(lanes):
            scale = sxl[j] / sll[j]
            gain = scale * sxl[j]
            better = gain > best[j]
            best[j] = gain if better else best[j]
            S[j] = scale if better else S[j]


@kernel
def _measure(X, W, G, S, E, sll, sxl):
    """Per lane the error and the sums that least squares needs."""
    n, lanes = X.shape
    for j in range(lanes):
        E[j] = ZERO
        sll[j] = ZERO
        sxl[j] = ZERO
    for i in range(n):
        for j in range(lanes):
            miss = X[i, j] - S[j] * G[i, j]
            wg = W[i, j] * G[i, j]
            E[j] += W[i, j] * miss * miss
            sll[j] += wg * G[i, j]
            sxl[j] += wg * X[i, j]


@kernel
def _terms8(X, W, j, P, values, odd, Z):
    """2 A and B of the candidates for lane j's groups of eight weights.

    Z[group]: for sixteen candidates 2 A = sum 2 w |x| g, where `odd` less the cost of the cheapest wrong sign, then
    their B = sum w g^2, then the next sixteen.
    """
    for g in range(X.shape[0] // 8):
        p, i = P[g, j], 8 * g
        w0, w1, w2, w3 = W[i, j], W[i + 1, j], W[i + 2, j], W[i + 3, j]
        w4, w5, w6, w7 = W[i + 4, j], W[i + 5, j], W[i + 6, j], W[i + 7, j]
        q0, q1, q2, q3 = TWO * w0 * X[i, j], TWO * w1 * X[i + 1, j], TWO * w2 * X[i + 2, j], TWO * w3 * X[i + 3, j]
        q4, q5, q6, q7 = TWO * w4 * X[i + 4, j], TWO * w5 * X[i + 5, j], TWO * w6 * X[i + 6, j], TWO * w7 * X[i + 7, j]
        flip = odd[g, j]
        for c in range(Z.shape[1] // 32):
            v, z = 128 * c, 32 * c
            for k in range(16):
                g0, g1, g2, g3 = (
                    F(values[p, v + k]),
                    F(values[p, v + 16 + k]),
                    F(values[p, v + 32 + k]),
                    F(values[p, v + 48 + k]),
                )
                g4, g5, g6, g7 = (
                    F(values[p, v + 64 + k]),
                    F(values[p, v + 80 + k]),
                    F(values[p, v + 96 + k]),
                    F(values[p, v + 112 + k]),
                )
                a0, a1, a2, a3, a4, a5, a6, a7 = q0 * g0, q1 * g1, q2 * g2, q3 * g3, q4 * g4, q5 * g5, q6 * g6, q7 * g7
                a = a0 + a1 + a2 + a3 + (a4 + a5 + a6 + a7)
                if flip:
                    a0 = a0 if a0 < a1 else a1
                    a2 = a2 if a2 < a3 else a3
                    a4 = a4 if a4 < a5 else a5
                    a6 = a6 if a6 < a7 else a7
                    a0 = a0 if a0 < a2 else a2
                    a4 = a4 if a4 < a6 else a6
                    a -= TWO * (a0 if a0 < a4 else a4)
                Z[g, z + k] = a
                b = w0 * g0 * g0 + w1 * g1 * g1 + w2 * g2 * g2 + w3 * g3 * g3
                Z[g, z + 16 + k] = b + (w4 * g4 * g4 + w5 * g5 * g5 + w6 * g6 * g6 + w7 * g7 * g7)


@kernel
def _terms4(X, W, j, P, values, odd, Z):
    """As _terms8, for groups of four weights; with a wrong sign, where `odd`, in the second half of Z."""
    for g in range(X.shape[0] // 4):
        p, i, flip = P[g, j], 4 * g, odd[g // 2, j]
        w0, w1, w2, w3 = W[i, j], W[i + 1, j], W[i + 2, j], W[i + 3, j]
        q0, q1, q2, q3 = TWO * w0 * X[i, j], TWO * w1 * X[i + 1, j], TWO * w2 * X[i + 2, j], TWO * w3 * X[i + 3, j]
        h = g + X.shape[0] // 4
        for c in range(Z.shape[1] // 32):
            v, z = 64 * c, 32 * c
            for k in range(16):
                g0, g1, g2, g3 = (
                    F(values[p, v + k]),
                    F(values[p, v + 16 + k]),
                    F(values[p, v + 32 + k]),
                    F(values[p, v + 48 + k]),
                )
                Z[g, z + k] = q0 * g0 + q1 * g1 + q2 * g2 + q3 * g3
                Z[g, z + 16 + k] = w0 * g0 * g0 + w1 * g1 * g1 + w2 * g2 * g2 + w3 * g3 * g3
            if flip:
                for k in range(16):
                    g0, g1, g2, g3 = (
                        F(values[p, v + k]),
                        F(values[p, v + 16 + k]),
                        F(values[p, v + 32 + k]),
                        F(values[p, v + 48 + k]),
                    )
                    a0, a1, a2, a3 = q0 * g0, q1 * g1, q2 * g2, q3 * g3
                    a0 = a0 if a0 < a1 else a1
                    a2 = a2 if a2 < a3 else a3
                    Z[h, z + k] = Z[g, z + k] - TWO * (a0 if a0 < a2 else a2)
                    Z[h, z + 16 + k] = Z[g, z + 16 + k]


@kernel
def _minima(Z, g, U, M):
    """Into M[g]: the least s B - 2 A among the candidates in Z[g], for each of the scales s = U[SCALES:]."""
    for c in range(Z.shape[1] // 32):
        z = 32 * c
        for t in range(M.shape[1]):
            s = U[SCALES + t]
            m = INFINITY if c == 0 else M[g, t]
            for k in range(16):
                e = s * Z[g, z + 16 + k] - Z[g, z + k]
                m = e if e < m else m
            M[g, t] = m


@kernel
def _trials(X, W, odd, S, unit, ends, choices, dim, values, P, D, L, Z, M, U, V):
    """Per super-block the best stored float D, and per lane the best level L (as 2 level + 1).

    S: first scales; the largest is sent to each of `ends` in turn, and each lane tries the `choices` levels about its
    scale. Z, M, U, V: scratch; U is one array with named places so that the compiler sees no overlap.
    """
    n, lanes = X.shape
    group, groups = unit.shape[0], n // dim
    for g in range(group):
        largest = ZERO
        for j in range(g, lanes, group):
            largest = S[j] if S[j] > largest else largest
        for t in range(TRIALS):
            d = stored(largest / ends[t], unit[g])
            U[t] = d
            U[INVERSE + t] = ONE / d if d > TINY else ZERO
            U[TOTAL + t] = ZERO
        for j in range(g, lanes, group):
            scale = S[j]
            for t in range(TRIALS):
                q = np.floor((scale * U[INVERSE + t] - F(choices - 1)) * HALF)
                q = q if q > ZERO else ZERO
                q = q if q < F(16 - choices) else F(16 - choices)
                U[LEVEL + t] = q * TWO + ONE
            for c in range(choices):
                for t in range(TRIALS):
                    U[SCALES + TRIALS * c + t] = (U[LEVEL + t] + F(2 * c)) * U[t]
            if dim == 8:
                _terms8(X, W, j, P, values, odd, Z)
                for h in range(groups):
                    _minima(Z, h, U, M)
            else:
                _terms4(X, W, j, P, values, odd, Z)
                for h in range(groups):
                    _minima(Z, h, U, M)
                for h in range(0, groups, 2):
                    if odd[h // 2, j]:
                        _minima(Z, groups + h, U, M)
                        _minima(Z, groups + h + 1, U, M)
                        for t in range(M.shape[1]):
                            e, f = M[groups + h, t] + M[h + 1, t], M[h, t] + M[groups + h + 1, t]
                            M[h, t] = e if e < f else f
                            M[h + 1, t] = ZERO
            for h in range(1, groups):
                for t in range(M.shape[1]):
                    M[0, t] += M[h, t]
            for t in range(TRIALS):
                U[LEAST + t] = U[SCALES + t] * M[0, t]
                U[MORE + t] = ZERO
            for c in range(1, choices):
                for t in range(TRIALS):
                    e = U[SCALES + TRIALS * c + t] * M[0, TRIALS * c + t]
                    U[MORE + t] = F(2 * c) if e < U[LEAST + t] else U[MORE + t]
                    U[LEAST + t] = e if e < U[LEAST + t] else U[LEAST + t]
            for t in range(TRIALS):
                U[TOTAL + t] += U[LEAST + t]
                V[j, t] = U[LEVEL + t] + U[MORE + t]
        best, where = INFINITY, 0
        for t in range(TRIALS):
            if U[TOTAL + t] < best:
                best, where = U[TOTAL + t], t
        D[g] = U[where]
        for j in range(g, lanes, group):
            L[j] = V[j, where]


@kernel
def _descend(sll, sxl, unit, D, L):
    """Entries fixed: per lane the best level, then per super-block the best stored float."""
    group = unit.shape[0]
    for g in range(group):
        inverse = ONE / D[g] if D[g] > TINY else ZERO
        aa, ax = ZERO, ZERO
        for j in range(g, L.shape[0], group):
            q = np.rint((sxl[j] / sll[j] * inverse - ONE) * HALF)
            q = q if q > ZERO else ZERO
            q = q if q < TOP else TOP
            L[j] = q * TWO + ONE
            aa += L[j] * L[j] * sll[j]
            ax += L[j] * sxl[j]
        if ax > ZERO:
            D[g] = stored(ax / aa, unit[g])


@kernel
def _keep(total, best, E, D, L, N, flips, best_D, best_L, best_N, best_flips):
    """Where the super-block's error fell below `best`, keep its numbers. E, the lanes' errors, is overwritten."""
    group = D.shape[0]
    for g in range(group):
        total[g] = ZERO
    for j in range(0, E.shape[0], group):
        for g in range(group):
            total[g] += E[j + g]
    for j in range(0, E.shape[0], group):
        for g in range(group):
            E[j + g] = ONE if total[g] < best[g] else ZERO
    for g in range(group):
        best_D[g] = D[g] if total[g] < best[g] else best_D[g]
        best[g] = total[g] if total[g] < best[g] else best[g]
    for j in range(E.shape[0]):
        best_L[j] = L[j] if E[j] > ZERO else best_L[j]
    for i in range(N.shape[0]):
        for j in range(E.shape[0]):
            best_N[i, j] = N[i, j] if E[j] > ZERO else best_N[i, j]
    for o in range(flips.shape[0]):
        for j in range(E.shape[0]):
            best_flips[o, j] = flips[o, j] if E[j] > ZERO else best_flips[o, j]


@kernel
def fit(
    x,
    w,
    sub,
    dim,
    step,
    low,
    spacing,
    top,
    even,
    entry_at,
    values,
    near,
    tries,
    ends,
    choices,
    rounds,
    entries,
    signs,
    levels,
    d,
):
    """Choose everything that blocks store.

    x float32 [blocks, 256]; w float32 [blocks of a row, 256]; sub to even: dynq.kernels.grids.Grid; entry_at, values:
    its entry_at and neighbours; near to rounds: dynq.kernels.grids.Plan. Out: entries uint16 [blocks, 256 / dim], signs
    uint8 [blocks, 32] (1 is minus), levels uint8 [blocks, 256 / sub], d uint16 [blocks].
    """
    subs, octets, groups = 256 // sub, sub // 8, sub // dim
    group = LANES // subs
    X = np.empty((sub, LANES), np.float32)
    W = np.empty((sub, LANES), np.float32)
    T = np.empty((sub, LANES), np.float32)
    G = np.empty((sub, LANES), np.float32)
    A = np.empty((7, LANES), np.float32)
    S, E, sll, sxl, L, best_L, inverse = A[0], A[1], A[2], A[3], A[4], A[5], A[6]
    B = np.empty((5, group), np.float32)
    unit, D, best_D, best, total = B[0], B[1], B[2], B[3], B[4]
    C = np.empty((4 * octets, LANES), np.uint8)
    minus, odd, flips, best_flips = C[:octets], C[octets : 2 * octets], C[2 * octets : 3 * octets], C[3 * octets :]
    P = np.empty((groups, LANES), np.int32)
    keys = np.empty((2 * groups, LANES), np.int32)
    best_N = np.empty((groups, LANES), np.int32)
    Z = np.empty((2 * groups, 2 * near), np.float32)
    M = np.empty((2 * groups, TRIALS * choices), np.float32)
    U = np.empty(SCALES + TRIALS * choices, np.float32)
    V = np.empty((LANES, TRIALS), np.float32)
    for first in range(0, x.shape[0], group):
        load(x, w, first, sub, X, W, unit)
        for g in range(group):
            unit[g] *= step
            best[g] = INFINITY
        _magnitudes(X, even, minus, odd)
        _scales(X, W, low, spacing, top, tries, S, A)
        points(X, S, low, spacing, top, dim, inverse, T, P)
        _trials(X, W, odd, S, unit, ends, choices, dim, values, P, D, L, Z, M, U, V)
        for r in range(rounds + 1):
            for j in range(0, LANES, group):
                for g in range(group):
                    S[j + g] = D[g] * L[j + g]
            assign(X, W, odd, S, low, spacing, top, dim, values, inverse, T, P, keys, G, flips)
            _measure(X, W, G, S, E, sll, sxl)
            number(G, low, spacing, top, dim, P)
            _keep(total, best, E, D, L, P, flips, best_D, best_L, best_N, best_flips)
            if r < rounds:
                _descend(sll, sxl, unit, D, L)
        for g in range(min(group, x.shape[0] - first)):
            b = first + g
            d[b] = half(best_D[g] / unit[g])
            for s in range(subs):
                j = s * group + g
                levels[b, s] = np.uint8(best_L[j] * HALF)
                for i in range(groups):
                    entries[b, s * groups + i] = entry_at[best_N[i, j]]
                for o in range(octets):
                    signs[b, s * octets + o] = minus[o, j] ^ best_flips[o, j]
