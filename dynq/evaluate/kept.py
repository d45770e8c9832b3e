"""Results that are computed once: kept in a folder under the hash of all that they depend on."""

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import dynq
from dynq.folder import RunFolder


def digest(about: Any) -> str:
    """16 hexadecimal digits of dynq's version and of plain JSON values."""
    return hashlib.sha256(json.dumps([dynq.__version__, about], sort_keys=True).encode()).hexdigest()[:16]


@dataclass(frozen=True)
class Kept:
    """JSON values in ``scores/`` of a folder. about: what a value depends on."""

    folder: RunFolder

    def has(self, about: Any) -> bool:
        return (self.folder / self._name(about)).exists()

    def get(self, about: Any, make: Callable[[], Any]) -> Any:
        """The value that is there, or the one that `make` gives, which stays there."""
        if not self.has(about):
            self.folder.write_json(self._name(about), make())
        return self.folder.read_json(self._name(about))

    def _name(self, about: Any) -> str:
        return f"scores/{digest(about)}.json"
