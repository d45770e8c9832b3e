"""A graphics card against all cores of this machine's processor, step by step.

    python tests/bench/device.py                       # a random llama of 1 B weights
    python tests/bench/device.py --width 1024 --layers 8 --chunks 4
    python tests/bench/device.py --sides card          # the card alone: a larger model

Both sides in turn; figures are medians, without a first turn that warms up. Steps are those of `dynq run`,
in its precision: on a card text is sampled and the model calibrated in bfloat16, all else is float32.
Agreement: the correlation of the logarithms of predicted KLDs, from samples of the one and of the other, and the
ratio of their sums; the ratio of the KLDs of one file. Throughput counts 2 operations a weight and token forward, 4
backward; sampling reads all weights for each token of an answer. The peak is measured: products of large matrices, and
a copy of a large array. Of a card's memory: the most that a step has taken (its model, and what torch came to hold
meanwhile), beside what `dynq.needs` reckons.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from functools import partial
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from dynq import calibrate as calibration
from dynq import codec, needs
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.devices import calibration_dtype, cards, single
from dynq.evaluate import kld
from dynq.fisher import Fisher
from dynq.layer_inputs import collect, products
from dynq.machine import Machine
from dynq.schedule import BATCH
from dynq.sensitivity import head_divergence, parameter_error, quadratic_form
from dynq.text import answer_batch
from dynq.torch_model import load_model
from dynq.tune import CODES, RATE, _Search, unknown

ANSWERS, ANSWER = 32, 32  # answers that are sampled at once, and tokens of each
COLLECTED = 8  # linear layers whose inputs are collected at once
TUNED = "Q4_0"


def random_model(folder: Path, width: int, layers: int) -> Path:
    """A llama with random weights and dynq-tiny's tokenizer."""
    config = transformers.LlamaConfig(
        hidden_size=width,
        intermediate_size=width * 7 // 2 // 256 * 256,
        num_hidden_layers=layers,
        num_attention_heads=width // 64,
        num_key_value_heads=max(1, width // 256),
        vocab_size=32000,
        initializer_range=0.5 / width**0.5,
    )
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(config).bfloat16().save_pretrained(folder)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        source = Path(str(files("dynq"))) / "data" / "dynq-tiny" / name
        (folder / name).write_bytes(source.read_bytes())
    return folder


def synchronize() -> None:
    for card in cards():
        torch.cuda.synchronize(card)


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    synchronize()
    start = time.perf_counter()
    result = call()
    synchronize()
    return time.perf_counter() - start, result


class Side:
    """One of the two, with what its steps need: as a run makes it."""

    def __init__(self, checkpoint: Checkpoint, device: str, folder: Path, tensors: dict[str, tuple[str, np.ndarray]]):
        self.checkpoint, self.device, self.folder, self.tensors = checkpoint, device, folder, tensors
        folder.mkdir()
        self.dtype, self.place = calibration_dtype(device), single(device)
        self.exact = load_model(checkpoint, device=device, streamed=False)
        coarse = self.dtype != "float32"
        self.model = load_model(checkpoint, dtype=self.dtype, device=device, streamed=False) if coarse else self.exact
        self.taken: dict[str, int] = {}
        self.turn = 0
        self.predicted: list[float] = []
        self.divergence = 0.0
        self.search: _Search | None = None

    def sample(self, tokens: np.ndarray) -> None:
        """Text: answers to prompts, in one batch."""
        prompts = [tokens[i % len(tokens), : 8 + i % 8].tolist() for i in range(ANSWERS)]
        answer_batch(self.model, prompts, ANSWER, set(), torch.Generator().manual_seed(0), None)

    def calibrate(self, tokens: np.ndarray) -> None:
        self.turn += 1
        self.run = self.folder / str(self.turn)
        self.run.mkdir()
        calibration.calibrate(self.checkpoint, self.model, tokens, self.run, keep=1024)

    def sensitivity(self, tokens: np.ndarray) -> None:
        """The products alone; encoding stays on the processor."""
        fisher, self.predicted = Fisher(self.run / "fisher"), []
        for name, (fmt, data) in self.tensors.items():
            info = self.checkpoint.tensors[name]
            if fmt != TUNED or not (info.layer in (0, 1) or name == "output.weight"):
                continue
            weight, samples = self.checkpoint.read(name), fisher.samples(name, self.place)
            error = codec.dequantize(data, fmt).reshape(weight.shape) - weight
            architecture, shape = self.checkpoint.architecture, fisher.shapes[fisher.unit[name]]
            moved = parameter_error(architecture, name, error, shape).to(self.place)
            if name == "output.weight":
                own = torch.from_numpy(weight).to(self.place)
                self.predicted.append(head_divergence(own, moved, samples, architecture.logits)[0])
            else:
                self.predicted.append(quadratic_form(samples.projections(moved), samples)[0])

    def collect(self, tokens: np.ndarray) -> None:
        names = list(products(self.checkpoint, self.exact))[:COLLECTED]
        collect(self.exact, self.checkpoint, names, tokens, ["a"] * len(tokens))

    def reference(self, tokens: np.ndarray) -> None:
        """The original's log-probabilities: evaluation's first half."""
        self.kept = kld.make_reference(self.exact, tokens, self.folder / "kept", first=0, desc="")

    def tune(self, tokens: np.ndarray) -> None:
        """One step, of scales and codes."""
        if self.search is None:
            self.search = _Search(self.checkpoint, self.exact, self.tensors, tokens, tokens, RATE, CODES, unknown)
            self.adam = self.search.adam()
        self.search._step(self.adam, np.arange(min(BATCH, len(tokens))), 0.1)

    def evaluate(self, tokens: np.ndarray) -> None:
        """The tuned file against the original."""
        assert self.search is not None
        self.divergence = float(kld.measure(self.search.model, self.kept, batch=2, desc="").kld.mean())

    def step(self, name: str, tokens: np.ndarray) -> None:
        """One of `STEPS`, and the most memory of the card that it takes: its model, and what is added to that."""
        if not self.place.startswith("cuda"):
            return getattr(self, name)(tokens)
        before = torch.cuda.memory_allocated(self.place)
        torch.cuda.reset_peak_memory_stats(self.place)
        getattr(self, name)(tokens)
        model = self.model if name in ("sample", "calibrate") else self.exact if name != "sensitivity" else None
        own = sum(p.nbytes for p in model.parameters()) if model else 0
        if name == "evaluate" and self.search:
            own += sum(p.nbytes for p in self.search.model.parameters())
        added = torch.cuda.max_memory_allocated(self.place) - before
        self.taken[name] = max(self.taken.get(name, 0), own + added)

    def reckoned(self, tokens: np.ndarray) -> dict[str, float]:
        """The same by `dynq.needs`."""
        shape, machine, n_ctx = needs.Shape.of(self.checkpoint), Machine.here(device=self.place), tokens.shape[1]
        size, weight = sum(data.nbytes for _, data in self.tensors.values()), machine.calibrated
        text = {"at_once": ANSWERS, "weight": weight}
        export = partial(needs.export, shape, "", size, domains=1, measured=len(tokens), n_ctx=n_ctx, machine=machine)
        evaluated = min(BATCH, len(tokens))
        found = {
            "sample": needs.sampled(shape, "", 1, 16 + ANSWER, machine, **text),
            "calibrate": needs.calibrate(shape, len(tokens), n_ctx, 1024, machine),
            "sensitivity": needs.sensitivity(shape, [TUNED], "plain", 1024, 0, 0, machine),
            "collect": export(level="feedback", tune=0, chunks=len(tokens)),
            "tune": export(level="plain", tune=1, chunks=evaluated, codes=True),
            "evaluate": needs.evaluate(shape, "", [size], 0, evaluated, n_ctx, machine, beside=True),
        }
        return {name: need.card for name, need in found.items()}


STEPS = ("sample", "calibrate", "sensitivity", "collect", "reference", "tune", "evaluate")


def peaks(device: str) -> dict[str, float]:
    """Operations a second of a product in bfloat16 and float32, bytes a second of a copy (read and written)."""
    found, n = {}, 8192 if device != "cpu" else 2048
    for dtype in ("bfloat16", "float32"):
        a = torch.ones(n, n, dtype=getattr(torch, dtype), device=device)
        found[dtype] = 2 * n**3 / min(timed(lambda a=a: a @ a)[0] for _ in range(5))
    a = torch.ones(1 << (30 if device != "cpu" else 27), dtype=torch.uint8, device=device)
    b = torch.empty_like(a)
    found["bytes"] = 2 * a.numel() / min(timed(lambda: b.copy_(a))[0] for _ in range(5))
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=8)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--sides", nargs="+", default=["cpu", "card"], choices=["cpu", "card"])
    parser.add_argument("--steps", nargs="+", default=STEPS, choices=STEPS, help="needs those before them")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dynq-device-") as text:
        folder = Path(text)
        checkpoint = open_checkpoint(random_model(folder / "model", given.width, given.layers))
        tokens = np.random.default_rng(0).integers(3, 8000, (given.chunks, 512)).astype(np.int32)
        tensors = {}
        for name, info in checkpoint.tensors.items():
            fmt = TUNED if info.quantizable else "F32"
            tensors[name] = fmt, codec.quantize(checkpoint.read(name), fmt)
        device = {"cpu": "cpu", "card": given.device}
        sides = {side: Side(checkpoint, device[side], folder / side, tensors) for side in given.sides}
        print(f"{checkpoint.n_weights:,} weights, {tokens.size:,} tokens, {torch.get_num_threads()} threads")
        if "card" in sides and torch.cuda.is_available():
            print(f"card: {torch.cuda.get_device_name(sides['card'].place)}, {sides['card'].dtype} to calibrate")
        times: dict[tuple[str, str], list[float]] = {}
        for turn in range(given.repeats + 1):
            for step in given.steps:
                for name, side in sides.items():
                    read = tokens[:BATCH] if turn == 0 or step in ("reference", "tune", "evaluate") else tokens
                    spent, _ = timed(lambda side=side, step=step, read=read: side.step(step, read))
                    if step == "tune" and turn == 0:
                        print(f"{name}: the first step of tuning, latent numbers made, {spent:.1f} s", flush=True)
                    if turn:
                        times.setdefault((step, name), []).append(spent)
        report(times, sides, given, checkpoint, tokens)


