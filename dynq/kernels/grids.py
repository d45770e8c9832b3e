"""The code books of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S and, for each rounded point, the entries nearest to it."""

from dataclasses import dataclass

import numpy as np
from gguf import quants

from dynq.kernels._once import once


@dataclass(frozen=True)
class Grid:
    """A code book: weight = step * (2 level + 1) * d * a value of an entry, with a sign.

    entries float32 [entries, dim]; their values are low, low + spacing, ..., `top` spacings in all (nearly: the grids
    of IQ2 and IQ3_XXS are a little uneven); sub: weights that share a level of 0..15; even: seven signs are stored for
    eight weights, the eighth makes the number of minus signs even. IQ1_S's book, of values -1, 0, 1 without signs, is
    here for error feedback; IQ1_M has the same.
    """

    entries: np.ndarray
    values: np.ndarray
    sub: int
    even: bool
    step: float

    @property
    def dim(self) -> int:
        return self.entries.shape[1]

    @property
    def low(self) -> np.float32:
        return self.values[0]

    @property
    def top(self) -> np.float32:
        return np.float32(len(self.values) - 1)

    @property
    def spacing(self) -> np.float32:
        return (self.values[-1] - self.values[0]) / self.top


# weights that share a level, seven signs for eight, step
_SHAPES = {
    "IQ2_XXS": (32, True, 0.125),
    "IQ2_XS": (16, True, 0.125),
    "IQ2_S": (16, False, 0.125),
    "IQ3_XXS": (32, True, 0.25),
    "IQ3_S": (32, False, 1.0),
    "IQ1_S": (32, False, 1.0),
}


@once
def grid(name: str) -> Grid:
    """The code book of a format, from gguf."""
    source = getattr(quants, name)
    source.init_grid()
    entries = source.grid.reshape(source.grid_shape).astype(np.float32)
    return Grid(entries, np.array(source.grid_map, np.float32), *_SHAPES[name])


@dataclass(frozen=True)
class Plan:
    """How a format is searched (dynq.kernels.lattice).

    near: entries looked at for each scale tried, count: for the scale that is stored, both multiples of 16, at most
    256; choices: levels tried for each of the super-block's floats; rounds: descents over the stored numbers; tries:
    what the largest |x| of a sub-block is sent to at first, in values; ends: what the largest scale of a super-block is
    sent to, 16 of them, where 31 is the highest level.
    """

    near: int
    count: int
    choices: int
    rounds: int
    tries: tuple[float, ...]
    ends: tuple[float, ...]


# near, count, choices on level plain. Chosen on trained weights: levels tried gain most, then entries looked at; more
# floats, tries or rounds next to nothing. IQ2_S has the shortest search, because llama.cpp is fastest there.
_PLAIN = {
    "IQ2_XXS": (32, 64, 6),
    "IQ2_XS": (32, 64, 6),
    "IQ2_S": (16, 32, 5),
    "IQ3_XXS": (16, 32, 8),
    "IQ3_S": (16, 32, 8),
}


def plan_of(name: str, level: str) -> Plan:
    """The plan of a format on a level, `plain` or `search`."""
    tries = tuple((float(grid(name).values[-1]) * np.linspace(0.9, 2.2, 10)).tolist())
    ends = tuple(np.linspace(22, 34, 16).tolist())
    return Plan(*_PLAIN[name], 1, tries, ends) if level == "plain" else Plan(64, 128, 10, 2, tries, ends)


@once
def neighbours(name: str, count: int) -> np.ndarray:
    """The `count` (a multiple of 16) entries nearest to each point whose coordinates are all values of the grid.

    A point's number has its first coordinate, counted in values, as its lowest digit. Out: int8 [points, count * dim],
    the entries' values, nearest first: of sixteen entries the first coordinates, then the second ones, and so on, then
    the next sixteen.
    """
    book = grid(name)
    points = book.values[np.arange(len(book.values) ** book.dim)[:, None] // _bases(book) % len(book.values)]
    entries = book.entries
    distance = (points**2).sum(1)[:, None] - 2 * (points @ entries.T) + (entries**2).sum(1)  # exact: integers
    order = distance.astype(np.int64) * len(entries) + np.arange(len(entries))
    nearest = np.sort(np.partition(order, count - 1, axis=1)[:, :count], axis=1) % len(entries)
    values = entries[nearest].reshape(len(points), count // 16, 16, book.dim).swapaxes(2, 3)
    return values.astype(np.int8).reshape(len(points), -1)


@once
def coordinates(name: str, count: int) -> np.ndarray:
    """`neighbours` with all first coordinates together, then all second ones, and so on: int8 [points, dim, count]."""
    near = neighbours(name, count).reshape(-1, count // 16, grid(name).dim, 16)
    return np.ascontiguousarray(near.swapaxes(1, 2)).reshape(len(near), grid(name).dim, count)


@once
def entry_at(name: str) -> np.ndarray:
    """The entry at each point, by the point's number as in `neighbours`: uint16 [points], 65535 where there is none."""
    book = grid(name)
    found = np.full(len(book.values) ** book.dim, 65535, np.uint16)
    found[(np.searchsorted(book.values, book.entries) * _bases(book)).sum(1)] = np.arange(len(book.entries))
    return found


def _bases(book: Grid) -> np.ndarray:
    return len(book.values) ** np.arange(book.dim)
