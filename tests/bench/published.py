"""Published recipes on a model of another depth: recipes/*.json hold what their makers' tables say, in our words.

A file names its source and gives, for each kind of tensor, one format or the layers of each format; or, where the
maker chose one of llama.cpp's mixes for each layer, the layers of each mix. Layers are mapped by relative depth: the
first to the first, the last to the last. A mix gives a tensor what it would give it in a whole model of our depth.
"""

import json
from pathlib import Path
from typing import Any

from dynq import describe, formats, mixes
from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.evaluate.compare import stored_bytes
from dynq.recipe import Recipe


def read(path: Path, checkpoint: Checkpoint) -> Recipe:
    """The recipe of a table in recipes/, of a recipe file of dynq's, or of a GGUF's header, for this model.

    Formats are those that are written, after llama.cpp's fallbacks. DynqError: a recipe of another model.
    """
    chosen, about = _chosen(path, checkpoint)
    tensors = checkpoint.tensors
    if missing := [name for name, info in tensors.items() if info.quantizable and name not in chosen]:
        raise DynqError(
            f"{path}: no format for {missing[0]} ({len(missing)} tensors): of another architecture or depth"
        )
    written = {
        name: formats.usable(chosen[name], info.row) if info.quantizable else "F32" for name, info in tensors.items()
    }
    size = stored_bytes(written, tensors)
    return Recipe(written, f"as {path.name}", size, 8 * size / checkpoint.n_weights, None, about)


def _chosen(path: Path, checkpoint: Checkpoint) -> tuple[dict[str, str], dict[str, Any]]:
    """(tensor -> format, provenance)."""
    table = json.loads(path.read_text(encoding="utf-8")) if path.suffix == ".json" else {}
    if "layers" not in table:
        described = describe.read(path)
        return described.recipe.formats, described.recipe.provenance
    if table["architecture"] != checkpoint.architecture.name:
        raise DynqError(f"{path}: for {table['architecture']}, the model is {checkpoint.architecture.name}")
    return from_table(table, checkpoint), {key: table[key] for key in ("source", "published", "model")}


def from_table(table: dict[str, Any], checkpoint: Checkpoint) -> dict[str, str]:
    """Tensor -> format of every quantizable tensor that the table speaks of, before fallbacks."""
    tensors = checkpoint.tensors
    depth = 1 + max(info.layer for info in tensors.values() if info.layer is not None)
    by_layer = {layer: mix for mix, text in table.get("mixes", {}).items() for layer in layers(text)}
    whole = {name: mixes.mix(name, tensors, checkpoint.metadata, True) for name in table.get("mixes", {})}
    chosen = {}
    for name, info in tensors.items():
        # a head that is the embedding as well gets the head's format, as in llama.cpp
        kind = "output" if checkpoint.tied and info.kind == "token_embd" and "output" in table["tensors"] else info.kind
        there = 0 if info.layer is None else relative(info.layer, depth, table["layers"])
        rule = table["tensors"].get(kind)
        if not info.quantizable:
            continue
        if isinstance(rule, dict):
            rule = next((fmt for fmt, text in rule.items() if there in layers(text)), None)
        elif rule is None and info.layer is not None and there in by_layer:
            rule = whole[by_layer[there]][name]
        if rule is not None:
            chosen[name] = rule
    return chosen


def relative(layer: int, depth: int, other: int) -> int:
    """The layer at the same relative depth in a model of `other` layers: first to first, last to last."""
    return round(layer * (other - 1) / (depth - 1)) if depth > 1 else 0


def layers(text: str) -> set[int]:
    """{0, 1, 2, 5} of "0-2,5", as `describe.layers` writes it."""
    found: set[int] = set()
    for part in text.split(","):
        first, _, last = part.partition("-")
        found |= set(range(int(first), int(last or first) + 1))
    return found
