"""The scales of encoded blocks: read out of the bytes, varied, improved, and written back with new codes.

What error feedback needs to know of a format. Arrays are [.., rows]; weight j of a row is
``step * levels[code] + offset`` with ``step = d * ls``, ``offset = -(dmin * lm)``, where d and dmin are half floats of
the block and ls, lm integers of a group of its weights. In Q4_0 to Q5_1 the group is the block, ls and lm are 1 and
the halves themselves are varied. IQ4_NL is like Q4_0 with uneven levels.

In the formats with code books ls is the odd number (IQ1) or odd multiple of the format's factor (IQ2, IQ3) that
multiplies d, and levels are the values of entries with either sign, or in IQ1 with either delta.

Another family is added with its own `Grid` (levels that are not equally spaced do) and a line in `read` and `write`;
one whose weights are chosen together with a `Book` too.
"""

from dataclasses import dataclass, field
from functools import cache

import numpy as np

from dynq import formats
from dynq.kernels import iq1, iq4, iquants, kquants, legacy
from dynq.kernels.arrays import Array, beside, host, namespace, pick
from dynq.kernels.floats import half_table
from dynq.kernels.grids import coordinates, entry_at, neighbours
from dynq.kernels.grids import grid as lattice
from dynq.kernels.plans import PLANS

F = np.float32


@dataclass(frozen=True)
class Book:
    """What an entry of a code book allows weights to be together.

    source: its name in dynq.kernels.grids; dim: weights of an entry; signs: 0 none are stored, 1 any, 2 an even number
    of minus signs among eight; delta: what is added to all values, or with the other sign, as eight weights choose
    (`apart`) or all that share a scale.
    """

    source: str
    dim: int
    signs: int
    delta: float = 0
    apart: bool = False

    @property
    def values(self) -> np.ndarray:
        """float32 [count], ascending."""
        return lattice(self.source).values

    @property
    def candidates(self) -> np.ndarray:
        """What dynq.kernels.grids.neighbours gives."""
        return neighbours(self.source, NEAR)

    @property
    def coordinates(self) -> np.ndarray:
        """The same, as dynq.kernels.grids.coordinates gives it."""
        return coordinates(self.source, NEAR)


NEAR = 32  # entries looked at; twice or half as many change the output error by 0.2 % at most


@dataclass(frozen=True)
class Grid:
    """How a format's weights are stored.

    group: weights that share a scale, block: weights encoded together; levels float32, ascending; affine: whether there
    are offsets; bottom, top, stride: range of ls and lm and distance of two of their values, both 0 where a group has
    its own half floats; mirrored: whether the levels are of use upside down; reach: candidates of a group's scale to
    each side in the walk, in sweeps; book: None where each weight has a code of its own.
    """

    name: str
    block: int
    group: int
    levels: np.ndarray
    affine: bool = False
    bottom: float = 0
    top: float = 0
    stride: float = 1
    mirrored: bool = False
    reach: tuple[int, int] = (4, 2)
    book: Book | None = None

    @property
    def free(self) -> bool:
        """Whether the group has half floats of its own."""
        return self.top == 0


@cache
def grid(name: str) -> Grid | None:
    """The grid of a format, None where error feedback does not know the format."""
    block = formats.get(name).block
    if name in iquants.PACK:
        book = lattice(name)
        levels = np.concatenate([-book.values[::-1], book.values])
        entries = Book(name, book.dim, 2 if book.even else 1)
        ends = book.step, 31 * book.step, 2 * book.step
        return Grid(name, block, book.sub, levels, False, *ends, reach=(2, 1), book=entries)
    if name in iq1.SHARES:
        groups, deltas = iq1.SHARES[name]
        levels = (np.array([-1, 0, 1], F)[:, None] + np.array([-iq1.DELTA, iq1.DELTA])).ravel()
        entries = Book("IQ1_S", 8, 0, float(iq1.DELTA), deltas == 1)
        return Grid(name, block, 8 * groups, levels, False, 1, 15, 2, reach=(1, 1), book=entries)
    if name in ("IQ4_NL", "IQ4_XS"):
        ends = (0, 0, 1) if name == "IQ4_NL" else (-32, 31, 1)
        return Grid(name, block, 32, iq4.LEVELS, False, *ends, mirrored=True)
    if name not in PLANS or name == "Q8_0":
        return None
    plan = PLANS[name]
    levels = np.arange(plan.low, plan.high + 1, dtype=F)
    return Grid(name, block, plan.sub, levels, plan.affine, plan.bottom, plan.top)


