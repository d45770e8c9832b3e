"""Latent numbers: they start at the encoder's bytes, decode to the nearest point, and carry the gradient."""

import numpy as np
import pytest
import torch

from dynq import codec, formats
from dynq.kernels import scales, snap
from dynq.kernels.grids import grid as lattice
from dynq.latent import Latent, encoded, movable, nearest_entries

MOVABLE = [name for name in formats.FORMATS if movable(name)]
BOOKS = [name for name in MOVABLE if scales.grid(name).book is not None]
ROWS, N = 24, 512


@pytest.fixture(scope="module")
def weights():
    rng = np.random.default_rng(0)
    found = (rng.standard_t(5, (ROWS, N)) * rng.lognormal(0, 1, (ROWS, 1))).astype(np.float32)
    found[3], found[4, :256] = 0, 0.25  # scales of 0, blocks of one value
    return found


def latent(name, weights, device="cpu"):
    data = codec.quantize(weights, name, np.random.default_rng(1).lognormal(0, 1, N))
    return data, Latent(name, data, weights, device)


def offsets(name, data):
    """What is added to the levels, float32 [rows, n]."""
    form = scales.grid(name)
    _, dmin, _, lm = scales.read(name, data.reshape(-1, formats.get(name).block_bytes))
    return np.repeat((-dmin * lm).T.reshape(ROWS, -1), form.group, 1)


