"""The encoders `search` and `feedback` on a graphics card against all cores of the same machine.

    PYTHONPATH=.:tests python tests/bench/card_encoders.py
    PYTHONPATH=.:tests python tests/bench/card_encoders.py --sizes 2048 --formats Q4_K,IQ3_S --repeats 3

For a random matrix of each size and each format: millions of weights a second on either side, their ratio, the share of
equal codes and the ratio of errors (weighted by importance, or of outputs). A line's times are the best of the repeats,
after a first call that compiles; that takes seconds for each kernel and is printed. The last lines are
`feedback.encode` as a run calls it: with the choice of the shrinkage, and two domains each of which is left out once.
"""

import argparse
import os
import time
from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np
import torch
from codes import codes
from threadpoolctl import threadpool_limits

from dynq import codec, feedback
from dynq.compensate import Metric, encode_rows, on_card, shrunk
from dynq.kernels import FAMILIES, ON_CARD, scales
from dynq.kernels.arrays import placed

FORMATS = "Q4_0,Q4_1,Q2_K,Q3_K,Q4_K,Q5_K,Q6_K,IQ4_NL,IQ4_XS,IQ1_S,IQ2_S,IQ3_S"


def inputs(tokens: int, n: int, seed: int) -> np.ndarray:
    """Inputs whose channels are mixed: float32 [tokens, n]."""
    mixing, rng = np.random.default_rng(0), np.random.default_rng(1 + seed)
    mix = mixing.standard_normal((n // 4, n)) * np.exp(0.5 * mixing.standard_normal(n))
    return (rng.standard_normal((tokens, n // 4)) @ mix + rng.standard_normal((tokens, n))).astype(np.float32)


def timed(call: Callable[[], Any], repeats: int) -> tuple[float, float, Any]:
    """Seconds of the first call, of the best of the others, and a result."""
    seconds = []
    for _ in range(repeats + 1):
        start = time.perf_counter()
        result = call()
        seconds.append(time.perf_counter() - start)
    return seconds[0], min(seconds[1:]), result


def line(what: str, name: str, weights: np.ndarray, sides: list, error: Callable[[np.ndarray], float]) -> None:
    (_, cpu, ours), (first, card, theirs) = sides
    equal = (codes(name, ours) == codes(name, theirs)).mean()
    errors = [error(codec.dequantize(data, name)) for data in (ours, theirs)]
    rate = weights.size / 1e6
    print(
        f"{what:8} {name:8} {weights.shape[1]:5}  processor {rate / cpu:8.2f}  card {rate / card:8.2f} M weights/s  "
        f"ratio {cpu / card:7.2f}  equal codes {100 * equal:9.5f} %  bytes {100 * (ours == theirs).mean():9.5f} %  "
        f"error ratio {errors[1] / errors[0]:.6f}  first call {first:.1f} s",
        flush=True,
    )


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--sizes", default="2048,4096")
    parser.add_argument("--formats", default=FORMATS)
    parser.add_argument("--levels", default="search,feedback,encode")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    card = torch.cuda.get_device_name() if given.device != "cpu:0" else "no card: torch on the processor"
    print(f"{card}, torch {torch.__version__}, {len(os.sched_getaffinity(0))} cores", flush=True)
    for n in map(int, given.sizes.split(",")):
        size(n, given)


def size(n: int, given: argparse.Namespace) -> None:
    weights = (np.random.default_rng(n).standard_t(5, (n, n)) * 0.03).astype(np.float32)
    domains = [feedback.hessian(inputs(n, n, seed)) for seed in range(4)]
    h = domains[0].matrix + domains[1].matrix
    metric = feedback.Hessian(shrunk(h, 0.2), 2 * n)
    devices = ("cpu", given.device)
    for name in given.formats.split(","):
        form = scales.grid(name)
        if "search" in given.levels and FAMILIES[name] in ON_CARD:
            search = partial(codec.quantize, weights, name, h.diagonal(), level="search")
            sides = [timed(partial(search, device=d), given.repeats) for d in devices]
            line("search", name, weights, sides, partial(codec.weighted_error, weights, importance=h.diagonal()))
        if "feedback" in given.levels and form is not None:
            sides = [timed(partial(fed_back, weights, form, h, d), given.repeats) for d in devices]
            line("feedback", name, weights, sides, partial(feedback.output_error, weights, inputs=metric))
    if "profile" in given.levels:
        profile(weights, h, given)
    name = given.formats.split(",")[0]
    for device in devices if "encode" in given.levels else ():
        whole = partial(feedback.encode, weights, name, domains[:2], domains[2:], device=device)
        _, best, encoded = timed(whole, 1)
        print(f"encode   {name:8} {n:5}  {device:5} {best:.2f} s  {encoded.level} {encoded.shrinkage}", flush=True)


@threadpool_limits.wrap(limits=1, user_api="blas")
def fed_back(weights: np.ndarray, form: scales.Grid, h: np.ndarray, device: str) -> np.ndarray:
    return feedback._feedback(weights, form, placed(h, device), 0.2, None)


def profile(weights: np.ndarray, h: np.ndarray, given: argparse.Namespace) -> None:
    """Where the time of error feedback goes on the card."""
    form = scales.grid("Q4_K")
    assert form is not None
    metric = Metric.of(shrunk(placed(h, given.device), 0.2), form.group)
    encode_rows(weights, form, metric, on_card())
    part = np.ascontiguousarray(weights[:, :256])
    for device in ("cpu", given.device):
        _, best, _ = timed(lambda d=device: codec.quantize(part, "Q4_K", np.ones(256), device=d), 3)
        print(f"plain Q4_K of {part.shape} on {device}: {1e3 * best:.2f} ms")
    with torch.profiler.profile() as found:
        encode_rows(weights, form, metric, on_card())
    print(found.key_averages().table(sort_by="self_cpu_time_total", row_limit=25, max_name_column_width=50))


if __name__ == "__main__":
    main()
