"""MXFP4 and NVFP4: on level `search` the best block there is, and the twin's bytes."""

import numpy as np
import pytest
from gguf import GGMLQuantizationType, quants

from dynq import codec, formats, reference

WIDTH = {"MXFP4": 32, "NVFP4": 16}  # weights that share a scale


def case(seed: int, n: int = 512) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(seed)
    weights = rng.standard_t(3, (6, n)) * 10.0 ** np.array([-40, -3, -2, 0, 3, 37])[:, None]
    weights[2, 100] = -1e30
    importance = np.exp(2 * rng.standard_normal(n))
    importance[rng.random(n) < 0.5] = 0
    return weights.clip(-3.4e38, 3.4e38).astype(np.float32), importance.astype(np.float32)


@pytest.mark.parametrize("name", WIDTH)
@pytest.mark.parametrize("seed", range(2))
def test_search_finds_the_best_scale(name: str, seed: int):
    """Against every scale by gguf-py's decoder, in float64. Bytes from 0x80 on are no UE4M3."""
    weights, importance = case(seed)
    weights = weights[:5]  # of the largest floats a scale that overflows would be the best
    form = formats.get(name)
    columns = codec._columns(importance, weights.shape[1], form.block)
    codes = np.tile(np.arange(16, dtype=np.uint8) * 17, (256, form.block // 8))[:, : form.block // 2]
    heads = np.repeat(np.arange(256, dtype=np.uint8)[:, None], form.block_bytes - form.block // 2, axis=1)
    with np.errstate(all="ignore"):
        table = quants.dequantize(np.concatenate([heads, codes], axis=1), GGMLQuantizationType[name])
    grids = np.unique(table[: 128 if name == "NVFP4" else 256].astype(np.float64), axis=1)
    grids = grids[np.isfinite(grids).all(1)]
    x = weights.astype(np.float64).reshape(-1, WIDTH[name])
    w = np.tile(columns, len(weights)).astype(np.float64).reshape(x.shape)
    best = np.full(len(x), np.inf)
    for grid in grids:
        miss = np.abs(x[..., None] - grid).min(axis=-1)
        best = np.minimum(best, (w * miss**2).sum(1))
    decoded = codec.dequantize(codec.quantize(weights, name, importance, level="search"), name)
    ours = (w * (x - decoded.reshape(x.shape)) ** 2).sum(1)
    np.testing.assert_allclose(ours, best, rtol=1e-5, atol=0)


@pytest.mark.parametrize("name", WIDTH)
@pytest.mark.parametrize("level", codec.LEVELS)
def test_kernel_and_twin_write_the_same_bytes_on_each_level(name: str, level: str):
    for seed in range(5):
        weights, importance = case(seed)
        columns = codec._columns(importance, weights.shape[1], formats.get(name).block)
        ours = codec.quantize(weights, name, importance, level=level)
        np.testing.assert_array_equal(ours, reference.encode(weights, name, columns, level))
        assert np.isfinite(codec.dequantize(ours, name)).all()


@pytest.mark.parametrize("name", WIDTH)
def test_a_groups_bytes_do_not_depend_on_its_neighbours(name: str):
    weights, importance = case(4)
    together = codec.quantize(weights, name, importance, level="search")
    for row in range(len(weights)):
        np.testing.assert_array_equal(codec.quantize(weights[row], name, importance, level="search"), together[row])
