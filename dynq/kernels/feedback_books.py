"""Error feedback where eight or four weights take one entry of a code book: `choose` of dynq.kernels.feedback for them.

Eight weights at a time, from left to right, make up for the errors before them. The book's constraint aside, each
weight would be rounded as in the scalar formats, making up for those of the eight before it too; that gives its sign.
Where seven signs are stored for eight weights and the eighth would be wrong, the weight turns for which that costs
least, and the others are rounded once more. Of the entries nearest to the rounded point (dynq.kernels.grids) the one is
taken for which the columns of ``e R + P`` are least, all their products counted. In IQ1_M both deltas are tried.

Rows are independent and lie side by side: arrays are [column, row]. Of each row the candidates are looked at sixteen at
a time. No sum is reordered by that, so the twin in dynq.reference.feedback_books gives the same bytes.
"""

import numpy as np

from dynq.kernels._jit import kernel
from dynq.kernels.feedback import INFINITY, LANES, ONE, TINY, ZERO
from dynq.kernels.nearest import LAST, LIMIT, MASK, NUMBER, F


@kernel
def _round(x, r, R, a, first, last, s, shift, book, scale, sign, points, turn, e):
    """Babai's rounding of weights first..last - 1 of eight, each making up for those before it in that range.

    x, r [8, LANES]: weights and what other errors add to their columns of ``e R``; a: the first of the eight in R; s,
    shift, scale [LANES]: size of the values book [count], what is added to them, inverse size. Out: sign, turn [8,
    LANES]: of the weights, chosen where it is 0, and what turning it costs; points int32 [LANES]: numbers of the
    rounded points, as in dynq.kernels.grids. e is scratch [8, LANES].
    """
    count = book.shape[0]
    low, top = book[0], F(count - 1)
    per = top / (book[count - 1] - low)
    base = np.int32(1)
    for j in range(LANES):
        points[j] = 0
    for i in range(first, last):
        for j in range(LANES):
            e[i, j] = r[i, j]
        for p in range(first, i):
            for j in range(LANES):
                e[i, j] += e[p, j] * R[a + p, a + i]
        own = R[a + i, a + i]
        across = ONE / own
        for j in range(LANES):
            target = (x[i, j] - shift[j] + e[i, j] * across) * scale[j]
            if sign[i, j] == ZERO:
                sign[i, j] = -ONE if target < ZERO else ONE
            t = target * sign[i, j]
            t = t if t < LIMIT else LIMIT
            q = np.rint((t - low) * per)
            q = q if q > ZERO else ZERO
            q = q if q < top else top
            points[j] += base * np.int32(q)
            value = low + q / per
            e[i, j] = x[i, j] - (s[j] * (sign[i, j] * value) + shift[j])
            turn[i, j] = own * own * (abs(target) * value)
        base *= np.int32(count)


