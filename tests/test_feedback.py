"""Error feedback: gains where inputs are correlated, falls back where they say nothing, ordinary blocks throughout."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynq import codec, compensate, feedback, formats, reference
from dynq.errors import DynqError
from dynq.kernels import feedback as kernels
from dynq.kernels import scales
from dynq.reference import feedback as twin
from dynq.reference import feedback_books as twin_books

F = np.float32
NAMES = [name for name in formats.FORMATS if scales.grid(name) is not None]


BOOKS = [name for name in NAMES if scales.grid(name).book is not None]
TWINS = compensate.Choose(twin.choose, twin_books.choose)


def correlated(tokens: int, n: int, seed: int, mixing: int = 0) -> np.ndarray:
    """Inputs whose channels are mixed by a fixed matrix: float32 [tokens, n]; `seed` draws other tokens."""
    rng = np.random.default_rng(mixing)
    mix = rng.standard_normal((n // 4, n)) * np.exp(0.5 * rng.standard_normal(n))
    tokens_rng = np.random.default_rng(1000 + seed)
    return (tokens_rng.standard_normal((tokens, n // 4)) @ mix + tokens_rng.standard_normal((tokens, n))).astype(F)


def gaussian(rows: int, n: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, n)) * 0.05).astype(F)


def ratio(weights: np.ndarray, name: str, encoded: feedback.Encoded, x: np.ndarray, importance: np.ndarray) -> float:
    ours, plain = encoded.data, codec.quantize(weights, name, importance)
    errors = [feedback.output_error(weights, codec.dequantize(data, name), x) for data in (ours, plain)]
    return errors[0] / errors[1]


@pytest.mark.parametrize("name", NAMES)
def test_feedback_lowers_the_output_error_on_other_inputs(name: str):
    weights, n = gaussian(96, 512), 512
    fit, aside, held = (correlated(tokens, n, seed) for seed, tokens in enumerate((4096, 1024, 2048)))
    importance = np.square(fit).mean(0)
    encoded = feedback.encode(weights, name, fit, aside, importance, guard=False)
    assert encoded.level == "feedback" and encoded.reason == ""
    assert encoded.data.dtype == np.uint8 and encoded.data.shape == (96, formats.row_bytes(name, n))
    measured = ratio(weights, name, encoded, held, importance)
    assert measured < 0.6
    assert encoded.ratios[0] == pytest.approx(measured, rel=0.1)


@pytest.mark.parametrize("name", ["Q3_K", "Q4_K", "Q4_1"])
def test_inputs_that_do_not_resemble_the_fitted_ones_get_no_feedback(name: str):
    weights, n = gaussian(64, 256), 256
    fit, aside = correlated(300, n, 0), correlated(600, n, 1, mixing=5)
    encoded = feedback.encode(weights, name, [fit, fit], [correlated(300, n, 2), aside])
    assert encoded.level in codec.LEVELS and encoded.shrinkage is None
    assert "do not gain in every domain" in encoded.reason
    assert max(encoded.ratios) <= 1 + 1e-6
    importance = sum(feedback.hessian(x).matrix.diagonal() for x in (fit, fit, correlated(300, n, 2), aside))
    np.testing.assert_array_equal(encoded.data, codec.quantize(weights, name, importance, level=encoded.level))


@pytest.mark.parametrize("name", NAMES)
def test_uncorrelated_inputs_never_lose(name: str):
    weights, n = gaussian(64, 256), 256
    rng = np.random.default_rng(3)
    fit, aside, held = (rng.standard_normal((tokens, n)).astype(F) for tokens in (2560, 512, 2560))
    importance = np.square(fit).mean(0)
    encoded = feedback.encode(weights, name, fit, aside, importance, guard=False)
    measured = ratio(weights, name, encoded, held, importance)
    assert measured <= 1.0


def test_domains_that_are_not_fitted_are_protected():
    """Two domains gain on their own inputs, neither from the other's fit: others would lose."""
    weights, n = gaussian(64, 256), 256
    fit, aside = ([correlated(2048, n, seed, mixing) for mixing in (1, 2)] for seed in (0, 1))
    free = feedback.encode(weights, "Q3_K", fit, aside, guard=False)
    assert free.level == "feedback"
    guarded = feedback.encode(weights, "Q3_K", fit, aside)
    assert guarded.level in codec.LEVELS and "left out loses" in guarded.reason
    alone = feedback.encode(weights, "Q3_K", fit[0], aside[0])
    assert alone.level in codec.LEVELS and "single domain" in alone.reason
    alike = [correlated(2048, n, seed) for seed in range(3)]
    assert feedback.encode(weights, "Q3_K", alike[:2], alike[2]).level == "feedback"


