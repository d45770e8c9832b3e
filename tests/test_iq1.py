"""What an encoder with error feedback builds on: the parts of IQ1 blocks and the steps of their weights."""

import numpy as np
import pytest

from dynq import codec, formats
from dynq.kernels import iq1
from dynq.kernels.iq1_search import book
from dynq.reference.iq1 import _cheapest

NAMES = list(iq1.SHARES)


def blocks(name: str) -> np.ndarray:
    """Random bytes whose d is finite: uint8 [16, block_bytes]."""
    data = np.random.default_rng(2).integers(0, 256, (16, formats.get(name).block_bytes), dtype=np.uint8)
    d_high_byte = {"IQ1_S": 1, "IQ1_M": 55}[name]
    data[:, d_high_byte] &= 0x3F
    return data


@pytest.mark.parametrize("name", NAMES)
def test_packing_is_the_inverse_of_unpacking(name: str):
    data = blocks(name)
    out = np.empty_like(data)
    iq1.pack(name, iq1.unpack(name, data), out)
    np.testing.assert_array_equal(out, data)


@pytest.mark.parametrize("name", NAMES)
def test_steps_and_entries_make_the_weights(name: str):
    data = blocks(name)
    step, delta = iq1.steps(name, data)
    numbers = book().grid[iq1.unpack(name, data).entries].reshape(16, 256)
    np.testing.assert_array_equal(step * (numbers + delta), codec.dequantize(data, name))


@pytest.mark.parametrize("width", [0.0, 1.0, 3.0])
def test_costs_in_16_bits_find_the_best_entry(width: float):
    """Against all 2048 entries in float64, under importance of any width."""
    rng = np.random.default_rng(4)
    x, w = rng.standard_normal((4, 32, 8)).astype(np.float32), np.exp(width * rng.standard_normal((4, 32, 8)))
    step, w = np.full((4, 32), 1.2, np.float32), w.astype(np.float32)
    limit = np.float32(8 * 4095) / (step * w.sum(2) + np.abs(w * x).sum(2))
    found = _cheapest(x, w * limit[:, :, None], step[:, :, None], np.float32(0.125))
    numbers = step[..., None, None] * (book().grid.astype(float) + 0.125)
    errors = (w[:, :, None] * (x[:, :, None] - numbers) ** 2).sum(-1)
    assert np.take_along_axis(errors, found[..., None], 2).sum() <= errors.min(2).sum() * (1 + 2e-4)
