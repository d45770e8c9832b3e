"""The multiple-choice knapsack: one choice for each item, the sum of bytes bounded, the sum of losses smallest."""

import itertools
import math
from collections.abc import Sequence

import numpy as np
import numpy.typing as npt

_MAX_STATES = 4_000


def choose(
    bytes_: Sequence[npt.ArrayLike], loss: Sequence[npt.ArrayLike], budget: int, *, exact: bool = True
) -> list[int]:
    """The index of one choice per item, with the smallest total loss whose total bytes stay within `budget`.

    bytes_[i], loss[i]: bytes (int) and loss (float, finite) of each choice of item i; the lengths may differ.
    exact: False leaves out the search at the end, most of the time it takes; for a slider that is still moving.
    ValueError if even the smallest choices do not fit.

    Method: Lagrangian relaxation (each item takes the smallest of loss + lambda * bytes, which walks its convex hull),
    lambda by bisection; greedy filling of what is left; then the few choices whose reduced cost does not exceed the
    gap between the two are searched by dynamic programming over undominated (bytes, loss) states, as in D. Pisinger,
    "A minimal algorithm for the multiple-choice knapsack problem", EJOR 83 (1995). The result is optimal to about
    1e-9 of the loss, unless more than 4,000 states of one stage survive, where the most promising are kept.
    Being optimal it is monotone in the budget, and what is left over is less than the smallest step that would help.
    """
    n = len(bytes_)
    if n == 0:
        return []
    rows = [(np.asarray(b), np.asarray(x)) for b, x in zip(bytes_, loss, strict=True)]
    width = max(len(b) for b, _ in rows)
    size = np.full((n, width), np.iinfo(np.int64).max // (4 * n), dtype=np.int64)
    cost = np.full((n, width), np.inf)
    for i, (b, x) in enumerate(rows):
        size[i, : len(b)] = b
        cost[i, : len(b)] = x
    if size.min(axis=1).sum() > budget:
        raise ValueError(f"the smallest choices need {size.min(axis=1).sum()} bytes, more than {budget}")
    # Fewest bytes first, then least loss: argmin then takes the smallest of equal choices.
    order = np.lexsort((cost, size), axis=1)
    size, cost = np.take_along_axis(size, order, 1), np.take_along_axis(cost, order, 1)
    picked = _solve(size, cost, int(budget), exact)
    return [int(order[i, j]) for i, j in enumerate(picked)]


def _solve(
    size: npt.NDArray[np.int64], cost: npt.NDArray[np.float64], budget: int, exact: bool
) -> npt.NDArray[np.int64]:
    rows = np.arange(len(size))
    picked = cost.argmin(axis=1)
    if size[rows, picked].sum() <= budget:
        return picked
    # A choice that costs more bytes and no less loss than another is never taken.
    best_so_far = np.minimum.accumulate(cost, axis=1)
    cost = np.where(np.c_[np.zeros(len(cost), bool), cost[:, 1:] >= best_so_far[:, :-1]], np.inf, cost)

    multiplier, picked = _bisect(size, cost, budget)
    penalised = cost + multiplier * size
    reduced = penalised - penalised[rows, picked][:, None]
    start = picked
    picked = _fill(size, cost, picked, budget)
    if not exact:
        return picked
    # How much better than `picked` any solution can be: the duality gap.
    gap = float(reduced[rows, picked].sum() + multiplier * (budget - size[rows, picked].sum()))
    return _search(size, reduced, multiplier, start, picked, gap, budget)


def frontier(
    bytes_: Sequence[npt.ArrayLike], loss: Sequence[npt.ArrayLike]
) -> tuple[npt.NDArray[np.int64], npt.NDArray[np.float64]]:
    """The lower convex hull of all (total bytes, total loss): int64 and float64 ``[n]``, from the smallest size on.

    Each corner is what `choose` finds for its bytes; between two no choice lies below the line. The steps are those of
    every item's own hull, in the order of loss saved per byte.
    """
    steps: list[tuple[float, int, float]] = []  # loss saved per byte, bytes, loss saved
    start, least = 0, 0.0
    for sizes, losses in zip(bytes_, loss, strict=True):
        hull: list[tuple[int, float]] = []
        for size, cost in sorted(zip(np.asarray(sizes).tolist(), np.asarray(losses).tolist(), strict=True)):
            if hull and cost >= hull[-1][1]:
                continue
            while len(hull) > 1:
                (x0, y0), (x1, y1) = hull[-2:]
                if (y0 - y1) * (size - x1) > (y1 - cost) * (x1 - x0):
                    break
                hull.pop()
            hull.append((size, cost))
        start, least = start + hull[0][0], least + hull[-1][1]
        steps += [((y0 - y1) / (x1 - x0), x1 - x0, y0 - y1) for (x0, y0), (x1, y1) in itertools.pairwise(hull)]
    steps.sort(key=lambda step: -step[0])
    # losses from the smallest up: as differences from the largest they would drown in its rounding
    saved = np.cumsum([least, *(step[2] for step in reversed(steps))])[::-1]
    return np.cumsum([start, *(step[1] for step in steps)], dtype=np.int64), saved


def _bisect(
    size: npt.NDArray[np.int64], cost: npt.NDArray[np.float64], budget: int
) -> tuple[float, npt.NDArray[np.int64]]:
    """The smallest multiplier (loss per byte), to floating point, whose unconstrained choice fits; and that choice."""
    rows = np.arange(len(size))

    def at(multiplier: float) -> npt.NDArray[np.int64]:
        return (cost + multiplier * size).argmin(axis=1)

    low, high = 0.0, 1e-12
    while size[rows, at(high)].sum() > budget:
        low, high = high, high * 64
    picked = at(high)
    while high - low > 1e-12 * high:
        middle = math.sqrt(low * high) if low > 0 and high > 4 * low else (low + high) / 2
        trial = at(middle)
        if size[rows, trial].sum() <= budget:
            high, picked = middle, trial
        else:
            low = middle
    return high, picked


def _fill(
    size: npt.NDArray[np.int64], cost: npt.NDArray[np.float64], picked: npt.NDArray[np.int64], budget: int
) -> npt.NDArray[np.int64]:
    """Spend the bytes left on single exchanges, the one with the most loss saved per byte first, until none fits."""
    rows, picked = np.arange(len(size)), picked.copy()
    left = budget - int(size[rows, picked].sum())
    while True:
        step = size - size[rows, picked][:, None]
        saved = cost[rows, picked][:, None] - cost
        useful = (step <= left) & (saved > 0)
        if not useful.any():
            return picked
        rate = np.where(useful, saved / np.maximum(step, 1), 0.0)
        i, j = np.unravel_index(rate.argmax(), rate.shape)
        left -= int(step[i, j])
        picked[i] = j


def _search(
    size: npt.NDArray[np.int64],
    reduced: npt.NDArray[np.float64],
    multiplier: float,
    start: npt.NDArray[np.int64],
    picked: npt.NDArray[np.int64],
    gap: float,
    budget: int,
) -> npt.NDArray[np.int64]:
    """Dynamic programming over the choices that could still close the gap.

    A state is a set of exchanges away from `start`: (bytes over start's, sum of reduced costs). Its loss above the
    lower bound is that sum plus multiplier * bytes left, so a state whose sum reaches the gap is dropped.
    """
    rows = np.arange(len(size))
    left = budget - int(size[rows, start].sum())
    slight = 1e-12 * abs(gap)
    open_ = (reduced < gap - slight) & np.isfinite(reduced)
    open_[rows, start] = False
    items = np.flatnonzero(open_.any(axis=1))
    items = items[np.argsort(np.where(open_, reduced, np.inf).min(axis=1)[items], kind="stable")]
    step = {i: size[i, open_[i]] - size[i, start[i]] for i in items.tolist()}
    # The most that the items not yet looked at can still release or take up.
    release = np.array([min(0, x.min()) for x in step.values()] + [0], dtype=np.int64)[::-1].cumsum()[::-1]
    take_up = np.array([max(0, x.max()) for x in step.values()] + [0], dtype=np.int64)[::-1].cumsum()[::-1]

    used, total = np.zeros(1, np.int64), np.zeros(1)
    trail: list[tuple[npt.NDArray[np.int64], npt.NDArray[np.int64]]] = []  # per item: each state's parent, its choice
    for stage, item in enumerate(items.tolist()):
        choices = np.r_[start[item], np.flatnonzero(open_[item])]
        new_used = (used[None] + np.r_[0, step[item]][:, None]).ravel()
        new_total = (total[None] + reduced[item, choices][:, None]).ravel()

        # Each state, with start's choices for the rest, is a solution if it fits.
        value = np.where(new_used <= left, new_total + multiplier * (left - new_used), np.inf)
        k = int(value.argmin())
        if float(value[k]) < gap - slight:
            gap = float(value[k])
            picked = start.copy()
            picked[item], state = choices[k // len(used)], k % len(used)
            for earlier in range(stage - 1, -1, -1):
                parents, chosen = trail[earlier]
                picked[items[earlier]], state = chosen[state], int(parents[state])

        bound = new_total + multiplier * np.maximum(left - new_used - take_up[stage + 1], 0)
        keep = np.flatnonzero((bound < gap - slight) & (new_used + release[stage + 1] <= left))
        # Undominated: in the order of bytes, only those with less loss than all before.
        loss = (new_total - multiplier * new_used)[keep]
        order = np.lexsort((loss, new_used[keep]))
        lowest = np.minimum.accumulate(loss[order])
        keep = keep[order[np.r_[True, lowest[1:] < lowest[:-1]][: len(order)]]]
        if len(keep) > _MAX_STATES:
            keep = keep[np.argsort(new_total[keep], kind="stable")[:_MAX_STATES]]
        if not len(keep):
            break
        trail.append((keep % len(used), choices[keep // len(used)]))
        used, total = new_used[keep], new_total[keep]
    return picked