def test_hessians_stand_for_inputs():
    weights, x, y = gaussian(16, 256), correlated(1024, 256, 0), correlated(512, 256, 1)
    raw = feedback.encode(weights, "Q3_K", [x, x], y)
    sums = feedback.encode(weights, "Q3_K", [feedback.hessian(x)] * 2, [feedback.hessian(y)])
    np.testing.assert_array_equal(raw.data, sums.data)
    assert raw.ratios == sums.ratios
    assert feedback.hessian(x).tokens == 1024


@pytest.mark.parametrize("coupled", [False, True])
def test_no_weight_alone_does_better_than_at_its_best(coupled: bool):
    rng = np.random.default_rng(5)
    weights, n = gaussian(6, 32), 32
    decoded = weights + 0.01 * rng.standard_normal(weights.shape).astype(F)
    x, g = correlated(256, n, 0), rng.standard_normal((40, 6)) @ rng.standard_normal((6, 6))
    h, G = feedback.hessian(x).matrix, g.T @ g if coupled else np.eye(6)
    found = feedback.best(weights, decoded, h, compensate.upper(G) if coupled else None)
    for i, j in np.ndindex(weights.shape):
        errors = []
        for step in (-1e-3, 0, 1e-3):
            D = (decoded - weights).astype(np.float64)
            D[i, j] = found[i, j] + step - weights[i, j]
            errors.append(np.trace(G @ D @ h @ D.T))
        assert errors[1] < errors[0] and errors[1] < errors[2]
        assert errors[2] - errors[1] == pytest.approx(errors[0] - errors[1], rel=0.05)  # in the middle of the parabola


def test_the_best_weights_come_with_what_was_fed_back():
    weights, x, y = gaussian(64, 256), correlated(1024, 256, 0), correlated(512, 256, 1)
    fed = feedback.encode(weights, "Q3_K", x, y, guard=False)
    h = compensate.shrunk(feedback.hessian(x).matrix + feedback.hessian(y).matrix, fed.shrinkage)
    np.testing.assert_allclose(
        fed.best, feedback.best(weights, codec.dequantize(fed.data, "Q3_K"), h, None), rtol=1e-3, atol=1e-5
    )
    away = [np.abs(fed.best - other).mean() for other in (codec.dequantize(fed.data, "Q3_K"), weights)]
    assert min(away) > 1e-3  # neither what is stored nor the original
    assert feedback.encode(weights, "Q8_0", x, y, guard=False).best is None


def test_output_error_by_hand():
    weights, decoded, x = np.float32([[1, 2], [0, 1]]), np.float32([[1, 1], [1, 1]]), np.float32([[1, 0], [2, 3]])
    # D = [[0, 1], [-1, 0]]; X D^T = [[0, -1], [3, -2]]
    assert feedback.output_error(weights, decoded, x) == pytest.approx(1 + 9 + 4)


@pytest.mark.parametrize("name", NAMES)
def test_singular_hessians(name: str):
    """Channels that repeat others, and channels that are never seen."""
    weights, n = gaussian(32, 256), 256
    x, y, z = (correlated(1024, n, seed) for seed in range(3))
    for part in (x, y, z):
        part[:, 100:160] = part[:, :60]
        part[:, 200:220] = 0
    importance = np.square(x).mean(0)
    encoded = feedback.encode(weights, name, x, y, importance, guard=False)
    assert encoded.level == "feedback"
    assert ratio(weights, name, encoded, z, importance) < 0.6
    assert np.abs(codec.dequantize(encoded.data, name) - weights).max() < 0.3


@pytest.mark.parametrize(
    ("fit", "aside", "reason"),
    [
        (0, 512, "0 inputs to fit, at least 256"),
        (200, 512, "200 inputs to fit"),
        (512, 0, "0 inputs kept aside, at least 64"),
        (512, 60, "60 inputs kept aside"),
    ],
)
def test_too_few_inputs(fit: int, aside: int, reason: str):
    weights = gaussian(8, 256)
    encoded = feedback.encode(weights, "Q4_K", correlated(fit, 256, 0), correlated(aside, 256, 1))
    assert encoded.level in codec.LEVELS and reason in encoded.reason


def test_inputs_of_zeros_and_formats_without_feedback():
    weights, zeros, x = gaussian(8, 256), np.zeros((512, 256), F), correlated(512, 256, 0)
    for name in ("Q4_K", "IQ2_XS"):
        encoded = feedback.encode(weights, name, zeros, zeros)
        assert encoded.level in codec.LEVELS and encoded.ratios == () and encoded.reason
    for name in ("Q8_0", "F16", "F32"):
        encoded = feedback.encode(weights, name, x, x)
        assert encoded.level in codec.LEVELS and encoded.reason == f"{name} has no feedback"
        np.testing.assert_array_equal(encoded.data, codec.quantize(weights, name))


