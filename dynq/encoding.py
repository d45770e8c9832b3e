"""The bytes of a recipe's tensors by the encoders alone, one tensor in memory at a time."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from functools import partial
from typing import TYPE_CHECKING

import numpy as np

from dynq import codec, formats
from dynq.checkpoint import Checkpoint
from dynq.cluster import tasks
from dynq.errors import DynqError
from dynq.imatrix import Importance

if TYPE_CHECKING:
    from distributed import Client

Stream = Iterator[tuple[str, str, np.ndarray]]
"""Name, format and bytes uint8 ``[..., row bytes]`` of tensors."""


def encode(
    checkpoint: Checkpoint,
    chosen: Mapping[str, str],
    importance: Importance | None,
    *,
    level: str = "plain",
    threads: int | None = None,
    desc: str = "encode",
    cluster: Client | None = None,
) -> Stream:
    """In the order of chosen: tensor name -> format; level: as in `codec.quantize`; cluster: whose workers encode."""
    function = partial(_encoded, checkpoint, level, 1 if cluster else threads)
    items = ((name, fmt, importance_of(checkpoint, name, importance)) for name, fmt in chosen.items())
    made = tasks(function, items, cluster, total=len(chosen), desc=desc, unit="tensor")
    for (name, fmt), data in zip(chosen.items(), made, strict=True):
        yield name, fmt, data


def quantize_tensor(
    checkpoint: Checkpoint, name: str, fmt: str, importance: Importance | None, level: str, threads: int | None
) -> np.ndarray:
    return quantized(checkpoint, name, fmt, importance_of(checkpoint, name, importance), level, threads)


def importance_of(checkpoint: Checkpoint, name: str, importance: Importance | None) -> np.ndarray | None:
    """What a tensor is encoded with, see `Importance.mean`."""
    return importance.mean(name, checkpoint.tensors[name].row) if importance is not None else None


def quantized(
    checkpoint: Checkpoint, name: str, fmt: str, mean: np.ndarray | None, level: str, threads: int | None
) -> np.ndarray:
    """`codec.quantize` of a tensor; of a stack of experts one matrix at a time is in memory as weights."""
    info = checkpoint.tensors[name]
    if not info.stacked:
        return codec.quantize(checkpoint.read(name), fmt, mean, level=level, threads=threads)
    out = np.empty((*info.shape[:2], formats.row_bytes(fmt, info.row)), np.uint8)
    for i, (weights, own) in enumerate(matrices(checkpoint, name, mean)):
        out[i] = codec.quantize(weights, fmt, own, level=level, threads=threads)
    return out


def usable(candidates: Iterable[str], row: int, mean: np.ndarray | None) -> list[str]:
    """The formats that a tensor with this row length and importance can have, once each: `formats.usable`."""
    found = dict.fromkeys(formats.usable(c, row) for c in candidates)
    return [fmt for fmt in found if mean is not None or not formats.get(fmt).needs_importance]


def matrices(
    checkpoint: Checkpoint, name: str, mean: np.ndarray | None
) -> Iterator[tuple[np.ndarray, np.ndarray | None]]:
    """The matrices of a tensor, see `Checkpoint.matrices`, each with its part of the importance."""
    info = checkpoint.tensors[name]
    apart = mean if mean is not None and mean.ndim == 2 and info.stacked else None
    if apart is not None and len(apart) != info.n_matrices:
        raise DynqError(f"importance matrix: {name} has {len(apart)} experts there, {info.n_matrices} in the model")
    for i, weights in enumerate(checkpoint.matrices(name)):
        yield weights, mean if apart is None else apart[i]


def _encoded(
    checkpoint: Checkpoint, level: str, threads: int | None, item: tuple[str, str, np.ndarray | None]
) -> np.ndarray:
    name, fmt, mean = item
    return quantized(checkpoint, name, fmt, mean, level, threads)
