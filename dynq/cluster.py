"""More than one machine: tasks that workers of a Dask cluster share, in place of a loop in this process.

What a task needs (the model, Fisher samples, Hessians, log-probabilities) is on paths that all machines share and
travels as its path, a model behind a URL as that, of which each machine has its own copy. What a task gives travels
back and is written here; Fisher samples, which are large, each task writes into a folder of its own on the shared path,
and only its name travels. So this process alone puts files in place, a task that is done twice does no harm, and a
worker that dies costs the tasks it had. A task is computed by one thread, of torch too, or its sequences by one each,
and its bytes depend on nothing else.

Dask is an extra (`dynq[cluster]`) and is imported only where there is a cluster.
"""

from __future__ import annotations

import logging
import socket
import sys
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from contextlib import contextmanager, nullcontext, suppress
from functools import cache
from importlib.metadata import version
from threading import Lock
from typing import TYPE_CHECKING, Any, TypeVar
from uuid import uuid4

import dynq
from dynq import memory
from dynq.errors import DynqError
from dynq.progress import progress

if TYPE_CHECKING:
    from distributed import Client, Future

    from dynq.checkpoint import Checkpoint

AHEAD = 4  # tasks given out for each thread: results wait on the workers until those before them are there
SECONDS = 20  # until a scheduler must have answered, or the first worker be there
MISSING = "a cluster needs Dask, which is not installed; pip install 'dynq[cluster]'"
# run in each worker that is started here: Ctrl-C goes to all processes of a terminal, and mistakes are said once, here
_QUIET = """import logging, signal
signal.signal(signal.SIGINT, signal.SIG_IGN)
logging.getLogger("distributed.worker").setLevel(logging.CRITICAL)
"""
_DECIDE = ("numba", "numpy", "torch")  # packages whose versions the bytes depend on

Item = TypeVar("Item")
Result = TypeVar("Result")


@contextmanager
def started(workers: int) -> Iterator[str]:
    """A cluster of so many processes on this machine, of one thread each; gives the scheduler's address.

    Each may take its share of the memory that is free: a model that is larger is read layer by layer there.
    """
    try:
        from distributed import LocalCluster
    except ImportError:
        raise DynqError(MISSING) from None
    share = {memory.LIMIT: f"{memory.available() // workers}B"}
    with LocalCluster(
        n_workers=workers,
        threads_per_worker=1,
        processes=True,
        memory_limit=None,  # Dask would count mapped files as memory
        dashboard_address="127.0.0.1:0",
        env=share,
        preload=[_QUIET],
    ) as cluster:
        try:
            yield cluster.scheduler_address
        finally:  # a worker that takes long to end is ended: no news
            logging.getLogger("distributed.nanny").setLevel(logging.ERROR)


def connect(address: str) -> Client | None:
    """A running cluster, by its scheduler's address ("tcp://HOST:PORT"); None for "". The log has its dashboard's link.

    DynqError: Dask is not installed, nothing answers there, or no worker comes.
    """
    if not address:
        return None
    try:
        from distributed import Client
        from distributed.comm import get_address_host_port
    except ImportError:
        raise DynqError(MISSING) from None
    try:
        # first, for a client that did not reach its scheduler does not go quietly
        socket.create_connection(get_address_host_port(address, strict=True), SECONDS).close()
        client = Client(address, timeout=SECONDS, set_as_default=False)
    except ValueError as error:
        raise DynqError(f"{address!r} is no address of a scheduler ({error}); write tcp://HOST:PORT") from None
    except (OSError, OverflowError) as error:
        raise DynqError(f"{address}: no Dask scheduler answers there ({error}); start one: dask scheduler") from None
    logging.getLogger("distributed.client").setLevel(logging.CRITICAL)  # a scheduler that is gone: said by `_result`
    try:
        client.wait_for_workers(1, timeout=SECONDS)
    except TimeoutError:
        client.close()
        raise DynqError(f"{address}: no worker has come; start some with `dask worker {address}`") from None
    threads = client.nthreads()
    said = f"cluster {address}: {sum(threads.values())} threads of {len(threads)} workers"
    port = client.scheduler_info(n_workers=0)["services"].get("dashboard")
    link = f", dashboard {client.dashboard_link}" if port else ""
    print(said + link, file=sys.stderr, flush=True)
    return client


