"""Twin of dynq.kernels.feedback: all rows at once, in float32 and in the same order, so the choices are the same."""

import numpy as np

from dynq.kernels.feedback import TINY

F = np.float32


def choose(
    w: np.ndarray,
    P: np.ndarray,
    R: np.ndarray,
    step: np.ndarray,
    offset: np.ndarray,
    levels: np.ndarray,
    keep: bool,
    E: np.ndarray,
    codes: np.ndarray,
    best: np.ndarray,
) -> None:
    """As the kernel: minimise |e R + P|^2, e = w - (step * levels[code] + offset), column by column, per candidate."""
    with np.errstate(all="ignore"):
        least = np.zeros(w.shape[1], F) if keep else np.full(w.shape[1], np.inf, F)
        for j in range(len(w) if keep else 0):
            least += _reach(E[: j + 1], P, R, j) ** 2
        best[:] = -1
        start = E.copy()
        for k, (s, o) in enumerate(zip(step, offset, strict=True)):
            e, q, cost = np.empty_like(start), np.empty(start.shape, np.uint8), np.zeros(w.shape[1], F)
            inverse = np.where(np.abs(s) > TINY, F(1) / s, F(0))
            for j in range(len(w)):
                r = _reach(e[:j], P, R, j)
                target = (w[j] + r * (F(1) / R[j, j]) - o) * inverse
                q[j] = nearest(target, levels)
                e[j] = w[j] - (s * levels[q[j]] + o)
                cost += (r + R[j, j] * e[j]) ** 2
            better = cost < least
            least, best[:] = np.where(better, cost, least), np.where(better, k, best)
            E[:], codes[:] = np.where(better, e, E), np.where(better, q, codes)


def _reach(e: np.ndarray, P: np.ndarray, R: np.ndarray, j: int) -> np.ndarray:
    """Component j of e R + P from the errors of the columns in e."""
    r = P[j].copy()
    for i in range(len(e)):
        r += e[i] * R[i, j]
    return r


def nearest(target: np.ndarray, levels: np.ndarray) -> np.ndarray:
    """Index of the level nearest to each target; where levels are one apart, halves go to the even level."""
    if (np.diff(levels) == 1).all():
        return (np.clip(np.rint(target), levels[0], levels[-1]) - levels[0]).astype(np.uint8)
    return (F(2) * target[..., None] > levels[:-1] + levels[1:]).sum(-1)
