"""What a sensitivity table allows at every size: the limits, the frontier, llama.cpp's mixes, the problem of a target.

`dynq.allocate` answers for one target. Here the table is read once, so that a slider can ask for many.
"""

import math
from collections.abc import Mapping
from functools import cached_property
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np

from dynq import formats, mixes
from dynq.allocate import Problem, Target, parse_target, target_bytes
from dynq.knapsack import frontier

if TYPE_CHECKING:
    import pyarrow

    from dynq.checkpoint import TensorInfo

# beside the baselines those that everybody knows, though others of their size do better
_SHOWN = (*mixes.BASELINES, "Q2_K", "Q3_K_S", "Q3_K_M", "Q3_K_L")


class Mix(NamedTuple):
    """One of llama.cpp's mixes.

    tensor_bytes: of all tensor data; kld: predicted, in nats, None where the table lacks one of its formats.
    """

    name: str
    tensor_bytes: int
    kld: float | None
    formats: dict[str, str]


class Frontier(NamedTuple):
    """The lower convex hull of all recipes: bytes of tensor data, rising, and the predicted KLD in nats, falling."""

    tensor_bytes: np.ndarray
    kld: np.ndarray


class Budget:
    """A model's tensors and their sensitivities, to be asked for any target. Arguments: `dynq.allocate.allocate`'s."""

    def __init__(
        self,
        table: "pyarrow.Table",
        tensors: "Mapping[str, TensorInfo]",
        *,
        metadata: Mapping[str, Any],
        header_bytes: int = 0,
        pins: Mapping[str, str] | None = None,
        profile: str | None = None,
        has_importance: bool = True,
    ):
        self.tensors = tensors
        self.n_weights = sum(math.prod(info.shape) for info in tensors.values())
        self._table, self._metadata, self._has_importance = table, metadata, has_importance
        self._more: dict[str, Any] = {"metadata": metadata, "header_bytes": header_bytes, "pins": pins}
        self._more |= {"profile": profile, "has_importance": has_importance}

    @cached_property
    def data(self) -> Problem:
        """The problem in bytes of tensor data, with room for everything."""
        return Problem.of(self._table, self.tensors, Target("everything", "bpw", 1e6), **self._more)

    @cached_property
    def file(self) -> Problem:
        """The problem in bytes of the whole file, with room for everything."""
        return Problem.of(self._table, self.tensors, Target("everything", "file", 1e18, "b"), **self._more)

    def at(self, target: str | Target) -> Problem:
        """The problem of one target. DynqError: not a size, or below the smallest possible."""
        target = parse_target(target) if isinstance(target, str) else target
        problem = self.file if target.kind == "file" else self.data
        if target.kind == "like" and target.like in self._sizes:
            return problem.resized(target, self._sizes[target.like])
        return problem.resized(target, target_bytes(target, self.tensors, self._metadata, self._has_importance))

    @cached_property
    def mixes(self) -> list[Mix]:
        """The usual mixes, smallest first; without importance those that need none. Of one size the last stands."""
        known = {
            (row["tensor"], formats.usable(row["format"], self.tensors[row["tensor"]].shape[-1])): row["predicted_kld"]
            for row in self._table.to_pylist()
        }
        found: dict[int, Mix] = {}
        for name in _SHOWN:
            chosen = mixes.mix(name, self.tensors, self._metadata, self._has_importance)
            if not self._has_importance and any(formats.get(fmt).needs_importance for fmt in set(chosen.values())):
                continue
            losses = [known.get((t, fmt)) for t, fmt in chosen.items() if self.tensors[t].quantizable]
            size = sum(formats.tensor_bytes(fmt, self.tensors[tensor].shape) for tensor, fmt in chosen.items())
            kld = None if None in losses else math.fsum(loss for loss in losses if loss is not None)
            found[size] = Mix(name, size, kld, chosen)
        return [found[size] for size in sorted(found)]

    def mix_kld(self, tensor_bytes: int) -> float | None:
        """The predicted KLD of the baselines' line at a size (`dynq.mixes.interpolate_kld`); None beyond its ends."""
        known = [(m.tensor_bytes, m.kld) for m in self.mixes if m.name in mixes.BASELINES and m.kld is not None]
        known = [(size, kld) for size, kld in known if kld > 0]
        below = max((point for point in known if point[0] <= tensor_bytes), default=None)
        above = min((point for point in known if point[0] >= tensor_bytes), default=None)
        return None if below is None or above is None else mixes.interpolate_kld(tensor_bytes, below, above)

    @cached_property
    def _sizes(self) -> dict[str, int]:
        return {mix.name: mix.tensor_bytes for mix in self.mixes}

    def frontier(self, pinned: Mapping[str, str] | None = None) -> Frontier:
        """What the best recipes of all sizes predict, with these tensors' formats decided."""
        problem = self.data.pinned(pinned or {})
        rows = list(problem.options.values())
        sizes, losses = frontier([[o.bytes for o in row] for row in rows], [[o.loss for o in row] for row in rows])
        return Frontier(sizes + (problem.budget - problem.room), losses)
