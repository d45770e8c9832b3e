"""Super-blocks of 256 weights on a lattice grid as GGUF stores them: IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S.

A code book's entry g (dynq.kernels.grids) stands for the magnitudes of eight weights (IQ2) or four (IQ3)::

    w = d (0.5 + level) c sign g        level in 0..15 for 32 weights (IQ2_XS, IQ2_S: 16); c = 1/4, IQ3_XXS 1/2, IQ3_S 2

    IQ2_XXS   66 bytes  d f16 | 8 x (4 entries 8 bits each, word)
    IQ2_XS    74 bytes  d f16 | 32 x (signs 7 : entry 9) | levels 8
    IQ2_S     82 bytes  d f16 | entries, lower 8 bits 32 | signs 32 | entries, upper 2 bits 8 | levels 8
    IQ3_XXS   98 bytes  d f16 | entries 64 | 8 words
    IQ3_S    110 bytes  d f16 | entries, lower 8 bits 64 | entries, upper bit 8 | signs 32 | levels 4

    word, 32 bits: level 4 : signs 7 : signs 7 : signs 7 : signs 7, those of the first weights lowest
    levels: byte k holds level[2k] below and level[2k + 1] above

Bit i of signs belongs to weight i of eight; of seven, the eighth makes the number of minus signs even. Upper bits:
byte k holds those of the k-th four (IQ2_S) or eight (IQ3_S) entries, the first lowest.

Source: block_iq2_xxs to block_iq3_s in llama.cpp's ggml-common.h. Decoding multiplies in gguf-py's order.
"""

from collections.abc import Callable

import numpy as np

from dynq.kernels._jit import call, kernel
from dynq.kernels._once import once
from dynq.kernels.floats import half_table, put_half
from dynq.kernels.grids import entry_at, grid, neighbours, plan_of
from dynq.kernels.lattice import fit


@kernel
def _put_word(signs, levels, b, s, out, at):
    """Four times seven signs and the level of sub-block s, 32 bits."""
    word = np.uint32(levels[b, s]) << np.uint32(28)
    for k in range(4):
        word |= np.uint32(signs[b, 4 * s + k] & np.uint8(127)) << np.uint32(7 * k)
    for k in range(4):
        out[b, at + k] = np.uint8(word >> np.uint32(8 * k))


@kernel
def _get_word(data, b, at, signs, levels, s):
    word = np.uint32(0)
    for k in range(4):
        word |= np.uint32(data[b, at + k]) << np.uint32(8 * k)
    levels[b, s] = np.uint8(word >> np.uint32(28))
    for k in range(4):
        signs[b, 4 * s + k] = _eight(np.uint8((word >> np.uint32(7 * k)) & np.uint32(127)))


@kernel
def _eight(seven):
    """Seven signs and the eighth, which makes the number of ones even."""
    odd = seven ^ (seven >> 4)
    odd ^= odd >> 2
    odd ^= odd >> 1
    return np.uint8(seven | ((odd & 1) << 7))


