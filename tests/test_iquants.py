"""The pieces of the lattice formats that error feedback will use, and what the code books promise."""

import numpy as np
import pytest

from dynq import codec, formats
from dynq.kernels import grids, iquants

NAMES = list(iquants.PACK)


@pytest.mark.parametrize("name", NAMES)
def test_packing_undoes_unpacking(name: str):
    data = np.random.default_rng(0).integers(0, 256, (50, formats.get(name).block_bytes), dtype=np.uint8)
    fields = iquants.empty(name, len(data))
    iquants.UNPACK[name](data, *fields)
    out = np.empty_like(data)
    iquants.PACK[name](*fields, np.ascontiguousarray(data[:, :2]).view(np.uint16).ravel(), out)
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("name", NAMES)
def test_a_weight_is_its_step_times_a_value_of_its_entry(name: str):
    weights = np.random.default_rng(0).standard_normal((20, 256)).astype(np.float32)
    data = codec.quantize(weights, name, np.ones(256))
    entries, signs, levels = iquants.empty(name, len(data))
    iquants.UNPACK[name](data, entries, signs, levels)
    values = grids.grid(name).entries[entries].reshape(weights.shape)
    decoded = codec.dequantize(data, name)
    np.testing.assert_array_equal(np.abs(decoded), iquants.steps(name, data) * values)
    np.testing.assert_array_equal(np.packbits(decoded < 0, axis=1, bitorder="little"), signs)


@pytest.mark.parametrize("name", NAMES)
def test_neighbours_are_the_nearest_entries_in_order(name: str):
    book = grids.grid(name)
    base = len(book.values)
    values = grids.neighbours(name, 32).reshape(base**book.dim, 2, book.dim, 16)
    for number in np.random.default_rng(0).integers(0, base**book.dim, 20):
        point = book.values[number // base ** np.arange(book.dim) % base]
        distances = np.sort(((book.entries - point) ** 2).sum(1))[:32]
        found = np.swapaxes(values[number], 1, 2).reshape(32, book.dim)
        np.testing.assert_array_equal(((found - point) ** 2).sum(1), distances)
        at = grids.entry_at(name)[number]
        assert (at == 65535) == (distances[0] > 0)
        assert at == 65535 or (book.entries[at] == point).all()


@pytest.mark.parametrize("name", NAMES)
def test_weights_on_the_grid_are_kept(name: str):
    """Whatever the decoder can produce is found again (to half a level's error at most where scales are ambiguous)."""
    rng = np.random.default_rng(1)
    book = grids.grid(name)
    entries = rng.integers(0, len(book.entries), (30, 256 // book.dim))
    weights = book.entries[entries].reshape(30, 256) * np.float32(2**-9)
    signs = rng.integers(0, 2, (30, 32, 8))
    signs[..., 7] ^= signs.sum(-1) % 2
    weights = np.where(signs.reshape(30, 256) == 1, -weights, weights)
    decoded = codec.dequantize(codec.quantize(weights, name, np.ones(256), level="search"), name)
    assert codec.weighted_error(weights, decoded) < 1e-3 * float((weights.astype(np.float64) ** 2).sum())


@pytest.mark.parametrize("name", NAMES)
def test_search_is_better_than_plain(name: str):
    rng = np.random.default_rng(2)
    weights = rng.standard_normal((64, 512)).astype(np.float32)
    importance = np.exp(rng.standard_normal(512)).astype(np.float32)
    plain, search = (
        codec.weighted_error(
            weights, codec.dequantize(codec.quantize(weights, name, importance, level=level), name), importance
        )
        for level in codec.LEVELS
    )
    assert search < plain
