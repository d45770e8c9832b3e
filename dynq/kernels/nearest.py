"""For a scale, the entries of a code book that stand for groups of weights with the least weighted error.

Only the entries nearest to the rounded point are looked at, as llama.cpp has it (``iq2_find_best_neighbour`` and
``iq3_find_best_neighbour`` in ggml-quants.c), sixteen at a time. Where only seven signs are stored for eight weights
and the eighth would be wrong, the weight that takes the wrong sign is chosen together with the entry: for weight i of
magnitude t in units of the scale it costs 4 w_i t_i g_i more. llama.cpp first flips the weight that matters least.

Arrays are [weight in sub-block, lane], a lane is a sub-block of a block (dynq.kernels.lattice). Candidates' values are
dynq.kernels.grids.neighbours.
"""

import numpy as np

from dynq.kernels._jit import kernel
from dynq.kernels.fit import INFINITY, ONE, ZERO

F = np.float32
FOUR = np.float32(4)
LIMIT = np.float32(1e9)  # keeps squares finite
TINY = np.float32(1e-30)  # below it a scale counts as zero
# a candidate and its error in one integer, so that a minimum finds both: the last eight bits are its number
LAST = np.int32(0x7FFFFFFF)
NUMBER = np.int32(255)
MASK = np.int32(~255)


