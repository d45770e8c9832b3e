"""Error feedback on the rows of one matrix, for one H: the walk, the sweeps and least squares of dynq.feedback."""

from collections.abc import Callable
from dataclasses import dataclass
from typing import NamedTuple

import numpy as np
from scipy.linalg import solve_triangular

from dynq import codec, formats
from dynq.errors import DynqError
from dynq.kernels import feedback, feedback_books, scales
from dynq.kernels.arrays import Array, beside, dense, double, host, namespace, single

SWEEPS = 3
PANEL = 256  # columns between two large matrix products
F = np.float32


class Choose(NamedTuple):
    """Who chooses codes: of each weight, of weights that take one entry of a code book. The kernels or their twins."""

    codes: Callable[..., None]
    entries: Callable[..., None]


KERNELS = Choose(feedback.choose, feedback_books.choose)


def on_card() -> Choose:
    """The kernels for torch tensors."""
    from dynq.kernels import feedback_card

    return Choose(feedback_card.choose_codes, feedback_card.choose_entries)


def shrunk(h: Array, shrinkage: float) -> Array:
    """(1 - a) H + a diag H, scaled to a mean diagonal of 1; channels never seen weigh 1e-6 of that."""
    diagonal, own = h.diagonal(), namespace(h).arange(len(h))
    out = h * ((1 - shrinkage) / diagonal.mean())
    out[own, own] = diagonal / diagonal.mean() + 1e-6
    return out


@dataclass(frozen=True)
class Metric:
    """A positive definite H float32 [n, n] in the forms that the steps need; of NumPy or of torch.

    R upper triangular, H = R R^T, float64; of the groups' own blocks of H: root likewise [groups, g, g], and its
    inverse, float32.
    """

    H: Array
    R: Array
    root: Array
    inverse: Array

    @classmethod
    def of(cls, h: Array, group: int) -> "Metric":
        xp = namespace(h)
        own = xp.stack([h[i : i + group, i : i + group] for i in range(0, len(h), group)])
        root = upper(own)
        return cls(single(h), upper(h), single(root), single(xp.linalg.inv(root)))


def upper(h: Array) -> Array:
    """R upper triangular with H = R R^T."""
    xp, both = namespace(h), (-2, -1)
    try:
        return dense(xp.flip(xp.linalg.cholesky(xp.flip(h, both)), both))
    except xp.linalg.LinAlgError:
        raise DynqError("a Hessian is no sum of x x^T: it has a negative eigenvalue") from None


def encode_rows(weights: np.ndarray, form: scales.Grid, metric: Metric, choose: Choose = KERNELS) -> np.ndarray:
    """Walk and sweeps over some rows [rows, n]: uint8 [rows, row_bytes]. All is done where the metric's arrays are."""
    exponent = np.frexp(np.abs(weights).max(axis=1))[1]
    unit = np.ldexp(F(1), np.clip(-exponent, -126, 126)).astype(F)
    rows = np.ascontiguousarray((weights * unit[:, None]).T), unit, np.zeros(weights.T.shape, np.uint8), form.levels
    w, unit, codes, levels = (beside(x, metric.H) for x in rows)
    start = scales.Scales.empty(form, len(w), unit)
    state = State(w, form, levels, metric, start, namespace(w).zeros_like(w), codes)
    state.walk(choose)
    for _ in range(SWEEPS):
        state.sweep(choose)
    out = np.empty((len(weights), formats.row_bytes(form.name, len(w))), np.uint8)
    scales.write(form, state.scales, state.codes, out)
    return out


