"""What the model card of a run says beside its numbers: where the model comes from, what the files are called, recipes.

A card is the ``README.md`` of a model's repository on the Hugging Face hub. Its front matter has what the source tells;
what it does not tell is left out.
"""

import re
from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from dynq import describe, shards
from dynq.folder import RunFolder, file_safe
from dynq.recipe import Recipe

if TYPE_CHECKING:
    from dynq.checkpoint import Checkpoint

_CACHED = re.compile(r"models--((?:(?!--)[\w.-])+)--((?:(?!--)[\w.-])+)")  # the folder of a model in the hub's cache
_COPIED = re.compile(r"hf://([\w.-]+/[\w.-]+?)(@[^/]+)?/?")  # a model, with its revision, and not a file in it
_HUB_URL = re.compile(r"https://huggingface\.co/([\w.-]+/[\w.-]+)/?")


def values(folder: RunFolder, checkpoint: "Checkpoint", evaluation: Mapping[str, Any]) -> dict[str, Any]:
    """Values for the template ``model-card.md.j2``, without those that the report has as well."""
    return {
        "front": front_matter(checkpoint),
        "names": hub_names(checkpoint.name, evaluation),
        "recipes": {
            target["target"]: recipe_table(
                Recipe.load(folder / f"{file_safe(target['target'])}.recipe.json"), checkpoint
            )
            for target in evaluation["targets"]
        },
    }


def front_matter(checkpoint: "Checkpoint") -> dict[str, Any]:
    """base_model (an id of the hub), license, license_name, license_link, language: those that are known."""
    metadata = checkpoint.metadata
    found = {
        "base_model": _hub_id(checkpoint),
        "license": metadata.get("general.license"),
        "license_name": metadata.get("general.license.name"),
        "license_link": metadata.get("general.license.link"),
        "language": metadata.get("general.languages"),
    }
    return {key: value for key, value in found.items() if value}


def _hub_id(checkpoint: "Checkpoint") -> str | None:
    """owner/name, from the URL, the folder that the hub's client keeps a model in, or as a GGUF tells of its source."""
    if match := _COPIED.fullmatch(checkpoint.url):
        return match[1]
    for part in checkpoint.path.parts:
        if match := _CACHED.fullmatch(part):
            return f"{match[1]}/{match[2]}"
    for key in ("general.source.repo_url", "general.repo_url"):
        if match := _HUB_URL.fullmatch(str(checkpoint.metadata.get(key))):
            return match[1]
    return None


def hub_names(model: str, evaluation: Mapping[str, Any]) -> list[dict[str, str]]:
    """For each target its file, the name it should have on the hub and the TAG that then finds it.

    A tag is the name of a quantization at the end of a file's name. A target such as 3.5bpw has none, so the nearest
    mix of llama.cpp's stands behind it. Files with the same one have no TAG ("").
    """
    sizes = {entry["label"]: entry["tensor_bytes"] for entry in evaluation["files"]}
    found = []
    for target in evaluation["targets"]:
        size, around = sizes[target["label"]], (target["below"], target["above"])
        tag = target["like"] or min(around, key=lambda mix: abs(sizes[mix] - size))
        own = "" if target["like"] else f"{file_safe(target['target'])}-"
        name, split = f"{file_safe(model)}-{own}{tag}.gguf", len(shards.unsplit(Path(target["file"])).stem)
        name = name.replace(".gguf", target["file"][split:])  # with the number of the shard
        found.append({"file": target["file"], "name": name, "tag": tag})
    tags = [row["tag"] for row in found]
    return [row | {"tag": row["tag"] if tags.count(row["tag"]) == 1 else ""} for row in found]


def recipe_table(recipe: Recipe, checkpoint: "Checkpoint") -> dict[str, Any]:
    """rows: for each kind of matrix its number, bpw and formats with their layers; rest: formats of all else."""
    tensors = checkpoint.tensors
    matrices = {name: fmt for name, fmt in recipe.formats.items() if tensors[name].quantizable}
    shapes = {name: tensors[name].shape for name in matrices}
    rows = describe.by_kind(describe.Described(checkpoint.path, replace(recipe, formats=matrices), shapes))
    return {
        "bpw": recipe.bpw,
        "rows": [
            {"kind": row["kind"], "tensors": row["tensors"], "bpw": row["bpw"]}
            | {"formats": ", ".join(f"{fmt} {_layers(own)}".strip() for fmt, own in row["formats"].items())}
            for row in rows
        ],
        "rest": ", ".join(sorted(set(recipe.formats.values()) - set(matrices.values()))),
    }


def plain(text: str) -> str:
    """A text for Markdown that says what it says: no markup of either kind, no new line, no end of a table cell."""
    return re.sub(r"[^\w\s.,:;()+/=~@%-]", lambda match: f"&#{ord(match[0])};", " ".join(text.split()))


def _layers(numbers: list[int | None]) -> str:
    shown = describe.layers(numbers)
    return f"({shown})" if shown else ""
