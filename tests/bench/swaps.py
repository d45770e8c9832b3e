"""Predicted sensitivity against measured swaps, for every tensor: does the theory hold on this model?

    python tests/bench/swaps.py dynq-tiny --text chats.jsonl --chunks 32 --formats Q2_K,Q3_K,Q4_K

Prints, within each format, the rank correlation across tensors and, for each kind of tensor, the median of
predicted / measured, and writes all rows to ``--out``. One forward pass of the text for each tensor and format: on a
GPU a matter of minutes, on two cores half an hour for the embedded model.
"""

import argparse
import json
from pathlib import Path

import torch

from dynq.calibrate import calibrate
from dynq.checkpoint import open_checkpoint
from dynq.evaluate import kld
from dynq.sensitivity import agreement, measure_swaps, sensitivity
from dynq.text import load_text
from dynq.torch_model import load_model, load_tokenizer


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", default="sampled")
    parser.add_argument("--chunks", type=int, default=32)
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--keep", type=int, default=1024, help="Fisher samples per layer")
    parser.add_argument("--formats", default="Q2_K,Q3_K,Q4_K")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--measure-chunks", type=int, default=None, help="measure on the first so many chunks only")
    parser.add_argument("--out", type=Path, default=Path("runs/swaps"))
    args = parser.parse_args()
    args.out.mkdir(parents=True, exist_ok=True)

    checkpoint = open_checkpoint(args.model)
    model = load_model(checkpoint).to("cuda" if torch.cuda.is_available() else "cpu")
    text = load_text(
        args.text, load_tokenizer(checkpoint), n_ctx=args.n_ctx, n_chunks=args.chunks, seed=args.seed, model=model
    )
    importance = calibrate(checkpoint, model, text.tokens, args.out, seed=args.seed, keep=args.keep)
    table = sensitivity(checkpoint, args.out, importance, args.formats.split(","))
    reference = kld.make_reference(model, text.tokens[: args.measure_chunks], args.out / "reference", first=0, batch=8)
    table = measure_swaps(checkpoint, model, args.out, table, range(len(table)), reference, importance)
    (args.out / "reference.u16").unlink()
    result = agreement(table)
    (args.out / "swaps.json").write_text(json.dumps({"agreement": result, "rows": table.to_pylist()}, indent=1))
    print(json.dumps(result, indent=1))


if __name__ == "__main__":
    main()
