"""Memory of a model larger than memory: how much export and calibration take beyond an idle interpreter.

    python tests/bench/memory.py                 # 8 GB of BF16, export only
    python tests/bench/memory.py --gib 2 --calibrate
    python tests/bench/memory.py --experts 64
    python tests/bench/memory.py --gguf          # read from a GGUF

The checkpoint is synthetic: a llama (or a Mixtral) whose files are sparse, so they take no room and all weights are
zero. Memory is what the process itself holds (RssAnon of Linux): pages of files that the system has read
are not counted, it drops them when it needs room. Figures in MiB, and as multiples of the largest tensor as it is
stored.
"""

import argparse
import json
import shutil
import sys
import tempfile
import threading
from importlib.resources import files
from pathlib import Path

import numpy as np

from dynq import export as gguf_file
from dynq import formats
from dynq.calibrate import calibrate
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.export import export
from dynq.recipe import Recipe
from dynq.torch_model import load_model

WIDTH, FEED_FORWARD, VOCAB = 4096, 14336, 32000


def sparse_checkpoint(folder: Path, layers: int, experts: int) -> Path:
    """A directory with a config, dynq-tiny's tokenizer, and one sparse safetensors file."""
    kv = {"q_proj": WIDTH, "k_proj": WIDTH // 4, "v_proj": WIDTH // 4, "o_proj": WIDTH}
    shapes = {
        "model.embed_tokens.weight": (VOCAB, WIDTH),
        "lm_head.weight": (VOCAB, WIDTH),
        "model.norm.weight": (WIDTH,),
    }
    for layer in range(layers):
        inside = f"model.layers.{layer}"
        shapes |= {f"{inside}.self_attn.{name}.weight": (rows, WIDTH) for name, rows in kv.items()}
        shapes |= {f"{inside}.{name}.weight": (WIDTH,) for name in ("input_layernorm", "post_attention_layernorm")}
        if not experts:
            shapes |= {f"{inside}.mlp.{name}_proj.weight": (FEED_FORWARD, WIDTH) for name in ("gate", "up")}
            shapes[f"{inside}.mlp.down_proj.weight"] = (WIDTH, FEED_FORWARD)
            continue
        shapes[f"{inside}.block_sparse_moe.gate.weight"] = (experts, WIDTH)
        for e in range(experts):
            one = f"{inside}.block_sparse_moe.experts.{e}"
            shapes |= {
                f"{one}.w1.weight": (1024, WIDTH),
                f"{one}.w3.weight": (1024, WIDTH),
                f"{one}.w2.weight": (WIDTH, 1024),
            }
    header, at = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "BF16", "shape": shape, "data_offsets": [at, at + size]}
        at += size
    text = json.dumps(header).encode()
    with (folder / "model.safetensors").open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        file.truncate(8 + len(text) + at)
    config = {"model_type": "mixtral" if experts else "llama", "hidden_size": WIDTH, "num_hidden_layers": layers}
    config |= {"intermediate_size": 1024 if experts else FEED_FORWARD, "num_attention_heads": 32, "vocab_size": VOCAB}
    config |= {"num_key_value_heads": 8, "head_dim": WIDTH // 32, "num_local_experts": experts or None}
    (folder / "config.json").write_text(json.dumps({k: v for k, v in config.items() if v is not None}))
    for name in ("tokenizer.json", "tokenizer_config.json"):
        shutil.copy(Path(str(files("dynq"))) / "data" / "dynq-tiny" / name, folder)
    return folder


def sparse_gguf(checkpoint: Checkpoint, path: Path) -> Path:
    """The same model as one sparse GGUF in BF16."""
    chosen = {name: "BF16" if info.quantizable else info.kept for name, info in checkpoint.tensors.items()}
    header = gguf_file._header(checkpoint, chosen, checkpoint.metadata)
    sizes = (formats.tensor_bytes(fmt, checkpoint.tensors[name].shape) for name, fmt in chosen.items())
    with path.open("wb") as file:
        file.write(header)
        file.truncate(len(header) + sum(map(gguf_file._padded, sizes)))
    return path


def held() -> float:
    """MiB that the process itself holds."""
    line = next(line for line in Path("/proc/self/status").read_text().splitlines() if line.startswith("RssAnon"))
    return int(line.split()[1]) / 1024


class Peak:
    """The largest `held` inside a with block, above what it was before."""

    def __enter__(self) -> "Peak":
        self.before = self.most = held()
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._watch)
        self._thread.start()
        return self

    def _watch(self) -> None:
        while not self._stop.wait(0.01):
            self.most = max(self.most, held())

    def __exit__(self, *_: object) -> None:
        self._stop.set()
        self._thread.join()
        self.mib = self.most - self.before


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--gib", type=float, default=8.0, help="size of the checkpoint")
    parser.add_argument("--experts", type=int, default=0, help="of each layer; 0: a dense model")
    parser.add_argument("--calibrate", action="store_true", help="one sequence of 64 tokens, layer by layer, as well")
    parser.add_argument("--gguf", action="store_true", help="the source is a GGUF, not safetensors")
    parser.add_argument("--format", default="Q4_K")
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    ends = 2 * 2 * VOCAB * WIDTH
    layer = 2 * (int(2.5 * WIDTH * WIDTH) + 3 * WIDTH * (1024 * given.experts if given.experts else FEED_FORWARD))
    layers = max(1, round((given.gib * 2**30 - ends) / layer))
    with tempfile.TemporaryDirectory(prefix="dynq-memory-") as folder:
        checkpoint = open_checkpoint(sparse_checkpoint(Path(folder), layers, given.experts))
        if given.gguf:
            checkpoint = open_checkpoint(sparse_gguf(checkpoint, Path(folder) / "in.gguf"))
        stored = 2 * max(info.n_weights for info in checkpoint.tensors.values()) / 2**20
        matrix = 2 * max(int(np.prod(info.shape[-2:])) for info in checkpoint.tensors.values()) / 2**20
        total = 2 * checkpoint.n_weights / 2**30
        print(f"{layers} layers, {total:.2f} GiB of BF16, largest tensor {stored:.0f} MiB; idle {held():.0f} MiB")
        recipe = Recipe(dict.fromkeys(checkpoint.tensors, given.format), given.format, 0, 0.0, None)
        with Peak() as peak:
            export(checkpoint, recipe, None, Path(folder) / "out.gguf", threads=given.threads)
        of = f"{peak.mib / stored:.2f} of the largest tensor, {peak.mib / matrix:.2f} of the largest matrix"
        print(f"export to {given.format}: {peak.mib:.0f} MiB, {of}")
        if given.calibrate:
            tokens = np.arange(2, 66, dtype=np.int32)[None]
            with Peak() as peak:
                model = load_model(checkpoint, streamed=True)
                calibrate(checkpoint, model, tokens, Path(folder), keep=16, threads=given.threads)
            ends_held, one = 2 * ends / 2**20, 2 * layer / 2**20
            print(
                f"calibrate layer by layer: {peak.mib:.0f} MiB; in float32 a layer is {one:.0f} MiB, "
                f"embedding and head {ends_held:.0f} MiB, all layers {layers * one:.0f} MiB"
            )


if __name__ == "__main__":
    sys.exit(main())