@kernel
def points(X, S, low, spacing, top, dim, inverse, T, P):
    """|x| in units of the scale, T [sub, lanes], and the rounded points' numbers, P int32 [sub / dim, lanes]."""
    n, lanes = X.shape
    per = ONE / spacing
    for j in range(lanes):
        inverse[j] = ONE / S[j] if S[j] > TINY else ZERO
    for g in range(n // dim):
        for j in range(lanes):
            P[g, j] = 0
        base = np.int32(1)
        for i in range(g * dim, (g + 1) * dim):
            for j in range(lanes):
                t = X[i, j] * inverse[j]
                t = t if t < LIMIT else LIMIT
                T[i, j] = t
                q = np.rint((t - low) * per)
                q = q if q > ZERO else ZERO
                q = q if q < top else top
                P[g, j] += base * np.int32(q)
            base *= np.int32(top + ONE)


@kernel
def number(G, low, spacing, top, dim, N):
    """The numbers of the points |G|: N int32 [sub / dim, lanes]."""
    per = ONE / spacing
    for g in range(N.shape[0]):
        for j in range(N.shape[1]):
            N[g, j] = 0
        base = np.int32(1)
        for i in range(g * dim, (g + 1) * dim):
            for j in range(N.shape[1]):
                N[g, j] += base * np.int32(np.rint((abs(G[i, j]) - low) * per))
            base *= np.int32(top + ONE)


@kernel
def _nearest8(T, W, o, P, values, odd, keys):
    """Per lane the candidate of the least error sum w (t - g)^2 over eight weights: the error's bits, its number last.

    Where `odd` one of the eight takes the wrong sign, the one for which that costs least.
    """
    i = 8 * o
    for j in range(T.shape[1]):
        p, flip = P[o, j], odd[o, j]
        t0, t1, t2, t3 = T[i, j], T[i + 1, j], T[i + 2, j], T[i + 3, j]
        t4, t5, t6, t7 = T[i + 4, j], T[i + 5, j], T[i + 6, j], T[i + 7, j]
        w0, w1, w2, w3 = W[i, j], W[i + 1, j], W[i + 2, j], W[i + 3, j]
        w4, w5, w6, w7 = W[i + 4, j], W[i + 5, j], W[i + 6, j], W[i + 7, j]
        best = LAST
        for c in range(values.shape[1] // 128):
            v = 128 * c
            near = LAST
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
                m0, m1, m2, m3, m4, m5, m6, m7 = t0 - g0, t1 - g1, t2 - g2, t3 - g3, t4 - g4, t5 - g5, t6 - g6, t7 - g7
                e = w0 * m0 * m0 + w1 * m1 * m1 + w2 * m2 * m2 + w3 * m3 * m3
                e = e + (w4 * m4 * m4 + w5 * m5 * m5 + w6 * m6 * m6 + w7 * m7 * m7)
                if flip:
                    a0, a1, a2, a3 = w0 * t0 * g0, w1 * t1 * g1, w2 * t2 * g2, w3 * t3 * g3
                    a4, a5, a6, a7 = w4 * t4 * g4, w5 * t5 * g5, w6 * t6 * g6, w7 * t7 * g7
                    a0 = a0 if a0 < a1 else a1
                    a2 = a2 if a2 < a3 else a3
                    a4 = a4 if a4 < a5 else a5
                    a6 = a6 if a6 < a7 else a7
                    a0 = a0 if a0 < a2 else a2
                    a4 = a4 if a4 < a6 else a6
                    e = e + FOUR * (a0 if a0 < a4 else a4)
                key = np.int32(np.int32(np.float32(e).view(np.int32) & MASK) | np.int32(k))
                near = key if key < near else near
            near = np.int32(near | np.int32(c << 4))
            best = near if near < best else best
        keys[o, j] = best


@kernel
def _nearest4(T, W, g, P, values, odd, keys):
    """As _nearest8, over the four weights of group g; in the second half of `keys` with a wrong sign where `odd`."""
    i = 4 * g
    for j in range(T.shape[1]):
        p, flip = P[g, j], odd[g // 2, j]
        t0, t1, t2, t3 = T[i, j], T[i + 1, j], T[i + 2, j], T[i + 3, j]
        w0, w1, w2, w3 = W[i, j], W[i + 1, j], W[i + 2, j], W[i + 3, j]
        best = LAST
        turned = LAST
        for c in range(values.shape[1] // 64):
            v = 64 * c
            near = LAST
            for k in range(16):
                g0, g1, g2, g3 = (
                    F(values[p, v + k]),
                    F(values[p, v + 16 + k]),
                    F(values[p, v + 32 + k]),
                    F(values[p, v + 48 + k]),
                )
                m0, m1, m2, m3 = t0 - g0, t1 - g1, t2 - g2, t3 - g3
                e = w0 * m0 * m0 + w1 * m1 * m1 + w2 * m2 * m2 + w3 * m3 * m3
                key = np.int32(np.int32(np.float32(e).view(np.int32) & MASK) | np.int32(k))
                near = key if key < near else near
            near = np.int32(near | np.int32(c << 4))
            best = near if near < best else best
            if flip:
                near = LAST
                for k in range(16):
                    g0, g1, g2, g3 = (
                        F(values[p, v + k]),
                        F(values[p, v + 16 + k]),
                        F(values[p, v + 32 + k]),
                        F(values[p, v + 48 + k]),
                    )
                    m0, m1, m2, m3 = t0 - g0, t1 - g1, t2 - g2, t3 - g3
                    e = w0 * m0 * m0 + w1 * m1 * m1 + w2 * m2 * m2 + w3 * m3 * m3
                    a0, a1, a2, a3 = w0 * t0 * g0, w1 * t1 * g1, w2 * t2 * g2, w3 * t3 * g3
                    a0 = a0 if a0 < a1 else a1
                    a2 = a2 if a2 < a3 else a3
                    e = e + FOUR * (a0 if a0 < a2 else a2)
                    key = np.int32(np.int32(np.float32(e).view(np.int32) & MASK) | np.int32(k))
                    near = key if key < near else near
                near = np.int32(near | np.int32(c << 4))
                turned = near if near < turned else turned
        keys[g, j] = best
        keys[g + P.shape[0], j] = turned


@kernel
def _error(key):
    return np.int32(key & MASK).view(np.float32)


@kernel
def assign(X, W, odd, S, low, spacing, top, dim, values, inverse, T, P, keys, G, flips):
    """The best entries for scales S.

    Out: their values, G [sub, lanes], minus where the sign is to be wrong, and those places as bits, flips uint8
    [sub / 8, lanes]. inverse to keys: scratch, [lanes], like X, int32 [sub / dim, lanes], int32 [2 sub / dim, lanes].
    """
    n, lanes = X.shape
    points(X, S, low, spacing, top, dim, inverse, T, P)
    for o in range(n // 8):
        if dim == 8:
            _nearest8(T, W, o, P, values, odd, keys)
        else:
            _nearest4(T, W, 2 * o, P, values, odd, keys)
            _nearest4(T, W, 2 * o + 1, P, values, odd, keys)
        for j in range(lanes):
            start, end = 8 * o, 8 * o + 8
            if dim == 4 and odd[o, j]:
                a, b = 2 * o, 2 * o + 1
                c, d = P.shape[0] + a, P.shape[0] + b
                if _error(keys[c, j]) + _error(keys[b, j]) <= _error(keys[a, j]) + _error(keys[d, j]):
                    keys[a, j] = keys[c, j]
                    end = 8 * o + 4
                else:
                    keys[b, j] = keys[d, j]
                    start = 8 * o + 4
            for g in range(8 // dim):
                at = 8 // dim * o + g
                k = keys[at, j] & NUMBER
                v = (k >> 4) * 16 * dim + (k & 15)
                for i in range(dim):
                    G[at * dim + i, j] = values[P[at, j], v + 16 * i]
            flips[o, j] = 0
            if odd[o, j]:
                least, where = INFINITY, start
                for i in range(start, end):
                    cost = W[i, j] * T[i, j] * G[i, j]
                    if cost < least:
                        least, where = cost, i
                G[where, j] = -G[where, j]
                flips[o, j] = np.uint8(1 << (where - 8 * o))
