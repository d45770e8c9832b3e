"""The memory that a piece of work takes at the most, where Linux tells it."""

import ctypes
import gc
import multiprocessing
import threading
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from pathlib import Path
from typing import TypeVar

_Result = TypeVar("_Result")

_MMAP_THRESHOLD = -3  # M_MMAP_THRESHOLD of glibc's malloc.h


def _own_bytes() -> int:
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return 1024 * int(line.split()[1])


def in_a_new_process(work: Callable[..., _Result], *arguments: object) -> _Result:
    """Call a function of a module where no other test's threads and heap add to what it measures."""
    with ProcessPoolExecutor(1, multiprocessing.get_context("spawn")) as pool:
        return pool.submit(work, *arguments).result()


class Peak:
    """The most that the process held inside of a with block, above what it held before."""

    _libc = ctypes.CDLL(None)

    def __enter__(self) -> "Peak":
        gc.collect()
        self._libc.mallopt(_MMAP_THRESHOLD, 1 << 20)  # what is let go of goes back at once, not when malloc likes
        self._libc.malloc_trim(0)  # else what a step before has let go of is taken again, unseen
        self.bytes, self._before, self._end = 0, _own_bytes(), threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._end.wait(0.002):
            self.bytes = max(self.bytes, _own_bytes() - self._before)

    def __exit__(self, *_: object) -> None:
        self._end.set()
        self._thread.join()
        self._libc.mallopt(_MMAP_THRESHOLD, 32 << 20)
