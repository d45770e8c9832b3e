from importlib.metadata import version
from pathlib import Path

import numpy as np
import oracle
import pytest
from gguf import GGMLQuantizationType, quants
from hypothesis import assume, given, settings
from hypothesis import strategies as st
from safetensors import safe_open
from test_reference import tensors

import dynq
from dynq import codec, formats, reference
from dynq.errors import DynqError
from dynq.kernels import FAMILIES

NAMES = list(formats.FORMATS)
TINY = Path(dynq.__file__).parent / "data" / "dynq-tiny"
SISTERS = Path(__file__).parents[2] / "shared" / "models"  # larger sisters of the embedded model, not in the repository
needs_oracle = pytest.mark.skipif(oracle.library() is None, reason="xllamacpp (the extra `engine`) is not installed")


def gaussian(rows: int, n: int, seed: int = 0) -> np.ndarray:
    return (np.random.default_rng(seed).standard_normal((rows, n)) * 0.05).astype(np.float32)


def importance_for(name: str, n: int, seed: int = 0) -> np.ndarray | None:
    """None where a format can do without."""
    mild = np.exp(np.random.default_rng(seed).standard_normal(n)).astype(np.float32)
    return mild if formats.get(name).needs_importance else None


def matrices(folder: Path, rows: int) -> list[tuple[str, np.ndarray]]:
    """Every matrix of a model's safetensors in float32, `rows` rows of each; of fused experts the first."""
    import torch

    found = []
    for shard in sorted(folder.glob("*.safetensors")):
        with safe_open(str(shard), "pt") as file:
            for key in file.keys():  # noqa: SIM118
                tensor = file.get_tensor(key).to(torch.float32).numpy()
                if tensor.ndim >= 2:
                    found.append((f"{folder.name} {key}", tensor.reshape(-1, tensor.shape[-1])[:rows]))
    return found


def upstream(data: np.ndarray, name: str) -> np.ndarray:
    """gguf-py's decoding, or libggml's where gguf-py has none."""
    with np.errstate(all="ignore"):
        try:
            return quants.dequantize(data, GGMLQuantizationType[name])
        except NotImplementedError:
            if oracle.library() is None:
                pytest.skip(f"gguf {version('gguf')} does not decode {name}, and xllamacpp is not installed")
            return oracle.dequantize(data, name)


