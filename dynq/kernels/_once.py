"""Tables that are made on first use."""

from collections.abc import Callable, Hashable
from functools import cache, wraps
from threading import RLock
from typing import TypeVar

T = TypeVar("T")


def once(function: Callable[..., T]) -> Callable[..., T]:
    """`functools.cache` for tables: threads that ask at the same time wait for one, instead of making one each."""
    cached, lock = cache(function), RLock()

    @wraps(function)
    def waiting(*arguments: Hashable) -> T:
        with lock:
            return cached(*arguments)

    return waiting
