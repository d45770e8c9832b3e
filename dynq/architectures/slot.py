"""Where a GGUF tensor's values stand in transformers' parameters, in a form that serves both directions."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

View = Callable[[Any], Any]
"""Slices, transpositions and splits of axes: what it returns shares memory with the array or tensor it is given."""


def whole(parameter: Any) -> Any:
    """The parameter as it is."""
    return parameter


def part(index: int, of: int, axis: int) -> View:
    """One of several equal parts that follow each other along an axis: gate or up of `gate_up_proj`."""

    def view(p: Any) -> Any:
        size = p.shape[axis] // of
        return p[(*[slice(None)] * axis, slice(index * size, (index + 1) * size))]

    return view


def every(step: int, start: int) -> View:
    """Every so many entries of the last axis: gate or up where they alternate."""
    return lambda p: p[..., start::step]


def transposed(p: Any) -> Any:
    """The last two axes exchanged: `[in, out]` to `[out, in]`."""
    return p.swapaxes(-1, -2)


def then(*views: View) -> View:
    """One view after the other."""

    def view(p: Any) -> Any:
        for step in views:
            p = step(p)
        return p

    return view


@dataclass(frozen=True, eq=False)
class Slot:
    """The place of one GGUF tensor.

    parameter: transformers' parameter or buffer.
    view: of the parameter; its values, in C order, are those of the GGUF tensor.
    rows: which of the view's, in GGUF's order, where no view gives them; all if None.
    cols: the order of the columns alike; not both.
    merge: so many leading axes of the view are one in GGUF.
    plus: what GGUF adds to the values: 1 for norms that transformers keeps as w - 1.
    decay: GGUF holds -exp(value): decays, of which transformers keeps the logarithm.
    stored, parts: how checkpoints name the matrices that are stacked, "{}" standing for the number, and how many there
        are: experts that are saved apart. A checkpoint may hold the whole parameter instead.
    """

    parameter: str
    view: View = whole
    rows: np.ndarray | None = None
    cols: np.ndarray | None = None
    merge: int = 0
    plus: float = 0.0
    decay: bool = False
    stored: str = ""
    parts: int = 0

    @property
    def linear(self) -> bool:
        """Whether the GGUF tensor is rows of the parameter: y = W x holds for both, x in the order of `cols`."""
        return self.view is whole or self.merge > 0

    @property
    def same(self) -> bool:
        """Whether GGUF holds the parameter as it is."""
        return self.view is whole and self.rows is None and self.cols is None and not self.plus and not self.decay

    def shape(self, shape: tuple[int, ...]) -> tuple[int, ...]:
        """The GGUF tensor's shape for a parameter of this shape."""
        return tuple(self.gather(np.broadcast_to(np.False_, shape)).shape)

    def gather(self, parameter: Any) -> Any:
        """The parameter's entries (or those of its gradient) in GGUF's order and shape, as they are: array or tensor.

        A copy, unless both agree.
        """
        values = self.view(parameter)[self._at]
        return values.reshape(-1, *values.shape[self.merge :]) if self.merge else values

    def take(self, parameter: np.ndarray) -> np.ndarray:
        """The GGUF tensor's values from the parameter's: C-contiguous."""
        values = np.ascontiguousarray(self.gather(parameter))
        if self.decay:
            values = -np.exp(values)
        return values + np.float32(self.plus) if self.plus else values

    def put(self, parameter: Any, values: Any) -> None:
        """Write the GGUF tensor's values into the parameter in place (NumPy arrays or torch tensors, both alike)."""
        values = values - self.plus if self.plus else values
        if self.decay:
            values = np.log(-values) if isinstance(values, np.ndarray) else (-values).log()
        self.scatter(parameter, values)

    def scatter(self, parameter: Any, values: Any) -> None:
        """The inverse of `gather`, in place: also for differences of values."""
        target = self.view(parameter)
        shape = tuple(target.shape) if self.rows is None else (len(self.rows), *target.shape[1:])
        target[self._at] = values.reshape(shape)

    def columns(self, shape: tuple[int, ...], flipped: bool) -> np.ndarray | None:
        """Which input each column of the GGUF tensor multiplies; None where its rows do not run along the inputs.

        shape: of the parameter; flipped: it is ``[..., n_in, n_out]``. (The k part of DeepSeek's kv_b is kept
        transposed: its inputs are queries, which no layer of transformers reads.)
        """
        axis = len(shape) - (2 if flipped else 1)
        inputs = np.arange(shape[axis], dtype=np.int32).reshape([-1 if i == axis else 1 for i in range(len(shape))])
        rows = self.gather(np.broadcast_to(inputs, shape))
        first = np.array(rows[(0,) * (rows.ndim - 1)])
        return first if len(first) == shape[axis] and len(np.unique(first)) == len(first) else None

    @property
    def _at(self) -> Any:
        """The index of what is taken of the view."""
        if self.cols is not None:
            return slice(None), self.cols
        return ... if self.rows is None else self.rows


def neighbours(heads: int) -> dict[str, Any]:
    """Settings of a slot whose rows are rotated: halves of each head (i, i + dim/2), as in transformers, to neighbours
    (2i, 2i + 1), as llama.cpp's architectures of RoPE type "norm" have them."""

    def view(p: Any) -> Any:
        return p.reshape(heads, 2, -1, *p.shape[1:]).swapaxes(1, 2)

    return {"view": view, "merge": 3}
