"""The search for IQ1_S and IQ1_M: which entries of the code book, deltas, scales and d a block takes.

The code book is searched to the end, where llama.cpp looks at neighbours of a rounding. For a given step and delta
every weight has a cost of each of -1, 0, 1. The cost of an entry is that of its first four numbers plus that of its
last four, and there are only 81 quadruples of each; so both tables are filled, and the cheapest of the 2048 sums is
found with one integer minimum and a fraction of an addition for each. First steps come from rounding to -1, 0, 1
without a code book.

Blocks are worked on side by side: arrays are [weight in group, lane], lane = group * GROUP + block.

Source of the code book: gguf-py. The formats are drawn in dynq.kernels.iq1.
"""

from typing import NamedTuple

import numpy as np
from gguf import quants

from dynq.kernels._jit import kernel
from dynq.kernels._once import once
from dynq.kernels.fit import INFINITY, ONE, TWO, ZERO, load, stored
from dynq.kernels.floats import half

GROUP = 8  # blocks side by side
LANES = 32 * GROUP
DELTA = np.float32(0.125)
HALF = np.float32(0.5)
TOP = np.float32(7)  # the largest scale
# A weight's largest cost in the tables: eight of them fit int16, of which a vector holds twice as many as of float32
MOST = np.float32(4095)
LIMIT = np.float32(8 * 4095)  # sets MOST at about the cost of a step for the mean of a group's eight weights
TINY = np.float32(1e-20)


class Search(NamedTuple):
    """How far to look: the first steps to try (1 is the root mean square of a sub-block) and how often to solve least
    squares after them; where to send a block's largest step (15 is the top); per pass through the code book how many
    neighbours of each stored scale to try."""

    starts: tuple[float, ...]
    refinements: int
    ends: tuple[float, ...]
    passes: tuple[int, ...]


# Chosen on trained weights: all eight scales and more passes lower the error by another 0.2 % at most.
_ENDS = (9.0, 11.0, 13.0, 14.0, 15.0, 16.0, 17.0)
SEARCHES = {
    "plain": Search((1.0, 1.25, 1.5, 1.8), 1, _ENDS, (0,)),
    "search": Search((0.85, 1.0, 1.15, 1.35, 1.6, 1.9), 2, _ENDS, (0, 1)),
}


class Book(NamedTuple):
    """The code book. grid float32 [2048, 8]; trits uint16 [2048], the same in two bits each (0, 1, 2), lowest first.

    For the search its entries are laid out in rows of eight that begin with the same four numbers (short rows repeat
    their last entry): entry uint16 [rows, 8], first uint8 [rows] and second uint8 [rows, 8] the quadruples.
    """

    grid: np.ndarray
    trits: np.ndarray
    entry: np.ndarray
    first: np.ndarray
    second: np.ndarray


@once
def book() -> Book:
    quants.IQ1_S.init_grid()
    grid = np.array(quants.IQ1_S.grid, np.float32).reshape(2048, 8)
    digits = grid.astype(np.int64) + 1
    halves = digits.reshape(2048, 2, 4) @ [27, 9, 3, 1]
    rows = []
    for quadruple in range(81):
        members = np.flatnonzero(halves[:, 0] == quadruple)
        rows.append(np.pad(members, (0, -len(members) % 8), "edge").reshape(-1, 8))
    entry = np.concatenate(rows)
    trits = (digits << 2 * np.arange(8)).sum(axis=1)
    first, second = halves[entry[:, 0], 0], halves[entry, 1]
    return Book(grid, trits.astype(np.uint16), entry.astype(np.uint16), first.astype(np.uint8), second.astype(np.uint8))


# --- sums over groups ------------------------------------------------------------------------------------------------


