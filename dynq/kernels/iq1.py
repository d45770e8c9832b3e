"""IQ1_S and IQ1_M: groups of eight weights from a code book of 2048 points of {-1, 0, 1}^8.

A block holds 256 weights, w = d (2 l + 1) (g + delta), g a weight's number in its group's entry e (11 bits) and delta
0.125, or -0.125 where the sign bit t is set. IQ1_S has one scale l (3 bits) and one t for 32 weights, IQ1_M one l for
16 weights and a t for each group::

    IQ1_S  50 bytes  d f16 | lower eight bits of e 32 x u8 | 8 x u16, each of four groups:
                     bits 15  14..12  11..9    8..6     5..3     2..0
                          t   l       e3 >> 8  e2 >> 8  e1 >> 8  e0 >> 8
    IQ1_M  56 bytes  lower eight bits of e 32 x u8 | 16 x u8, each of two groups | 4 x u16, each of eight groups:
                     bits 7   6..4     3   2..0            bits 15..12        11..9  8..6  5..3  2..0
                          t1  e1 >> 8  t0  e0 >> 8              d's nibble k  l3     l2    l1    l0

(nibble k of d's half float, from the lowest bits, lies in the k-th of the four words).

The search is in dynq.kernels.iq1_search.

Source: block_iq1_s and block_iq1_m in llama.cpp's ggml-common.h. Decoding multiplies and adds in gguf-py's order.
"""

from collections.abc import Callable
from typing import NamedTuple

import numpy as np

from dynq.kernels._jit import call, kernel
from dynq.kernels.floats import half_table
from dynq.kernels.iq1_search import DELTA, SEARCHES, book, fit

# groups that share a scale, groups that share a delta
SHARES = {"IQ1_S": (4, 4), "IQ1_M": (2, 1)}


@kernel
def pack_iq1_s(entries, signs, levels, d, out):
    """entries uint16 in 0..2047, signs uint8 in 0..1 [blocks, 32] (of four groups the first counts); levels uint8 in
    0..7 [blocks, 8]; d uint16 [blocks]; out [blocks, 50]."""
    for b in range(entries.shape[0]):
        out[b, 0] = np.uint8(d[b])
        out[b, 1] = np.uint8(d[b] >> 8)
        for s in range(32):
            out[b, 2 + s] = np.uint8(entries[b, s])
        for u in range(8):
            word = (levels[b, u] << 12) | (signs[b, 4 * u] << 15)
            for k in range(4):
                word |= (entries[b, 4 * u + k] >> 8) << (3 * k)
            out[b, 34 + 2 * u] = np.uint8(word)
            out[b, 35 + 2 * u] = np.uint8(word >> 8)


@kernel
def unpack_iq1_s(data, entries, signs, levels, d):
    """The inverse of pack_iq1_s."""
    for b in range(data.shape[0]):
        d[b] = np.uint16(data[b, 0] | (np.uint32(data[b, 1]) << np.uint32(8)))
        for u in range(8):
            word = data[b, 34 + 2 * u] | (np.uint32(data[b, 35 + 2 * u]) << np.uint32(8))
            levels[b, u] = np.uint8((word >> 12) & 7)
            for k in range(4):
                s = 4 * u + k
                entries[b, s] = np.uint16(data[b, 2 + s] | (((word >> (3 * k)) & 7) << 8))
                signs[b, s] = np.uint8(word >> 15)


@kernel
def pack_iq1_m(entries, signs, levels, d, out):
    """As pack_iq1_s, with signs of each group and levels uint8 [blocks, 16]; out [blocks, 56]."""
    for b in range(entries.shape[0]):
        for s in range(32):
            out[b, s] = np.uint8(entries[b, s])
        for k in range(16):
            low = (entries[b, 2 * k] >> 8) | (signs[b, 2 * k] << 3)
            high = (entries[b, 2 * k + 1] >> 8) | (signs[b, 2 * k + 1] << 3)
            out[b, 32 + k] = np.uint8(low | (high << 4))
        for k in range(4):
            word = ((d[b] >> (4 * k)) & 15) << 12
            for i in range(4):
                word |= levels[b, 4 * k + i] << (3 * i)
            out[b, 48 + 2 * k] = np.uint8(word)
            out[b, 49 + 2 * k] = np.uint8(word >> 8)


