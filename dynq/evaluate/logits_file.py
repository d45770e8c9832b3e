"""llama-perplexity's logits file (``--kl-divergence-base``), read as a reference and written.

Layout, little endian (tools/perplexity/perplexity.cpp of llama.cpp)::

    "_logits_"  n_ctx uint32  n_vocab int32  n_chunk int32  tokens int32 [n_chunk, n_ctx]
    for each chunk and each of its n_ctx - 1 - n_ctx / 2 scored positions:
        scale float32  lowest float32  codes uint16 [n_vocab, to the next even number]

A log-probability is ``lowest + scale * code``. ``lowest`` is at most 16 nats below that of the best token: whatever
lies lower is clipped to it. llama-perplexity therefore leaves tokens below -16 nats out of the KLD, and so do we with
such a reference. dynq's own file keeps 32 nats (see dynq/evaluate/kld.py).
"""

import shutil
import struct
from collections.abc import Iterable
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynq.errors import DynqError
from dynq.evaluate.kld import Coded
from dynq.files import replacing

MAGIC = b"_logits_"
RANGE = 16.0  # nats below the best token
_HEADER = struct.Struct("<Iii")
_HEAD = 4  # codes' places that scale and lowest take in a row of uint16


@dataclass(frozen=True)
class LogitsFile:
    """A reference for `kld.measure`.

    tokens int32 ``[n_chunks, n_ctx]``; rows uint16 ``[n_chunks, scored, 4 + n_vocab to even]`` (a memory map). path:
    as which it travels to other processes.
    """

    tokens: np.ndarray
    n_vocab: int
    rows: np.ndarray
    path: Path

    def __reduce__(self) -> Any:
        return _read_elsewhere, (self.path, self.tokens)

    @property
    def first(self) -> int:
        """The first scored position."""
        return int(self.tokens.shape[1]) // 2

    @property
    def floor(self) -> float:
        return -RANGE

    def starting_with(self, bos: int | None) -> "LogitsFile":
        """With this token in place of each chunk's first, as llama-perplexity reads it to models that add a BOS.

        The file keeps the text's own token. None changes nothing.
        """
        tokens = self.tokens.copy()
        tokens[:, 0] = tokens[:, 0] if bos is None else bos
        return replace(self, tokens=tokens)

    def coded(self, chunk: int) -> Coded:
        """As stored: clipped, and not to be normalised again."""
        rows = self.rows[chunk]
        step, lowest = np.ascontiguousarray(rows[:, :_HEAD]).view("<f4").T
        return Coded(rows[:, _HEAD : _HEAD + self.n_vocab], step, lowest, normalise=False)


def read(path: str | Path) -> LogitsFile:
    """Open a logits file; nothing but the tokens is read into memory.

    DynqError for another kind of file, a truncated one, or impossible numbers.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DynqError(f"{path}: the logits file cannot be read: not a file")
    try:
        with path.open("rb") as file:
            magic, header = file.read(len(MAGIC)), file.read(_HEADER.size)
    except OSError as error:
        raise DynqError(f"{path}: the logits file cannot be read: {error.strerror}") from error
    if magic != MAGIC:
        raise DynqError(f"{path}: not a logits file of llama-perplexity (it does not begin with {MAGIC.decode()})")
    n_ctx, n_vocab, n_chunks = _HEADER.unpack(header) if len(header) == _HEADER.size else (0, 0, 0)
    if n_ctx < 4 or n_vocab < 1 or n_chunks < 1:
        raise DynqError(
            f"{path}: {n_chunks} chunks of {n_ctx} tokens, {n_vocab} in the vocabulary: damaged; make it anew"
        )
    start = len(MAGIC) + _HEADER.size
    shape = n_chunks, n_ctx - 1 - n_ctx // 2, _width(n_vocab)
    size, expected = path.stat().st_size, start + 4 * n_chunks * n_ctx + 2 * prod(shape)
    if size != expected:
        raise DynqError(f"{path}: {size:,} bytes where {expected:,} are expected: truncated; make it anew")
    tokens = np.fromfile(path, "<i4", n_chunks * n_ctx, offset=start).reshape(n_chunks, n_ctx)
    if tokens.min() < 0 or tokens.max() >= n_vocab:
        raise DynqError(f"{path}: a token outside of the vocabulary of {n_vocab}: damaged; make it anew")
    return LogitsFile(tokens, n_vocab, np.memmap(path, "<u2", "r", start + tokens.nbytes, shape), path.absolute())


def _read_elsewhere(path: Path, tokens: np.ndarray) -> LogitsFile:
    return replace(read(path), tokens=tokens)


def write(path: str | Path, tokens: np.ndarray, n_vocab: int, log_probs: Iterable[torch.Tensor]) -> None:
    """Write what ``llama-perplexity --kl-divergence`` takes as its base.

    tokens int32 ``[n_chunks, n_ctx]``; log_probs: one float32 ``[scored, n_vocab]`` for each chunk, of positions
    ``n_ctx / 2 .. n_ctx - 2``. DynqError where the disk has no room, before anything is computed.
    """
    path = Path(path)
    n_chunks, n_ctx = tokens.shape
    scored = n_ctx - 1 - n_ctx // 2
    need = len(MAGIC) + _HEADER.size + 4 * tokens.size + 2 * n_chunks * scored * _width(n_vocab)
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else need
    if need > free:
        raise DynqError(f"{path}: the logits need {need / 2**30:.1f} GiB, {free / 2**30:.1f} GiB are free")
    with replacing(path, need) as beside, beside.open("wb") as file:
        file.write(MAGIC + _HEADER.pack(n_ctx, n_vocab, n_chunks))
        file.write(tokens.astype("<i4").tobytes())
        for chunk in log_probs:
            file.write(_encode(chunk.cpu().numpy()).tobytes())


def _encode(log_probs: np.ndarray) -> np.ndarray:
    """float32 ``[n, n_vocab]`` -> uint16 ``[n, 4 + n_vocab to even]``."""
    n, n_vocab = log_probs.shape
    best = log_probs.max(axis=1)
    lowest = np.maximum(log_probs.min(axis=1), best - np.float32(RANGE))
    scale = (best - lowest) / np.float32(65535)
    inverse = np.divide(1, scale, out=np.zeros_like(scale), where=scale > 0)
    rows = np.zeros((n, _width(n_vocab)), "<u2")
    rows[:, :_HEAD] = np.stack([scale, lowest], axis=1).astype("<f4").view("<u2")
    codes = np.rint((log_probs - lowest[:, None]) * inverse[:, None])
    rows[:, _HEAD : _HEAD + n_vocab] = np.clip(codes, 0, 65535)
    return rows


def _width(n_vocab: int) -> int:
    """uint16 values in a row."""
    return _HEAD + n_vocab + n_vocab % 2