@pytest.mark.parametrize("name", NAMES)
def test_odd_rows(name: str):
    """Zeros, constants, denormals, outliers: finite, and none of them spoils the other rows."""
    weights = gaussian(8, 512)
    weights[1], weights[2], weights[3], weights[4, 7], weights[5, 300], weights[6, :256] = 0, 0.3, 1e-41, 1e30, 3e38, 0
    form = scales.grid(name)
    assert form is not None
    metric = compensate.Metric.of(compensate.shrunk(feedback.hessian(correlated(1024, 512, 0)).matrix, 0.2), form.group)
    decoded = codec.dequantize(compensate.encode_rows(weights, form, metric), name)
    assert np.isfinite(decoded).all()
    assert (decoded[1] == 0).all()
    assert np.abs(decoded[[0, 7]] - weights[[0, 7]]).max() < 0.3


@pytest.mark.parametrize("shape", [(1, 32), (3, 288), (257, 64), (0, 64)])
def test_shapes(shape: tuple[int, int]):
    rows, n = shape
    encoded = feedback.encode(gaussian(rows, n), "Q4_0", correlated(20 * n, n, 0), correlated(5 * n, n, 1), guard=False)
    assert encoded.data.shape == (rows, formats.row_bytes("Q4_0", n))
    assert encoded.level == "feedback" or not rows


def test_bytes_do_not_depend_on_threads():
    weights, x, y = gaussian(600, 256), correlated(1024, 256, 0), correlated(512, 256, 1)
    one = feedback.encode(weights, "Q3_K", [x, x], y, threads=1)
    three = feedback.encode(weights, "Q3_K", [x, x], y, threads=3)
    np.testing.assert_array_equal(one.data, three.data)
    assert one.shrinkage == three.shrinkage


@pytest.mark.parametrize("name", NAMES)
def test_scales_are_read_and_written(name: str):
    """read and steps explain what the decoder sees; write gives the same bytes."""
    form = scales.grid(name)
    assert form is not None
    weights = gaussian(5, form.block * 3)
    data = codec.quantize(weights, name, np.linspace(1, 2, form.block * 3))
    state = scales.Scales.empty(form, weights.shape[1], np.ones(5, F))
    groups = form.block // form.group
    for b in range(3):
        blocks = data.reshape(5, 3, -1)[:, b]
        part = slice(b * groups, (b + 1) * groups)
        state.d[b], state.dmin[b], state.ls[part], state.lm[part] = scales.read(name, blocks)
    decoded = codec.dequantize(data, name).T
    codes = np.empty(decoded.shape, np.uint8)
    for group in range(3 * groups):
        own = slice(group * form.group, (group + 1) * form.group)
        step, offset = state.steps(form, group)
        assert (step != 0).all()
        codes[own] = twin.nearest((decoded[own] - offset) / step, form.levels)
        np.testing.assert_allclose(step * form.levels[codes[own]] + offset, decoded[own], rtol=1e-5, atol=1e-6)
    out = np.empty_like(data)
    scales.write(form, state, codes, out)
    np.testing.assert_array_equal(out, data)


