"""KLD of a GGUF before and after its scales are tuned, on texts that neither the file nor the tuning has seen.

    python tests/bench/tune.py dynq-tiny runs/first/like-Q2_K.gguf --tokens runs/first/calibrate-text.json \\
        --heldout chats.jsonl,code.txt,wiki.txt

What judges is kept aside as a run does. Of every held-out file ``--chunks`` chunks behind the first ``--skip`` are
scored, at all positions of each. Settings of `tune.tune` may be given several times, each a line of its own:
``--try passes=2 --try passes=4,batch=1,codes=0``.
"""

import argparse
import ast
import json
import sys
import tempfile
import time
from pathlib import Path

import numpy as np

sys.path.insert(0, str(Path(__file__).parent))
from passages import passages

from dynq import codec, tune
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.evaluate import kld
from dynq.gguf_reader import Reader
from dynq.layer_inputs import kept_aside
from dynq.torch_model import load_model, load_tokenizer


def encoded(path: Path) -> tune.Tensors:
    """The tensors of a GGUF: name -> (format, bytes)."""
    found = Reader(path).tensors
    return {t.name: (t.tensor_type.name, np.ascontiguousarray(t.data).view(np.uint8)) for t in found}


def divergences(
    checkpoint: Checkpoint, tensors: tune.Tensors, references: dict[str, kld.Reference]
) -> dict[str, float]:
    shapes = {name: info.shape for name, info in checkpoint.tensors.items()}
    weights = ((n, codec.dequantize(data, fmt).reshape(shapes[n])) for n, (fmt, data) in tensors.items())
    model = load_model(checkpoint, weights)
    return {name: float(kld.measure(model, one, batch=1).kld.mean()) for name, one in references.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("gguf", type=Path, nargs="+")
    parser.add_argument("--tokens", type=Path, required=True)
    parser.add_argument("--heldout", required=True)
    parser.add_argument("--chunks", type=int, default=6)
    parser.add_argument("--skip", type=int, default=0, help="chunks that are left out at the start of each file")
    parser.add_argument("--first", type=int, help="chunks of --tokens that are taken, all by default")
    parser.add_argument("--try", action="append", dest="tries", metavar="NAME=VALUE,...")
    a = parser.parse_args()
    checkpoint = open_checkpoint(a.model)
    teacher, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    text = json.loads(a.tokens.read_text())
    tokens = np.array(text["tokens"], np.int32)[: a.first]
    aside = kept_aside(text["domains"][: a.first], tune.JUDGES)
    with tempfile.TemporaryDirectory() as place:
        references = {}
        for spec in a.heldout.split(","):
            name = Path(spec).stem
            found = passages(Path(spec), tokenizer, n_ctx=tokens.shape[1], chunks=a.chunks, skip=a.skip)
            references[name] = kld.make_reference(teacher, found, Path(place, name), first=0)
        for path in a.gguf:
            before = encoded(path)
            old = divergences(checkpoint, before, references)
            for tried in a.tries or [""]:
                settings = {
                    name: ast.literal_eval(x) for name, _, x in (y.partition("=") for y in tried.split(",") if y)
                }
                start = time.perf_counter()
                tuned = tune.tune(checkpoint, teacher, before, tokens[~aside], tokens[aside], **settings)
                seconds = time.perf_counter() - start
                new = divergences(checkpoint, tuned.tensors, references)
                ratios = {name: new[name] / old[name] for name in old}
                told = ", ".join(f"{name} {old[name]:.4f} x {ratio:.3f}" for name, ratio in ratios.items())
                mean = np.exp(np.mean(np.log(list(ratios.values()))))
                print(f"{path.stem} {tried}: {seconds:.0f} s, {tuned.steps} steps, {tuned.codes:.2%} of the codes")
                print(
                    f"  kept aside {tuned.kld[0]:.4f} x {tuned.kld[1] / tuned.kld[0]:.3f}; {told}; mean x {mean:.3f}",
                    flush=True,
                )


if __name__ == "__main__":
    main()