@kernel
def _put_levels(levels, b, out, at):
    for k in range(levels.shape[1] // 2):
        out[b, at + k] = np.uint8(levels[b, 2 * k] | (levels[b, 2 * k + 1] << 4))


@kernel
def _get_levels(data, b, at, levels):
    for k in range(levels.shape[1] // 2):
        levels[b, 2 * k] = data[b, at + k] & np.uint8(15)
        levels[b, 2 * k + 1] = data[b, at + k] >> np.uint8(4)


@kernel
def pack_iq2_xxs(entries, signs, levels, d, out):
    """What lattice.fit gives to blocks uint8 [blocks, 66]."""
    for b in range(out.shape[0]):
        put_half(d[b], out, b, 0)
        for s in range(8):
            for k in range(4):
                out[b, 2 + 8 * s + k] = np.uint8(entries[b, 4 * s + k])
            _put_word(signs, levels, b, s, out, 6 + 8 * s)


@kernel
def unpack_iq2_xxs(data, entries, signs, levels):
    """Blocks to entries uint16 [blocks, groups], signs uint8 [blocks, 32] (1 is minus), levels uint8 [blocks, subs]."""
    for b in range(data.shape[0]):
        for s in range(8):
            for k in range(4):
                entries[b, 4 * s + k] = data[b, 2 + 8 * s + k]
            _get_word(data, b, 6 + 8 * s, signs, levels, s)


@kernel
def pack_iq2_xs(entries, signs, levels, d, out):
    """As pack_iq2_xxs: [blocks, 74]."""
    for b in range(out.shape[0]):
        put_half(d[b], out, b, 0)
        for k in range(32):
            out[b, 2 + 2 * k] = np.uint8(entries[b, k])
            out[b, 3 + 2 * k] = np.uint8((entries[b, k] >> 8) | (signs[b, k] << 1))
        _put_levels(levels, b, out, 66)


@kernel
def unpack_iq2_xs(data, entries, signs, levels):
    """As unpack_iq2_xxs."""
    for b in range(data.shape[0]):
        for k in range(32):
            upper = data[b, 3 + 2 * k]
            entries[b, k] = np.uint16(data[b, 2 + 2 * k]) | (np.uint16(upper & np.uint8(1)) << np.uint16(8))
            signs[b, k] = _eight(np.uint8(upper >> np.uint8(1)))
        _get_levels(data, b, 66, levels)


@kernel
def pack_iq2_s(entries, signs, levels, d, out):
    """As pack_iq2_xxs: [blocks, 82]."""
    for b in range(out.shape[0]):
        put_half(d[b], out, b, 0)
        for k in range(32):
            out[b, 2 + k] = np.uint8(entries[b, k])
            out[b, 34 + k] = signs[b, k]
        for k in range(8):
            bits = np.uint8(0)
            for i in range(4):
                bits |= np.uint8((entries[b, 4 * k + i] >> 8) << (2 * i))
            out[b, 66 + k] = bits
        _put_levels(levels, b, out, 74)


@kernel
def unpack_iq2_s(data, entries, signs, levels):
    """As unpack_iq2_xxs."""
    for b in range(data.shape[0]):
        for k in range(8):
            upper = np.uint16(data[b, 66 + k])
            for i in range(4):
                above = np.uint16(((upper >> np.uint16(2 * i)) & np.uint16(3)) << np.uint16(8))
                entries[b, 4 * k + i] = np.uint16(data[b, 2 + 4 * k + i]) | above
        for k in range(32):
            signs[b, k] = data[b, 34 + k]
        _get_levels(data, b, 74, levels)


@kernel
def pack_iq3_xxs(entries, signs, levels, d, out):
    """As pack_iq2_xxs: [blocks, 98]."""
    for b in range(out.shape[0]):
        put_half(d[b], out, b, 0)
        for k in range(64):
            out[b, 2 + k] = np.uint8(entries[b, k])
        for s in range(8):
            _put_word(signs, levels, b, s, out, 66 + 4 * s)


@kernel
def unpack_iq3_xxs(data, entries, signs, levels):
    """As unpack_iq2_xxs."""
    for b in range(data.shape[0]):
        for k in range(64):
            entries[b, k] = data[b, 2 + k]
        for s in range(8):
            _get_word(data, b, 66 + 4 * s, signs, levels, s)


@kernel
def pack_iq3_s(entries, signs, levels, d, out):
    """As pack_iq2_xxs: [blocks, 110]."""
    for b in range(out.shape[0]):
        put_half(d[b], out, b, 0)
        for k in range(64):
            out[b, 2 + k] = np.uint8(entries[b, k])
        for k in range(8):
            bits = np.uint8(0)
            for i in range(8):
                bits |= np.uint8((entries[b, 8 * k + i] >> 8) << i)
            out[b, 66 + k] = bits
        for k in range(32):
            out[b, 74 + k] = signs[b, k]
        _put_levels(levels, b, out, 106)


@kernel
def unpack_iq3_s(data, entries, signs, levels):
    """As unpack_iq2_xxs."""
    for b in range(data.shape[0]):
        for k in range(8):
            upper = np.uint16(data[b, 66 + k])
            for i in range(8):
                above = np.uint16(((upper >> np.uint16(i)) & np.uint16(1)) << np.uint16(8))
                entries[b, 8 * k + i] = np.uint16(data[b, 2 + 8 * k + i]) | above
        for k in range(32):
            signs[b, k] = data[b, 74 + k]
        _get_levels(data, b, 106, levels)


@kernel
def scales(data, levels, c, half, out):
    """What multiplies the entries of each sub-block: float32 [blocks, subs]."""
    for b in range(data.shape[0]):
        d = half[np.uint32(data[b, 0]) | (np.uint32(data[b, 1]) << np.uint32(8))]
        for s in range(levels.shape[1]):
            out[b, s] = d * (np.float32(0.5) + np.float32(levels[b, s])) * c


@kernel
def expand8(entries, signs, steps, book, plusminus, out):
    """Entries of eight weights, times their step and signs: float32 [blocks, 256]."""
    sub = 32 // steps.shape[1]
    for b in range(out.shape[0]):
        for o in range(32):
            step, e, s = steps[b, o // sub], entries[b, o], signs[b, o]
            for i in range(8):
                out[b, 8 * o + i] = step * book[e, i] * plusminus[s, i]


@kernel
def expand4(entries, signs, steps, book, plusminus, out):
    """As expand8, with entries of four weights."""
    sub = 32 // steps.shape[1]
    for b in range(out.shape[0]):
        for o in range(32):
            step, e, f, s = steps[b, o // sub], entries[b, 2 * o], entries[b, 2 * o + 1], signs[b, o]
            for i in range(4):
                out[b, 8 * o + i] = step * book[e, i] * plusminus[s, i]
            for i in range(4):
                out[b, 8 * o + 4 + i] = step * book[f, i] * plusminus[s, 4 + i]


PACK = {
    "IQ2_XXS": pack_iq2_xxs,
    "IQ2_XS": pack_iq2_xs,
    "IQ2_S": pack_iq2_s,
    "IQ3_XXS": pack_iq3_xxs,
    "IQ3_S": pack_iq3_s,
}
UNPACK = {
    "IQ2_XXS": unpack_iq2_xxs,
    "IQ2_XS": unpack_iq2_xs,
    "IQ2_S": unpack_iq2_s,
    "IQ3_XXS": unpack_iq3_xxs,
    "IQ3_S": unpack_iq3_s,
}


@once
def _plusminus() -> np.ndarray:
    """1 or -1 for each bit of a byte of signs: float32 [256, 8]."""
    return np.where(np.arange(256)[:, None] >> np.arange(8) & 1, -1, 1).astype(np.float32)


def empty(name: str, blocks: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Room for entries uint16 [blocks, groups], signs uint8 [blocks, 32] and levels uint8 [blocks, subs]."""
    book = grid(name)
    entries = np.empty((blocks, 256 // book.dim), np.uint16)
    return entries, np.empty((blocks, 32), np.uint8), np.empty((blocks, 256 // book.sub), np.uint8)


def steps(name: str, data: np.ndarray) -> np.ndarray:
    """What multiplies the code book's values for each weight of encoded blocks: float32 [blocks, 256].

    For error feedback, with grid(name).entries and PACK.
    """
    entries, signs, levels = empty(name, len(data))
    UNPACK[name](data, entries, signs, levels)
    out = np.empty(levels.shape, np.float32)
    scales(data, levels, np.float32(2 * grid(name).step), half_table(), out)
    return np.repeat(out, grid(name).sub, axis=1)


def encode(
    name: str, x: np.ndarray, w: np.ndarray | None, level: str, out: np.ndarray, run: Callable[..., None] = call
) -> None:
    """Fill `out` [blocks, block_bytes] from float32 x [blocks, 256]; w [blocks of a row, 256] or None."""
    book, plan = grid(name), plan_of(name, level)
    w = np.ones((1, 256), np.float32) if w is None else w
    found = empty(name, len(x))
    d = np.empty(len(x), np.uint16)
    tries, ends = np.array(plan.tries, np.float32), np.array(plan.ends, np.float32)
    shape = book.sub, book.dim, np.float32(book.step), book.low, book.spacing, book.top, book.even
    lists = entry_at(name), neighbours(name, plan.count), plan.near
    run(fit, x, w, *shape, *lists, tries, ends, plan.choices, plan.rounds, *found, d)
    PACK[name](*found, d, out)


def decode(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` float32 [blocks, 256] from uint8 data [blocks, block_bytes]."""
    book = grid(name)
    entries, signs, levels = empty(name, len(data))
    UNPACK[name](data, entries, signs, levels)
    step = np.empty(levels.shape, np.float32)
    scales(data, levels, np.float32(2 * book.step), half_table(), step)
    (expand8 if book.dim == 8 else expand4)(entries, signs, step, book.entries, _plusminus(), out)
