"""The drawing of a block's bits against the decoder: every bit is flipped, every weight is made from its fields."""

import numpy as np
import pytest
from gguf import quants

from dynq import DynqError, dequantize, formats, quantize
from dynq.kernels.grids import grid
from dynq.layout import layout

NAMES = [name for name, form in formats.FORMATS.items() if form.block > 1]


def blocks(name, count=6):
    """Encoded blocks of random weights: uint8 [count, block_bytes]."""
    form = formats.get(name)
    rng = np.random.default_rng(0)
    weights = rng.standard_t(4, (count, form.block)).astype(np.float32)
    return quantize(weights, name, rng.lognormal(0, 1, form.block).astype(np.float32), threads=1)


@pytest.mark.parametrize("name", NAMES)
def test_every_bit_belongs_to_one_field(name):
    bits = sorted(bit for field in layout(name).fields for bit in field.bits)
    assert bits == list(range(8 * formats.get(name).block_bytes))


@pytest.mark.parametrize("name", NAMES)
def test_a_flipped_bit_changes_the_weights_of_its_field_and_no_others(name):
    found, fields = blocks(name), layout(name).fields
    before = dequantize(found, name, threads=1)
    where = [(field, bit) for field in fields for bit in field.bits]
    flipped = np.repeat(found[None], len(where), 0)
    for i, (_, bit) in enumerate(where):
        flipped[i, :, bit >> 3] ^= np.uint8(1 << (bit & 7))
    with np.errstate(invalid="ignore"):
        changed = (dequantize(flipped, name, threads=1) != before).any(1)  # [bits, weights], in any of the blocks
    reached = {}
    for (field, _), weights in zip(where, changed, strict=True):
        reached.setdefault(field, set()).update(np.flatnonzero(weights).tolist())
    assert {field: set(field.weights) for field in fields} == reached


@pytest.mark.parametrize("name", [name for name in NAMES if name != "TQ1_0"])
def test_a_weight_is_made_from_its_fields(name):
    """What the formula says, worked out with the fields' numbers, is what the decoder gives."""
    drawn = layout(name)
    for block in blocks(name, 2):
        decoded = dequantize(block, name, threads=1)
        numbers = {field: drawn.number(field, block) for field in drawn.fields}
        made = [weight(name, i, {f.kind: (f, numbers[f]) for f in drawn.of_weight(i)}) for i in range(len(decoded))]
        np.testing.assert_allclose(made, decoded, rtol=1e-6, atol=1e-12)


def weight(name, i, found):
    value = {kind: number for kind, (_, number) in found.items()}
    step = value.get("d", 1.0) * value.get("scale", 1.0)
    if "entry" not in found:
        return step * value["code"] - value.get("dmin", 0.0) * value.get("min", 0.0) + value.get("m", 0.0)
    entry = int(value["entry"])
    if "shift" in found:
        quants.IQ1_S.init_grid()
        return step * (np.reshape(quants.IQ1_S.grid, (2048, 8))[entry, i % 8] + value["shift"])
    entries = grid(name).entries
    signs = int(value["signs"])
    if grid(name).even:
        signs |= signs.bit_count() % 2 << 7
    return step * entries[entry, i % entries.shape[1]] * (-1 if signs >> i % 8 & 1 else 1)


def test_levels_and_what_has_none():
    assert layout("Q4_0").levels.tolist() == list(range(-8, 8))
    assert len(layout("IQ4_NL").levels) == 16 and layout("IQ4_NL").levels[0] == -127
    assert layout("MXFP4").levels.tolist() == [-6, -4, -3, -2, -1.5, -1, -0.5, 0, 0.5, 1, 1.5, 2, 3, 4, 6]
    with pytest.raises(DynqError, match="no codes of their own"):
        _ = layout("IQ2_XXS").levels
    with pytest.raises(DynqError, match="no block"):
        layout("F16")
    with pytest.raises(DynqError, match="unknown format"):
        layout("Q9_K")
