"""The machine that needs are reckoned for: how fast it is, and what is free on it."""

from __future__ import annotations

import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import numpy as np
from threadpoolctl import threadpool_limits

from dynq import memory
from dynq.codec import cores
from dynq.devices import CPU, calibration_dtype, check_device, single

CORE = 155e9  # operations a second of the core that `dynq.needs` counts in
READ = 1.7e9  # bytes a second of BF16 that one thread reads, widens and looks through: less than a common SSD gives
F32 = 4  # bytes


@dataclass(frozen=True)
class Machine:
    """threads; flops: of one of them, a second; memory: bytes that are free; read: bytes a second from its disk.

    card: bytes that are free on the card that computes, or on all of them; None where the processor does. calibrated:
    bytes of a weight of a model that is calibrated.
    """

    threads: int
    flops: float
    memory: float
    read: float = READ
    card: float | None = None
    calibrated: int = F32

    @property
    def free(self) -> float:
        """Bytes that are free where the model is computed."""
        return self.memory if self.card is None else self.card

    def holds(self, alone: float, card: float, beside: float) -> dict[str, Any]:
        """Memory of a `Need`. alone: where the processor computes; else what lies on the card, and beside it in main
        memory."""
        return {"memory": alone} if self.card is None else {"memory": beside, "card": card}

    @classmethod
    def here(cls, threads: int = 0, device: str = CPU) -> Machine:
        """This machine as it is now, in 0.2 s: products of matrices of 512 x 512 on all threads at once, which are
        slower together than one alone.

        device: where the model is to be computed. DynqError where that is not there.
        """
        check_device(device)
        threads = threads or cores()
        a, b = np.random.default_rng(0).normal(size=(2, 512, 512)).astype(np.float32)

        def multiplied(seconds: float) -> int:
            end, n = time.perf_counter() + seconds, 0
            while time.perf_counter() < end:
                a @ b
                n += 1
            return n

        with threadpool_limits(1), ThreadPoolExecutor(threads) as workers:
            list(workers.map(multiplied, [0.05] * threads))  # threads begin, clocks settle
            start = time.perf_counter()
            done = sum(workers.map(multiplied, [0.15] * threads))
            spent = time.perf_counter() - start
        flops, own = done * 2 * 512**3 / spent / threads, memory.available()
        if single(device) == CPU:
            return cls(threads, flops, own)
        calibrated = 2 if calibration_dtype(device) == "bfloat16" else F32
        return cls(threads, flops, own, card=memory.available(device), calibrated=calibrated)
