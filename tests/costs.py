"""What a reader of a stranger's file costs, and where it writes."""

from __future__ import annotations

import contextlib
import os
import sys
import time
from pathlib import Path
from typing import Any

SECONDS, BYTES = 2.0, 500e6  # that a reader may take
_WRITES = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC | os.O_APPEND
_CHANGES = {"os.mkdir": 1, "os.rename": 2, "os.link": 2, "os.symlink": 2, "os.remove": 1, "os.truncate": 1}


class Costs:
    """Of what is done inside of a with block.

    seconds: of computing, for the clock tells what else a machine does. bytes: of memory above what there was, at the
    most (Linux). written: what Python opened to write, made, renamed or removed; but not its own caches.
    """

    _now: Costs | None = None

    def __enter__(self) -> Costs:
        if not _hooked:
            sys.addaudithook(_audit)  # for good: Python takes none back
            _hooked.append(True)
        self.written: list[Path] = []
        with contextlib.suppress(OSError):
            Path("/proc/self/clear_refs").write_text("5")  # else the most is that since the process began
        self._bytes, self._start = _most_bytes(), time.process_time()
        Costs._now = self
        return self

    def __exit__(self, *_: object) -> None:
        Costs._now = None
        self.seconds, self.bytes = time.process_time() - self._start, _most_bytes() - self._bytes

    def outside(self, folder: Path) -> list[Path]:
        """What was written elsewhere than in this folder."""
        return [path for path in self.written if not path.is_relative_to(folder.resolve())]


_hooked: list[bool] = []


def _audit(event: str, arguments: tuple[Any, ...]) -> None:
    if (costs := Costs._now) is None:
        return
    if event == "open":
        paths = arguments[:1] if arguments[2] & _WRITES else ()
    else:
        paths = arguments[: _CHANGES.get(event, 0)]
    for path in paths:
        if isinstance(path, str | bytes | os.PathLike):
            found = Path(os.path.realpath(os.fsdecode(path)))
            if found != Path(os.devnull) and "__pycache__" not in found.parts:
                costs.written.append(found)


def _most_bytes() -> int:
    """Bytes of memory at the most, mapped files included; 0 where it is not Linux."""
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
    except OSError:
        return 0
    return 1024 * int(next(line for line in lines if line.startswith("VmHWM")).split()[1])