@dataclass
class State:
    """Rows on their way: w float32 [n, rows] scaled, E their errors w - what so far, codes uint8 [n, rows]."""

    w: Array
    form: scales.Grid
    levels: Array
    metric: Metric
    scales: scales.Scales
    E: Array
    codes: Array

    def walk(self, choose: Choose) -> None:
        """Step 1. Its products are of float64, as one rounding that goes another way changes all that follows."""
        R, n = self.metric.R, len(self.w)
        block, group = self.form.block, self.form.group
        for start in range(0, n, PANEL):
            panel = slice(start, min(start + PANEL, n))
            carried = R[:start, panel].T @ double(self.E[:start])
            for first in range(start, panel.stop, group):
                own = slice(first, first + group)
                if first % block == 0:
                    self._start(slice(first, first + block), carried[first - start : first - start + block], start)
                P = carried[first - start : first - start + group] + self._near(own, start)
                self._choose(choose, first // group, single(P), single(R[own, own]), self.form.reach[0], keep=False)

    def _near(self, own: slice, panel: int) -> Array:
        """What the errors since the panel's first column add to columns of E R."""
        before = slice(panel, own.start)
        return self.metric.R[before, own].T @ double(self.E[before])

    def _start(self, own: slice, carried: Array, panel: int) -> None:
        """Scales of one block, from the plain encoding of the weights that make up for the errors so far."""
        R, form = self.metric.R, self.form
        target = self.w[own] + single(_solve(R[own, own].T, carried + self._near(own, panel)))
        x = np.ascontiguousarray(host((target / self.scales.unit).T))
        x = np.clip(x, np.finfo(F).min, np.finfo(F).max)
        threads = 1 if isinstance(R, np.ndarray) else None  # one of several over rows, or alone
        data = codec.quantize(x, form.name, host(R.diagonal()[own] ** 2), threads=threads)
        d, dmin, ls, lm = (beside(x, R) for x in scales.read(form.name, data))
        b, groups = own.start // form.block, slice(own.start // form.group, own.stop // form.group)
        self.scales.d[b], self.scales.dmin[b] = d * self.scales.unit, dmin * self.scales.unit
        self.scales.ls[groups], self.scales.lm[groups] = ls, lm

    def _choose(self, choose: Choose, group: int, P: Array, R: Array, reach: int, *, keep: bool) -> None:
        form, own = self.form, slice(group * self.form.group, (group + 1) * self.form.group)
        a, m, step, offset = self.scales.candidates(form, group, reach)
        xp = namespace(self.w)
        best = xp.zeros_like(self.codes[0], dtype=xp.int64)
        E, codes = self.E[own], self.codes[own]
        P, R, step, offset = (dense(x) for x in (P, R, step, offset))
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
                before = E[own] + 0
                rest = G[first - start : first - start + group] - H[own, own] @ before
                P = self.metric.inverse[i] @ rest
                self._choose(choose, i, P, self.metric.root[i], self.form.reach[1], keep=True)
                G += H[panel, own] @ (E[own] - before)
            if not self.form.free:
                for first in range(start, panel.stop, self.form.block):
                    self._refit(
                        slice(first, first + self.form.block), G[first - start : first - start + self.form.block]
                    )

    def _refit(self, own: slice, G: Array) -> None:
        """Step 3 for one super-block: what = d S - dmin M, codes fixed."""
        form, s, xp = self.form, self.scales, namespace(G)
        b, groups = own.start // form.block, slice(own.start // form.group, own.stop // form.group)
        H, E = self.metric.H[own, own], self.E[own]

        def dot(one: Array, other: Array) -> Array:
            return xp.einsum("jr,jr->r", one, other)

        def spread(levels: Array) -> Array:  # from groups to their weights
            return xp.broadcast_to(levels[:, None], (len(levels), form.group, levels.shape[1])).reshape(E.shape)

        S = spread(s.ls[groups]) * self.levels[xp.asarray(self.codes[own], dtype=xp.int64)]
        HS = H @ S
        ss, sg = dot(S, HS), dot(S, G)
        with np.errstate(all="ignore"):
            if form.affine:
                M = spread(s.lm[groups])
                HM = H @ M
                sm, mm, mg = dot(M, HS), dot(M, HM), dot(M, G)
                determinant = ss * mm - sm * sm
                d = s.stored(s.d[b] + (mm * sg - sm * mg) / determinant)
                dmin = s.stored(s.dmin[b] + (sm * sg - ss * mg) / determinant)
                usable = (determinant > 1e-5 * ss * mm) & (d >= 0) & (dmin >= 0)
                change = (dmin - s.dmin[b]) * M - (d - s.d[b]) * S
            else:
                d, dmin = s.stored(s.d[b] + sg / ss), s.dmin[b]
                usable = ss > 0
                change = (s.d[b] - d) * S
            change = xp.where(usable, change, 0.0)
        gain = dot(change, H @ change + 2 * G)
        better = usable & (gain < 0)
        change = xp.where(better, change, 0.0)
        s.d[b], s.dmin[b] = xp.where(better, d, s.d[b]), xp.where(better, dmin, s.dmin[b])
        E += change
        G += H @ change


def _solve(lower: Array, right: Array) -> Array:
    """x where lower x = right, lower triangular."""
    if isinstance(lower, np.ndarray):
        return solve_triangular(lower, right, lower=True, check_finite=False)
    return namespace(lower).linalg.solve_triangular(lower, right, upper=False)
