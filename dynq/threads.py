"""Sequences side by side, each computed by one thread of torch: the same bytes whatever the number of threads.

torch cuts the elements of an operation into a piece for each thread and rounds the last few of a piece otherwise
(silu), and Intel's MKL sums a product of matrices in another order. So two and three threads differ in their last bits,
and a sampled text from the first token that hangs on them.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any, TypeVar

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def one_thread_each(threads: int | None) -> Iterator[ThreadPoolExecutor]:
    """Workers whose torch operations take one thread each; threads: how many, by default as many as torch has."""
    import torch  # those who only read texts need none

    threads = threads or torch.get_num_threads()
    first_calls()
    # each thread is told, for MKL's own number of threads is another one in each
    pool = ThreadPoolExecutor(threads, initializer=torch.set_num_threads, initargs=(1,))
    with _torch_takes(1), pool as workers:
        yield workers


@contextmanager
def power_of_two() -> Iterator[None]:
    """The largest power of two of torch's threads, two of three: with MKL then the same bytes for any number.

    An operation's elements are cut into a share for each thread, and torch's activations round the last few of a share
    otherwise; shares of a power of two have no such rest.
    """
    import torch

    with _torch_takes(1 << (torch.get_num_threads().bit_length() - 1)):
        yield


@contextmanager
def _torch_takes(threads: int) -> Iterator[None]:
    """So many threads in each of torch's operations, afterwards as many as before."""
    import torch

    before = torch.get_num_threads()
    torch.set_num_threads(threads)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def each(workers: ThreadPoolExecutor, step: Callable[[int], None], items: Iterable[int], bar: Any = None) -> None:
    """A step for each item; what has not begun is left out when one fails or the user interrupts.

    bar: counts the items that are done.
    """
    futures = [workers.submit(step, item) for item in items]
    try:
        for future in futures:
            future.result()
            if bar is not None:
                bar.update(1)
    finally:
        for future in futures:
            future.cancel()


def in_order(function: Callable[[Item], Result], items: Iterable[Item], count: int) -> Generator[Result, None, None]:
    """`function` of each item, in order, so many side by side; what has not begun is left out when one fails, or when
    no more are asked for."""
    waiting: deque[Future[Result]] = deque()
    with ThreadPoolExecutor(count) as workers:
        try:
            for item in items:
                waiting.append(workers.submit(function, item))
                if len(waiting) > count:
                    yield waiting.popleft().result()
            while waiting:
                yield waiting.popleft().result()
        finally:
            for future in waiting:
                future.cancel()


def first_calls() -> None:
    """Call the vector functions of MKL once, before several threads do.

    MKL 2024.2 chooses the code of such a function in its first call. While it does, another thread may get a coarse
    one, with errors of a thousand units in the last place; the next call is right again (pytorch issue 188792).
    """
    import torch

    for dtype in (torch.float32, torch.float64):
        one = torch.ones(1, dtype=dtype)
        for function in (torch.exp, torch.log, torch.sqrt, torch.cos, torch.sin, torch.tanh, torch.erf):
            function(one)
