"""Split files: one model in several GGUF files, named and numbered as llama.cpp's ``llama-gguf-split`` does it.

The shards are called NAME-00001-of-00003.gguf and so on, and each says its number from 0 (`split.no`), how many there
are (`split.count`) and how many tensors all of them hold (`split.tensors.count`). The model's metadata stand in the
first alone; that is the one which llama.cpp is given. Source: ``src/llama.cpp`` (llama_split_path), its model loader
and ``tools/gguf-split``.
"""

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from dynq.errors import DynqError

MOST = 65535
"""Shards: their number is kept in 16 bits."""
_NAME = re.compile(r"(.+)-(\d{5})-of-(\d{5})\.gguf")


def shard(path: Path, index: int, count: int) -> Path:
    """Shard number `index`, from 0, of the file that unsplit would be called `path`."""
    return path.with_name(f"{path.name.removesuffix('.gguf')}-{index + 1:05d}-of-{count:05d}.gguf")


def unsplit(path: Path) -> Path:
    """What the file would be called if it were not split: the path itself, or NAME.gguf of one of its shards."""
    match = _NAME.fullmatch(path.name)
    return path.with_name(f"{match[1]}.gguf") if match else path


def named(path: Path) -> list[Path]:
    """The path alone, or all shards in order where it is called as one of them."""
    match = _NAME.fullmatch(path.name)
    if not match:
        return [path]
    count = int(match[3])
    return [shard(unsplit(path), i, count) for i in range(count)]


def of(path: Path) -> list[Path]:
    """What is `named`; DynqError tells which shard is missing."""
    found = named(path)
    for file in found if len(found) > 1 else []:
        if not file.exists():
            raise DynqError(f"{file}: this shard is missing; all {len(found)} are needed")
    return found


def total_bytes(path: Path) -> int:
    """Bytes of a file, or of all shards."""
    return sum(file.stat().st_size for file in of(path))


def keys(index: int, count: int, tensors: int) -> dict[str, Any]:
    """What a shard says of itself, of the types that llama.cpp reads. tensors: of all shards together."""
    return {"split.no": np.uint16(index), "split.count": np.uint16(count), "split.tensors.count": np.int32(tensors)}


def partition(sizes: Mapping[str, int], limit: int, *, first: int, more: Mapping[str, int]) -> list[list[str]]:
    """The names of `sizes` in order, cut into shards of at most `limit` bytes each.

    sizes: bytes of each tensor's data in the file; first: bytes that stand before the data in the first shard; more:
    bytes of each tensor's entry in the header of any other. A tensor that does not fit has a shard of its own.
    DynqError where that makes more shards than a file can have.
    """
    parts: list[list[str]] = [[]]
    room = limit - first
    for name, size in sizes.items():
        needed = size + (more[name] if len(parts) > 1 else 0)
        if parts[-1] and needed > room:
            parts.append([])
            room, needed = limit - _ROOM, size + more[name]
        parts[-1].append(name)
        room -= needed
    if len(parts) > MOST:
        raise DynqError(
            f"shards of {limit:,} bytes would be {len(parts):,}, llama.cpp takes {MOST:,}; make them larger"
        )
    return parts


_ROOM = 256  # bytes of a shard's header without its tensors' entries: magic, counts, three keys, padding
