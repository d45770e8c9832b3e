"""Encode and decode speed against llama.cpp's encoders and gguf-py's decoders: python tests/bench/encode.py [--quick]

The rival's encoders come from the same tensor through `ggml_quantize_chunk`, with the same number of threads (rows
split over threads that release the GIL, as ours are), ours and theirs in turn; the figure is the median. Ratios above
1 are ours being faster. Error is ours / llama.cpp's, weighted by the importance where there is one.
"""

import argparse
import sys
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
from gguf import GGMLQuantizationType, quants

sys.path.insert(0, str(Path(__file__).parents[1]))
import oracle

from dynq import codec, formats


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def in_turn(calls: list[Callable[[], Any]], repeats: int) -> tuple[list[float], list[Any]]:
    """The median seconds of each call, run in turn `repeats` times, and what each returned last."""
    times: list[list[float]] = [[] for _ in calls]
    results: list[Any] = [None] * len(calls)
    for _ in range(repeats):
        for i, call in enumerate(calls):
            seconds, results[i] = timed(call)
            times[i].append(seconds)
    return [median(t) for t in times], results


def rival(weights: np.ndarray, name: str, importance: np.ndarray | None, threads: int) -> np.ndarray:
    out = np.empty((weights.shape[0], formats.row_bytes(name, weights.shape[1])), np.uint8)
    with ThreadPoolExecutor(threads) as pool:
        parts = np.array_split(weights, threads), np.array_split(out, threads)
        list(pool.map(lambda w, o: oracle.quantize(w, name, importance, o), *parts))
    return out


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--quick", action="store_true", help="a smaller tensor, fewer repeats")
    parser.add_argument("--threads", type=int, default=2)
    parser.add_argument("formats", nargs="*", help="default: all but F32")
    options = parser.parse_args()
    rows, repeats = (256, 3) if options.quick else (1024, 7)
    rng = np.random.default_rng(0)
    weights = (rng.standard_t(5, (rows, 4096)) * 0.03).astype(np.float32)
    importance = np.exp(rng.standard_normal(4096)).astype(np.float32)
    names = options.formats or [name for name in formats.FORMATS if name != "F32"]
    seconds, _ = timed(lambda: codec.warmup(names))
    print(f"kernels ready after {seconds:.1f} s; {rows} x 4096 weights, {options.threads} threads, {repeats} repeats")
    print("format importance  ours M/s  llama.cpp M/s  ratio   error | decode M/s  gguf-py M/s  ratio")
    for name in names:
        first = importance if formats.get(name).needs_importance else None
        for columns in (first,) if first is importance else (None, importance):
            (ours, theirs), (data, other) = in_turn(
                [
                    lambda: codec.quantize(weights, name, columns, threads=options.threads),  # noqa: B023
                    lambda: rival(weights, name, columns, options.threads),  # noqa: B023
                ],
                repeats,
            )
            speeds = [weights.size / t / 1e6 for t in (ours, theirs)]
            errors = [codec.weighted_error(weights, codec.dequantize(d, name), columns) for d in (data, other)]
            line = f"{name:6} {'no' if columns is None else 'yes':10} {speeds[0]:9.1f} {speeds[1]:14.1f} "
            line += f"{theirs / ours:6.2f} {errors[0] / errors[1]:7.4f}"
            if columns is first:
                kind = GGMLQuantizationType[name]
                (ours, theirs), _ = in_turn(
                    [
                        lambda: codec.dequantize(data, name, threads=options.threads),  # noqa: B023
                        lambda: quants.dequantize(data, kind),  # noqa: B023
                    ],
                    repeats,
                )
                line += f" | {weights.size / ours / 1e6:10.1f} {weights.size / theirs / 1e6:12.1f} {theirs / ours:6.2f}"
            print(line, flush=True)


if __name__ == "__main__":
    main()
