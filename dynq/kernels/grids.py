"""The code books of IQ2_XXS, IQ2_XS, IQ2_S, IQ3_XXS, IQ3_S and, for each rounded point, the entries nearest to it."""

from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf import quants


@dataclass(frozen=True)
class Grid:
    """A code book: weight = step * (2 level + 1) * d * entry's value, with a sign.

    entries float32 [entries, dim]; values: the few that occur in it, rising, evenly spaced but for the last;
    sub: weights that share a level of 0..15; even: seven signs are stored for eight weights, the eighth makes the
    number of minus signs even.
    """

    entries: np.ndarray
    values: np.ndarray
    sub: int
    even: bool
    step: float

    @property
    def dim(self) -> int:
        return self.entries.shape[1]


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
