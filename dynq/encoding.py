"""The bytes of a recipe's tensors by the encoders alone, one tensor in memory at a time."""

from collections.abc import Iterator, Mapping

import numpy as np

from dynq import codec, formats
from dynq.checkpoint import Checkpoint
from dynq.imatrix import Importance
from dynq.progress import progress

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
) -> Stream:
    """In the order of chosen: tensor name -> format; level: as in `codec.quantize`."""
    for name, fmt in progress(chosen.items(), total=len(chosen), desc=desc, unit="tensor"):
        yield name, fmt, quantize_tensor(checkpoint, name, fmt, importance, level, threads)


def quantize_tensor(
    checkpoint: Checkpoint, name: str, fmt: str, importance: Importance | None, level: str, threads: int | None
) -> np.ndarray:
    mean = importance.mean(name, checkpoint.tensors[name].row) if importance is not None else None
    return quantized(checkpoint, name, fmt, mean, level, threads)


def quantized(
    checkpoint: Checkpoint, name: str, fmt: str, mean: np.ndarray | None, level: str, threads: int | None
) -> np.ndarray:
    """`codec.quantize` of a tensor; of a stack of experts one matrix at a time is in memory as weights."""
    shape = checkpoint.tensors[name].shape
    if len(shape) != 3:
        return codec.quantize(checkpoint.read(name), fmt, mean, level=level, threads=threads)
    out = np.empty((*shape[:2], formats.row_bytes(fmt, shape[2])), np.uint8)
    for i, weights in enumerate(checkpoint.matrices(name)):
        own = mean[i] if mean is not None and mean.ndim == 2 else mean
        out[i] = codec.quantize(weights, fmt, own, level=level, threads=threads)
    return out
