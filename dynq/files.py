"""Files that are whole or not there: written beside their place, flushed to the disk, renamed; and their hash."""

import contextlib
import errno
import hashlib
import json
import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from dynq.errors import DynqError

_STEP = 1 << 24  # bytes read at once


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
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            what = f"the file needs {needs:,} bytes" if needs else "make room and run the same command again"
            raise DynqError(f"{path}: the disk is full; {what}") from error
        raise
    finally:
        beside.unlink(missing_ok=True)
    with contextlib.suppress(OSError):  # not every system opens a directory
        _flush(path.parent)  # the rename, too, is on the disk


def _flush(path: Path) -> None:
    handle = os.open(path, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def load_json(path: Path, meaning: str) -> dict[str, Any]:
    """The object in a JSON file. DynqError if it is missing (meaning: what the folder then is) or is something else."""
    try:
        loaded = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DynqError(f"{path.parent}: {meaning}, {path.name} is missing") from None
    except (ValueError, OSError) as error:
        raise DynqError(f"{path}: not readable as JSON ({error})") from None
    if not isinstance(loaded, dict):
        raise DynqError(f"{path}: not a JSON object")
    return loaded