@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_upstream_on_random_bytes(name: str):
    fmt = formats.get(name)
    data = np.random.default_rng(1).integers(0, 256, (33, 1024 // fmt.block * fmt.block_bytes), dtype=np.uint8)
    expected, ours = upstream(data, name), codec.dequantize(data, name)
    same = (ours.view(np.uint32) == expected.view(np.uint32)) | (np.isnan(ours) & np.isnan(expected))
    assert same.all()


@pytest.mark.parametrize("level", codec.LEVELS)
@pytest.mark.parametrize("name", NAMES)
def test_decoding_equals_upstream_on_encoded_weights(name: str, level: str):
    data = codec.quantize(gaussian(8, 512), name, importance_for(name, 512), level=level)
    np.testing.assert_array_equal(codec.dequantize(data, name).view(np.uint32), upstream(data, name).view(np.uint32))


@needs_oracle
@pytest.mark.parametrize("name", [name for name in NAMES if name != "F32"])
def test_error_is_never_above_llama_cpps(name: str):
    """Per tensor of the embedded model and, where they are, of two trained sisters: `plain`, with importance of two
    widths or without in turn, and `search` not above `plain`, which a few rows of a router are too few to show."""
    for folder in (TINY, SISTERS / "llama", SISTERS / "qwen3moe"):
        for i, (key, weights) in enumerate(matrices(folder, 96)):
            if weights.shape[1] % formats.get(name).block:
                continue
            noise = np.random.default_rng(i).standard_normal(weights.shape[1])
            widths = [width for width in (0, 0.5, 1.5) if width or not formats.get(name).needs_importance]
            width = widths[i % len(widths)]
            columns = np.exp(width * noise).astype(np.float32) if width else None
            plain, search, theirs = (
                codec.weighted_error(weights, codec.dequantize(data, name), columns)
                for data in (
                    codec.quantize(weights, name, columns),
                    codec.quantize(weights, name, columns, level="search"),
                    oracle.quantize(weights, name, columns),
                )
            )
            assert plain <= theirs * 1.00005, (key, width, plain / theirs)
            assert search <= plain * 1.00005 or len(weights) < 64, (key, width, search / plain)


@needs_oracle
@pytest.mark.parametrize("name", [name for name in NAMES if name not in ("F32", "F16", "BF16")])
@settings(max_examples=25, deadline=None, derandomize=True)
@given(case=tensors())
def test_error_on_odd_tensors_is_not_above_llama_cpps(name: str, case: tuple[np.ndarray, np.ndarray | None]):
    """Few and odd rows: up to what half floats resolve, and 5 % where rows are too few for an average (LOG.md).

    All within the range of half floats, beyond which llama.cpp stores infinity. Left out are an outlier that weighs
    nothing (dynq gives every channel some weight), and rows of two values in grid formats (up to 2.3 there: LOG.md).
    """
    weights, importance = case
    largest = np.abs(weights).max()
    weights = (weights / (2 * largest if largest > 0 else 1)).astype(np.float32)
    if importance is None and formats.get(name).needs_importance:
        importance = np.ones(weights.shape[1], np.float32)
    assume(largest < 1e20 or importance is None or importance[np.abs(weights).max(axis=0).argmax()] > 0)
    if name.startswith(("IQ1", "IQ2", "IQ3")):
        assume(all(len(np.unique(row)) != 2 for row in weights))
    ours, theirs = (
        codec.weighted_error(weights, oracle.dequantize(data, name), importance)
        for data in (codec.quantize(weights, name, importance), oracle.quantize(weights, name, importance))
    )
    energy = codec.weighted_error(weights, np.zeros_like(weights), importance)
    assert ours <= 1.05 * theirs + 5e-5 * energy


@needs_oracle
@pytest.mark.parametrize("name", [name for name in NAMES if formats.get(name).bpw <= 4.5])
def test_search_is_well_below_llama_cpp(name: str):
    """Mean over tensors of the embedded model, with an importance as wide as measured ones are."""
    ratios = []
    for i, (_, weights) in enumerate(matrices(TINY, 128)[1::4]):
        columns = np.exp(1.5 * np.random.default_rng(i).standard_normal(weights.shape[1])).astype(np.float32)
        found = codec.quantize(weights, name, columns, level="search"), oracle.quantize(weights, name, columns)
        ours, theirs = (codec.weighted_error(weights, codec.dequantize(data, name), columns) for data in found)
        ratios.append(ours / theirs)
    assert np.mean(ratios) <= 0.97


@pytest.mark.parametrize("name", NAMES)
def test_bytes_do_not_depend_on_threads(name: str):
    weights = gaussian(300, 1024)
    importance = np.linspace(0, 3, 1024, dtype=np.float32)
    one = codec.quantize(weights, name, importance, threads=1)
    np.testing.assert_array_equal(one, codec.quantize(weights, name, importance, threads=3))
    np.testing.assert_array_equal(codec.dequantize(one, name, threads=1), codec.dequantize(one, name, threads=3))


@pytest.mark.parametrize("name", NAMES)
def test_leading_dimensions_and_strides(name: str):
    weights, columns = gaussian(6, 512).reshape(2, 3, 512), importance_for(name, 512)
    data = codec.quantize(weights, name, columns)
    assert data.shape == (2, 3, formats.row_bytes(name, 512))
    np.testing.assert_array_equal(data[1, 2], codec.quantize(weights[1, 2], name, columns))
    np.testing.assert_array_equal(data[:, ::2], codec.quantize(weights[:, ::2], name, columns))
    assert codec.dequantize(data, name).shape == weights.shape
    assert codec.quantize(weights[:0], name, columns).shape == (0, 3, data.shape[-1])


@settings(max_examples=150, deadline=None)
@given(
    name=st.sampled_from(NAMES),
    value=st.sampled_from([0.0, -0.0, 1.0, -0.3, 1e30, -3e38, 1e-41, 65520.0]),
    other=st.sampled_from([0.0, 1.0, -1e-3, 3e38]),
    zeros=st.booleans(),
    level=st.sampled_from(codec.LEVELS),
)
def test_extreme_values_stay_finite(name: str, value: float, other: float, zeros: bool, level: str):
    weights = np.full((2, 256), value, np.float32)
    weights[1, 77] = other
    importance = np.zeros(256, np.float32)
    importance[0] = 0.0 if zeros else 1e30
    for columns in [importance] if formats.get(name).needs_importance else [None, importance]:
        assert np.isfinite(codec.dequantize(codec.quantize(weights, name, columns, level=level), name)).all()


@pytest.mark.parametrize("name", ["Q4_0", "Q4_1", "Q4_K", "Q2_K", "Q6_K", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"])
def test_importance_moves_the_error_to_where_it_matters_less(name: str):
    weights = gaussian(64, 512)
    importance = np.where(np.arange(512) % 4 == 0, 100, 1).astype(np.float32)
    with_it = codec.dequantize(codec.quantize(weights, name, importance), name)
    without = codec.dequantize(codec.quantize(weights, name, importance_for(name, 512)), name)
    assert codec.weighted_error(weights, with_it, importance) < 0.9 * codec.weighted_error(weights, without, importance)


def test_experts_have_an_importance_each():
    weights, importance = gaussian(6, 256).reshape(3, 2, 256), np.exp(gaussian(3, 256, 1) * 20)
    data = codec.quantize(weights, "Q4_K", importance)
    for expert in range(3):
        np.testing.assert_array_equal(data[expert], codec.quantize(weights[expert], "Q4_K", importance[expert]))
    decoded = codec.dequantize(data, "Q4_K")
    apart = [codec.weighted_error(w, d, i) for w, d, i in zip(weights, decoded, importance, strict=True)]
    assert codec.weighted_error(weights, decoded, importance) == pytest.approx(sum(apart))


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
        (lambda w: codec.quantize(np.float32(1), "F32"), r"shape \(\)"),
        (lambda w: codec.quantize(w[:, :0], "F32"), r"shape \(4, 0\)"),
        (lambda w: codec.quantize(np.where(np.arange(256) == 9, np.nan, w), "Q4_K"), r"\(0, 9\).*nan"),
        (lambda w: codec.quantize(np.where(np.arange(4)[:, None] == 2, np.inf, w), "F16"), r"\(2, 0\).*inf"),
        (lambda w: codec.quantize(w, "IQ2_S"), "IQ2_S.*without importance"),
        (lambda w: codec.quantize(w, "Q4_K", level="best"), "best.*plain and search"),
        (lambda w: codec.quantize(w, "Q4_K", np.ones((3, 256))), "experts does not fit"),
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


@pytest.mark.parametrize("name", ["IQ4_NL", "IQ4_XS", "TQ1_0", "TQ2_0", "Q1_0"])
def test_codes_can_be_replaced(name: str):
    """Scales are read from encoded blocks and packed with other codes: what an encoder with feedback needs."""
    family, block = FAMILIES[name], formats.get(name).block
    data = codec.quantize(gaussian(2, 1024), name).reshape(-1, formats.get(name).block_bytes)
    levels = {"IQ": np.array(quants.IQ4_NL.kvalues), "TQ": np.array([-1, 0, 1]), "Q1": np.array([-1, 1])}[name[:2]]
    codes = np.random.default_rng(2).integers(0, len(levels), (len(data), block), dtype=np.uint8)
    if name.startswith("IQ4"):
        d, integers = family.unpack_scales(name, data)
        family.pack(name, codes, integers, d.astype(np.float16).view(np.uint16), data)
        steps = d[:, None] * np.repeat(integers, 32, axis=1).astype(np.float32)
    else:
        d = family.unpack_scales(name, data)
        family.pack(name, codes, d.astype(np.float16).view(np.uint16), data)
        steps = d[:, None]
    np.testing.assert_array_equal(codec.dequantize(data, name), steps * levels[codes].astype(np.float32))


def test_search_finds_the_best_ternary_scale():
    """Against all scales that some set of largest weights gives, in float64."""
    weights, importance = gaussian(16, 256, seed=4), np.exp(np.random.default_rng(5).standard_normal(256))
    order = np.argsort(-np.abs(weights), axis=1)
    a = np.take_along_axis(np.abs(weights.astype(np.float64)), order, 1)
    w = importance[order]
    best = (np.cumsum(w * a, axis=1) ** 2 / np.cumsum(w, axis=1)).max(axis=1)
    least = ((w * a * a).sum(axis=1) - best).sum()
    data = codec.quantize(weights, "TQ2_0", importance, level="search")
    assert least <= codec.weighted_error(weights, codec.dequantize(data, "TQ2_0"), importance) <= 1.00001 * least


@needs_oracle
@pytest.mark.parametrize("level", codec.LEVELS)
def test_q2_0_before_gguf_knows_it(monkeypatch: pytest.MonkeyPatch, level: str):
    """Kernel, twin and llama.cpp's decoder agree, and the error is below llama.cpp's; also of weights on few levels."""
    monkeypatch.setitem(formats.FORMATS, "Q2_0", formats.Format("Q2_0", 42, 64, 18, "", fallback="Q4_0"))
    few = np.random.default_rng(1).choice(np.float32([-0.25, 0, 0.25]), (8, 512))
    for weights in (gaussian(33, 512), few, np.zeros((1, 512), np.float32), np.full((1, 512), 1e-41, np.float32)):
        for columns in (None, np.exp(gaussian(1, 512, 1)[0] * 30)):
            data = codec.quantize(weights, "Q2_0", columns, level=level)
            ours = codec.dequantize(data, "Q2_0")
            normal = None if columns is None else codec._columns(columns, 512, 64)
            np.testing.assert_array_equal(data, reference.encode(weights, "Q2_0", normal, level))
            np.testing.assert_array_equal(ours.view(np.uint32), oracle.dequantize(data, "Q2_0").view(np.uint32))
            np.testing.assert_array_equal(ours, reference.decode(data, "Q2_0"))
            theirs = oracle.dequantize(oracle.quantize(weights, "Q2_0", columns), "Q2_0")
            errors = (codec.weighted_error(weights, decoded, columns) for decoded in (ours, theirs))
            assert next(errors) <= next(errors)