def parts_of_calibration(side: Side, tokens: np.ndarray) -> str:
    """How long one sequence after the other chooses samples and writes them: threads that do so may overlap."""
    spent = dict.fromkeys(("sequence_samples", "save_file", "true_fisher_backward"), 0.0)
    kept = {name: getattr(calibration, name) for name in spent}

    def clocked(name: str, *args: Any) -> Any:
        seconds, result = timed(lambda: kept[name](*args))
        spent[name] += seconds
        return result

    for name in spent:
        setattr(calibration, name, partial(clocked, name))
    try:
        whole, _ = timed(lambda: side.calibrate(tokens))
    finally:
        for name, function in kept.items():
            setattr(calibration, name, function)
    return f"of {whole:.2f} s: " + ", ".join(f"{name} {seconds:.2f} s" for name, seconds in spent.items())


def report(
    times: dict[tuple[str, str], list[float]], sides: dict[str, Side], given: Any, checkpoint: Checkpoint, tokens: Any
) -> None:
    n, few = checkpoint.n_weights, min(BATCH, len(tokens)) * tokens.shape[1]
    best = {name: peaks(side.place) for name, side in sides.items()}
    for name, peak in best.items():
        print(
            f"{name}: peak {peak['bfloat16'] / 1e12:.1f} TFLOP/s in bfloat16, {peak['float32'] / 1e12:.1f} in float32, "
            f"{peak['bytes'] / 1e9:.0f} GB/s"
        )
    # operations of a step, or the bytes that it reads
    work = {"calibrate": 6 * n * tokens.size, "reference": 2 * n * few, "evaluate": 2 * n * few, "tune": 8 * n * few}
    work["collect"] = 2 * n * tokens.size
    for step in given.steps:
        line = [f"{step:12}"]
        for name, side in sides.items():
            spent = median(times[step, name])
            line.append(f"{name} {spent:.3f} s")
            dtype = side.dtype if step in ("sample", "calibrate") else "float32"
            if step in work:
                rate, peak = work[step] / spent, best[name][dtype]
                line.append(f"({rate / 1e12:.2f} TFLOP/s, {100 * rate / peak:.0f} % of {dtype}'s)")
            elif step == "sample":
                rate = n * (4 if dtype == "float32" else 2) * ANSWER / spent
                line.append(f"({rate / 1e9:.0f} GB/s, {100 * rate / best[name]['bytes']:.0f} %)")
        if len(sides) == 2:
            line.append(f"ratio {median(times[step, 'cpu']) / median(times[step, 'card']):.1f}")
        print(*line)
        if step == "calibrate":
            for name, side in sides.items():
                print(f"  {name}, all threads together, {parts_of_calibration(side, tokens)}")
    for side in sides.values():
        for step, own in side.reckoned(tokens).items() if side.taken else ():
            if step in side.taken:
                taken = side.taken[step]
                print(
                    f"{step:12} card, GiB: reckoned {own / 2**30:.2f} / taken {taken / 2**30:.2f} = {own / taken:.2f}"
                )
    if len(sides) == 2:
        one, other = (np.array(side.predicted) for side in sides.values())
        if len(one):
            print(
                f"predicted KLDs: correlation of logarithms {np.corrcoef(np.log(one), np.log(other))[0, 1]:.4f}, "
                f"sums {other.sum() / one.sum():.4f}"
            )
        print("mean KLD of the file: " + ", ".join(f"{name} {side.divergence:.6f}" for name, side in sides.items()))


if __name__ == "__main__":
    sys.exit(main())
