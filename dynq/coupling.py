"""Rows of a matrix that make up for each other's errors.

Error feedback looks at each output of a layer alone; what the model makes of them depends on all together. Let g be
the gradient of the log-likelihood at the outputs, G = E[g g^T]. With the inputs' H an error D of the matrix then costs
``tr(G D H D^T)``: K-FAC (Martens and Grosse 2015), for rounding YAQA (Tseng, Sun and De Sa 2025, "Model-Preserving
Adaptive Rounding"). Let ``G = R R^T``, R upper triangular. Row j of ``R^T D`` holds the errors of rows up to j only,
so rows can be encoded from the top, each aiming at what makes up for those above it:

    w_j + (sum of R_ij e_i over the rows i above j) / R_jj,    e_i = w_i - what_i

whatever H is: the walk of `dynq.feedback` over columns, turned by a right angle, with all of that inside. Here a band
of rows takes its turn at a time, for rows are encoded side by side; inside a band they do not know of each other.
"""

from collections.abc import Callable
from itertools import pairwise

import numpy as np
from scipy.linalg import solve_triangular

from dynq.compensate import shrunk, upper

SHRINKAGE = (0.7, 0.5, 0.35, 0.2, 0.1)  # of G: the largest that errs at most `TOLERANCE` more than the best
TOLERANCE = 0.01
BANDS, ROWS = 16, 32  # bands of a matrix at most, rows of a band at least
GAIN = 0.999  # of the error without coupling, at most, on what is kept aside
F = np.float32


def factor(fit: np.ndarray, aside: np.ndarray) -> np.ndarray | None:
    """R float64 [rows, rows] of both, shrunk by what serves the gradients kept aside; None where nothing does.

    fit, aside: sums of |x|^2 g g^T [rows, rows] over tokens of different passages. Where they are not finite nothing
    is coupled.
    """
    fit, aside = fit.astype(np.float64), aside.astype(np.float64)
    if not all(np.isfinite(part).all() and part.diagonal().any() for part in (fit, aside)):
        return None
    expected = np.array([expected_error(fit, aside, shrinkage) for shrinkage in SHRINKAGE])
    best = expected.min()
    chosen = SHRINKAGE[int(np.argmax(expected <= (1 + TOLERANCE) * best))]
    return upper(shrunk(fit + aside, chosen)) if best < GAIN else None


def expected_error(fit: np.ndarray, aside: np.ndarray, shrinkage: float) -> float:
    """Error by one G of what is coupled by another, over that of rows alone, if each is rounded as coarsely.

    Row j of ``R^T D`` is R_jj times a rounding error z_j of its own, so ``D = R^-T diag(R) Z``.
    """
    R = upper(shrunk(fit, shrinkage))
    other = shrunk(aside, 0.0)
    spread = solve_triangular(R.T, np.diag(R.diagonal()), lower=True, check_finite=False)
    return float(((other @ spread) * spread).sum() / other.trace())


def encode(
    weights: np.ndarray,
    R: np.ndarray,
    encoded: Callable[[np.ndarray], np.ndarray],
    decoded: Callable[[np.ndarray], np.ndarray],
) -> np.ndarray:
    """uint8 [rows, row_bytes] of weights float32 [rows, n], band after band.

    encoded, decoded: between float32 [some rows, n] and bytes.
    """
    errors = np.zeros(weights.shape)
    out = []
    for band in bands(len(weights)):
        above = slice(0, band.start)
        shift = solve_triangular(R[band, band].T, R[above, band].T @ errors[above], lower=True, check_finite=False)
        aim = np.clip(weights[band] + shift, np.finfo(F).min, np.finfo(F).max)
        out.append(encoded(aim.astype(F)))
        errors[band] = weights[band] - decoded(out[-1])
    return np.concatenate(out)


def bands(rows: int) -> list[slice]:
    """Rows that are encoded side by side."""
    count = max(1, min(BANDS, rows // ROWS))
    edges = np.arange(count + 1) * rows // count
    return [slice(a, b) for a, b in pairwise(edges.tolist())]


def error(weights: np.ndarray, decoded: np.ndarray, G: np.ndarray, H: np.ndarray) -> float:
    """``tr(G D H D^T)`` in float64."""
    d = weights.astype(np.float64) - decoded
    return float(((G @ d @ H) * d).sum())