CURVED = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], F)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 150),
    group=st.sampled_from([4, 16, 32]),
    levels=st.sampled_from([np.arange(-4, 4, dtype=F), np.arange(16, dtype=F), CURVED]),
    keep=st.booleans(),
    odd=st.sampled_from(["none", "zero step", "tiny step", "zero weights", "far"]),
)
def test_kernel_and_twin_choose_the_same(seed, rows, group, levels, keep, odd):
    rng = np.random.default_rng(seed)
    w, P = (rng.standard_normal((group, rows)).astype(F) for _ in range(2))
    R = np.triu(rng.standard_normal((group, group)) * 0.4).astype(F)
    np.fill_diagonal(R, rng.uniform(0.1, 2, group))
    step, offset = ((rng.standard_normal((5, rows)) * size).astype(F) for size in (2 / np.abs(levels).max(), 0.1))
    if odd == "zero weights":
        w[:] = 0
    elif odd == "far":
        P *= F(1e12)
    elif odd != "none":
        step[1:3] = {"zero step": 0, "tiny step": 1e-42}[odd]
    results = []
    for choose in (kernels.choose, twin.choose):
        E, codes = w * F(0.3), np.zeros((group, rows), np.uint8)
        best = np.full(rows, 99, np.int64)
        choose(w, P, R, step, offset, levels, keep, E, codes, best)
        results.append((E.view(np.uint32), codes, best))
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@settings(max_examples=40, deadline=None)
@given(
    seed=st.integers(0, 2**32 - 1),
    rows=st.integers(1, 80),
    name=st.sampled_from(BOOKS),
    keep=st.booleans(),
    odd=st.sampled_from(["none", "zero step", "tiny step", "negative step", "zero weights", "far"]),
)
def test_kernel_and_twin_choose_the_same_entries(seed, rows, name, keep, odd):
    rng = np.random.default_rng(seed)
    form = scales.grid(name)
    assert form is not None and form.book is not None
    group, book = form.group, form.book
    w, P = (rng.standard_normal((group, rows)).astype(F) for _ in range(2))
    R = np.triu(rng.standard_normal((group, group)) * 0.3).astype(F)
    np.fill_diagonal(R, rng.uniform(0.1, 2, group))
    step = (rng.uniform(0.5, 2, (3, rows)) / book.values.max()).astype(F)
    if odd == "zero weights":
        w[:] = 0
    elif odd == "far":
        P *= F(1e12)
    elif odd != "none":
        step[1:] = {"zero step": 0, "tiny step": 1e-42, "negative step": -step[1:]}[odd]
    offset = step * F(book.delta)
    results = []
    for choose in (compensate.KERNELS.entries, TWINS.entries):
        E, codes = w * F(0.3), np.zeros((group, rows), np.uint8)
        best = np.full(rows, 99, np.int64)
        allowed = book.dim, book.values, book.candidates, book.signs, book.apart
        choose(w, P, R, step, offset, *allowed, keep, E, codes, best)
        results.append((E.view(np.uint32), codes, best))
        if book.signs == 2 and (best >= 0).all():
            minus = codes < len(book.values)
            assert not (minus.reshape(-1, 8, rows).sum(1) % 2).any()
    for ours, theirs in zip(*results, strict=True):
        np.testing.assert_array_equal(ours, theirs)


@pytest.mark.parametrize("name", NAMES)
def test_kernel_and_twin_write_the_same_bytes(name: str, monkeypatch: pytest.MonkeyPatch):
    monkeypatch.setattr(compensate, "SWEEPS", 1)
    form = scales.grid(name)
    assert form is not None
    n = max(64, form.block)
    metric = compensate.Metric.of(compensate.shrunk(feedback.hessian(correlated(1024, n, 0)).matrix, 0.1), form.group)
    weights = gaussian(70, n)
    data = compensate.encode_rows(weights, form, metric)
    np.testing.assert_array_equal(data, compensate.encode_rows(weights, form, metric, TWINS))
    np.testing.assert_array_equal(codec.dequantize(data, name), reference.decode(data, name))


@pytest.mark.parametrize("name", NAMES)
def test_sweeps_only_lower_the_error(name: str, monkeypatch: pytest.MonkeyPatch):
    form = scales.grid(name)
    assert form is not None
    h = feedback.hessian(correlated(2048, 512, 0)).matrix
    metric = compensate.Metric.of(compensate.shrunk(h, 0.1), form.group)
    weights, last = gaussian(40, 512), np.inf
    for sweeps in range(4):
        monkeypatch.setattr(compensate, "SWEEPS", sweeps)
        decoded = codec.dequantize(compensate.encode_rows(weights, form, metric), name)
        error = feedback.output_error(weights, decoded, feedback.Hessian(metric.H, 1))
        assert error <= last * (1 + 1e-6)
        last = error


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w, x: feedback.encode(w, "Q4_K", x[:, :128], x), r"\(128, 128\).*256"),
        (lambda w, x: feedback.encode(w[0], "Q4_K", x, x), "matrices"),
        (lambda w, x: feedback.encode(w[:, :200], "Q4_K", x, x), r"200.*256"),
        (lambda w, x: feedback.encode(w, "Q4_K", x, feedback.Hessian(-np.eye(256), 512)), "negative diagonal"),
        (lambda w, x: feedback.encode(w, "Q4_K", x, feedback.Hessian(np.tri(256), 512)), "not symmetric"),
        (lambda w, x: feedback.encode(w, "Q4_K", x, feedback.Hessian(np.full((256, 256), np.nan), 9)), "not finite"),
        (
            lambda w, x: feedback.encode(w, "Q4_K", feedback.Hessian(2 * np.eye(256)[::-1] + np.eye(256), 999), x),
            "no sum of",
        ),
        (lambda w, x: feedback.encode(np.where(w > 0.1, np.nan, w), "Q4_K", x, x), "only finite"),
        (lambda w, x: feedback.encode(w, "Q4_K", np.where(x > 4, np.inf, x), x), "finite"),
        (lambda w, x: feedback.hessian(x[0]), r"\[tokens, n\]"),
        (lambda w, x: feedback.output_error(w, w[:2], x), "equal matrices"),
    ],
)
def test_mistakes_are_named(call, message: str):
    with pytest.raises(DynqError, match=message):
        call(gaussian(4, 256), correlated(512, 256, 0))
