"""Twin of dynq.kernels.feedback_books: all rows at once, in float32 and in the same order: the choices are the same."""

import numpy as np

from dynq.kernels.feedback import TINY
from dynq.kernels.nearest import LIMIT, MASK, NUMBER

F = np.float32


def choose(
    w: np.ndarray,
    P: np.ndarray,
    R: np.ndarray,
    step: np.ndarray,
    offset: np.ndarray,
    dim: int,
    book: np.ndarray,
    values: np.ndarray,
    signs: int,
    apart: bool,
    keep: bool,
    E: np.ndarray,
    codes: np.ndarray,
    best: np.ndarray,
) -> None:
    """As the kernel: minimise |e R + P|^2, e = w - (step * v + offset), eight weights at a time, per candidate."""
    with np.errstate(all="ignore"):
        least = _squares(_columns(E, P, R, 0)) if keep else np.full(w.shape[1], np.inf, F)
        best[:] = -1
        for k, (s, o) in enumerate(zip(step, offset, strict=True)):
            e, q, cost = np.zeros_like(w), np.empty(w.shape, np.uint8), np.zeros(w.shape[1], F)
            for a in range(0, len(w), 8):
                own = slice(a, a + 8)
                reach = P[own].copy()
                for p in range(a):
                    reach += e[p] * R[p, own, None]
                near = np.full(w.shape[1], np.inf, F)
                for side, shift in enumerate([o, -o] if apart else [o]):
                    v = _eight(w[own], reach, R[own, own], s, shift, dim, book, values, signs)
                    miss = w[own] - (s * v + shift)
                    error = _squares(_columns(miss, reach, R[own, own], 0))
                    better = (error < near) | (side == 0)
                    near, e[own] = np.where(better, error, near), np.where(better, miss, e[own])
                    q[own] = np.where(better, _codes(v, book, signs, shift * s > 0), q[own])
                cost += near
            better = cost < least
            least, best[:] = np.where(better, cost, least), np.where(better, k, best)
            E[:], codes[:] = np.where(better, e, E), np.where(better, q, codes)


def _columns(e: np.ndarray, P: np.ndarray, R: np.ndarray, first: int) -> np.ndarray:
    """e R + P of all columns, e's errors being those of the columns from `first` on."""
    out = P.copy()
    for p, errors in enumerate(e):
        for i in range(first + p, len(P)):
            out[i] += errors * R[first + p, i]
    return out


def _squares(columns: np.ndarray) -> np.ndarray:
    total = np.zeros(columns.shape[1:], F)
    for column in columns:
        total += column * column
    return total


def _eight(
    x: np.ndarray,
    reach: np.ndarray,
    R: np.ndarray,
    s: np.ndarray,
    shift: np.ndarray,
    dim: int,
    book: np.ndarray,
    values: np.ndarray,
    signs: int,
) -> np.ndarray:
    """The values chosen for eight weights, with their signs: float32 [8, rows]."""
    sign = np.zeros_like(x) if signs else np.ones_like(x)
    if signs == 2:
        _, turn = _round(x, reach, R, s, shift, book, sign)
        odd = np.flatnonzero((sign < 0).sum(0) % 2)
        sign[turn[:, odd].argmin(0), odd] *= -1
    v = np.empty_like(x)
    for first in range(0, 8, dim):
        own = slice(first, first + dim)
        number, _ = _round(x[own], reach[own], R[own, own], s, shift, book, sign[own])
        # [rows, candidates, dim]
        near = values[number].reshape(len(number), -1, dim, 16).swapaxes(2, 3).reshape(len(number), -1, dim).astype(F)
        e = (x[own] - shift).T[:, None] - (s * sign[own]).T[:, None] * near
        start = np.broadcast_to(reach[own, :, None], (dim, *e.shape[:2]))
        error = _squares(_columns(np.moveaxis(e, 2, 0), start, R[own, own], 0))
        keys = error.view(np.int32) & MASK | np.arange(near.shape[1], dtype=np.int32)
        v[own] = sign[own] * near[np.arange(len(near)), keys.min(1) & NUMBER].T
        reach = _columns((x - (s * v + shift))[own], reach, R, first)
    return v


def _round(
    x: np.ndarray, r: np.ndarray, R: np.ndarray, s: np.ndarray, shift: np.ndarray, book: np.ndarray, sign: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """Numbers of the rounded points and what turning signs costs; a sign that is 0 is chosen."""
    top = F(len(book) - 1)
    per = top / (book[-1] - book[0])
    scale = np.where(np.abs(s) > TINY, F(1) / s, F(0))
    number, turn, e = np.zeros(x.shape[1], np.int64), np.empty_like(x), np.empty_like(x)
    for i in range(len(x)):
        reach = r[i].copy()
        for p in range(i):
            reach += e[p] * R[p, i]
        target = (x[i] - shift + reach * (F(1) / R[i, i])) * scale
        sign[i] = np.where(sign[i] == 0, np.where(target < 0, F(-1), F(1)), sign[i])
        q = np.clip(np.rint((np.minimum(target * sign[i], LIMIT) - book[0]) * per), F(0), top)
        number += len(book) ** i * q.astype(np.int64)
        value = book[0] + q / per
        e[i] = x[i] - (s * (sign[i] * value) + shift)
        turn[i] = R[i, i] * R[i, i] * (np.abs(target) * value)
    return number, turn


def _codes(v: np.ndarray, book: np.ndarray, signs: int, positive: np.ndarray) -> np.ndarray:
    if not signs:
        return (2 * (v - book[0]) + positive).astype(np.uint8)
    digit = np.rint((np.abs(v) - book[0]) * (F(len(book) - 1) / (book[-1] - book[0])))
    return np.where(v < 0, len(book) - 1 - digit, len(book) + digit).astype(np.uint8)
