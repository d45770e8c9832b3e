"""Speed of the KLD evaluation against llama-perplexity: python tests/bench/evaluate.py PATH/TO/llama-perplexity

Two models: the embedded one on its evaluation prompts, and a random llama of 269 M weights with a vocabulary of 32,000
on random tokens. Each is exported as llama.cpp's mixes; both sides read the same files and the same logits file (-c 512
-b 512), one thread by default, in turn. Tokens per second without loading: llama-perplexity's over the chunks that a
long logits file has more than a short one; ours of `precision.measure`, the choice of the arithmetic included, and of
`kld.measure` in float32. Ratios are of medians.
"""

import argparse
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch

sys.path.insert(0, str(Path(__file__).parents[1]))
import tiny_models

from dynq import export, mixes
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.evaluate import compare, kld, logits_file, precision
from dynq.recipe import Recipe
from dynq.text import load_text
from dynq.torch_model import load_model, load_tokenizer

N_CTX, SHORT = 512, 1
LARGER = {
    "vocab_size": 32000,
    "hidden_size": 1024,
    "intermediate_size": 2816,
    "num_hidden_layers": 20,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "tie_word_embeddings": True,
}


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    start = time.perf_counter()
    result = call()
    return time.perf_counter() - start, result


def rival(binary: Path, threads: int, file: Path, logits: Path) -> float:
    """Mean KLD that llama-perplexity finds."""
    options = ["--kl-divergence", "--kl-divergence-base", str(logits), "-c", str(N_CTX), "-b", str(N_CTX)]
    command = [str(binary), "-m", str(file), *options, "-t", str(threads)]
    said = subprocess.run(command, capture_output=True, text=True, check=True)
    found = re.search(r"Mean\s+KLD:\s*([-\d.]+)", said.stdout + said.stderr)
    return float(found[1]) if found else float("nan")


def tokens_of(checkpoint: Checkpoint, chunks: int, random: bool) -> np.ndarray:
    if random:
        return np.random.default_rng(0).integers(2, tiny_models.VOCAB - 64, (chunks, N_CTX)).astype(np.int32)
    text = load_text(
        "",
        load_tokenizer(checkpoint),
        n_ctx=N_CTX,
        n_chunks=chunks,
        seed=0,
        model=load_model(checkpoint),
        split="evaluate",
    )
    return text.tokens


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("llama_perplexity", type=Path)
    parser.add_argument("--models", nargs="*", default=["dynq-tiny", "larger"])
    parser.add_argument("--mixes", nargs="*", default=["Q2_K", "Q4_K_M", "Q6_K"])
    parser.add_argument("--chunks", type=int, nargs=2, default=[16, 8], help="of dynq-tiny and of the larger model")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args()
    torch.set_num_threads(options.threads)
    os.environ["OMP_NUM_THREADS"] = str(options.threads)
    print(
        "| model | file | KLD, llama-perplexity | ours | computed in | tokens/s, llama-perplexity | ours | ratio "
        "| float32, ratio |\n|---|---|--:|--:|---|--:|--:|--:|--:|",
        flush=True,
    )
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        for name in options.models:
            random = name != "dynq-tiny"
            source = tiny_models.make("llama", folder / name, **LARGER) if random else name
            checkpoint = open_checkpoint(source)
            chunks = options.chunks[random]
            tokens, n_vocab = tokens_of(checkpoint, chunks, random), checkpoint.tensors["token_embd.weight"].shape[0]
            original = load_model(checkpoint)
            for n in (chunks, SHORT):
                log_probs = kld.log_probabilities(original, tokens[:n], N_CTX // 2, desc="")
                logits_file.write(folder / f"{n}.logits", tokens[:n], n_vocab, log_probs)
            del original
            for mix in options.mixes:
                chosen = mixes.mix(mix, checkpoint.tensors, checkpoint.metadata, False)
                size = compare.stored_bytes(chosen, checkpoint.tensors)
                file = folder / f"{name}-{mix}.gguf"
                export.export(checkpoint, Recipe(chosen, mix, size, 0.0, None), None, file)
                row = _row(options, file, folder, chunks)
                print(f"| {name} | {mix} | {row} |", flush=True)


def _row(options: argparse.Namespace, file: Path, folder: Path, chunks: int) -> str:
    model = load_model(open_checkpoint(file, allow_requantize=True))
    base = logits_file.read(folder / f"{chunks}.logits")
    calls: list[Callable[[], Any]] = [
        lambda: rival(options.llama_perplexity, options.threads, file, folder / f"{chunks}.logits"),
        lambda: rival(options.llama_perplexity, options.threads, file, folder / f"{SHORT}.logits"),
        lambda: precision.measure(model, base, desc=""),
        lambda: kld.measure(model, base, desc=""),
    ]
    kld.measure(model, base, chunks=1, desc="")  # compiles
    times: list[list[float]] = [[] for _ in calls]
    results: list[Any] = [None] * len(calls)
    for _ in range(options.repeats):
        for i, call in enumerate(calls):
            seconds, results[i] = timed(call)
            times[i].append(seconds)
    long, short, ours, exact = map(median, times)
    theirs = N_CTX * (chunks - SHORT) / (long - short)
    scores, arithmetic = results[2]
    floor = f", floor {arithmetic.floor:.1e}" if arithmetic.floor is not None else ""
    speed, plain = (N_CTX * chunks / seconds for seconds in (ours, exact))
    return (
        f"{results[0]:.5f} | {scores.kld.mean():.5f} | {arithmetic.dtype}{floor} | {theirs:.0f} | {speed:.0f} "
        f"| {speed / theirs:.2f} | {plain / theirs:.2f}"
    )


if __name__ == "__main__":
    main()
