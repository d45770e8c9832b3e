from pathlib import Path

import numpy as np
import oracle
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import given, settings
from hypothesis import strategies as st
from safetensors import safe_open

import dynq
from dynq import codec, formats
from dynq.errors import DynqError

NAMES = list(formats.FORMATS)
TINY = Path(dynq.__file__).parent / "data" / "dynq-tiny"
needs_oracle = pytest.mark.skipif(oracle.library() is None, reason="xllamacpp (the extra `engine`) is not installed")


def gaussian(rows: int, n: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, n)) * 0.05).astype(np.float32)


def needed(name: str, n: int) -> np.ndarray | None:
    """None where the format can be encoded so, else an importance of ones."""
    return np.ones(n, np.float32) if formats.get(name).needs_importance else None


def bf16_tensors() -> list[tuple[str, np.ndarray]]:
    import torch

    found = []
    for shard in sorted(TINY.glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key)
                if tensor.ndim == 2:
                    found.append((key, tensor.to(torch.float32).numpy()))
    return found


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_gguf_py_on_random_bytes(name: str):
    fmt = formats.get(name)
    data = np.random.default_rng(1).integers(0, 256, (33, 1024 // fmt.block * fmt.block_bytes), dtype=np.uint8)
    with np.errstate(all="ignore"):
        expected = quants.dequantize(data, GGMLQuantizationType[name])
    ours = codec.dequantize(data, name)
    same = (ours.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(ours) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_gguf_py_on_encoded_weights(name: str):
    data = codec.quantize(gaussian(8, 512), name, needed(name, 512))
    expected = quants.dequantize(data, GGMLQuantizationType[name])
    np.testing.assert_array_equal(codec.dequantize(data, name).view(np.uint32), expected.view(np.uint32))


@needs_oracle
@pytest.mark.parametrize("name", [name for name in NAMES if name != "F32"])
def test_error_is_never_above_llama_cpps_on_the_embedded_model(name: str):
    """Per tensor (of the embedding a slice of rows), with a heavy-tailed importance and without."""
    rng = np.random.default_rng(7)
    for key, weights in bf16_tensors():
        weights = weights[:1024]
        importance = np.exp(1.5 * rng.standard_normal(weights.shape[1])).astype(np.float32)
        for columns in (needed(name, len(importance)), importance):
            ours, theirs = (
                codec.weighted_error(weights, codec.dequantize(data, name), columns)
                for data in (codec.quantize(weights, name, columns), oracle.quantize(weights, name, columns))
            )
            assert ours <= theirs * 1.00005, (key, columns is importance, ours / theirs)


@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_threads(name: str):
    weights = gaussian(300, 1024)
    importance = np.linspace(0, 3, 1024, dtype=np.float32)
    one = codec.quantize(weights, name, importance, threads=1)
    np.testing.assert_array_equal(one, codec.quantize(weights, name, importance, threads=3))
    np.testing.assert_array_equal(codec.dequantize(one, name, threads=1), codec.dequantize(one, name, threads=3))


@pytest.mark.parametrize("name", NAMES)
def test_leading_dimensions_and_strides(name: str):
    weights = gaussian(6, 512).reshape(2, 3, 512)
    columns = needed(name, 512)
    data = codec.quantize(weights, name, columns)
    assert data.shape == (2, 3, formats.row_bytes(name, 512))
    np.testing.assert_array_equal(data[1, 2], codec.quantize(weights[1, 2], name, columns))
    np.testing.assert_array_equal(data[:, ::2], codec.quantize(weights[:, ::2], name, columns))
    assert codec.dequantize(data, name).shape == weights.shape
    assert codec.quantize(weights[:0], name, columns).shape == (0, 3, data.shape[-1])


@settings(max_examples=40, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    value=st.sampled_from([0.0, -0.0, 1.0, -0.3, 1e30, -3e38, 1e-41, 65520.0]),
    other=st.sampled_from([0.0, 1.0, -1e-3, 3e38]),
    zeros=st.booleans(),
)
def test_extreme_values_stay_finite(name: str, value: float, other: float, zeros: bool):
    weights = np.full((2, 256), value, np.float32)
    weights[1, 77] = other
    importance = np.zeros(256, np.float32)
    importance[0] = 0.0 if zeros else 1e30
    for columns in (needed(name, 256), importance):
        assert np.isfinite(codec.dequantize(codec.quantize(weights, name, columns), name)).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q2_K", "Q6_K", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_importance_moves_the_error_to_where_it_matters_less(name: str):
    weights = gaussian(64, 512)
    importance = np.where(np.arange(512) % 4 == 0, 100, 1).astype(np.float32)
    with_it = codec.dequantize(codec.quantize(weights, name, importance), name)
    without = codec.dequantize(codec.quantize(weights, name, needed(name, 512)), name)
    assert codec.weighted_error(weights, with_it, importance) < 0.9 * codec.weighted_error(weights, without, importance)


def test_importance_of_zeros_counts_as_ones():
    weights = gaussian(4, 256)
    ones, zeros = np.ones(256, np.float32), np.zeros(256, np.float32)
    np.testing.assert_array_equal(codec.quantize(weights, "Q3_K", zeros), codec.quantize(weights, "Q3_K", ones))


def test_weighted_error_by_hand():
    weights, decoded = np.float32([[1, 2, 3, 4, 5]]), np.float32([[1, 1, 1, 1, 1]])
    assert codec.weighted_error(weights, decoded) == 1 + 4 + 9 + 16
    assert codec.weighted_error(weights, decoded, np.array([1, 0, 2, 0, 0.5])) == 8 + 8


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda w: codec.quantize(w[:, :200], "Q4_K"), r"200.*256"),
        (lambda w: codec.quantize(w, "Q4_X"), "Q4_X"),
        (lambda w: codec.quantize(np.float32(1), "F32"), "scalar"),
        (lambda w: codec.quantize(np.where(np.arange(256) == 9, np.nan, w), "Q4_K"), r"\(0, 9\).*nan"),
        (lambda w: codec.quantize(np.where(np.arange(4)[:, None] == 2, np.inf, w), "F16"), r"\(2, 0\).*inf"),
        (lambda w: codec.quantize(w, "Q4_K", np.ones(255, np.float32)), r"255.*256"),
        (lambda w: codec.quantize(w, "Q4_K", np.full(256, -1.0)), "negative at column 0"),
        (lambda w: codec.quantize(w, "Q4_K", np.where(np.arange(256) == 3, np.nan, 1.0)), "not finite at column 3"),
        (lambda w: codec.dequantize(np.zeros(143, np.uint8), "Q4_K"), r"143.*144"),
        (lambda w: codec.dequantize(w, "Q4_K"), "uint8"),
        (lambda w: codec.weighted_error(w, w[:2]), "differ in shape"),
    ],
)
def test_mistakes_are_named(call, message: str):
    with pytest.raises(DynqError, match=message):
        call(gaussian(4, 256))