@kernel
def _nearest8(x, r, R, a, s, shift, sign, points, values, keys):
    """Per row the candidate of the least error in the columns of eight weights: its key as in dynq.kernels.nearest."""
    r00, r01, r02, r03 = R[a, a], R[a, a + 1], R[a, a + 2], R[a, a + 3]
    r04, r05, r06, r07 = R[a, a + 4], R[a, a + 5], R[a, a + 6], R[a, a + 7]
    b = a + 1
    r11, r12, r13, r14 = R[b, b], R[b, b + 1], R[b, b + 2], R[b, b + 3]
    r15, r16, r17 = R[b, b + 4], R[b, b + 5], R[b, b + 6]
    b = a + 2
    r22, r23, r24, r25, r26, r27 = R[b, b], R[b, b + 1], R[b, b + 2], R[b, b + 3], R[b, b + 4], R[b, b + 5]
    b = a + 3
    r33, r34, r35, r36, r37 = R[b, b], R[b, b + 1], R[b, b + 2], R[b, b + 3], R[b, b + 4]
    b = a + 4
    r44, r45, r46, r47 = R[b, b], R[b, b + 1], R[b, b + 2], R[b, b + 3]
    b = a + 5
    r55, r56, r57, r66, r67, r77 = R[b, b], R[b, b + 1], R[b, b + 2], R[b + 1, b + 1], R[b + 1, b + 2], R[b + 2, b + 2]
    for j in range(LANES):
        size, o, p = s[j], shift[j], points[j]
        t0, t1, t2, t3 = x[0, j] - o, x[1, j] - o, x[2, j] - o, x[3, j] - o
        t4, t5, t6, t7 = x[4, j] - o, x[5, j] - o, x[6, j] - o, x[7, j] - o
        s0, s1, s2, s3 = size * sign[0, j], size * sign[1, j], size * sign[2, j], size * sign[3, j]
        s4, s5, s6, s7 = size * sign[4, j], size * sign[5, j], size * sign[6, j], size * sign[7, j]
        c0, c1, c2, c3, c4, c5, c6, c7 = r[0, j], r[1, j], r[2, j], r[3, j], r[4, j], r[5, j], r[6, j], r[7, j]
        best = LAST
        for c in range(values.shape[1] // 128):
            v = 128 * c
            near = LAST
            for k in range(16):
                e0 = t0 - s0 * F(values[p, v + k])
                e1 = t1 - s1 * F(values[p, v + 16 + k])
                e2 = t2 - s2 * F(values[p, v + 32 + k])
                e3 = t3 - s3 * F(values[p, v + 48 + k])
                e4 = t4 - s4 * F(values[p, v + 64 + k])
                e5 = t5 - s5 * F(values[p, v + 80 + k])
                e6 = t6 - s6 * F(values[p, v + 96 + k])
                e7 = t7 - s7 * F(values[p, v + 112 + k])
                m0 = c0 + e0 * r00
                m1 = c1 + e0 * r01 + e1 * r11
                m2 = c2 + e0 * r02 + e1 * r12 + e2 * r22
                m3 = c3 + e0 * r03 + e1 * r13 + e2 * r23 + e3 * r33
                m4 = c4 + e0 * r04 + e1 * r14 + e2 * r24 + e3 * r34 + e4 * r44
                m5 = c5 + e0 * r05 + e1 * r15 + e2 * r25 + e3 * r35 + e4 * r45 + e5 * r55
                m6 = c6 + e0 * r06 + e1 * r16 + e2 * r26 + e3 * r36 + e4 * r46 + e5 * r56 + e6 * r66
                m7 = c7 + e0 * r07 + e1 * r17 + e2 * r27 + e3 * r37 + e4 * r47 + e5 * r57 + e6 * r67 + e7 * r77
                e = m0 * m0 + m1 * m1 + m2 * m2 + m3 * m3 + m4 * m4 + m5 * m5 + m6 * m6 + m7 * m7
                key = np.int32(np.int32(np.float32(e).view(np.int32) & MASK) | np.int32(k))
                near = key if key < near else near
            near = np.int32(near | np.int32(c << 4))
            best = near if near < best else best
        keys[j] = best


@kernel
def _nearest4(x, r, R, a, first, s, shift, sign, points, values, keys):
    """As _nearest8, for weights first..first + 3 of eight."""
    b = a + first
    r00, r01, r02, r03 = R[b, b], R[b, b + 1], R[b, b + 2], R[b, b + 3]
    r11, r12, r13 = R[b + 1, b + 1], R[b + 1, b + 2], R[b + 1, b + 3]
    r22, r23, r33 = R[b + 2, b + 2], R[b + 2, b + 3], R[b + 3, b + 3]
    for j in range(LANES):
        i, size, o, p = first, s[j], shift[j], points[j]
        t0, t1, t2, t3 = x[i, j] - o, x[i + 1, j] - o, x[i + 2, j] - o, x[i + 3, j] - o
        s0, s1, s2, s3 = size * sign[i, j], size * sign[i + 1, j], size * sign[i + 2, j], size * sign[i + 3, j]
        c0, c1, c2, c3 = r[i, j], r[i + 1, j], r[i + 2, j], r[i + 3, j]
        best = LAST
        for c in range(values.shape[1] // 64):
            v = 64 * c
            near = LAST
            for k in range(16):
                e0 = t0 - s0 * F(values[p, v + k])
                e1 = t1 - s1 * F(values[p, v + 16 + k])
                e2 = t2 - s2 * F(values[p, v + 32 + k])
                e3 = t3 - s3 * F(values[p, v + 48 + k])
                m0 = c0 + e0 * r00
                m1 = c1 + e0 * r01 + e1 * r11
                m2 = c2 + e0 * r02 + e1 * r12 + e2 * r22
                m3 = c3 + e0 * r03 + e1 * r13 + e2 * r23 + e3 * r33
                e = m0 * m0 + m1 * m1 + m2 * m2 + m3 * m3
                key = np.int32(np.int32(np.float32(e).view(np.int32) & MASK) | np.int32(k))
                near = key if key < near else near
            near = np.int32(near | np.int32(c << 4))
            best = near if near < best else best
        keys[j] = best


@kernel
def _turn(sign, turn):
    """Where an odd number of eight signs is minus, turn the one for which that costs least."""
    for j in range(LANES):
        odd, least, at = False, INFINITY, 0
        for i in range(8):
            odd ^= sign[i, j] < ZERO
            if turn[i, j] < least:
                least, at = turn[i, j], i
        if odd:
            sign[at, j] = -sign[at, j]


@kernel
def _eight(x, r, R, a, s, shift, scale, dim, book, values, signs, sign, turn, points, keys, e, v, error):
    """Choose eight weights: their errors e, their values v [8, LANES], their columns' error [LANES].

    r becomes the columns themselves. sign to keys: scratch.
    """
    for i in range(8):
        for j in range(LANES):
            sign[i, j] = ZERO if signs else ONE
    if signs == 2:
        _round(x, r, R, a, 0, 8, s, shift, book, scale, sign, points, turn, e)
        _turn(sign, turn)
    for first in range(0, 8, dim):
        _round(x, r, R, a, first, first + dim, s, shift, book, scale, sign, points, turn, e)
        if dim == 8:
            _nearest8(x, r, R, a, s, shift, sign, points, values, keys)
        else:
            _nearest4(x, r, R, a, first, s, shift, sign, points, values, keys)
        for j in range(LANES):
            k = keys[j] & NUMBER
            at = (k >> 4) * 16 * dim + (k & 15)
            for i in range(dim):
                v[first + i, j] = sign[first + i, j] * F(values[points[j], at + 16 * i])
        for p in range(first, first + dim):
            for j in range(LANES):
                e[p, j] = x[p, j] - (s[j] * v[p, j] + shift[j])
            for i in range(p, 8):
                for j in range(LANES):
                    r[i, j] += e[p, j] * R[a + p, a + i]
    for j in range(LANES):
        error[j] = ZERO
    for i in range(8):
        for j in range(LANES):
            error[j] += r[i, j] * r[i, j]


@kernel
def choose(w, P, R, step, offset, dim, book, values, signs, apart, keep, E, codes, best):
    """Minimise ``|e R + P|^2`` with e = w - (step * v + offset), over entries v and the steps and offsets given.

    dim: weights an entry stands for, 4 or 8; book float32 [count]: the values of entries; values int8:
    dynq.kernels.grids.neighbours; signs: 0 where entries have none, 1 where any are stored, 2 where the number of minus
    signs is even; apart: eight weights choose between offset and -offset. codes: with signs, indices of the values
    -book[count - 1] to book[count - 1]; else 2 index + 1 with an offset of step's sign, 2 index with another. The rest
    as in dynq.kernels.feedback.choose.
    """
    g, rows = w.shape
    count = book.shape[0]
    low, per = book[0], F(count - 1) / (book[count - 1] - book[0])
    X = np.zeros((g, LANES), np.float32)
    carry = np.zeros((g, LANES), np.float32)
    e = np.zeros((g, LANES), np.float32)
    best_e = np.zeros((g, LANES), np.float32)
    q = np.zeros((g, LANES), np.uint8)
    best_q = np.zeros((g, LANES), np.uint8)
    B = np.zeros((6, 8, LANES), np.float32)
    reach, r, sign, turn, e8, v8 = B[0], B[1], B[2], B[3], B[4], B[5]
    A = np.zeros((8, LANES), np.float32)
    s, o, scale, shift, error, near, total, least = A[0], A[1], A[2], A[3], A[4], A[5], A[6], A[7]
    points = np.zeros(LANES, np.int32)
    keys = np.zeros(LANES, np.int32)
    for first in range(0, rows, LANES):
        width = min(LANES, rows - first)
        for i in range(g):
            for j in range(width):
                X[i, j] = w[i, first + j]
                carry[i, j] = P[i, first + j]
        for j in range(width):
            best[first + j] = -1
        least[:] = ZERO if keep else INFINITY
        if keep:
            for i in range(g):
                for j in range(width):
                    best_e[i, j] = E[i, first + j]
            for i in range(g):
                for j in range(LANES):
                    total[j] = carry[i, j]
                for p in range(i + 1):
                    for j in range(LANES):
                        total[j] += best_e[p, j] * R[p, i]
                for j in range(LANES):
                    least[j] += total[j] * total[j]
        for k in range(step.shape[0]):
            for j in range(width):
                s[j] = step[k, first + j]
                o[j] = offset[k, first + j]
            for j in range(LANES):
                scale[j] = ONE / s[j] if abs(s[j]) > TINY else ZERO
                total[j] = ZERO
            for a in range(0, g, 8):
                for i in range(8):
                    for j in range(LANES):
                        reach[i, j] = carry[a + i, j]
                    for p in range(a):
                        for j in range(LANES):
                            reach[i, j] += e[p, j] * R[p, a + i]
                for side in range(2 if apart else 1):
                    for j in range(LANES):
                        shift[j] = -o[j] if side else o[j]
                        for i in range(8):
                            r[i, j] = reach[i, j]
                    x = X[a : a + 8]
                    _eight(
                        x, r, R, a, s, shift, scale, dim, book, values, signs, sign, turn, points, keys, e8, v8, error
                    )
                    for j in range(LANES):
                        if side == 0 or error[j] < near[j]:
                            near[j] = error[j]
                            for i in range(8):
                                e[a + i, j] = e8[i, j]
                                size = abs(v8[i, j]) if signs else v8[i, j]
                                digit = np.int32(np.rint((size - low) * per))
                                if signs:
                                    q[a + i, j] = count - 1 - digit if v8[i, j] < ZERO else count + digit
                                else:
                                    q[a + i, j] = 2 * digit + (shift[j] * s[j] > ZERO)
                for j in range(LANES):
                    total[j] += near[j]
            for j in range(width):
                if total[j] < least[j]:
                    least[j] = total[j]
                    best[first + j] = k
                    for i in range(g):
                        best_e[i, j] = e[i, j]
                        best_q[i, j] = q[i, j]
        for i in range(g):
            for j in range(width):
                if best[first + j] >= 0:
                    E[i, first + j] = best_e[i, j]
                    codes[i, first + j] = best_q[i, j]
