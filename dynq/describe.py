"""What a recipe says, for a reader: formats by kind of tensor and layer, bytes, and how two recipes differ.

A recipe is read from its own file or from the header of any GGUF. Bytes need shapes, which only a GGUF knows; a
recipe file is shown without them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from dynq.checkpoint import TensorInfo
from dynq.errors import DynqError
from dynq.gguf_header import stored_bytes
from dynq.recipe import Recipe, file_order, read_headers
from dynq.tables import text_table


@dataclass(frozen=True)
class Described:
    """A recipe, the file it was read from, and tensor name -> shape in NumPy order (empty for a recipe file)."""

    path: Path
    recipe: Recipe
    shapes: dict[str, tuple[int, ...]]

    def bytes(self, name: str) -> int | None:
        """Bytes of one tensor; None where the shape is not known."""
        return stored_bytes(self.recipe.formats[name], self.shapes[name]) if name in self.shapes else None


def read(path: str | Path) -> Described:
    """A recipe file or any GGUF, split or not. DynqError for anything else."""
    path = Path(path)
    if path.is_dir():
        raise DynqError(f"{path}: a folder, not a recipe or GGUF file")
    if not path.exists():
        raise DynqError(f"{path}: no such file")
    with path.open("rb") as file:
        is_gguf = file.read(4) == b"GGUF"
    if not is_gguf:
        return Described(path, Recipe.load(path), {})
    _, tensors = read_headers(path)
    return Described(path, Recipe.from_gguf(path), {name: shape for name, (_, shape) in tensors.items()})


def other_shapes(described: Described, shapes: Mapping[str, tuple[int, ...]]) -> list[str]:
    """Tensors that both know and that have another shape in `shapes`; none where `described` knows no shapes."""
    return [name for name, shape in described.shapes.items() if shapes.get(name, shape) != shape]


def by_kind(described: Described) -> list[dict[str, Any]]:
    """One row for each kind of tensor: kind, tensors, bytes, bpw (None where unknown), formats {name: layers}.

    Kinds are in the order in which they first appear; layers is a list, [None] for a tensor outside of the layers.
    """
    rows: dict[str, dict[str, Any]] = {}
    for name in sorted(described.recipe.formats, key=_place):
        info = _info(described, name)
        row = rows.setdefault(info.kind, {"kind": info.kind, "tensors": 0, "bytes": 0, "weights": 0, "formats": {}})
        _count(row, described, info)
        row["formats"].setdefault(info.dtype, []).append(info.layer)
    return [_with_bpw(row, described) for row in rows.values()]


def by_format(described: Described) -> list[dict[str, Any]]:
    """One row for each format: format, tensors, bytes, bpw; the one with most bytes (or tensors) first."""
    rows: dict[str, dict[str, Any]] = {}
    for name, fmt in described.recipe.formats.items():
        row = rows.setdefault(fmt, {"format": fmt, "tensors": 0, "bytes": 0, "weights": 0})
        _count(row, described, _info(described, name))
    ordered = sorted(rows.values(), key=lambda row: (-row["bytes"], -row["tensors"], row["format"]))
    return [_with_bpw(row, described) for row in ordered]


def _count(row: dict[str, Any], described: Described, info: TensorInfo) -> None:
    row["tensors"] += 1
    row["bytes"] += described.bytes(info.name) or 0
    row["weights"] += info.n_weights if described.shapes else 0


def _with_bpw(row: dict[str, Any], described: Described) -> dict[str, Any]:
    if not described.shapes:
        return row | {"bytes": None, "weights": None, "bpw": None}
    return row | {"bpw": 8 * row["bytes"] / row["weights"]}


def difference(a: Described, b: Described) -> list[dict[str, Any]]:
    """Tensors whose formats differ, or that only one has: tensor, a, b (formats), bytes_a, bytes_b; in file order.

    Where only one of the two knows the shapes, they count for both. DynqError where no tensor has the same name, or
    one has another shape: recipes of different models.
    """
    shared = a.recipe.formats.keys() & b.recipe.formats.keys()
    if not shared:
        raise DynqError(f"{a.path} and {b.path} have no tensor in common: recipes of different models")
    if other := other_shapes(a, b.shapes):
        mine, theirs = (list(described.shapes[other[0]]) for described in (a, b))
        raise DynqError(f"{a.path}: {other[0]} has shape {mine}, in {b.path} {theirs}: another model")
    shapes = b.shapes | a.shapes
    rows = []
    for name in sorted(a.recipe.formats.keys() | b.recipe.formats.keys(), key=file_order):
        pair = a.recipe.formats.get(name), b.recipe.formats.get(name)
        if pair[0] != pair[1]:
            sizes = [stored_bytes(fmt, shapes[name]) if fmt and name in shapes else None for fmt in pair]
            rows.append({"tensor": name, "a": pair[0], "b": pair[1], "bytes_a": sizes[0], "bytes_b": sizes[1]})
    return rows


def layers(numbers: Iterable[int | None]) -> str:
    """Layers in short: [0, 1, 2, 5] is "0-2,5"; the empty text for a tensor outside of the layers."""
    runs: list[list[int]] = []
    for number in sorted(n for n in numbers if n is not None):
        if runs and number == runs[-1][1] + 1:
            runs[-1][1] = number
        elif not runs or number != runs[-1][1]:
            runs.append([number, number])
    return ",".join(str(a) if a == b else f"{a}-{b}" for a, b in runs)


def show_text(described: Described) -> str:
    """What ``dynq recipe show`` prints."""
    recipe = described.recipe
    kld = "" if recipe.predicted_kld is None else f", predicted KLD {recipe.predicted_kld:.4g}"
    lines = [
        f"{described.path.name}: {recipe.target}",
        f"{len(recipe.formats)} tensors, {recipe.tensor_bytes:,} bytes, {recipe.bpw:.3f} bpw{kld}",
        "",
    ]
    kinds = [
        {
            "kind": row["kind"],
            "tensors": row["tensors"],
            "bytes": row["bytes"],
            "bpw": row["bpw"],
            "formats": "  ".join(f"{fmt} {layers(own)}".rstrip() for fmt, own in row["formats"].items()),
        }
        for row in by_kind(described)
    ]
    totals = [{key: row[key] for key in ("format", "tensors", "bytes", "bpw")} for row in by_format(described)]
    return "\n".join([*lines, text_table(kinds), "", text_table(totals)])


def difference_text(a: Described, b: Described) -> str:
    """What ``dynq recipe diff`` prints."""
    rows = difference(a, b)
    lines = [
        f"{letter}: {described.path}, {described.recipe.tensor_bytes:,} bytes, {described.recipe.bpw:.3f} bpw"
        for letter, described in (("a", a), ("b", b))
    ]
    names = a.recipe.formats.keys() | b.recipe.formats.keys()
    if rows:
        lines += ["", text_table([{key.replace("_", " "): value for key, value in row.items()} for row in rows]), ""]
    change = b.recipe.tensor_bytes - a.recipe.tensor_bytes
    return "\n".join([*lines, f"{len(rows)} of {len(names)} tensors differ; b has {change:+,} bytes"])


def _info(described: Described, name: str) -> TensorInfo:
    return TensorInfo(name, described.shapes.get(name, ()), described.recipe.formats[name])


def _place(name: str) -> tuple[bool, list[int | str], str]:
    return name.startswith("blk."), *file_order(name)


def as_json(described: Described) -> dict[str, Any]:
    """What ``dynq recipe show --json`` prints: a recipe file, with what a reader may want besides."""
    recipe = described.recipe
    tensors = [
        {"tensor": name, "kind": info.kind, "layer": info.layer, "format": info.dtype, "bytes": described.bytes(name)}
        for name in sorted(recipe.formats, key=_place)
        for info in [_info(described, name)]
    ]
    return json.loads(recipe.to_json()) | {
        "file": str(described.path),
        "target": recipe.target,
        "tensor_bytes": recipe.tensor_bytes,
        "bpw": recipe.bpw,
        "predicted_kld": recipe.predicted_kld,
        "provenance": recipe.provenance,
        "kinds": by_kind(described),
        "formats": by_format(described),
        "tensors": tensors,
    }
