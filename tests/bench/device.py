"""A graphics card against this machine's processor: calibration, sensitivity's products, and KL divergence.

    python tests/bench/device.py                       # a random llama of 1 B weights
    python tests/bench/device.py --width 1024 --layers 8 --chunks 4

Both sides in turn; figures are medians. The card computes the model in bfloat16, the processor in float32 as always.
Agreement: the correlation of the logarithms of all predicted KLDs, from samples of the one and of the other, and the
ratio of their sums; the ratio of the KLDs of one file. Throughput counts 2 operations a weight and token forward, 4
backward.
"""

import argparse
import sys
import tempfile
import time
from collections.abc import Callable
from importlib.resources import files
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
import transformers

from dynq import codec
from dynq.calibrate import calibrate
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.evaluate import kld
from dynq.fisher import Fisher
from dynq.sensitivity import quadratic_form
from dynq.torch_model import load_model


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


def timed(call: Callable[[], Any]) -> tuple[float, Any]:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    start = time.perf_counter()
    result = call()
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter() - start, result


def predicted(checkpoint: Checkpoint, folder: Path, device: str, names: list[str]) -> tuple[float, list[float]]:
    """Seconds of the products alone, and sums of the quadratic form, of a few tensors in Q3_K."""
    fisher, seconds, values = Fisher(folder / "fisher"), 0.0, []
    for name in names:
        weight = checkpoint.read(name)
        error = torch.from_numpy(
            codec.dequantize(codec.quantize(weight, "Q3_K"), "Q3_K").reshape(weight.shape) - weight
        )
        samples, error = fisher.samples(name, device), error.to(device)
        quadratic_form(error, samples)
        spent, (value, _) = timed(lambda error=error, samples=samples: quadratic_form(error, samples))
        seconds += spent
        values.append(value)
    return seconds, values


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=2048)
    parser.add_argument("--layers", type=int, default=16)
    parser.add_argument("--chunks", type=int, default=16)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="cuda")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dynq-device-") as text:
        folder = Path(text)
        checkpoint = open_checkpoint(random_model(folder / "model", given.width, given.layers))
        tokens = np.random.default_rng(0).integers(3, 8000, (given.chunks, 512)).astype(np.int32)
        sides = {"cpu": load_model(checkpoint, streamed=False)}
        sides["card"] = load_model(checkpoint, dtype="bfloat16", device=given.device, streamed=False)
        device = {"cpu": "cpu", "card": given.device}
        print(f"{checkpoint.n_weights:,} weights, {tokens.size:,} tokens, {torch.get_num_threads()} threads")
        times: dict[str, dict[str, list[float]]] = {}
        values: dict[str, list[float]] = {}
        divergence: dict[str, float] = {}
        names = [
            f"blk.{i}.{kind}.weight"
            for i in (1, given.layers - 1)
            for kind in ("attn_q", "attn_v", "ffn_up", "ffn_down")
        ]
        reference = kld.make_reference(sides["card"], tokens[:2], folder / "reference", desc="")
        for turn in range(given.repeats):
            for side, model in sides.items():
                run = folder / f"{side}{turn}"
                run.mkdir()
                spent, _ = timed(lambda model=model, run=run: calibrate(checkpoint, model, tokens, run, keep=1024))
                times.setdefault("calibrate", {}).setdefault(side, []).append(spent)
                spent, values[side] = predicted(checkpoint, run, device[side], names)
                times.setdefault("products of sensitivity", {}).setdefault(side, []).append(spent)
                spent, scores = timed(lambda model=model: kld.measure(model, reference, desc=""))
                times.setdefault("KL divergence", {}).setdefault(side, []).append(spent)
                divergence[side] = float(scores.kld.mean())
        for what, both in times.items():
            cpu, card = median(both["cpu"]), median(both["card"])
            print(f"{what}: processor {cpu:.3f} s, card {card:.3f} s, ratio {cpu / card:.1f}")
        work = 6 * checkpoint.n_weights * tokens.size
        for side in sides:
            print(f"calibrate on {side}: {work / median(times['calibrate'][side]) / 1e12:.2f} TFLOP/s")
        one, other = np.array(values["cpu"]), np.array(values["card"])
        print(
            f"correlation of logarithms {np.corrcoef(np.log(one), np.log(other))[0, 1]:.4f}, "
            f"sums {other.sum() / one.sum():.4f}"
        )
        print(f"mean KLD of the model against itself in bfloat16: {divergence}")


if __name__ == "__main__":
    sys.exit(main())
