"""What libllama's own quantizer decides for each tensor: `python tests/record_mixes.py` writes tests/data/mixes.json.

Needs llama-cpp-python (the extra `bench`). Small GGUF files are made whose metadata are those of real shapes of model
and whose tensors have two rows only (a dry run never looks at more), then `llama_model_quantize` is asked, dry, for
each mix, with and without an importance matrix, and the types are read from what it logs.
"""

import itertools
import json
import re
import tempfile
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import gguf
import numpy as np
from llama_quantize import FILE_TYPES, quantize

from dynq.checkpoint import TensorInfo

DATA = Path(__file__).parent / "data" / "mixes.json"


class Model(NamedTuple):
    arch: str
    layers: int
    heads: int
    kv_heads: int
    tied: bool = False
    embd: int = 256  # row of every matrix but ffn_down
    ff: int = 512  # row of ffn_down
    experts: int = 0
    shared_expert: bool = False  # a second set of feed-forward matrices in each layer
    bias: bool = False
    fused: bool = False  # attn_qkv instead of three

    def metadata(self) -> dict[str, Any]:
        a = self.arch
        return {
            "general.architecture": a,
            f"{a}.block_count": self.layers,
            f"{a}.attention.head_count": self.heads,
            f"{a}.attention.head_count_kv": self.kv_heads,
        } | ({f"{a}.expert_count": self.experts} if self.experts else {})

    def tensors(self) -> dict[str, TensorInfo]:
        """In file order: embedding, layers, final norm, output."""
        shapes: dict[str, tuple[int, ...]] = {"token_embd.weight": (4, self.embd)}
        stack, suffix = ((2,), "_exps") if self.experts else ((), "")
        for i in range(self.layers):
            layer: dict[str, tuple[int, ...]] = {"attn_norm.weight": (self.embd,)}
            for kind in ("attn_qkv",) if self.fused else ("attn_q", "attn_k", "attn_v"):
                layer[f"{kind}.weight"] = (2, self.embd)
                if self.bias:
                    layer[f"{kind}.bias"] = (2,)
            layer |= {"attn_output.weight": (2, self.embd), "ffn_norm.weight": (self.embd,)}
            if self.experts:
                layer["ffn_gate_inp.weight"] = (2, self.embd)
            layer |= {f"ffn_{kind}{suffix}.weight": (*stack, 2, self.embd) for kind in ("gate", "up")}
            layer[f"ffn_down{suffix}.weight"] = (*stack, 2, self.ff)
            if self.shared_expert:
                layer |= {f"ffn_{kind}_shexp.weight": (2, self.embd) for kind in ("gate", "up")}
                layer["ffn_down_shexp.weight"] = (2, self.ff)
            shapes |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
        shapes["output_norm.weight"] = (self.embd,)
        if not self.tied:
            shapes["output.weight"] = (4, self.embd)
        return {name: TensorInfo(name, shape, "F16") for name, shape in shapes.items()}

    def write(self, path: Path) -> None:
        a = self.arch
        writer = gguf.GGUFWriter(path, a)
        for key, value in self.metadata().items():
            if key != "general.architecture":
                writer.add_uint32(key, value)
        writer.add_uint32(f"{a}.context_length", 64)
        writer.add_uint32(f"{a}.embedding_length", self.embd)
        writer.add_uint32(f"{a}.feed_forward_length", self.ff)
        writer.add_float32(f"{a}.attention.layer_norm_rms_epsilon", 1e-6)
        if self.experts:
            writer.add_uint32(f"{a}.expert_used_count", 2)
            writer.add_uint32(f"{a}.expert_feed_forward_length", self.ff)
        for name, tensor in self.tensors().items():
            writer.add_tensor(name, np.ones(tensor.shape, np.float16 if tensor.quantizable else np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


MODELS = {
    "llama, 4 layers, no shared heads": Model("llama", 4, 8, 8),
    "llama, 12 layers, 2 heads shared, tied": Model("llama", 12, 8, 4, tied=True),
    "llama, 32 layers, 4 heads shared (8B)": Model("llama", 32, 32, 8),
    "llama, 32 layers, no shared heads (7B)": Model("llama", 32, 32, 32),
    "llama, 80 layers, 8 heads shared (70B)": Model("llama", 80, 64, 8),
    "llama, 80 layers, no shared heads (65B)": Model("llama", 80, 64, 64),
    "llama, 6 layers, rows of 288 and 352": Model("llama", 6, 8, 2, embd=288, ff=352),
    "llama, 6 layers, rows of 288 and 512, tied": Model("llama", 6, 8, 2, tied=True, embd=288, ff=512),
    "llama, 6 layers, rows of 256 and 40": Model("llama", 6, 8, 2, ff=40),
    "llama, 6 layers, rows of 40 and 512, tied": Model("llama", 6, 8, 2, tied=True, embd=40),
    "llama, 32 layers, 8 experts": Model("llama", 32, 32, 8, experts=8),
    "llama, 80 layers, 8 experts": Model("llama", 80, 64, 8, experts=8),
    "llama, 9 layers, 4 experts": Model("llama", 9, 8, 4, experts=4),
    "llama, 9 layers, 2 experts": Model("llama", 9, 8, 4, experts=2),
    "llama, 16 layers, 2 heads shared": Model("llama", 16, 32, 16),
    "llama, 6 layers, rows of 128 and 384": Model("llama", 6, 8, 2, embd=128, ff=384),
    "qwen2, 24 layers, 7 heads shared, tied": Model("qwen2", 24, 14, 2, tied=True, bias=True),
    "qwen2, 28 layers, 7 heads shared": Model("qwen2", 28, 28, 4, bias=True),
    "qwen2, 80 layers, 8 heads shared": Model("qwen2", 80, 64, 8, bias=True),
    "qwen2, 80 layers, no shared heads": Model("qwen2", 80, 64, 64, bias=True),
    "qwen3, 28 layers, 2 heads shared, tied": Model("qwen3", 28, 16, 8, tied=True),
    "qwen3, 36 layers, 4 heads shared": Model("qwen3", 36, 32, 8),
    "qwen3, 80 layers, 8 heads shared": Model("qwen3", 80, 64, 8),
    "qwen3moe, 48 layers, 128 experts": Model("qwen3moe", 48, 32, 4, experts=128),
    "qwen3moe, 8 layers, 8 experts, tied": Model("qwen3moe", 8, 8, 4, tied=True, experts=8),
    "qwen3moe, 8 layers, 16 experts, rows of 96": Model("qwen3moe", 8, 8, 4, embd=96, ff=96, experts=16),
    "qwen2moe, 24 layers, 60 experts and a shared one": Model(
        "qwen2moe", 24, 16, 16, experts=60, shared_expert=True, bias=True
    ),
    "phi3, 32 layers, fused qkv": Model("phi3", 32, 32, 32, fused=True),
}


class Decision(NamedTuple):
    """types: tensor -> type, or None where libllama gives up; needs_importance: whether it does so without a matrix."""

    types: dict[str, str] | None
    needs_importance: bool


def dry_run(path: Path, mix: str, has_importance: bool, overrides: str = "") -> Decision:
    """How libllama would write `path` as `mix`. overrides: the text of a --tensor-type-file."""
    matrix = {"none": np.ones(1, np.float32)} if has_importance else None
    succeeded, text = quantize(path, None, mix, matrix, overrides)
    if not succeeded and "no tensor type fallback" in text:
        return Decision(None, False)
    if not succeeded:
        raise RuntimeError(f"{path} as {mix}: {text[-500:]}")
    found = re.findall(r"^\[ *\d+/ *\d+\] +(\S+) .*type = +(\w+), size = .*?(?:\((\w+)\))?$", text, re.MULTILINE)
    return Decision(
        {name: (new or old).upper() for name, old, new in found},
        "will require an imatrix" in text and not has_importance,
    )


def runs(types: dict[str, str]) -> dict[str, str]:
    """Types per kind of tensor, run-length over the layers: {"attn_v": "Q6_K*4 Q4_K*2 ..."}; F32 left out."""
    kinds: dict[str, list[tuple[int, str]]] = {}
    for name, fmt in types.items():
        tensor = TensorInfo(name, (), "F16")
        if fmt != "F32":
            kinds.setdefault(tensor.kind, []).append((tensor.layer or 0, fmt))
    return {
        kind: " ".join(f"{fmt}*{len(list(same))}" for fmt, same in itertools.groupby(fmt for _, fmt in sorted(found)))
        for kind, found in sorted(kinds.items())
    }


def decisions(titles: Iterable[str] = MODELS) -> Iterator[tuple[str, str, bool, Decision]]:
    """(model, mix, has_importance, decision) of the models and every mix, from libllama."""
    with tempfile.TemporaryDirectory() as folder:
        for title in titles:
            model = MODELS[title]
            path = Path(folder) / "model.gguf"
            model.write(path)
            for mix, has_importance in itertools.product(FILE_TYPES, (False, True)):
                found = dry_run(path, mix, has_importance)
                assert found.types is None or set(found.types) == set(model.tensors()), (title, mix)
                yield title, mix, has_importance, found


def main() -> None:
    import llama_cpp

    record: dict[str, Any] = {"made_with": f"llama-cpp-python {llama_cpp.__version__}", "models": {}}
    for title, mix, has_importance, found in decisions():
        entry = record["models"].setdefault(title, {}).setdefault(mix, {})
        entry["with importance" if has_importance else "without"] = found.types and runs(found.types)
        if found.needs_importance:
            entry["needs importance"] = True
    for mixes in record["models"].values():
        for entry in mixes.values():
            if entry["with importance"] == entry["without"]:
                del entry["with importance"]
    DATA.parent.mkdir(exist_ok=True)
    DATA.write_text(json.dumps(record, indent=0, sort_keys=True) + "\n")
    print(f"{DATA}: {len(MODELS)} models, {len(FILE_TYPES)} mixes")


if __name__ == "__main__":
    main()
