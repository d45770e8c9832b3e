"""The code books of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S and, for each rounded point, the entries nearest to it."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import quants


@dataclass(frozen=True)
class Grid:
    """A code book: weight = step * (2 level + 1) * d * a value of an entry, with a sign.

    entries float32 [entries, dim]; their values are low, low + spacing, ..., `top` spacings in all (nearly: the grids
    of IQ2 and IQ3_XXS are a little uneven); sub: weights that share a level of 0..15; even: seven signs are stored for
    eight weights, the eighth makes the number of minus signs even.
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
}


@cache
def grid(name: str) -> Grid:
    """The code book of a format, from gguf."""
    source = getattr(quants, name)
    source.init_grid()
    entries = source.grid.reshape(source.grid_shape).astype(np.float32)
    return Grid(entries, np.array(source.grid_map, np.float32), *_SHAPES[name])


@dataclass(frozen=True)
class Plan:
    """How a format is searched (dynq.kernels.lattice).

    count: entries looked at for a group, a multiple of 16, at most 256; tries: what the largest |x| of a sub-block is
    sent to, in values; ends: what the largest scale of a super-block is sent to, 16 of them, where 31 is the highest
    level; choices: levels tried for each; rounds: descents over the stored numbers.
    """

    count: int
    tries: tuple[float, ...]
    ends: tuple[float, ...]
    choices: int
    rounds: int


# Chosen on trained weights. More levels tried gain most, then more entries looked at; more floats or rounds next to
# nothing. IQ2_S is where llama.cpp is fastest, and its plain search the shortest.
_CHOICES = {"IQ2_XXS": 5, "IQ2_XS": 5, "IQ2_S": 3, "IQ3_XXS": 5, "IQ3_S": 5}


def plan_of(name: str, level: str) -> Plan:
    """The plan of a format on a level, `plain` or `search`."""
    highest = float(grid(name).values[-1])
    tries = tuple((highest * np.linspace(0.9, 2.2, 10)).tolist())
    ends = tuple(np.linspace(22, 34, 16).tolist())
    return Plan(32, tries, ends, _CHOICES[name], 1) if level == "plain" else Plan(96, tries, ends, 8, 2)


@cache
def neighbours(name: str, count: int) -> tuple[np.ndarray, np.ndarray]:
    """The `count` (a multiple of 16) entries nearest to each point whose coordinates are all values of the grid.

    A point's number has its first coordinate, counted in values, as its lowest digit. Out, nearest first: uint16
    [points, count], which entries; int8 [points, count * dim], their values: of sixteen entries the first coordinates,
    then the second ones, and so on, then the next sixteen.
    """
    book = grid(name)
    base, dim = len(book.values), book.dim
    points = book.values[np.arange(base**dim)[:, None] // base ** np.arange(dim) % base]
    distance = (points**2).sum(1)[:, None] - 2 * (points @ book.entries.T) + (book.entries**2).sum(1)  # exact: integers
    order = distance.astype(np.int64) * len(book.entries) + np.arange(len(book.entries))
    nearest = np.sort(np.partition(order, count - 1, axis=1)[:, :count], axis=1) % len(book.entries)
    values = book.entries[nearest].reshape(len(points), count // 16, 16, dim).transpose(0, 1, 3, 2)
    return nearest.astype(np.uint16), values.astype(np.int8).reshape(len(points), -1)
