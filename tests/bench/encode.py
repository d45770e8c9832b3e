"""Speed and error of every format against llama.cpp's encoders and gguf-py's decoders: python tests/bench/encode.py

Columns: plain, speed: llama.cpp's time / ours; error: ours / llama.cpp's, weighted by the importance where there is
one; search, time: that of `plain` = 1; decode: gguf-py's time / ours.

The rival's encoders come from the same tensor through `ggml_quantize_chunk`, with the same number of threads (rows
split over threads that release the GIL, as ours are), all sides in turn; figures are ratios of medians.
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


def decoder(name: str) -> Callable[[np.ndarray], Any] | None:
    """gguf-py's decoder of a format, None where it has none."""
    kind = GGMLQuantizationType[name]
    try:
        quants.dequantize(np.zeros((1, formats.get(name).block_bytes), np.uint8), kind)
    except NotImplementedError:
        return None
    return lambda data: quants.dequantize(data, kind)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=256, help="of 4096 weights")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("formats", nargs="*", help="default: all but F32")
    options = parser.parse_args()
    rng = np.random.default_rng(0)
    weights = (rng.standard_t(5, (options.rows, 4096)) * 0.03).astype(np.float32)
    importance = np.exp(rng.standard_normal(4096)).astype(np.float32)
    names = options.formats or [name for name in formats.FORMATS if name != "F32"]
    seconds, _ = timed(lambda: codec.warmup(names))
    threads = options.threads
    print(f"kernels ready after {seconds:.1f} s; {options.rows} x 4096 weights, {threads} threads")
    print("| format | importance | plain, speed | plain, error | search, time | search, error | decode |")
    print("|---|---|--:|--:|--:|--:|--:|", flush=True)
    for name in names:
        needs = formats.get(name).needs_importance
        gguf = decoder(name)
        for columns in (importance,) if needs else (None, importance):
            calls = [
                lambda: rival(weights, name, columns, threads),  # noqa: B023
                lambda: codec.quantize(weights, name, columns, threads=threads),  # noqa: B023
                lambda: codec.quantize(weights, name, columns, level="search", threads=threads),  # noqa: B023
            ]
            (theirs, plain, search), found = in_turn(calls, options.repeats)
            decoded = [codec.dequantize(data, name) for data in found]
            base, *errors = (codec.weighted_error(weights, d, columns) for d in decoded)
            line = f"| {name} | {'no' if columns is None else 'yes'} | {theirs / plain:.2f} | {errors[0] / base:.4f} "
            line += f"| {search / plain:.2f} | {errors[1] / base:.4f} |"
            if gguf and (needs or columns is None):
                calls = [lambda: gguf(found[1]), lambda: codec.dequantize(found[1], name, threads=threads)]  # noqa: B023
                (theirs, ours), _ = in_turn(calls, options.repeats)
                line += f" {theirs / ours:.1f}"
            print(line + " |", flush=True)


if __name__ == "__main__":
    main()