@kernel
def _sum_groups(plus, minus, flip, run, out):
    """Sums over the `run` groups of each sub-block, of `minus` where `flip`: [LANES] to [subs * GROUP]."""
    out[:] = ZERO
    for s in range(32):
        for g in range(GROUP):
            j = s * GROUP + g
            out[s // run * GROUP + g] += minus[j] if flip[j] else plus[j]


@kernel
def _to_groups(sub, run, out):
    """A sub-block's value to each of its groups: [subs * GROUP] to [LANES]."""
    for s in range(32):
        for g in range(GROUP):
            out[s * GROUP + g] = sub[s // run * GROUP + g]


@kernel
def _cheaper(plus, minus, share, flip):
    """Where `minus` is less than `plus`, summed over the `share` groups that must agree: bool [LANES]."""
    for s in range(0, 32, share):
        for g in range(GROUP):
            a, b = ZERO, ZERO
            for k in range(s, s + share):
                a += plus[k * GROUP + g]
                b += minus[k * GROUP + g]
            for k in range(s, s + share):
                flip[k * GROUP + g] = b < a


# --- first steps -----------------------------------------------------------------------------------------------------


@kernel
def _round(X, W, step, delta, out):
    """Round to -1, 0, 1 (all of them allowed); out [3, LANES]: cost less the weights' own, least squares' sums."""
    A = np.empty((4, LANES), np.float32)
    size, inverse, sxl, sll = A[0], A[1], A[2], A[3]
    for j in range(LANES):
        size[j] = step[j]
        inverse[j] = ONE / size[j] if size[j] > ZERO else ZERO
        sxl[j] = ZERO
        sll[j] = ZERO
    for i in range(8):
        for j in range(LANES):
            q = np.rint(X[i, j] * inverse[j] - delta)
            q = q if q > -ONE else -ONE
            q = q if q < ONE else ONE
            wl = W[i, j] * (q + delta)
            sxl[j] += wl * X[i, j]
            sll[j] += wl * (q + delta)
    for j in range(LANES):
        out[0, j] = size[j] * (size[j] * sll[j] - TWO * sxl[j])
        out[1, j] = sxl[j]
        out[2, j] = sll[j]


@kernel
def _start(X, W, run, share, starts, refinements, sx, sl):
    """Least squares' sums of the best rounding of each sub-block: sx, sl [subs * GROUP], their ratio is its step."""
    A = np.empty((3, LANES), np.float32)
    sw, sxx, step = A[0], A[1], A[2]
    sums = np.empty((2, 3, LANES), np.float32)
    flip = np.empty(LANES, np.bool_)
    B = np.empty((5, 32 // run * GROUP), np.float32)
    size, tried, new_sx, new_sl, best = B[0], B[1], B[2], B[3], B[4]
    sw[:] = ZERO
    sxx[:] = ZERO
    new_sl[:] = ZERO
    new_sx[:] = ZERO
    for i in range(8):
        for j in range(LANES):
            sw[j] += W[i, j]
            sxx[j] += W[i, j] * X[i, j] * X[i, j]
    for s in range(32):
        for g in range(GROUP):
            new_sl[s // run * GROUP + g] += sw[s * GROUP + g]
            new_sx[s // run * GROUP + g] += sxx[s * GROUP + g]
    for u in range(sx.shape[0]):
        size[u] = np.sqrt(new_sx[u] / new_sl[u])
        best[u] = ZERO
        sx[u] = ZERO
        sl[u] = ONE
    for t in range(starts.shape[0] + refinements):
        for u in range(sx.shape[0]):
            tried[u] = size[u] * starts[t] if t < starts.shape[0] else sx[u] / sl[u]
        _to_groups(tried, run, step)
        for side in range(2):
            _round(X, W, step, -DELTA if side else DELTA, sums[side])
        _cheaper(sums[0, 0], sums[1, 0], share, flip)
        _sum_groups(sums[0, 1], sums[1, 1], flip, run, new_sx)
        _sum_groups(sums[0, 2], sums[1, 2], flip, run, new_sl)
        for u in range(sx.shape[0]):
            gain = new_sx[u] / new_sl[u] * new_sx[u]
            better = (gain > best[u]) & (new_sx[u] > ZERO)
            best[u] = gain if better else best[u]
            sx[u] = new_sx[u] if better else sx[u]
            sl[u] = new_sl[u] if better else sl[u]


# --- scales ----------------------------------------------------------------------------------------------------------


@kernel
def _level(step, inverse):
    """The stored scale whose 2 l + 1 is nearest to step * inverse."""
    level = np.rint(HALF * (step * inverse - ONE))
    level = level if level > ZERO else ZERO
    return level if level < TOP else TOP


@kernel
def _scales(sx, sl, ends, unit, D, L):
    """With the entries fixed, the best D [GROUP] and scales L [subs * GROUP]: minimum of sum s (s sl - 2 sx).

    The largest step is sent to each of `ends`, least squares gives each D, and once more after the best of them.
    """
    lanes = sx.shape[0]
    for g in range(GROUP):
        largest = ZERO
        for u in range(g, lanes, GROUP):
            step = sx[u] / sl[u]
            largest = step if step > largest else largest
        scale, best = ZERO, ZERO
        if largest > ZERO:
            for t in range(ends.shape[0] + 1):
                inverse = ends[t] / largest if t < ends.shape[0] else ONE / scale
                xl, ll = ZERO, ZERO
                for u in range(g, lanes, GROUP):
                    factor = TWO * _level(sx[u] / sl[u], inverse) + ONE
                    xl += factor * sx[u]
                    ll += factor * factor * sl[u]
                gain = xl / ll * xl
                if xl > ZERO and gain > best:
                    scale, best = xl / ll, gain
        D[g] = stored(scale, unit[g])
        inverse = ONE / D[g] if D[g] > ZERO else ZERO
        for u in range(g, lanes, GROUP):
            L[u] = _level(sx[u] / sl[u], inverse)


# --- the code book ---------------------------------------------------------------------------------------------------


@kernel
def _tables(X, W, step, delta, limit, T):
    """Costs of the 81 quadruples of numbers of a group's first and last four weights: int16 T [2, 81, LANES].

    Costs are counted from each weight's cheapest number, in units of 1 / (step * limit). One above MOST counts as that:
    a weight so important has its cheapest number in any case, and the others keep their digits.
    """
    E = np.empty((8, 3, LANES), np.int16)
    P = np.empty((2, 9, LANES), np.int16)
    up, down = ONE + TWO * delta, ONE - TWO * delta
    for i in range(8):
        for j in range(LANES):
            wu = W[i, j] * limit[j]
            plus = wu * (step[j] * up - TWO * X[i, j])
            minus = wu * (step[j] * down + TWO * X[i, j])
            least = plus if plus < minus else minus
            least = least if least < ZERO else ZERO
            zero = -least
            plus -= least
            minus -= least
            zero = zero if zero < MOST else MOST
            plus = plus if plus < MOST else MOST
            minus = minus if minus < MOST else MOST
            E[i, 0, j] = np.int16(np.int32(minus))
            E[i, 1, j] = np.int16(np.int32(zero))
            E[i, 2, j] = np.int16(np.int32(plus))
    for h in range(2):
        for p in range(2):
            for c in range(9):
                for j in range(LANES):
                    P[p, c, j] = E[4 * h + 2 * p, c // 3, j] + E[4 * h + 2 * p + 1, c % 3, j]
        for c in range(81):
            for j in range(LANES):
                T[h, c, j] = P[0, c // 9, j] + P[1, c % 9, j]


@kernel
def _cheapest_rows(T, first, second, which):
    """Per lane the row of the book with the cheapest entry, the first of equals: int16 [LANES]."""
    least = np.empty(LANES, np.int16)
    least[:] = np.int16(32767)
    which[:] = np.int16(0)
    lanes = T.shape[2]  # not LANES: unrolled by a known count, the loop comes out slower
    for r in range(first.shape[0]):
        t = T[0, first[r]]
        a, b, c, d = T[1, second[r, 0]], T[1, second[r, 1]], T[1, second[r, 2]], T[1, second[r, 3]]
        e, f, g, h = T[1, second[r, 4]], T[1, second[r, 5]], T[1, second[r, 6]], T[1, second[r, 7]]
        row = np.int16(r)
        for j in range(lanes):
            p, q = min(min(a[j], b[j]), min(c[j], d[j])), min(min(e[j], f[j]), min(g[j], h[j]))
            cost = np.int16(min(p, q) + t[j])
            # a mask, since a conditional store of 16 bits keeps AVX2 from taking the loop
            better = np.int16(-np.int16(cost < least[j]))
            least[j] = min(cost, least[j])
            which[j] = which[j] ^ ((which[j] ^ row) & better)


@kernel
def _nearest(X, W, step, delta, limit, book, found, out):
    """Per lane the best entry of the book; out as in _round."""
    T = np.empty((2, 81, LANES), np.int16)
    which = np.empty(LANES, np.int16)
    trits = np.empty(LANES, np.uint16)
    A = np.empty((3, LANES), np.float32)
    size, sxl, sll = A[0], A[1], A[2]
    _tables(X, W, step, delta, limit, T)
    _cheapest_rows(T, book.first, book.second, which)
    for j in range(LANES):
        row, place, least = which[j], 0, np.int16(32767)
        for i in range(8):
            value = T[1, book.second[row, i], j]
            if value < least:
                least, place = value, i
        found[j] = book.entry[row, place]
        trits[j] = book.trits[found[j]]
        size[j] = step[j]
        sxl[j] = ZERO
        sll[j] = ZERO
    for i in range(8):
        for j in range(LANES):
            level = np.float32(np.int32(trits[j] >> np.uint16(2 * i)) & np.int32(3)) - ONE + delta
            wl = W[i, j] * level
            sxl[j] += wl * X[i, j]
            sll[j] += wl * level
    for j in range(LANES):
        out[0, j] = size[j] * (size[j] * sll[j] - TWO * sxl[j])
        out[1, j] = sxl[j]
        out[2, j] = sll[j]


@kernel
def _choose(X, W, run, share, D, L, neighbours, book, found, signs, sx, sl):
    """For each sub-block the best of its scale and `neighbours` on either side, with both deltas; L becomes it.

    Out: found uint16, signs uint8 [LANES]; sx, sl [subs * GROUP], least squares' sums.
    """
    A = np.empty((4, LANES), np.float32)
    sw, swx, step, limit = A[0], A[1], A[2], A[3]
    sums = np.empty((2, 3, LANES), np.float32)
    entry = np.empty((2, LANES), np.uint16)
    flip = np.empty(LANES, np.bool_)
    B = np.empty((7, 32 // run * GROUP), np.float32)
    middle, level, size, cost, best, new_sx, new_sl = B[0], B[1], B[2], B[3], B[4], B[5], B[6]
    sw[:] = ZERO
    swx[:] = ZERO
    for i in range(8):
        for j in range(LANES):
            sw[j] += W[i, j]
            swx[j] += abs(W[i, j] * X[i, j])
    for u in range(L.shape[0]):
        middle[u] = L[u]
        best[u] = INFINITY
    for k in range(-neighbours, neighbours + 1):
        for s in range(L.shape[0] // GROUP):
            for g in range(GROUP):
                u = s * GROUP + g
                level[u] = min(max(middle[u] + np.float32(k), ZERO), TOP)
                size[u] = D[g] * (TWO * level[u] + ONE)
        _to_groups(size, run, step)
        for j in range(LANES):
            limit[j] = LIMIT / max(step[j] * sw[j] + swx[j], TINY)
        for side in range(2):
            _nearest(X, W, step, -DELTA if side else DELTA, limit, book, entry[side], sums[side])
        _cheaper(sums[0, 0], sums[1, 0], share, flip)
        _sum_groups(sums[0, 1], sums[1, 1], flip, run, new_sx)
        _sum_groups(sums[0, 2], sums[1, 2], flip, run, new_sl)
        for u in range(L.shape[0]):
            cost[u] = size[u] * (size[u] * new_sl[u] - TWO * new_sx[u])
        for s in range(32):
            for g in range(GROUP):
                j, u = s * GROUP + g, s // run * GROUP + g
                if cost[u] < best[u]:
                    found[j] = entry[1, j] if flip[j] else entry[0, j]
                    signs[j] = np.uint8(flip[j])
        for u in range(L.shape[0]):
            if cost[u] < best[u]:
                best[u], L[u], sx[u], sl[u] = cost[u], level[u], new_sx[u], new_sl[u]


@kernel
def fit(x, w, run, share, starts, refinements, ends, passes, book, entries, signs, levels, d):
    """Choose everything a block stores.

    x float32 [blocks, 256]; w float32 [blocks of a row, 256], the importance; run, share: groups that share a scale, a
    delta; the rest as in Search. Out: entries uint16, signs uint8 [blocks, 32]; levels uint8 [blocks, 32 / run]; d
    uint16 [blocks], bits of half floats.
    """
    lanes = 32 // run * GROUP
    X = np.empty((8, LANES), np.float32)
    W = np.empty((8, LANES), np.float32)
    found = np.empty(LANES, np.uint16)
    sign = np.empty(LANES, np.uint8)
    B = np.empty((3, lanes), np.float32)
    sx, sl, L = B[0], B[1], B[2]
    C = np.empty((3, GROUP), np.float32)
    unit, D, best = C[0], C[1], C[2]
    for begin in range(0, x.shape[0], GROUP):
        load(x, w, begin, 8, X, W, unit)
        best[:] = INFINITY
        _start(X, W, run, share, starts, refinements, sx, sl)
        for t in range(passes.shape[0] + 1):
            if t:
                _choose(X, W, run, share, D, L, passes[t - 1], book, found, sign, sx, sl)
            _scales(sx, sl, ends, unit, D, L)
            if t == 0:
                continue
            for g in range(min(GROUP, x.shape[0] - begin)):
                total = ZERO
                for u in range(g, lanes, GROUP):
                    step = D[g] * (TWO * L[u] + ONE)
                    total += step * (step * sl[u] - TWO * sx[u])
                if total < best[g]:
                    best[g] = total
                    b = begin + g
                    d[b] = half(D[g] / unit[g])
                    for s in range(32):
                        entries[b, s] = found[s * GROUP + g]
                        signs[b, s] = sign[s * GROUP + g]
                    for s in range(32 // run):
                        levels[b, s] = np.uint8(L[s * GROUP + g])
