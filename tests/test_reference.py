"""The kernels against their NumPy twins: the same bytes, on any input."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from dynq import codec, formats, reference

NAMES = [name for name in reference.FAMILIES if name in formats.FORMATS]  # gguf 0.19 does not know Q2_0


@st.composite
def tensors(draw: st.DrawFn) -> tuple[np.ndarray, np.ndarray | None]:
    """float32 [rows, n] with a few odd rows, and an importance with zeros or none."""
    rng = np.random.default_rng(draw(st.integers(0, 2**32 - 1)))
    rows, n = draw(st.integers(1, 10)), 256 * draw(st.integers(1, 3))
    x = rng.standard_t(3, (rows, n)) * 10.0 ** draw(st.integers(-12, 12))
    odd = draw(st.sampled_from(["none", "zero", "constant", "denormal", "outlier", "two values", "positive"]))
    row = draw(st.integers(0, rows - 1))
    if odd == "positive":
        x[row] = np.abs(x[row])
    elif odd == "outlier":
        x[row, draw(st.integers(0, n - 1))] = 1e30
    elif odd != "none":
        x[row] = {"zero": 0.0, "constant": 0.3, "denormal": 1e-41, "two values": rng.choice([-1.5, 2.0], n)}[odd]
    importance = None
    if draw(st.booleans()):
        importance = np.exp(2 * rng.standard_normal(n)).astype(np.float32)
        importance[rng.random(n) < draw(st.sampled_from([0.0, 0.3, 0.95]))] = 0
    return x.astype(np.float32), importance


@pytest.mark.parametrize("name", NAMES)
@settings(max_examples=25, deadline=None)
@given(case=tensors(), level=st.sampled_from(codec.LEVELS))
def test_kernel_and_twin_write_the_same_bytes(name: str, case: tuple[np.ndarray, np.ndarray | None], level: str):
    weights, importance = case
    if importance is None and formats.get(name).needs_importance:
        importance = np.ones(weights.shape[1], np.float32)
    columns = None if importance is None else codec._columns(importance, weights.shape[1], formats.get(name).block)
    ours = codec.quantize(weights, name, importance, level=level, threads=1)
    np.testing.assert_array_equal(ours, reference.encode(weights, name, columns, level))
    decoded = codec.dequantize(ours, name, threads=1)
    assert np.isfinite(decoded).all()
    np.testing.assert_array_equal(decoded, reference.decode(ours, name))


@pytest.mark.parametrize("name", NAMES)
def test_twin_decodes_random_bytes_as_the_kernel(name: str):
    data = np.random.default_rng(3).integers(0, 256, (7, 4 * formats.get(name).block_bytes), dtype=np.uint8)
    np.testing.assert_array_equal(reference.decode(data, name), codec.dequantize(data, name))
