"""A recipe: one format for every tensor of a model, and where the choice came from.

A recipe travels in three ways: as JSON (a file of its own, or the key ``dynq.recipe`` of a GGUF), as the text that
llama-quantize takes with ``--tensor-type-file``, and as the tensor types in the header of any GGUF, whoever made it.
"""

import json
import math
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from gguf.constants import GGMLQuantizationType

from dynq import shards
from dynq.errors import DynqError
from dynq.files import parse_json, read_bytes, replacing
from dynq.gguf_header import Header, read_header, stored_bytes

VERSION = 1
KEY = "dynq.recipe"
"""The metadata key under which an exported GGUF carries its recipe, as the JSON of `Recipe.to_json`."""


def file_order(name: str) -> tuple[list[int | str], str]:
    """Sort key of a tensor name that puts blk.2 before blk.10."""
    return [int(part) if part.isdigit() else part for part in re.split(r"(\d+)", name)], name


@dataclass(frozen=True)
class Recipe:
    """A format for every tensor of a file.

    formats: tensor name -> format name, every tensor, the unquantized ones too.
    target: what was asked for, in the user's words ("3.5bpw").
    tensor_bytes: bytes of all tensor data, without padding.
    bpw: bits of all tensor data over all weights of the file.
    predicted_kld: nats per token, the sum of the sensitivities; None where unknown (a recipe read from a header).
    provenance: plain JSON values: what the recipe was made from.
    """

    formats: dict[str, str]
    target: str
    tensor_bytes: int
    bpw: float
    predicted_kld: float | None
    provenance: dict[str, Any] = field(default_factory=dict)

    def to_json(self) -> str:
        """The recipe as JSON, tensors in file order, everything else by name: equal recipes give equal bytes."""
        body = {
            "version": VERSION,
            "target": self.target,
            "tensor_bytes": self.tensor_bytes,
            "bpw": self.bpw,
            "predicted_kld": self.predicted_kld,
            "provenance": json.loads(json.dumps(self.provenance, sort_keys=True, allow_nan=False)),
            "formats": {name: self.formats[name] for name in sorted(self.formats, key=file_order)},
        }
        return json.dumps({KEY: body}, indent=1, ensure_ascii=False, allow_nan=False) + "\n"

    @classmethod
    def from_json(cls, text: str, where: str = "recipe") -> "Recipe":
        """Read what `to_json` wrote. DynqError, beginning with `where`, for anything else."""
        outer = parse_json(text.encode("utf-8", "surrogatepass"), where)
        if not isinstance(outer, dict) or not isinstance(outer.get(KEY), dict):
            raise DynqError(f'{where}: no object "{KEY}"; this is not a recipe of dynq')
        body: dict[str, Any] = outer[KEY]
        if body.get("version") != VERSION:
            raise DynqError(
                f"{where}: recipe version {body.get('version')!r}, this dynq reads version {VERSION}; update dynq"
            )
        for key, kind in _FIELDS.items():
            if key not in body:
                raise DynqError(f'{where}: the recipe lacks "{key}"')
            value = body[key]
            # bool is an int to Python, never a number to us
            if not isinstance(value, kind) or isinstance(value, bool):
                raise DynqError(f'{where}: "{key}" of the recipe is {value!r}, not {_words(kind)}')
            if isinstance(value, float) and not math.isfinite(value):
                raise DynqError(f'{where}: "{key}" of the recipe is {value!r}, not a finite number')
        unknown = sorted(set(body) - set(_FIELDS) - {"version"})
        if unknown:
            raise DynqError(
                f'{where}: the recipe holds "{unknown[0]}", which this dynq does not understand; update dynq'
            )
        for name, fmt in body["formats"].items():
            if not name.isprintable():  # a line of its own in the text for llama-quantize
                raise DynqError(f"{where}: {name!r} is no name of a tensor")
            if not isinstance(fmt, str) or fmt not in _TYPES:
                raise DynqError(f"{where}: {name} has the format {fmt!r}, which GGUF does not know")
        kld = body["predicted_kld"]
        return cls(
            formats=body["formats"],
            target=body["target"],
            tensor_bytes=body["tensor_bytes"],
            bpw=float(body["bpw"]),
            predicted_kld=None if kld is None else float(kld),
            provenance=body["provenance"],
        )

    def save(self, path: str | Path) -> None:
        """Write the JSON; `path` is never half a recipe."""
        with replacing(path) as beside:
            beside.write_text(self.to_json(), encoding="utf-8", newline="\n")

    @classmethod
    def load(cls, path: str | Path) -> "Recipe":
        """Read a recipe file. DynqError if it is missing or not understood."""
        if not Path(path).exists():
            raise DynqError(f"{path}: no such recipe file")
        try:
            text = read_bytes(Path(path), _MOST_BYTES).decode("utf-8")
        except UnicodeDecodeError:
            raise DynqError(f"{path}: not a recipe (not a text file); a GGUF's recipe is read with from_gguf") from None
        return cls.from_json(text, str(path))

    def to_tensor_types(self) -> str:
        """The text for ``llama-quantize --tensor-type-file``, one ``pattern=type`` a line.

        llama-quantize (tools/quantize/quantize.cpp, src/llama-quant.cpp) lowers the case of the pattern, searches for
        it anywhere in a tensor's name as a regular expression, and takes the first that matches. So the name is
        anchored on both sides: a bare ``output.weight`` would also hit ``blk.0.attn_output.weight``. The overrides
        count only where the file type asked for is a quantized one; tensors that llama.cpp never quantizes ignore them.
        """
        return "".join(
            f"^{name.replace('.', chr(92) + '.')}$={self.formats[name].lower()}\n"
            for name in sorted(self.formats, key=file_order)
        )

    @classmethod
    def from_gguf(cls, path: str | Path) -> "Recipe":
        """The recipe of any GGUF, read from its header alone; the shards of a split file are read together.

        The tensor types of the header are the truth. A `dynq.recipe` in the metadata is returned if it agrees with
        them; if not (the file was quantized again by a tool that copied the metadata) it is left out, and
        provenance["stale_recipe"] says so; one that cannot be read leaves its reason in provenance["unread_recipe"].
        DynqError for a file that is not GGUF, cut off, or lacks a shard.
        """
        path = Path(path)
        metadata, tensors = read_headers(path)
        formats = {name: fmt for name, (fmt, _) in tensors.items()}
        weights = sum(math.prod(shape) for _, shape in tensors.values())
        tensor_bytes = sum(stored_bytes(fmt, shape) for fmt, shape in tensors.values())
        if not weights:
            raise DynqError(f"{path}: holds no tensors")
        provenance = {"file": path.name} | {key: metadata[key] for key in _TOLD if key in metadata}
        if isinstance(metadata.get(KEY), str):
            try:
                own = cls.from_json(metadata[KEY], f"{path}: {KEY}")
            except DynqError as error:  # written by a newer dynq: its tensor types can be read all the same
                provenance["unread_recipe"] = str(error)
            else:
                if own.formats == formats:
                    return own
                provenance["stale_recipe"] = True
        return cls(formats, f"as {path.name}", tensor_bytes, 8 * tensor_bytes / weights, None, provenance)


_MOST_BYTES = 1 << 26
_TYPES = {kind.name for kind in GGMLQuantizationType}
_FIELDS: dict[str, tuple[type, ...]] = {
    "target": (str,),
    "tensor_bytes": (int,),
    "bpw": (float, int),
    "predicted_kld": (float, int, type(None)),
    "provenance": (dict,),
    "formats": (dict,),
}
# header keys that say where a file came from
_TOLD = (
    "general.name",
    "general.architecture",
    "general.file_type",
    "general.quantized_by",
    "quantize.imatrix.file",
    "quantize.imatrix.dataset",
    "quantize.imatrix.entries_count",
    "quantize.imatrix.chunks_count",
)


def _words(kind: tuple[type, ...]) -> str:
    names = {str: "a text", int: "a whole number", float: "a number", dict: "an object", type(None): "null"}
    return " or ".join(names[k] for k in kind)


def read_headers(path: str | Path) -> Header:
    """`read_header` of a file, or of all shards of a split one together (the first shard's keys count)."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards.of(Path(path)):
        found, own = read_header(shard)
        metadata = {**found, **metadata}
        tensors |= own
    return metadata, tensors
