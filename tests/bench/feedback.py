"""Output error of the level `feedback` against `plain`, on inputs it was not fitted to.

    python tests/bench/feedback.py dynq-tiny --text chats.jsonl,wiki.txt,stories.txt --heldout other-chats.jsonl \\
        --foreign code.txt --formats Q2_K,Q3_K,Q4_K,Q4_0

Of every file of ``--text`` the first chunks are fitted, the next ones choose the shrinkage, later ones are held out;
``--heldout`` files are held out too, ``--foreign`` ones are of domains not calibrated. Plain has the mean square of the
calibration inputs as its importance. A figure is the ratio of squared output errors: geometric mean over the tensors
and the worst tensor, on all held-out inputs together and on each text.
"""

import argparse
import time
from pathlib import Path

import numpy as np
import torch

from dynq import codec, feedback, formats
from dynq.checkpoint import open_checkpoint
from dynq.fisher import HEAD, linear_tensors
from dynq.kernels import scales
from dynq.text import load_text
from dynq.torch_model import load_model, load_tokenizer


class Collector:
    """Sums x x^T of every linear layer; layers that read the same input share one sum."""

    def __init__(self, checkpoint, model):
        names = linear_tensors(checkpoint)
        head = HEAD if HEAD in names else "token_embd.weight"
        self.inputs: dict[str, torch.Tensor] = {}
        self.model = model
        for name in names if head in names else [*names, head]:
            if name == "token_embd.weight" and head != name:
                continue  # a lookup has no inputs
            module = model.get_submodule(checkpoint.architecture.parameter(name).removesuffix(".weight"))
            module = model.get_output_embeddings() if name == head else module
            module.register_forward_pre_hook(self._hook(name))

    def _hook(self, name: str):
        def keep(_, args: tuple) -> None:
            self.inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1])

        return keep

    @torch.no_grad()
    def sums(self, tokens: np.ndarray) -> dict[str, feedback.Hessian]:
        """The Hessian of every tensor for tokens int32 [chunks, n_ctx]."""
        shared: dict[str, torch.Tensor] = {}
        for start in range(0, len(tokens), 4):
            self.model(input_ids=torch.from_numpy(tokens[start : start + 4].astype(np.int64)), use_cache=False)
            first: dict[int, str] = {}
            group = {name: first.setdefault(x.data_ptr(), name) for name, x in self.inputs.items()}
            for name in first.values():
                x = self.inputs[name]
                shared[name] = (x.T @ x).double() + shared.get(name, 0)
        matrices = {name: feedback.Hessian(h.float().numpy(), tokens.size) for name, h in shared.items()}
        return {name: matrices[one] for name, one in group.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--text", required=True)
    parser.add_argument("--heldout", default="")
    parser.add_argument("--foreign", default="")
    names = [name for name in formats.FORMATS if scales.grid(name) is not None]
    parser.add_argument("--formats", default=",".join(names))
    parser.add_argument("--n-ctx", type=int, default=512)
    parser.add_argument("--chunks", default="16,5,8", help="fitted, aside and held out, of each file")
    parser.add_argument("--rows", type=int, default=1024, help="rows of a tensor that are encoded, at most")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--verbose", action="store_true", help="a line for each tensor")
    args = parser.parse_args()

    checkpoint = open_checkpoint(args.model)
    model, tokenizer = load_model(checkpoint), load_tokenizer(checkpoint)
    collector = Collector(checkpoint, model)
    n_fit, n_aside, n_held = map(int, args.chunks.split(","))

    def chunks(path: str, count: int) -> np.ndarray:
        return load_text(path, tokenizer, n_ctx=args.n_ctx, n_chunks=count, seed=0).tokens

    fit, aside, tests = [], [], {}
    for path in args.text.split(","):
        tokens = chunks(path, n_fit + n_aside + n_held)
        fit.append(collector.sums(tokens[:n_fit]))
        aside.append(collector.sums(tokens[n_fit : n_fit + n_aside]))
        if len(tokens) > n_fit + n_aside:
            tests[Path(path).name] = collector.sums(tokens[n_fit + n_aside :])
    for path in filter(None, args.heldout.split(",")):
        tests[Path(path).name] = collector.sums(chunks(path, n_held))
    held = list(tests)
    for path in filter(None, args.foreign.split(",")):
        tests[f"foreign {Path(path).name}"] = collector.sums(chunks(path, n_held))
    columns = ["held out", *tests]
    print(
        f"{checkpoint.path}: {sum(h.tokens for h in (next(iter(d.values())) for d in fit))} tokens fitted; geo / worst"
    )
    print("format  fed back  M weights/s  " + "  ".join(columns))
    for fmt in args.formats.split(","):
        table, levels, seconds, done = [], [], 0.0, 0
        for name in fit[0]:
            weights = checkpoint.read(name)[: args.rows]
            if weights.shape[-1] % formats.get(fmt).block:
                continue
            parts = [d[name] for d in fit], [d[name] for d in aside]
            importance = sum(h.matrix for side in parts for h in side).diagonal()
            start = time.perf_counter()
            encoded = feedback.encode(weights, fmt, *parts, importance, threads=args.threads)
            seconds, done = seconds + time.perf_counter() - start, done + weights.size
            plain = codec.dequantize(codec.quantize(weights, fmt, importance, threads=args.threads), fmt)
            ours = codec.dequantize(encoded.data, fmt)
            errors = {
                key: [feedback.output_error(weights, what, sums[name]) for what in (ours, plain)]
                for key, sums in tests.items()
            }
            pooled = np.sum([np.divide(errors[key], tests[key][name].tokens) for key in held], axis=0)
            row = [pooled[0] / pooled[1], *(a / b for a, b in errors.values())]
            table.append(row)
            levels.append(encoded.level)
            if args.verbose:
                figures = " ".join(f"{x:.3f}" for x in row)
                print(f"  {name} {encoded.level} {encoded.shrinkage} aside {max(encoded.ratios):.3f}: {figures}")
        geo, worst = np.exp(np.log(table).mean(0)), np.max(table, axis=0)
        share = f"{levels.count('feedback')}/{len(levels)}"
        figures = "  ".join(f"{a:.3f}/{b:.3f}" for a, b in zip(geo, worst, strict=True))
        print(f"{fmt:6}  {share:>8}  {done / seconds / 1e6:11.2f}  {figures}", flush=True)


if __name__ == "__main__":
    main()
