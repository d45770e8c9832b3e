"""How much memory there is, and whether a model fits into it."""

from __future__ import annotations

import os
from pathlib import Path
from typing import TYPE_CHECKING

from dynq.allocate import parse_target
from dynq.errors import DynqError

if TYPE_CHECKING:
    from dynq.checkpoint import Checkpoint

LIMIT = "DYNQ_MEMORY"
"""An environment variable: bytes that dynq may take ("16GB"), where that is less than the machine has."""

_BESIDES = 0.75  # of the memory may be weights: activations, Hessians and the interpreter take the rest
_CGROUPS = ("memory.max", "memory/memory.limit_in_bytes")  # version 2, version 1


def available(device: str = "cpu") -> int:
    """Bytes of memory that this process can have: what is free, within the limits of its container and the user's.

    device: a card has its own memory, all that is free; "auto": that of all cards.
    """
    if device != "cpu":
        from dynq.devices import AUTO, cards, free  # imports torch

        if all_of := cards() if device == AUTO else [device]:
            return sum(map(free, all_of))
    limits = [_free()]
    for name in _CGROUPS:
        if container := _number(Path("/sys/fs/cgroup") / name):
            limits.append(container)
    if os.environ.get(LIMIT):
        limit = parse_target(os.environ[LIMIT])
        if limit.kind != "file":
            raise DynqError(f'{LIMIT}={limit.text!r} is not a number of bytes; write it as "16GB"')
        limits.append(int(limit.value))
    return min(limits)


def resident(checkpoint: Checkpoint, dtype: str = "float32") -> int:
    """Bytes of a model's weights."""
    return (4 if dtype == "float32" else 2) * checkpoint.n_weights


def fits(checkpoint: Checkpoint, device: str = "cpu", dtype: str = "float32", *, copies: int = 1) -> bool:
    """Whether a model can be in memory as a whole, so many times; else its layers are read when they are called
    (`layerwise`)."""
    return copies * resident(checkpoint, dtype) <= _BESIDES * available(device)


def places(checkpoint: Checkpoint, device: str, dtype: str = "float32") -> list[str]:
    """The devices that a model goes to: one, or with "auto" all cards, where no single one takes it and they do."""
    from dynq.devices import AUTO, CPU, cards  # imports torch

    if device != AUTO:
        return [device]
    if alone := [card for card in cards() if fits(checkpoint, card, dtype)]:
        return alone[:1]
    together = checkpoint.architecture.layers_apart and fits(checkpoint, AUTO, dtype)
    return (cards() if together else cards()[:1]) or [CPU]


def place(checkpoint: Checkpoint, device: str) -> str:
    """The device whose memory counts: the one that the model goes to, or "auto" where it is spread over all cards."""
    found = places(checkpoint, device)
    return found[0] if len(found) == 1 else device


def for_weights(free: float) -> float:
    """How many bytes of weights may be in memory where so much is free."""
    return _BESIDES * free


def takes_copy(weights: int, free: float) -> bool:
    """Whether a model's copy in bfloat16 goes beside it: conversations that it writes must fit as well."""
    return 2 * 2 * weights <= free


def _free() -> int:
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
        return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    except (OSError, StopIteration):  # not Linux: all that there is
        pages, size = "SC_PHYS_PAGES", "SC_PAGE_SIZE"
        known = hasattr(os, "sysconf") and pages in os.sysconf_names
        return os.sysconf(pages) * os.sysconf(size) if known else 8 << 30


def _number(path: Path) -> int | None:
    try:
        return int(path.read_text())
    except (OSError, ValueError):  # not there, or "max"
        return None
