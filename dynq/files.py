"""Files that are whole or not there: written beside their place, flushed to the disk, renamed; and their hash."""

import contextlib
import errno
import gc
import hashlib
import json
import os
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import accumulate
from pathlib import Path, PureWindowsPath
from typing import Any

import numpy as np
import yaml

from dynq.errors import DynqError

_STEP = 1 << 24  # bytes read at once
# JSON of strangers. The largest of a model is a vocabulary (Gemma 4: 33 MB, 2.2 million commas, colons and brackets);
# Python makes up to a hundred bytes of each.
_MOST_BYTES, _MOST_MARKS = 1 << 26, 3_000_000
_LONGEST_YAML, _DEEPEST = 1 << 15, 50  # PyYAML takes the square of the depth


def sha256(path: Path, advance: Callable[[int], Any] | None = None) -> str:
    """SHA-256 (hex) of a file's bytes. advance: called with the bytes of each piece read, for a progress bar."""
    digest = hashlib.sha256()
    with path.open("rb") as file:
        while piece := file.read(_STEP):
            digest.update(piece)
            if advance is not None:
                advance(len(piece))
    return digest.hexdigest()


@contextmanager
def replacing(path: str | Path, needs: int = 0) -> Iterator[Path]:
    """Gives the path of a file beside ``path`` to write to; when the block ends it takes the place of ``path``.

    After an exception, Ctrl-C too, ``path`` is what it was before and nothing half-written stays behind. Raises
    DynqError where the folder is missing or the disk is full; needs: the file's bytes, where they are known.
    """
    path = Path(path)
    if not path.parent.is_dir():
        raise DynqError(f"{path}: the directory {path.parent} does not exist; make it first")
    beside = path.with_name(path.name + ".partial")
    try:
        yield beside
        _flush(beside)
        beside.replace(path)
    except Exception as error:
        if is_full(error):
            what = f"the file needs {needs:,} bytes" if needs else "make room and run the same command again"
            raise DynqError(f"{path}: the disk is full; {what}") from error
        raise
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system opens a directory
        _flush(path.parent)  # the rename, too, is on the disk


def is_full(error: Exception) -> bool:
    """Whether an error says that the disk is full. Those of safetensors have the system's number in their text."""
    codes = (errno.ENOSPC, errno.EDQUOT)
    return getattr(error, "errno", None) in codes or any(f"(os error {code})" in str(error) for code in codes)


def is_plain(name: str) -> bool:
    """Whether a stranger's name is that of a file in a folder: no slash, no backslash, no drive, no dots alone."""
    inside = name == PureWindowsPath(name).name and bool(name.strip("."))
    return inside and name.isprintable() and len(name.encode()) < 256


def disk_array(path: Path, dtype: Any, shape: tuple[int, ...]) -> np.memmap:
    """A new file as an array. The disk sets its bytes aside: were it full later, the system would end the process."""
    with path.open("wb") as file:
        file.truncate(size := int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize)
        if hasattr(os, "posix_fallocate"):
            try:
                os.posix_fallocate(file.fileno(), 0, size)
            except OSError as error:
                if is_full(error):
                    raise
    return np.memmap(path, dtype, "r+", shape=shape)


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def parse_json(data: bytes, where: str | Path, unique: bool = False) -> Any:
    """The value of a JSON text that a stranger wrote. unique: an object may not have a name twice.

    DynqError, beginning with `where`: no JSON, nested deeper than Python goes, or more than any model needs.
    """
    marks = sum(data.count(mark) for mark in (b",", b":", b"[", b"{"))
    if len(data) > _MOST_BYTES or marks > _MOST_MARKS:
        raise DynqError(f"{where}: {len(data):,} bytes of JSON with {marks:,} parts, more than any model has")
    try:
        return json.loads(data.decode("utf-8"), object_pairs_hook=_unique if unique else None)
    except RecursionError:
        raise DynqError(f"{where}: JSON nested too deep; fetch it again") from None
    except ValueError as error:
        raise DynqError(f"{where}: not readable as JSON ({error}); fetch it again or make it anew") from None


def parse_yaml(text: str, where: str) -> Any:
    """The value of a YAML text that a stranger wrote. DynqError, beginning with `where`: no YAML, long, deep, or with
    aliases."""
    nested = accumulate((mark in "[{") - (mark in "]}") for mark in text)
    if len(text) > _LONGEST_YAML or max(nested, default=0) > _DEEPEST:
        problem = f"is {len(text):,} characters long, or nested deeper than {_DEEPEST} brackets"
    else:
        try:
            if not any(isinstance(event, yaml.AliasEvent) for event in yaml.parse(text, yaml.SafeLoader)):
                return yaml.safe_load(text)
            problem = "has aliases, by which a few lines become millions"
        except (yaml.YAMLError, RecursionError, AttributeError, LookupError, ValueError) as error:
            problem = f"is not readable as YAML ({error})"
    raise DynqError(f"{where} {problem}; shorten or mend it")


def _unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, n in Counter(name for name, _ in pairs).items() if n > 1)
        raise ValueError(f"{twice!r} is there twice")
    return found


def load_json(path: Path, meaning: str) -> dict[str, Any]:
    """The object in a JSON file. DynqError if it is missing (meaning: what the folder then is) or is something else."""
    if not path.exists():
        raise DynqError(f"{path.parent}: {meaning}, {path.name} is missing")
    loaded = parse_json(read_bytes(path, _MOST_BYTES), path)
    if not isinstance(loaded, dict):
        raise DynqError(f"{path}: not a JSON object")
    return loaded


def read_bytes(path: Path, most: int) -> bytes:
    """A file's bytes. DynqError if it is longer than `most`, no file (a pipe would never end), or not readable."""
    if not path.is_file():
        raise DynqError(f"{path}: not a file")
    try:
        with path.open("rb") as file:
            data = file.read(most + 1)
    except OSError as error:
        raise DynqError(f"{path}: cannot be read: {error.strerror}") from error
    if len(data) > most:
        raise DynqError(f"{path}: longer than {most:,} bytes, more than any model has")
    return data


@contextmanager
def taking_apart(where: str | Path) -> Iterator[None]:
    """DynqError for what goes wrong while contents of a file are taken apart that are not what they should be."""
    try:
        yield
    except (
        ArithmeticError,
        AssertionError,
        AttributeError,
        LookupError,
        RecursionError,
        TypeError,
        ValueError,
    ) as error:
        reason = f"{type(error).__name__}: {error}" if str(error) else type(error).__name__
        raise DynqError(f"{where}: damaged, or of a kind that is not read ({reason}); fetch it again") from error


@contextmanager
def no_collection() -> Iterator[None]:
    """Python looks for garbage again and again while a million parts are made: two thirds of the time."""
    before = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if before:
            gc.enable()