@contextmanager
def joined(scheduler: str | None, workers: int | None) -> Iterator[Client | None]:
    """A running cluster, or one that is started and ended; None where neither is asked for."""
    with started(workers) if workers else nullcontext(scheduler or "") as address:
        client = connect(address)
        try:
            yield client
        finally:
            if client:
                client.close()


def tasks(
    function: Callable[[Item], Result],
    items: Iterable[Item],
    cluster: Client | None = None,
    *,
    total: int | None = None,
    desc: str = "",
    unit: str = "task",
) -> Generator[Result, None, None]:
    """`function` of each item, in order, with a progress bar: here, one by one, or by the workers of a cluster.

    function: of a module, or a `functools.partial` of one; it and the items are sent, so they hold little. items:
    taken as results are given. No desc: no bar.

    DynqError: what the function raised of that kind, or a task on which workers died over and over.
    """
    results = map(function, items) if cluster is None else _by_workers(function, items, cluster, desc)
    yield from progress(results, total=total, desc=desc, unit=unit) if desc else results


def whole(cluster: Client, checkpoint: Checkpoint) -> bool:
    """Whether a model fits into a worker's memory; else its layers are read one by one there."""
    return next(tasks(memory.fits, [checkpoint], cluster))


def runs(cluster: Client, checkpoint: Checkpoint, rows: range, step: int) -> list[range]:
    """Consecutive sequences of a text for each task: so many, or an equal share for each worker where a task reads all
    layers of the model."""
    if rows and not whole(cluster, checkpoint):
        step = -(-len(rows) // max(1, len(cluster.nthreads())))
    return [rows[start : start + step] for start in range(0, len(rows), step)]


def threads_here() -> int:
    """In a task: the threads of its worker."""
    from distributed import get_worker

    return int(get_worker().state.nthreads)


def _by_workers(
    function: Callable[[Item], Result], items: Iterable[Item], cluster: Client, desc: str
) -> Iterator[Result]:
    import cloudpickle  # comes with Dask

    waiting: deque[tuple[Item, Future]] = deque()
    try:
        for item in items:
            while len(waiting) >= AHEAD * max(1, sum(cluster.nthreads().values())):
                yield _result(*waiting.popleft())
            # as bytes, so that neither the scheduler nor a worker's event loop opens models
            work = cloudpickle.dumps((function, item))
            future = cluster.submit(_call, _versions(), work, key=f"{desc or 'task'}-{uuid4().hex}", pure=False)
            waiting.append((item, future))
        while waiting:
            yield _result(*waiting.popleft())
    finally:
        with suppress(Exception):  # the cluster may be gone
            cluster.cancel([future for _, future in waiting])


def _result(item: Any, future: Future) -> Any:
    from distributed import CancelledError, KilledWorker

    name = item[0] if isinstance(item, tuple) else item
    try:
        return future.result()
    except KilledWorker as error:
        raise DynqError(
            f"{name}: workers died on it, {error.allowed_failures + 1} in turn; if memory ran out, give them more of it"
        ) from None
    except CancelledError:
        raise DynqError("the cluster's scheduler is gone; the same command with another goes on from here") from None


@cache
def _versions() -> dict[str, str]:
    return {"dynq": dynq.__version__, **{name: version(name) for name in _DECIDE}}


def _call(versions: dict[str, str], work: bytes) -> Any:
    """A task on a worker."""
    import cloudpickle
    from distributed import get_worker

    from dynq import codec  # brings Numba, which most tasks need

    codec.one_core()
    try:
        for name, here in _versions().items():
            if here != versions[name]:
                raise DynqError(f"{name} {here} is installed, the run has {versions[name]}; install the same")
        function, item = cloudpickle.loads(work)
        if "torch" in sys.modules:
            sys.modules["torch"].set_num_threads(1)
        return function(item)
    except DynqError as error:
        raise DynqError(f"worker {get_worker().address}: {error}") from None


_holding = Lock()
_held: tuple[Any, Any] | None = None


def held(key: Any, make: Callable[[], Result]) -> Result:
    """What `make` gives, kept for the tasks that follow in this process: one thing at a time, a model is large."""
    global _held
    with _holding:
        if _held is None or _held[0] != key:
            _held = None  # its memory goes first
            _held = key, make()
        result: Result = _held[1]
        return result
