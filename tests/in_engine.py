"""A tokenizer written to a GGUF and opened in llama.cpp."""

from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import tiny_models

from dynq import architectures, tokenizer
from dynq.checkpoint import Checkpoint, TensorInfo
from dynq.engine import Engine
from dynq.export import export
from dynq.recipe import Recipe

ROOT = Path(__file__).parents[1]


def gguf_of(directory: Path, vocab_size: int, path: Path, **more: str) -> Path:
    """A GGUF with the tokenizer of a directory and a model of zeros; more: metadata of the group "general"."""
    config = {**tiny_models.COMMON, "model_type": "llama", "vocab_size": vocab_size, "num_hidden_layers": 1}
    architecture = architectures.for_config(config)
    width, ff, kv = 128, 160, 64
    shapes: dict[str, tuple[int, ...]] = {"attn_k": (kv, width), "attn_v": (kv, width), "ffn_down": (width, ff)}
    shapes |= {"ffn_gate": (ff, width), "ffn_up": (ff, width), "token_embd": (vocab_size, width)}
    shapes |= {"output": (vocab_size, width), "attn_q": (width, width), "attn_output": (width, width)}
    tensors = {}
    for name in architecture.required():
        info = TensorInfo(name, (width,), "F32")
        tensors[name] = TensorInfo(name, shapes.get(info.kind, (width,)), "F32")
    metadata = {"general.architecture": "llama", **architecture.metadata()}
    metadata |= {f"general.{key}": value for key, value in more.items()}
    metadata |= tokenizer.from_directory(directory, vocab_size)
    model = Checkpoint(
        "zeros", directory, architecture, metadata, tensors, lambda n: np.zeros(tensors[n].shape, np.float32), []
    )
    export(model, Recipe(dict.fromkeys(tensors, "F16"), "", 0, 0.0, None), None, path, threads=1)
    return path


def tokens(path: Path, strings: Iterable[str], *, add_special: bool = False) -> dict[str, list[int]]:
    """What llama.cpp makes of texts."""
    with Engine(path, n_ctx=64, threads=1) as engine:
        return {s: engine.tokenize(s, add_special=add_special) for s in strings}


def differ(ours: dict[str, list[int]], theirs: Callable[[str], Any], *, add_special: bool = False) -> list[str]:
    """The texts of which a tokenizer of transformers, or a function, makes other tokens."""

    def ids(text: str) -> list[int]:
        made = theirs(text, add_special_tokens=add_special) if hasattr(theirs, "vocab_size") else theirs(text)
        return list(made["input_ids"] if hasattr(made, "keys") else made)

    return [text for text, tokens in ours.items() if tokens != ids(text)]


def code() -> list[str]:
    """English and code to train on."""
    files = [ROOT / "LICENSE", *sorted((ROOT / "dynq").glob("*.py"))]
    return [line for file in files for line in file.read_text(encoding="utf-8").splitlines()]