@dataclass
class Scales:
    """The scales of some rows: d, dmin float32 [blocks, rows], ls, lm float32 [groups, rows]; of NumPy or of torch.

    All in the scaled world: `unit` float32 [rows] is the power of two that each row was multiplied by.
    """

    d: Array
    dmin: Array
    ls: Array
    lm: Array
    unit: Array
    moves: dict[tuple[int, bool], tuple[Array, Array]] = field(default_factory=dict)

    @classmethod
    def empty(cls, form: Grid, n: int, unit: Array) -> "Scales":
        rows = len(unit)
        d, dmin = beside(np.zeros((2, n // form.block, rows), F), unit)
        ls, lm = beside(np.ones((2, n // form.group, rows), F), unit)
        return cls(d, dmin, ls, lm, unit)

    def steps(self, form: Grid, group: int) -> tuple[Array, Array]:
        """Step and offset of a group: float32 [rows] each."""
        b = group * form.group // form.block
        return self.d[b] * self.ls[group], -(self.dmin[b] * self.lm[group])

    def stored(self, value: Array) -> Array:
        """A half float as the decoder will see it, in the scaled world."""
        xp = namespace(value)
        halves = xp.asarray(xp.clip(value / self.unit, -65504, 65504), dtype=xp.float16)
        return xp.asarray(halves, dtype=xp.float32) * self.unit

    def candidates(self, form: Grid, group: int, reach: int) -> tuple[Array, Array, Array, Array]:
        """Scales near a group's own: numbers a, m to be kept by `take`, steps and offsets; float32 [candidates, rows].

        a and m are ls and lm, or d and dmin where the group has its own. Each side of the range of codes moves, so a
        larger step goes with a lower offset.
        """
        xp, b = namespace(self.d), group * form.group // form.block
        up, down = self._moves(reach, form.affine)
        if form.free:
            size = float(F(FRACTION / len(form.levels)))
            a = self.stored(self.d[b] * (1 + size * up))
            # the middle of the range moves by down / 2 of what its ends move by
            middle = float(form.levels.mean())
            m = xp.zeros_like(a)
            if form.affine:
                moved = self.d[b] * float(F(size) * F(middle)) * down
                m = self.stored(self.dmin[b] + (a - self.d[b]) * middle + moved)
            if form.mirrored:
                a, m = xp.concatenate([a, -a]), xp.concatenate([m, m])
            return a, m, a, -m
        a = xp.clip(self.ls[group] + form.stride * up, form.bottom, form.top)
        if form.mirrored:
            a = xp.concatenate([a, xp.clip(-a, form.bottom, form.top)])
        deltas = [0.0] if form.book is None else [form.book.delta]
        if form.book is not None and form.book.delta and not form.book.apart:
            deltas = [form.book.delta, -form.book.delta]
        own = self.d[b] * a
        shift = xp.concatenate([own * delta for delta in deltas])
        a, step = xp.concatenate([a] * len(deltas)), xp.concatenate([own] * len(deltas))
        m = xp.clip(self.lm[group] + down, 0, form.top) if form.affine else xp.broadcast_to(self.lm[group], a.shape)
        return a, m, step, shift - self.dmin[b] * m

    def _moves(self, reach: int, affine: bool) -> tuple[Array, Array]:
        """What is added at either end of the range: float32 [candidates, 1] twice, the second for affine formats."""
        if (reach, affine) not in self.moves:
            moves = np.arange(-reach, reach + 1, dtype=F)
            up, down = (np.repeat(moves, len(moves)), np.tile(moves, len(moves))) if affine else (moves, moves)
            self.moves[reach, affine] = beside(up[:, None], self.d), beside(down[:, None], self.d)
        return self.moves[reach, affine]

    def take(self, form: Grid, group: int, a: Array, m: Array, best: Array) -> None:
        """Keep the candidate `best` int64 [rows] of a and m; none where it is -1."""
        xp, at = namespace(best), best * (best >= 0)
        kept = (self.d, self.dmin) if form.free else (self.ls, self.lm)
        for old, new in zip(kept, (a, m), strict=True):
            old[group] = xp.where(best >= 0, pick(new, at), old[group])


FRACTION = 0.4  # of a step: how far the outermost level moves from one candidate to the next


def read(name: str, data: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """d, dmin float32 [blocks], ls, lm float32 [groups of a block, blocks] of uint8 [blocks, block_bytes]."""
    none = np.zeros(len(data), F)
    if name in ("Q4_0", "Q5_0"):
        return _half(data, 0), none, np.ones((1, len(data)), F), np.ones((1, len(data)), F)
    if name in ("Q4_1", "Q5_1"):
        return _half(data, 0), -_half(data, 2), np.ones((1, len(data)), F), np.ones((1, len(data)), F)
    if name in ("IQ4_NL", "IQ4_XS"):
        d, integers = iq4.unpack_scales(name, data)
        return d, none, _f(integers), np.ones((integers.shape[1], len(data)), F)
    if name in iquants.PACK:
        parts = iquants.empty(name, len(data))
        iquants.UNPACK[name](data, *parts)
        return _half(data, 0), none, F(lattice(name).step) * (2 * _f(parts[2]) + 1), np.ones(parts[2].T.shape, F)
    if name in iq1.SHARES:
        found = iq1.unpack(name, data)
        return half_table()[found.d], none, 2 * _f(found.levels) + 1, np.ones(found.levels.T.shape, F)
    if name == "Q2_K":
        return _half(data, 80), _half(data, 82), _f(data[:, :16] & 15), _f(data[:, :16] >> 4)
    if name == "Q3_K":
        lower = np.concatenate([data[:, 96:104] & 15, data[:, 96:104] >> 4], axis=1)
        upper = np.concatenate([data[:, 104:108] >> 2 * i & 3 for i in range(4)], axis=1)
        return _half(data, 108), none, _f(lower | upper << 4) - 32, np.ones((16, len(data)), F)
    if name == "Q6_K":
        levels = np.ascontiguousarray(data[:, 192:208]).view(np.int8)
        return _half(data, 208), none, _f(levels), np.ones((16, len(data)), F)
    a, m, both = data[:, 4:8], data[:, 8:12], data[:, 12:16]
    scales = np.concatenate([a & 63, both & 15 | (a >> 6) << 4], axis=1)
    minima = np.concatenate([m & 63, both >> 4 | (m >> 6) << 4], axis=1)
    return _half(data, 0), _half(data, 2), _f(scales), _f(minima)


def write(form: Grid, scales: Scales, codes: Array, out: np.ndarray) -> None:
    """Fill uint8 out [rows, row_bytes] from codes uint8 [n, rows]."""
    n, rows = codes.shape
    name, blocks = form.name, n // form.block
    q = np.ascontiguousarray(host(codes.T)).reshape(rows * blocks, form.block)
    floats = host(scales.d / scales.unit), host(scales.dmin / scales.unit)
    d, dmin = (_bits(x) for x in floats)
    ls, lm = (host(x).T.reshape(rows * blocks, form.block // form.group) for x in (scales.ls, scales.lm))
    out = out.reshape(rows * blocks, -1)
    if form.book is not None:
        _write_entries(form, form.book, q, ls, d, out)
    elif name in ("IQ4_NL", "IQ4_XS"):
        iq4.pack(name, q, ls.astype(np.int8), d, out)
    elif form.free:
        legacy.pack(q, d, _bits(-floats[1]), form.affine, name[1] == "5", out)
    elif name == "Q2_K":
        kquants.pack_q2_k(q, ls.astype(np.uint8), lm.astype(np.uint8), d, dmin, out)
    elif name in ("Q4_K", "Q5_K"):
        kquants.pack_q45_k(q, ls.astype(np.uint8), lm.astype(np.uint8), d, dmin, name == "Q5_K", out)
    else:
        (kquants.pack_q3_k if name == "Q3_K" else kquants.pack_q6_k)(q, ls.astype(np.int8), d, out)


def _write_entries(form: Grid, book: Book, q: np.ndarray, ls: np.ndarray, d: np.ndarray, out: np.ndarray) -> None:
    count = len(book.values)
    digits = np.where(q < count, count - 1 - q, q - count) if book.signs else q >> 1
    points = digits.reshape(len(q), -1, book.dim).astype(np.int64) @ count ** np.arange(book.dim)
    entries = entry_at(book.source)[points]
    levels = ((ls / F(form.bottom) - 1) / 2).astype(np.uint8)
    if book.signs:
        signs = np.packbits(q < count, axis=1, bitorder="little")
        iquants.PACK[form.name](entries, signs, levels, d, out)
    else:
        iq1.pack(form.name, iq1.Parts(entries, 1 - (q[:, ::8] & 1), levels, d), out)


def _half(data: np.ndarray, at: int) -> np.ndarray:
    return np.ascontiguousarray(data[:, at : at + 2]).view(np.float16)[:, 0].astype(F)


def _f(values: np.ndarray) -> np.ndarray:
    """[blocks, groups] of integers to float32 [groups, blocks]."""
    return np.ascontiguousarray(values.T).astype(F)


def _bits(values: np.ndarray) -> np.ndarray:
    """float32 [blocks, rows] to the bits of half floats, uint16 [rows * blocks]."""
    return np.clip(values.T, -65504, 65504).astype(np.float16).ravel().view(np.uint16)
