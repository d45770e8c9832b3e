"""What a search has tried, line by line: it goes on from there where it was cut off."""

import json
from collections import deque
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dynq.errors import DynqError

_NUMBER = (int, float)
# first key of each kind of line -> what the line must have
_LINES: dict[str, dict[str, Any]] = {
    "search": {"search": str, "seconds": _NUMBER},
    "start": {"kld_held_out": _NUMBER, "bytes": int, "seconds": _NUMBER},
    "tried": {"tried": dict, "round": int, "proposal": int, "accepted": bool, "kld": list, "seconds": _NUMBER},
}


def read_log(path: Path) -> list[dict[str, Any]]:
    """The start and every proposal tried, in their order, as `<name>.search.jsonl` holds them."""
    return _whole_lines(path)[1:]


def _whole_lines(path: Path) -> list[dict[str, Any]]:
    lines = path.read_text(encoding="utf-8", errors="replace").split("\n")[:-1] if path.exists() else []
    found = []
    for number, line in enumerate(lines, 1):
        try:
            entry = json.loads(line)
            kind = next(kind for kind in _LINES if kind in entry)
            whole = all(isinstance(entry[key], wanted) for key, wanted in _LINES[kind].items())
        except (ValueError, RecursionError, StopIteration, TypeError, KeyError):
            whole = False
        if not whole:
            raise DynqError(f"{path}: line {number} is damaged; delete the file, the search starts anew")
        found.append(entry)
    return found


class Log:
    """A file of JSON lines that is first replayed, then written: what is recorded already is not done again."""

    def __init__(self, path: Path, digest: str):
        whole = _whole_lines(path)
        if not whole or whole[0].get("search") != digest:
            whole = [{"search": digest, "seconds": 0.0}]
        self.used = float(whole[-1]["seconds"])
        self.old = deque(whole[1:])
        self._file = path.open("w", encoding="utf-8")
        self._write(*whole)

    def replay(self, key: str) -> dict[str, Any] | None:
        """The next recorded line if it has this key."""
        return self.old.popleft() if self.old and key in self.old[0] else None

    def add(self, line: dict[str, Any]) -> dict[str, Any]:
        self._write(line)
        return line

    def close(self) -> None:
        self._file.close()

    def _write(self, *lines: Mapping[str, Any]) -> None:
        self._file.write("".join(json.dumps(line) + "\n" for line in lines))
        self._file.flush()
