"""The header of a GGUF (ggml/docs/gguf.md), read as what it is: numbers that a stranger wrote.

Every count and length is compared with what is left of the file before anything is made of it, and what no model has
(see the limits below) is refused, so that a damaged or hostile file costs no more than a look.
"""

import mmap
import os
import struct
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from math import prod
from pathlib import Path
from typing import Any

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dynq.errors import DynqError

Header = tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]
"""Metadata without arrays; tensors {name: (format, shape in NumPy order)}."""

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
# More than the largest vocabularies need (Gemma 4: 262,144 tokens, 514,906 merges, 16 MB), and several times the
# tensors of the largest models (1,800).
_MOST_STRINGS, _MOST_NUMBERS, _MOST_BYTES = 1 << 20, 1 << 22, 1 << 26
_MOST_ENTRIES, _MOST_AXES, _LONGEST_NAME = 1 << 13, 4, 1 << 10
_length = struct.Struct("<Q").unpack_from


@dataclass(frozen=True)
class _Tensor:
    fmt: str
    shape: tuple[int, ...]
    at: int  # from the beginning of the data

    @property
    def n_bytes(self) -> int:
        return stored_bytes(self.fmt, self.shape)


def stored_bytes(fmt: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in any of GGUF's types, those that dynq does not write too."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[fmt]]
    return prod(shape) // block * size


def read_header(path: str | Path) -> Header:
    """Metadata and tensors of one GGUF file, without touching tensor data: the file may end behind its header.

    Arrays (vocabularies) are skipped. DynqError for anything that is not a whole GGUF header of version 2 or 3.
    """
    with _mapped(Path(path)) as view:
        metadata, tensors, _ = _parse(view, Path(path))
    return metadata, {name: (tensor.fmt, tensor.shape) for name, tensor in tensors.items()}


def check(path: Path) -> None:
    """DynqError unless the header is sound and every tensor has a place of its own in the file."""
    with _mapped(path) as view:
        metadata, tensors, end = _parse(view, path)
        size = len(view)
    step = metadata.get("general.alignment", 32)
    if not isinstance(step, int) or step < 1 or step & (step - 1):
        raise DynqError(f"{path}: general.alignment is {step!r}, not a power of two; fetch the file again")
    start = -(-end // step) * step
    free, before = 0, ""
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1].at):
        if tensor.at % step:
            raise DynqError(f"{path}: tensor {name} begins at byte {tensor.at:,} of the data, no multiple of {step}")
        if tensor.at < free:
            raise DynqError(f"{path}: the tensors {before} and {name} overlap; fetch the file again")
        free, before = tensor.at + tensor.n_bytes, name
        if start + free > size:
            raise DynqError(
                f"{path}: truncated, tensor {name} reaches past its end ({start + free:,} bytes of {size:,}); "
                "fetch it again"
            )


@contextmanager
def _mapped(path: Path) -> Iterator[mmap.mmap]:
    """The file in memory as far as it is looked at."""
    try:
        if path.is_dir():
            raise DynqError(f"{path}: a folder, not a GGUF file")
        if not path.is_file():
            raise DynqError(f"{path}: no such file")
        with path.open("rb") as file:
            if os.fstat(file.fileno()).st_size < 4 or file.read(4) != b"GGUF":
                raise DynqError(f"{path}: not a GGUF file (it does not begin with GGUF); give a GGUF")
            with mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as view:
                yield view
    except OSError as error:
        raise DynqError(f"{path}: cannot be read: {error.strerror}") from error
    except (struct.error, EOFError, UnicodeDecodeError):
        raise DynqError(f"{path}: the GGUF header is cut off or damaged; fetch the file again") from None


def _parse(view: mmap.mmap, path: Path) -> tuple[dict[str, Any], dict[str, _Tensor], int]:
    """Metadata without arrays, tensors, and where the header ends."""
    at, size, n_strings, n_numbers = 4, len(view), 0, 0

    def refuse(what: str) -> DynqError:
        return DynqError(f"{path}: {what}; the file is damaged, fetch it again")

    def take(code: str) -> Any:
        nonlocal at
        (value,) = struct.unpack_from("<" + code, view, at)
        at += struct.calcsize(code)
        return value

    def skip(length: int) -> None:
        nonlocal at
        if length > size - at:
            raise EOFError
        at += length

    def text() -> str:
        length = take("Q")
        skip(length)
        if length > _MOST_BYTES:
            raise refuse(f"a text of {length:,} bytes in its header")
        return view[at - length : at].decode("utf-8")

    def name() -> str:
        found = text()
        if not 0 < len(found) <= _LONGEST_NAME or not found.isprintable():
            raise refuse(f"the name {found[:80]!r} is empty, long or not printable")
        return found

    def count(most: int, what: str) -> int:
        found: int = take("Q")
        if found > most:
            raise refuse(f"{found:,} {what}, of which no model has more than {most:,}")
        return found

    def array() -> None:
        nonlocal at, n_strings, n_numbers
        kind = take("I")
        if kind == _STRING:
            n = count(_MOST_STRINGS - n_strings, "texts in its lists")
            n_strings += n
            for _ in range(n):
                at += 8 + _length(view, at)[0]
                if at > size:
                    raise EOFError
        elif kind in _SCALARS:
            n = count(_MOST_NUMBERS - n_numbers, "numbers in its lists")
            n_numbers += n
            skip(n * struct.calcsize(_SCALARS[kind]))
        else:
            raise refuse(f"a list of type {kind}")

    version = take("I")
    if version not in (2, 3):
        raise DynqError(f"{path}: GGUF version {version}; versions 2 and 3 (little endian) are understood")
    n_tensors, n_keys = count(_MOST_ENTRIES, "tensors"), count(_MOST_ENTRIES, "keys")
    metadata: dict[str, Any] = {}
    keys: set[str] = set()
    for _ in range(n_keys):
        key, kind = name(), take("I")
        if key in keys:
            raise refuse(f"the key {key} is there twice")
        keys.add(key)
        if kind == _STRING:
            metadata[key] = text()
        elif kind in _SCALARS:
            metadata[key] = take(_SCALARS[kind])
        elif kind == _ARRAY:
            array()
        else:
            raise refuse(f"the key {key} has type {kind}")
        if at > _MOST_BYTES:
            raise refuse(f"metadata of more than {_MOST_BYTES:,} bytes")
    tensors: dict[str, _Tensor] = {}
    for _ in range(n_tensors):
        tensor, n_axes = name(), take("I")
        if tensor in tensors:
            raise refuse(f"the tensor {tensor} is there twice")
        if not 1 <= n_axes <= _MOST_AXES:
            raise refuse(f"tensor {tensor} has {n_axes} axes")
        shape = tuple(take("Q") for _ in range(n_axes))[::-1]
        kind = take("I")
        try:
            fmt = GGMLQuantizationType(kind)
        except ValueError:
            raise DynqError(
                f"{path}: {tensor} has type {kind}, newer than the installed gguf package; update gguf"
            ) from None
        if not 1 <= prod(shape) < 1 << 60 or shape[-1] % GGML_QUANT_SIZES[fmt][0]:
            raise refuse(f"tensor {tensor} of {'x'.join(map(str, shape))} weights in {fmt.name}")
        tensors[tensor] = _Tensor(fmt.name, shape, take("Q"))
    return metadata, tensors, at
