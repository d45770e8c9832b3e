"""Error feedback on the rows of one matrix, for one H: the walk, the sweeps and least squares of dynq.feedback."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from dynq import codec, formats
from dynq.errors import DynqError
from dynq.kernels import feedback, feedback_books, scales

SWEEPS = 3
PANEL = 256  # columns between two large matrix products
F = np.float32


class Choose(NamedTuple):
    """Who chooses codes: of each weight, of weights that take one entry of a code book. The kernels or their twins."""

    codes: Callable[..., None]
    entries: Callable[..., None]


KERNELS = Choose(feedback.choose, feedback_books.choose)


def shrunk(h: np.ndarray, shrinkage: float) -> np.ndarray:
    """(1 - a) H + a diag H, scaled to a mean diagonal of 1; channels never seen weigh 1e-6 of that."""
    diagonal = h.diagonal()
    out = h * ((1 - shrinkage) / diagonal.mean())
    np.fill_diagonal(out, diagonal / diagonal.mean() + 1e-6)
    return out


@dataclass(frozen=True)
class Metric:
    """A positive definite H float32 [n, n] in the forms that the steps need.

    R upper triangular, H = R R^T; of the groups' own blocks of H: root likewise [groups, g, g], and its inverse.
    """

    H: np.ndarray
    R: np.ndarray
    root: np.ndarray
    inverse: np.ndarray

    @classmethod
    def of(cls, h: np.ndarray, group: int) -> "Metric":
        own = np.stack([h[i : i + group, i : i + group] for i in range(0, len(h), group)])
        root = _upper(own)
        return cls(h.astype(F), _upper(h).astype(F), root.astype(F), np.linalg.inv(root).astype(F))


def _upper(h: np.ndarray) -> np.ndarray:
    """R upper triangular with H = R R^T."""
    try:
        return np.ascontiguousarray(np.linalg.cholesky(h[..., ::-1, ::-1])[..., ::-1, ::-1])
    except np.linalg.LinAlgError:
        raise DynqError("a Hessian is no sum of x x^T: it has a negative eigenvalue") from None


def encode_rows(weights: np.ndarray, form: scales.Grid, metric: Metric, choose: Choose = KERNELS) -> np.ndarray:
    """Walk and sweeps over some rows [rows, n]: uint8 [rows, row_bytes]."""
    exponent = np.frexp(np.abs(weights).max(axis=1))[1]
    unit = np.ldexp(F(1), np.clip(-exponent, -126, 126)).astype(F)
    w = np.ascontiguousarray((weights * unit[:, None]).T)
    state = State(
        w, form, metric, scales.Scales.empty(form, len(w), unit), np.zeros_like(w), np.zeros(w.shape, np.uint8)
    )
    state.walk(choose)
    for _ in range(SWEEPS):
        state.sweep(choose)
    out = np.empty((len(weights), formats.row_bytes(form.name, len(w))), np.uint8)
    scales.write(form, state.scales, state.codes, out)
    return out


@dataclass
class State:
    """Rows on their way: w float32 [n, rows] scaled, E their errors w - what so far, codes uint8 [n, rows]."""

    w: np.ndarray
    form: scales.Grid
    metric: Metric
    scales: scales.Scales
    E: np.ndarray
    codes: np.ndarray

    def walk(self, choose: Choose) -> None:
        """Step 1."""
        R, E, (n, rows) = self.metric.R, self.E, self.w.shape
        block, group = self.form.block, self.form.group
        for start in range(0, n, PANEL):
            panel = slice(start, min(start + PANEL, n))
            carried = R[:start, panel].T @ E[:start] if start else np.zeros((panel.stop, rows), F)
            for first in range(start, panel.stop, group):
                own = slice(first, first + group)
                if first % block == 0:
                    self._start(slice(first, first + block), carried[first - start : first - start + block], start)
                P = carried[first - start : first - start + group]
                if first > start:
                    P = P + R[start:first, own].T @ E[start:first]
                self._choose(choose, first // group, P, R[own, own], self.form.reach[0], keep=False)

    def _start(self, own: slice, carried: np.ndarray, panel: int) -> None:
        """Scales of one block, from the plain encoding of the weights that make up for the errors so far."""
        R, form = self.metric.R, self.form
        P = carried
        if own.start > panel:
            P = P + R[panel : own.start, own].T @ self.E[panel : own.start]
        target = self.w[own] + solve_triangular(R[own, own].T, P, lower=True, check_finite=False)
        x = np.ascontiguousarray((target / self.scales.unit).T)
        x = np.clip(x, np.finfo(F).min, np.finfo(F).max)
        data = codec.quantize(x, form.name, R.diagonal()[own] ** 2, threads=1)
        d, dmin, ls, lm = scales.read(form.name, data)
        b, groups = own.start // form.block, slice(own.start // form.group, own.stop // form.group)
        self.scales.d[b], self.scales.dmin[b] = d * self.scales.unit, dmin * self.scales.unit
        self.scales.ls[groups], self.scales.lm[groups] = ls, lm

    def _choose(self, choose: Choose, group: int, P: np.ndarray, R: np.ndarray, reach: int, *, keep: bool) -> None:
        form, own = self.form, slice(group * self.form.group, (group + 1) * self.form.group)
        a, m, step, offset = self.scales.candidates(form, group, reach)
        best = np.empty(self.w.shape[1], np.int64)
        E, codes = self.E[own], self.codes[own]
        P, R, step, offset = (np.ascontiguousarray(x, F) for x in (P, R, step, offset))
        if form.book is not None:
            book = form.book
            allowed = book.dim, book.values, book.candidates, book.signs, book.apart
            choose.entries(self.w[own], P, R, step, offset, *allowed, keep, E, codes, best)
        else:
            choose.codes(self.w[own], P, R, step, offset, form.levels, keep, E, codes, best)
        self.scales.take(form, group, a, m, best)

    def sweep(self, choose: Choose) -> None:
        """Steps 2 and 3, panel by panel. G holds E H of the panel's columns."""
        H, E, n, group = self.metric.H, self.E, len(self.w), self.form.group
        for start in range(0, n, PANEL):
            panel = slice(start, min(start + PANEL, n))
            G = H[panel] @ E
            for first in range(start, panel.stop, group):
                own, i = slice(first, first + group), first // group
                before = E[own].copy()
                rest = G[first - start : first - start + group] - H[own, own] @ before
                P = self.metric.inverse[i] @ rest
                self._choose(choose, i, P, self.metric.root[i], self.form.reach[1], keep=True)
                G += H[panel, own] @ (E[own] - before)
            if not self.form.free:
                for first in range(start, panel.stop, self.form.block):
                    self._refit(
                        slice(first, first + self.form.block), G[first - start : first - start + self.form.block]
                    )

    def _refit(self, own: slice, G: np.ndarray) -> None:
        """Step 3 for one super-block: what = d S - dmin M, codes fixed."""
        form, s = self.form, self.scales
        b, groups = own.start // form.block, slice(own.start // form.group, own.stop // form.group)
        H, E = self.metric.H[own, own], self.E[own]
        S = np.repeat(s.ls[groups], form.group, axis=0) * form.levels[self.codes[own]]
        HS = H @ S
        ss, sg = np.einsum("jr,jr->r", S, HS), np.einsum("jr,jr->r", S, G)
        with np.errstate(all="ignore"):
            if form.affine:
                M = np.repeat(s.lm[groups], form.group, axis=0)
                HM = H @ M
                sm, mm = np.einsum("jr,jr->r", M, HS), np.einsum("jr,jr->r", M, HM)
                mg = np.einsum("jr,jr->r", M, G)
                determinant = ss * mm - sm * sm
                d = s.stored(s.d[b] + (mm * sg - sm * mg) / determinant)
                dmin = s.stored(s.dmin[b] + (sm * sg - ss * mg) / determinant)
                usable = (determinant > 1e-5 * ss * mm) & (d >= 0) & (dmin >= 0)
                change = (dmin - s.dmin[b]) * M - (d - s.d[b]) * S
            else:
                d, dmin = s.stored(s.d[b] + sg / ss), s.dmin[b]
                usable = ss > 0
                change = (s.d[b] - d) * S
            change = np.where(usable, change, F(0))
        gain = np.einsum("jr,jr->r", change, H @ change + 2 * G)
        better = usable & (gain < 0)
        change = np.where(better, change, F(0))
        s.d[b], s.dmin[b] = np.where(better, d, s.d[b]), np.where(better, dmin, s.dmin[b])
        E += change
        G += H @ change
