"""Speed of reading a checkpoint's weights against NumPy's, in each type: python tests/bench/reading.py

Columns: ns a weight and GB/s of the file, by the reader on one thread and on all; times: NumPy's on one thread, which
reads the file, decodes by tables (dynq.reference.packed) and looks for what is not finite, over the reader's. All in
turn; medians. `small`: random weights a thousandth as large, where F16 has mostly numbers below its normal ones.
"""

import argparse
import sys
import tempfile
from collections.abc import Callable
from functools import partial
from pathlib import Path
from statistics import median
from time import perf_counter
from unittest.mock import patch

import numpy as np
import torch
from safetensors.torch import save_file

from dynq import codec
from dynq import safetensors_reader as reader
from dynq.reference import packed

TILE = (128, 128)


def write(path: Path, rows: int, n: int) -> None:
    torch.manual_seed(0)
    weights = torch.randn(rows, n) * 0.02
    tensors = {
        "BF16": weights.bfloat16(),
        "F16": weights.half(),
        "F16, small": (weights / 1000).half(),
        "F32": weights,
        "E4M3": (200 * weights).to(torch.float8_e4m3fn),
        "E4M3 scales": torch.rand(-(-rows // TILE[0]), -(-n // TILE[1])),
        "MXFP4": torch.randint(256, (1, rows, n // 32, 16)).to(torch.uint8),
        "MXFP4 scales": torch.randint(110, 125, (1, rows, n // 32)).to(torch.uint8),
    }
    save_file(tensors, path)


def readable(path: Path) -> dict[str, reader._Readable]:
    found = {item.name: item for item in reader._header(path)}
    return {
        **{name: found[name] for name in ("BF16", "F16", "F16, small", "F32")},
        "E4M3": reader._Scaled(found["E4M3"], found["E4M3 scales"], TILE),
        "MXFP4": reader._Mxfp4(found["MXFP4"], found["MXFP4 scales"]),
    }


def whole(item: reader._Stored) -> np.ndarray:
    return item.raw(slice(0, int(np.prod(item.shape)))).reshape(item.shape)


def by_numpy(name: str, item: reader._Readable) -> np.ndarray:
    if isinstance(item, reader._Scaled):
        values = packed.e4m3(whole(item.codes), whole(item.scales), TILE)
    elif isinstance(item, reader._Mxfp4):
        values = packed.mxfp4(whole(item.blocks), whole(item.scales)).swapaxes(1, 2)
    else:
        assert isinstance(item, reader._Stored)
        raw = whole(item)
        values = packed.bf16(raw) if name == "BF16" else raw.astype(np.float32, copy=False)
    reader.check_finite(values, name)
    return values


def by_reader(name: str, item: reader._Readable, threads: int) -> np.ndarray:
    with patch.object(codec, "cores", lambda: threads):
        return reader._finite(item, name)


def seconds(calls: list[Callable[[], np.ndarray]], repeats: int) -> list[float]:
    """The median of each call, run in turn; what they give is let go of."""
    times: list[list[float]] = [[] for _ in calls]
    for _ in range(repeats):
        for call, own in zip(calls, times, strict=True):
            start = perf_counter()
            call()
            own.append(perf_counter() - start)
    return [median(own) for own in times]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=int, default=2048, help="of 7168 weights: an expert of DeepSeek V3")
    parser.add_argument("--repeats", type=int, default=9)
    options = parser.parse_args()
    cores = codec.cores()
    with tempfile.TemporaryDirectory(prefix="dynq-reading-") as folder:
        path = Path(folder) / "model.safetensors"
        write(path, options.rows, 7168)
        print(f"{options.rows} x 7168 weights, file in memory")
        print(f"| type | NumPy, ns | one thread, ns | GB/s | times | {cores} threads, ns | GB/s | times |")
        print("|---|--:|--:|--:|--:|--:|--:|--:|")
        for name, item in readable(path).items():
            calls = [partial(by_numpy, name, item), *(partial(by_reader, name, item, t) for t in (1, cores))]
            first, *others = (call() for call in calls)  # compiles
            assert all(np.array_equal(first.view(np.uint32), other.view(np.uint32)) for other in others)
            del first, others
            theirs, one, all_of_them = seconds(calls, options.repeats)
            n = options.rows * 7168
            size = {"F32": 4, "E4M3": 1, "MXFP4": 17 / 32}.get(name, 2)
            line = f"| {name} | {theirs / n * 1e9:.2f} |"
            for ours in (one, all_of_them):
                line += f" {ours / n * 1e9:.2f} | {size * n / ours / 1e9:.2f} | {theirs / ours:.1f} |"
            print(line, flush=True)


if __name__ == "__main__":
    sys.exit(main())