def ones(found):
    return torch.ones(ROWS, N // found.form.block)


def test_what_has_no_points_of_its_own_does_not_move():
    others = {"F32", "F16", "BF16", "Q8_0", "IQ1_S", "IQ1_M", "TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0"}
    assert set(formats.FORMATS) - set(MOVABLE) == others


@pytest.mark.parametrize("name", MOVABLE)
def test_the_start_is_what_the_encoder_chose(name, weights):
    data, found = latent(name, weights)
    written = encoded(name, data, found.codes().numpy())
    rows = np.arange(ROWS) != 3  # where the scale is 0 all codes are alike
    assert np.array_equal(written[rows], data[rows]) and not codec.dequantize(written[3:4], name).any()
    decoded = found.weights(ones(found)).numpy() + offsets(name, data)
    np.testing.assert_allclose(decoded, codec.dequantize(data, name), rtol=0, atol=1e-6)


@pytest.mark.parametrize("name", MOVABLE)
def test_numbers_start_on_the_side_of_the_original(name, weights):
    data, found = latent(name, weights)
    toward = (weights - codec.dequantize(data, name)) / found.size.numpy().repeat(found.form.group, 1).clip(1e-20)
    moved = found.z.numpy() * found.distance - found.points.numpy()
    assert (moved * np.where(found.size.numpy().repeat(found.form.group, 1) > 0, toward, moved) >= -1e-3).all()
    assert (np.abs(moved) > 0.01 * found.distance).mean() > 0.5


@pytest.mark.parametrize("name", MOVABLE)
def test_codes_written_are_codes_decoded(name, weights):
    data, found = latent(name, weights)
    found.z += torch.from_numpy(np.random.default_rng(2).normal(size=(ROWS, N)).astype(np.float32))
    found.moved()
    written = encoded(name, data, found.codes().numpy())
    decoded = found.weights(ones(found)).numpy() + offsets(name, data)
    np.testing.assert_allclose(codec.dequantize(written, name), decoded, rtol=0, atol=1e-6)
    assert np.mean(written != data) > 0.2
    old, new = (scales.read(name, x.reshape(-1, formats.get(name).block_bytes)) for x in (data, written))
    assert all(map(np.array_equal, old, new))


@pytest.mark.parametrize("name", [name for name in MOVABLE if name not in BOOKS])
def test_the_nearest_level_is_taken(name, weights):
    _, found = latent(name, weights)
    found.z = torch.linspace(-40, 40, ROWS * N).view(ROWS, N)
    found.moved()
    x, levels = found.z.double() * found.distance, found.levels.double()
    far = (x[..., None] - levels).abs()
    assert torch.equal((x - found.points).abs(), far.min(-1).values)


@pytest.mark.parametrize("name", BOOKS)
def test_entries_near_the_rounded_point_against_all_entries(name):
    book = scales.grid(name).book
    grid = lattice(book.source)
    x = np.random.default_rng(3).normal(0, float(grid.values[-1]) / 2, (4000, 8)).astype(np.float32)
    mine = x.copy()
    snap.entries(mine, book.coordinates, grid.low, grid.spacing, grid.top, book.signs == 2)
    all_of_them = nearest_entries(torch.from_numpy(x), book).numpy()
    assert (mine == all_of_them).all(1).mean() > 0.99
    error = [((found - x).astype(np.float64) ** 2).sum() for found in (mine, all_of_them)]
    assert error[0] < 1.002 * error[1]
    if book.signs == 2:
        assert ((mine < 0).sum(1) % 2 == 0).all() and ((all_of_them < 0).sum(1) % 2 == 0).all()
    entries = {tuple(entry) for entry in grid.entries.tolist()}
    assert {tuple(entry) for entry in np.abs(mine).reshape(-1, book.dim).tolist()} <= entries


@pytest.mark.parametrize("name", ["Q4_K", "IQ3_S"])
def test_the_gradient_is_that_of_the_weight_by_its_number(name, weights):
    _, found = latent(name, weights)
    rng = np.random.default_rng(4)
    m = torch.from_numpy(rng.uniform(0.9, 1.1, ones(found).shape).astype(np.float32))
    gradient = torch.from_numpy(rng.normal(size=(ROWS, N)).astype(np.float32))
    experts = gradient.view(4, ROWS // 4, N)  # whose gradients come with columns together
    found.take(experts.mT.contiguous().mT, m)
    before = found.weights(m)
    found.points += found.distance
    slope = found.weights(m) - before
    torch.testing.assert_close(found.grad, gradient * slope, rtol=1e-3, atol=1e-6)


def step_twin(z, gradients, length):
    """Adam's direction u in float64, and steps of length u |u|: where z [n] is after gradients [steps, n]."""
    mean, square = np.zeros(z.shape), np.zeros(z.shape)
    for t, g in enumerate(gradients, 1):
        mean, square = 0.9 * mean + 0.1 * g, 0.99 * square + 0.01 * g**2
        u = mean / (1 - 0.9**t) / (np.sqrt(square / (1 - 0.99**t)) + 1e-8)
        z = z - length * u * np.abs(u)
    return z


def test_steps_are_long_where_gradients_agree(weights):
    rng, size = np.random.default_rng(5), (20, ROWS, N)
    agree = rng.normal(size=(ROWS, N)).astype(np.float32) * np.ones(size, np.float32)
    noise = rng.normal(size=size).astype(np.float32)
    for gradients, low, high in ((agree, 0.99, 1.01), (noise, 0.0, 0.25)):
        _, found = latent("Q4_K", weights)
        found.z = torch.full((ROWS, N), 7.25)  # far from the range's ends and from the borders
        start = found.z.numpy().copy()
        for g in gradients:
            found.grad.copy_(torch.from_numpy(g))
            found.step(0.01)
        np.testing.assert_allclose(found.z.numpy(), step_twin(start.astype(np.float64), gradients, 0.01), atol=1e-5)
        moved = np.abs(found.z.numpy() - start).mean() / (20 * 0.01)
        assert low <= moved <= high


@pytest.mark.parametrize("name", MOVABLE)
def test_a_code_that_turned_to_and_fro_stays(name, weights):
    _, found = latent(name, weights)
    away = torch.from_numpy(np.random.default_rng(6).choice([-1.5, 1.5], (ROWS, N)).astype(np.float32))
    start = found.points
    found.z += away
    found.moved()
    once = found.points != start
    assert 0.2 < once.float().mean() < 1 and torch.equal(found.turns, once.to(torch.uint8))
    found.z = start / found.distance  # all go back
    found.moved()
    assert torch.equal(found.points, start) and torch.equal(found.turns, 2 * once.to(torch.uint8))
    found.z += away
    found.moved()
    own = found.form.book is None  # of an entry the others can take one with them
    stayed = (found.points == start)[once].float().mean()
    assert stayed == 1 if own else stayed > 0.5
    assert found.turns.max() == 2
