"""The constants of dynq/estimate.py measured again, and how good an estimated recipe is.

    python tests/bench/prior.py dynq-tiny ./my-llama ./my-gemma --out runs/prior

For every model a sensitivity table is made (calibrated on sampled text; kept in ``--out``). Printed are the constants
of all models together; then, for every model, from the constants of the *other* models alone: the rank correlation of
estimated and measured sensitivities over tensors, and the KLD on held-out text of four recipes of the same bytes as
one of llama.cpp's mixes: the mix, the estimated one with the importance matrix, without any (against the mix without
any), and the measured one. All are encoded at level plain.
"""

import argparse
import json
import math
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from scipy.stats import spearmanr

from dynq import codec, mixes
from dynq.allocate import allocate, candidates
from dynq.calibrate import calibrate
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.estimate import INSIDE, class_of, estimate, layer_count
from dynq.evaluate import kld
from dynq.export import simulate
from dynq.imatrix import Importance, read_imatrix
from dynq.sensitivity import read_table, sensitivity
from dynq.text import load_text
from dynq.torch_model import load_model, load_tokenizer


def measured(checkpoint: Checkpoint, folder: Path, chunks: int, n_ctx: int) -> tuple[pa.Table, Importance]:
    """The table and the importance of a model, made unless they are there."""
    if not (folder / "sensitivity.parquet").exists():
        folder.mkdir(parents=True, exist_ok=True)
        model = load_model(checkpoint)
        text = load_text("", load_tokenizer(checkpoint), n_ctx=n_ctx, n_chunks=chunks, seed=0, model=model)
        importance = calibrate(checkpoint, model, text.tokens, folder, source=text.description)
        sensitivity(checkpoint, folder, importance, candidates([], "all"))
    return read_table(folder), read_imatrix(folder / "imatrix.gguf")


def factors(checkpoint: Checkpoint, table: pa.Table, importance: Importance) -> dict[str, float]:
    """Class -> geometric mean over its tensors of KLD over relative error, times the layers inside of one."""
    layers = layer_count(checkpoint.tensors)
    logs: dict[str, list[float]] = {}
    by_tensor: dict[str, list[float]] = {}
    for row in table.to_pylist():
        if row["format"] not in ("F16", "Q8_0"):
            by_tensor.setdefault(row["tensor"], []).append(math.log(row["predicted_kld"] / row["weighted_error"]))
    for name, own in by_tensor.items():
        info = checkpoint.tensors[name]
        weight = checkpoint.read(name)
        power = codec.weighted_error(weight, np.zeros_like(weight), importance.mean(name, info.row))
        kind = class_of(info, checkpoint.tied)
        inside = math.log(layers) if kind in INSIDE else 0.0
        logs.setdefault(kind, []).append(float(np.mean(own)) + math.log(power) + inside)
    return {kind: math.exp(float(np.mean(own))) for kind, own in logs.items()}


def pooled(models: Iterable[Mapping[str, float]]) -> dict[str, float]:
    logs: dict[str, list[float]] = {}
    for own in models:
        for kind, value in own.items():
            logs.setdefault(kind, []).append(math.log(value))
    return {kind: math.exp(float(np.mean(values))) for kind, values in sorted(logs.items())}


def rank(table: pa.Table, other: pa.Table, fmt: str) -> float:
    """Spearman's correlation over the tensors of one format."""
    sides = [{r["tensor"]: r["predicted_kld"] for r in t.to_pylist() if r["format"] == fmt} for t in (table, other)]
    shared = sorted(sides[0].keys() & sides[1].keys())
    return float(spearmanr([sides[0][n] for n in shared], [sides[1][n] for n in shared]).statistic)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("models", nargs="+")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--mixes", default="IQ2_M,IQ3_XXS,Q4_K_M", help="sizes that recipes are made of")
    parser.add_argument("--eval-chunks", type=int, default=8)
    parser.add_argument("--measure", default="", help="names of models whose recipes are measured; default: all")
    parser.add_argument("--out", type=Path, default=Path("runs/prior"))
    args = parser.parse_args()

    opened = {Path(model).name: open_checkpoint(model) for model in args.models}
    tables = {name: measured(c, args.out / name, args.chunks, args.n_ctx) for name, c in opened.items()}
    own = {name: factors(c, *tables[name]) for name, c in opened.items()}
    print(json.dumps({kind: float(f"{value:.2g}") for kind, value in pooled(own.values()).items()}, indent=1))
    for name, checkpoint in opened.items():
        if len(own) > 1 and name in (args.measure.split(",") if args.measure else own):
            others = pooled(values for other, values in own.items() if other != name)
            print(json.dumps({"model": name} | judged(checkpoint, *tables[name], others, args)), flush=True)


def judged(
    checkpoint: Checkpoint, table: pa.Table, importance: Importance, prior: dict[str, float], args: Any
) -> dict[str, Any]:
    prior = {"token_embd": prior["output"]} | prior  # of a class that no other model has
    names = [fmt for fmt in candidates([], "all") if fmt != "F16"]
    guessed = {
        given: estimate(checkpoint, importance if given else None, names, prior=prior) for given in (True, False)
    }
    model = load_model(checkpoint)
    n_ctx, chunks = args.n_ctx, args.eval_chunks
    text = load_text(
        "", load_tokenizer(checkpoint), n_ctx=n_ctx, n_chunks=chunks, seed=1, model=model, split="evaluate"
    )
    folder = args.out / Path(checkpoint.name).name
    reference = kld.make_reference(model, text.tokens, folder / "reference", desc="original")

    def divergence(chosen: Mapping[str, str], given: bool) -> float:
        weights = simulate(checkpoint, dict(chosen), importance if given else None)
        return float(kld.measure(load_model(checkpoint, weights), reference, desc="").kld.mean())

    def recipe(own: pa.Table, target: str, given: bool) -> dict[str, str]:
        settings = {"metadata": checkpoint.metadata, "has_importance": given}
        return allocate(own, checkpoint.tensors, f"like:{target}", **settings).formats

    sizes = {}
    for target in args.mixes.split(","):
        found = {}
        for given in (True, False):
            if not given and target.startswith(("IQ1", "IQ2", "IQ3_XXS")):
                continue  # llama-quantize refuses them without importance
            mix = divergence(mixes.mix(target, checkpoint.tensors, checkpoint.metadata, given), given)
            ratio = divergence(recipe(guessed[given], target, given), given) / mix
            found["with imatrix" if given else "data-free"] = {"mix": mix, "estimated / mix": ratio}
            if given:
                found["with imatrix"]["measured / mix"] = divergence(recipe(table, target, given), given) / mix
        sizes[target] = found
    (folder / "reference.u16").unlink()
    ranks = {fmt: {"with imatrix": rank(table, guessed[True], fmt)} for fmt in ("IQ2_XS", "Q3_K", "Q4_K")}
    for fmt in ("Q3_K", "Q4_K"):
        ranks[fmt]["data-free"] = rank(table, guessed[False], fmt)
    return {"rank": ranks, "kld": sizes}


if __name__ == "__main__":
    main()
