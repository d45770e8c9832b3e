"""Rows that make up for each other's errors: against the least squares that they stand for, and simulated rounding."""

import numpy as np
import pytest
from test_feedback import correlated, gaussian

from dynq import codec, coupling, feedback
from dynq.compensate import shrunk, upper

F = np.float32


def moments(tokens: int, rows: int, seed: int, mixing: int = 0) -> np.ndarray:
    """Sums of g g^T of gradients that are mixed by a fixed matrix; `seed` draws other tokens."""
    mix = np.random.default_rng(100 + mixing).standard_normal((rows // 8, rows))
    rng = np.random.default_rng(seed)
    g = rng.standard_normal((tokens, rows // 8)) @ mix + rng.standard_normal((tokens, rows))
    return (g.T @ g).astype(F)


def rounded(weights: np.ndarray, step: float = 0.02) -> np.ndarray:
    return (np.rint(weights / step) * step).astype(F)


@pytest.mark.parametrize(("rows", "count"), [(1, 1), (31, 1), (64, 2), (100, 3), (511, 15), (4096, 16), (0, 1)])
def test_bands_are_all_rows_in_order(rows: int, count: int) -> None:
    bands = coupling.bands(rows)
    assert len(bands) == count
    assert [row for band in bands for row in range(rows)[band]] == list(range(rows))


def test_a_band_aims_at_what_is_best_given_those_above() -> None:
    """With the errors of the rows above fixed and all others free, ``tr(G D H D^T)`` is least there, for any H."""
    weights, n = gaussian(96, 64), 64
    G = shrunk(moments(4000, 96, 0).astype(np.float64), 0.2)
    seen: list[np.ndarray] = []
    data = coupling.encode(weights, upper(G), lambda band: seen.append(band) or rounded(band), lambda band: band)
    assert [len(aim) for aim in seen] == [32, 32, 32]
    np.testing.assert_array_equal(seen[0], weights[:32])
    errors = weights - data.astype(np.float64)
    H = correlated(500, n, 0)
    H = H.T @ H
    for first in (32, 64):
        free, above = slice(first, 96), slice(0, first)
        best = -np.linalg.solve(G[free, free], G[free, above] @ errors[above])
        np.testing.assert_allclose(seen[first // 32], weights[first : first + 32] - best[:32], atol=1e-6)
        slope = G @ np.concatenate([errors[above], best]) @ H
        assert np.abs(slope[free]).max() < 1e-9 * np.abs(slope).max()


def test_expected_error_is_that_of_rounding() -> None:
    """A band for every row, and many columns: rounding errors are then what the formula takes them for."""
    rows = 64
    fit, aside = moments(3000, rows, 0), moments(3000, rows, 1)
    weights = gaussian(rows, 4096)
    for shrinkage in (0.7, 0.2):
        R, G = upper(shrunk(fit, shrinkage)), aside.astype(np.float64)
        errors = np.zeros(weights.shape)
        for j in range(rows):
            aim = weights[j] + R[:j, j] @ errors[:j] / R[j, j]
            errors[j] = weights[j] - rounded(aim)
        alone = weights.astype(np.float64) - rounded(weights)
        measured = np.sum((G @ errors) * errors) / np.sum((G @ alone) * alone)
        assert coupling.expected_error(fit, aside, shrinkage) == pytest.approx(measured, rel=0.03)
        assert measured < 0.9


def test_what_tells_nothing_couples_nothing() -> None:
    rng = np.random.default_rng(0)
    alone = [np.square(rng.standard_normal((2000, 64))).sum(0) * np.eye(64, dtype=F) for _ in range(2)]
    assert coupling.factor(*alone) is None
    zeros = np.zeros((64, 64), F)
    assert coupling.factor(zeros, alone[0]) is None and coupling.factor(alone[0], zeros) is None
    few = moments(8, 64, 0), moments(4000, 64, 0, mixing=5)  # of others than it is judged by
    assert coupling.factor(*few) is None
    assert coupling.factor(moments(4000, 64, 0), moments(1000, 64, 1)) is not None


def test_outputs_that_hardly_matter_or_not_at_all() -> None:
    """Rows without a gradient, and with one a billion times as small: in float32 the factor would be lost."""
    size = np.ones(64, F)
    size[:8], size[8:16] = 0, 1e-9
    fit, aside = (moments(tokens, 64, seed) * size[:, None] * size for seed, tokens in enumerate((4000, 1000)))
    R = coupling.factor(fit, aside)
    assert R is not None and R.dtype == np.float64 and np.isfinite(R).all()
    data = coupling.encode(gaussian(64, 64), R, rounded, lambda band: band)
    assert np.abs(data - gaussian(64, 64))[:16].max() < 0.02  # those are left where they are
    aside[0, 0] = np.nan
    assert coupling.factor(fit, aside) is None


@pytest.mark.parametrize("name", ["Q2_K", "IQ3_XXS", "Q4_0"])
def test_encoding_gains_on_other_gradients(name: str) -> None:
    weights, n = gaussian(128, 256), 256
    x = [correlated(tokens, n, seed) for seed, tokens in enumerate((2048, 512, 2048))]
    given = moments(4000, 128, 0), moments(1000, 128, 1)
    alone = feedback.encode(weights, name, x[0], x[1], guard=False)
    coupled = feedback.encode(weights, name, x[0], x[1], guard=False, gradients=given)
    assert alone.coupled == 1 and coupled.shrinkage == alone.shrinkage and coupled.ratios == alone.ratios
    H, G = feedback.hessian(x[2]).matrix, moments(4000, 128, 2)
    new, old = (coupling.error(weights, codec.dequantize(e.data, name), G, H) for e in (coupled, alone))
    assert new / old == pytest.approx(coupled.coupled, rel=0.05) and new < 0.9 * old


def test_encoding_without_a_gain_is_that_of_rows_alone() -> None:
    weights, x, y = gaussian(64, 256), correlated(2048, 256, 0), correlated(512, 256, 1)
    alone = feedback.encode(weights, "Q4_K", x, y, guard=False)
    same = feedback.encode(weights, "Q4_K", x, y, guard=False, gradients=(np.eye(64, dtype=F), np.eye(64, dtype=F)))
    np.testing.assert_array_equal(alone.data, same.data)
    assert same.coupled == 1


def test_weights_at_the_end_of_the_range() -> None:
    weights = gaussian(96, 64)
    weights[3], weights[40], weights[80] = 3e38, -3e38, 0
    R = upper(shrunk(moments(4000, 96, 0), 0.2))
    data = coupling.encode(weights, R, lambda band: codec.quantize(band, "Q4_0"), lambda d: codec.dequantize(d, "Q4_0"))
    assert np.isfinite(codec.dequantize(data, "Q4_0")).all()
