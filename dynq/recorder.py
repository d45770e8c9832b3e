"""What the weights of a model multiply and which way the output turns: inputs and gradients of every product, recorded.

Products are seen where torch computes them, whatever module they stand in: linear layers, the loop over the experts of
a mixture, batched products with all experts at once. A weight is known by its storage, an expert by its place in it.
"""

from __future__ import annotations

from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError

HEAD = "output.weight"
"""The name of the output head, also where it is tied to the embedding."""

_LOOKUP = torch.nn.functional.embedding
_LINEAR = torch.nn.functional.linear
_MATMUL = {torch.matmul, torch.mm, torch.bmm, torch.Tensor.matmul, torch.Tensor.mm, torch.Tensor.bmm}


@dataclass
class Use:
    """What one parameter multiplied.

    x: ``[n, n_in]`` of the model's dtype, or int64 ``[n]``, the rows that were looked up. g: float32 ``[n, n_out]``,
    the gradient at the product, None without a backward pass. expert: int64 ``[n]``, which matrix of a stack, None for
    a single matrix.
    """

    x: torch.Tensor
    g: torch.Tensor | None
    expert: torch.Tensor | None


@dataclass
class _Pieces:
    x: list[torch.Tensor] = field(default_factory=list)
    outputs: list[int] = field(default_factory=list)  # features of each product
    expert: list[torch.Tensor] = field(default_factory=list)
    g: dict[int, torch.Tensor] = field(default_factory=dict)


class Recorder(TorchFunctionMode):
    """A context: what a model computes inside is recorded, its backward pass too, until `clear`.

    units: name -> parameter: a matrix, a stack of experts, or an embedding, under the name of the first GGUF tensor
        that is in it; the head under `HEAD` also where it is tied. tensors: GGUF name -> unit.
    flipped: units whose matrices are ``[in, out]``, known once they were used.
    only: names of the tensors that are recorded, others are not seen; by default all, and the head.
    """

    def __init__(self, model: Any, checkpoint: Checkpoint, only: Collection[str] | None = None):
        super().__init__()
        self.units: dict[str, torch.Tensor] = {}
        self.tensors: dict[str, str] = {}
        self.flipped: set[str] = set()
        self._pieces: dict[str, _Pieces] = {}
        first: dict[str, str] = {}
        for name, info in checkpoint.tensors.items():
            if info.quantizable and (only is None or name in only):
                parameter = checkpoint.architecture.parameter(name)
                unit = self.tensors[name] = first.setdefault(parameter, name)
                self.units[unit] = model.get_parameter(parameter)
        if only is None or HEAD in only:
            self.tensors[HEAD] = HEAD
            self.units[HEAD] = model.get_output_embeddings().weight
        storages = {unit: parameter.untyped_storage().data_ptr() for unit, parameter in self.units.items()}
        storages = {unit: at for unit, at in storages.items() if at}  # a layer that is not in memory lies nowhere
        self._lookups = {at: unit for unit, at in storages.items() if unit != HEAD}
        self._products = {at: unit for unit, at in storages.items()}  # the head is the last, also where it is tied

    def clear(self) -> None:
        self._pieces.clear()

    @property
    def used(self) -> list[str]:
        """The units that were used since `clear`, in the order of first use."""
        return list(self._pieces)

    def check_used(self, used: Collection[str]) -> None:
        """DynqError, naming it, if a unit is not among those used."""
        for unit in self.units:
            if unit not in used:
                raise DynqError(f"{unit}: the model multiplies nothing by it, calibration has no rule for it")

    def shares(self, unit: str) -> int:
        """A number that is the same for units that read the same input."""
        pieces = self._pieces[unit]
        return pieces.x[0].data_ptr() if len(pieces.x) == 1 and not pieces.expert else id(pieces)

    def use(self, unit: str) -> Use:
        """What a unit multiplied since `clear`, which is among `used`."""
        pieces = self._pieces[unit]
        x = torch.cat(pieces.x) if len(pieces.x) > 1 else pieces.x[0]
        g = None
        if pieces.g:
            parts = [
                pieces.g[i] if i in pieces.g else torch.zeros(len(rows), n, device=rows.device)
                for i, (rows, n) in enumerate(zip(pieces.x, pieces.outputs, strict=True))
            ]
            g = (torch.cat(parts) if len(parts) > 1 else parts[0]).float()
        return Use(x, g, torch.cat(pieces.expert) if pieces.expert else None)

    def __torch_function__(self, func: Any, types: Any, args: tuple = (), kwargs: dict[str, Any] | None = None) -> Any:
        out = func(*args, **(kwargs or {}))
        if func is _LOOKUP or func is _LINEAR or func in _MATMUL:
            x, weight = args[0], args[1] if len(args) > 1 else (kwargs or {}).get("weight")
            if isinstance(weight, torch.Tensor):
                known = self._lookups if func is _LOOKUP else self._products
                unit = known.get(weight.untyped_storage().data_ptr())
                if unit is not None and func is _LOOKUP:
                    if torch.is_grad_enabled() and not out.requires_grad:
                        out.requires_grad_(True)  # no parameter needs a gradient: the graph begins here
                    self._keep(unit, x.reshape(-1), out, None)
                elif unit is not None:
                    self._product(unit, x, weight, out, func is _LINEAR)
        return out

    def _product(self, unit: str, x: torch.Tensor, weight: torch.Tensor, out: torch.Tensor, linear: bool) -> None:
        parameter = self.units[unit]
        as_kept = weight.stride()[-2:] == parameter.stride()[-2:]
        if as_kept != linear:  # linear multiplies by the transposed matrix
            self.flipped.add(unit)
        rows, expert = x.detach().reshape(-1, x.shape[-1]), None
        if parameter.ndim == 3 and weight.ndim == 2:
            number = weight.storage_offset() // parameter.stride(0)
            expert = torch.full((len(rows),), number, device=rows.device)
        elif parameter.ndim == 3:
            expert = torch.arange(len(parameter), device=rows.device).repeat_interleave(len(rows) // len(parameter))
        self._keep(unit, rows, out, expert)

    def _keep(self, unit: str, x: torch.Tensor, out: torch.Tensor, expert: torch.Tensor | None) -> None:
        pieces = self._pieces.setdefault(unit, _Pieces())
        chosen = None
        if expert is not None and len(expert) and expert[0] != expert[-1]:
            chosen = x.any(-1)  # where all experts see all tokens, those that are not meant for them are zero
            x, expert = x[chosen], expert[chosen]
        at = len(pieces.x)
        pieces.x.append(x)
        pieces.outputs.append(out.shape[-1])
        if expert is not None:
            pieces.expert.append(expert)

        def keep_gradient(gradient: torch.Tensor) -> None:
            rows = gradient.detach().reshape(-1, gradient.shape[-1])
            pieces.g[at] = rows if chosen is None else rows[chosen]

        if out.requires_grad:
            out.register_hook(keep_gradient)