@kernel
def unpack_iq1_m(data, entries, signs, levels, d):
    """The inverse of pack_iq1_m."""
    for b in range(data.shape[0]):
        bits = 0
        for k in range(4):
            word = data[b, 48 + 2 * k] | (np.uint32(data[b, 49 + 2 * k]) << np.uint32(8))
            bits |= (word >> 12) << (4 * k)
            for i in range(4):
                levels[b, 4 * k + i] = np.uint8((word >> (3 * i)) & 7)
        d[b] = np.uint16(bits)
        for s in range(32):
            nibble = data[b, 32 + s // 2] >> (4 * (s % 2))
            entries[b, s] = np.uint16(data[b, s] | ((nibble & 7) << 8))
            signs[b, s] = np.uint8((nibble >> 3) & 1)


@kernel
def _expand(entries, signs, levels, d, run, grid, half, out):
    """out [blocks, 256] = d (2 l + 1) (g + delta); `half` is the float32 of every half float, by its bits."""
    for b in range(entries.shape[0]):
        for s in range(32):
            step = half[d[b]] * np.float32(2 * levels[b, s // run] + 1)
            delta = -DELTA if signs[b, s] else DELTA
            e = entries[b, s]
            for i in range(8):
                out[b, 8 * s + i] = step * (grid[e, i] + delta)


class Parts(NamedTuple):
    """What the bytes of blocks hold: entries uint16 [blocks, 32]; signs uint8 [blocks, 32], 1 for a delta of -0.125;
    levels uint8 [blocks, 8 or 16], the scales; d uint16 [blocks], bits of half floats."""

    entries: np.ndarray
    signs: np.ndarray
    levels: np.ndarray
    d: np.ndarray


def _empty(name: str, blocks: int) -> Parts:
    levels = np.empty((blocks, 32 // SHARES[name][0]), np.uint8)
    return Parts(
        np.empty((blocks, 32), np.uint16), np.empty((blocks, 32), np.uint8), levels, np.empty(blocks, np.uint16)
    )


def unpack(name: str, data: np.ndarray) -> Parts:
    """The parts of blocks uint8 [blocks, block_bytes]."""
    parts = _empty(name, len(data))
    (unpack_iq1_s if name == "IQ1_S" else unpack_iq1_m)(data, *parts)
    return parts


def pack(name: str, parts: Parts, out: np.ndarray) -> None:
    """Fill `out` uint8 [blocks, block_bytes] from parts."""
    (pack_iq1_s if name == "IQ1_S" else pack_iq1_m)(*parts, out)


def steps(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Of each weight in blocks uint8 [blocks, block_bytes] its step and delta, w = step (g + delta): float32 [blocks,
    256] twice."""
    parts = unpack(name, data)
    step = half_table()[parts.d][:, None] * (2 * parts.levels.astype(np.float32) + 1)
    delta = np.where(parts.signs == 1, -DELTA, DELTA)
    return np.repeat(step, 8 * SHARES[name][0], axis=1), np.repeat(delta, 8, axis=1)


def encode(
    name: str, x: np.ndarray, w: np.ndarray | None, level: str, out: np.ndarray, run: Callable[..., None] = call
) -> None:
    """Fill `out` [blocks, block_bytes] from float32 x [blocks, 256]; w [blocks of a row, 256] or None."""
    search = SEARCHES[level]
    parts = _empty(name, len(x))
    starts, ends = np.array(search.starts, np.float32), np.array(search.ends, np.float32)
    passes = np.array(search.passes, np.int64)
    w = np.ones((1, 256), np.float32) if w is None else w
    run(fit, x, w, *SHARES[name], starts, search.refinements, ends, passes, book(), *parts)
    pack(name, parts, out)


def decode(name: str, data: np.ndarray, out: np.ndarray) -> None:
    """Fill `out` float32 [blocks, 256] from uint8 data [blocks, block_bytes]."""
    _expand(*unpack(name, data), SHARES[name][0], book().grid, half_table(), out)
