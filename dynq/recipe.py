"""A recipe: one format for every tensor of a model, and where the choice came from.

A recipe travels in three ways: as JSON (a file of its own, or the key ``dynq.recipe`` of a GGUF), as the text that
llama-quantize takes with ``--tensor-type-file``, and as the tensor types in the header of any GGUF, whoever made it.
"""

import json
import math
import os
import re
import struct
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, BinaryIO

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dynq import shards
from dynq.errors import DynqError
from dynq.files import replacing

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
        try:
            outer = json.loads(text)
        except ValueError as error:
            raise DynqError(f"{where}: not JSON ({error}); write it again with `dynq run`") from None
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
        try:
            text = Path(path).read_text(encoding="utf-8")
        except FileNotFoundError:
            raise DynqError(f"{path}: no such recipe file") from None
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


# --- the header of a GGUF (ggml/docs/gguf.md): magic, version, counts, key/values, tensor infos -----------------------

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9


Header = tuple[dict[str, Any], dict[str, tuple[str, tuple[int, ...]]]]


def stored_bytes(fmt: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor in any of GGUF's types, those that dynq does not write too."""
    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[fmt]]
    return math.prod(shape) // block * size


def read_headers(path: str | Path) -> Header:
    """`read_header` of a file, or of all shards of a split one together (the first shard's keys count)."""
    metadata: dict[str, Any] = {}
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for shard in shards.of(Path(path)):
        found, own = read_header(shard)
        metadata = {**found, **metadata}
        tensors |= own
    return metadata, tensors


def read_header(path: str | Path) -> Header:
    """Metadata and tensors {name: (format, shape in NumPy order)} of one GGUF file, without touching tensor data.

    Arrays (vocabularies) are skipped, which keeps this at milliseconds whatever the size of the file. DynqError for
    anything that is not a whole GGUF header of version 2 or 3.
    """
    path = Path(path)
    try:
        with path.open("rb") as file:
            return _header(file, path)
    except FileNotFoundError:
        raise DynqError(f"{path}: no such file") from None
    except IsADirectoryError:
        raise DynqError(f"{path}: a folder, not a GGUF file") from None
    except (struct.error, EOFError, UnicodeDecodeError, OverflowError):
        raise DynqError(f"{path}: the GGUF header is cut off or damaged; download the file again") from None


def _header(file: BinaryIO, path: Path) -> Header:
    size = path.stat().st_size

    def take(code: str) -> Any:
        width = struct.calcsize("<" + code)
        return struct.unpack("<" + code, file.read(width))[0]

    def skip(length: int) -> None:
        if file.tell() + length > size:
            raise EOFError
        file.seek(length, os.SEEK_CUR)

    def text() -> str:
        length = take("Q")
        data = file.read(length) if length <= size else b""
        if len(data) != length:
            raise EOFError
        return data.decode("utf-8")

    def value(kind: int) -> Any:
        if kind == _STRING:
            return text()
        if kind != _ARRAY:
            if kind not in _SCALARS:
                raise EOFError
            return take(_SCALARS[kind])
        of, count = take("I"), take("Q")
        if of in _SCALARS:
            skip(count * struct.calcsize(_SCALARS[of]))
        else:
            for _ in range(count):
                if of == _STRING:
                    skip(take("Q"))
                else:
                    value(of)
        return None

    if file.read(4) != b"GGUF":
        raise DynqError(f"{path}: not a GGUF file (it does not begin with GGUF)")
    version = take("I")
    if version not in (2, 3):
        raise DynqError(f"{path}: GGUF version {version}; versions 2 and 3 (little endian) are understood")
    n_tensors, n_keys = take("Q"), take("Q")
    metadata: dict[str, Any] = {}
    for _ in range(n_keys):
        key = text()
        kind = take("I")
        found = value(kind)
        if kind != _ARRAY:
            metadata[key] = found
    tensors: dict[str, tuple[str, tuple[int, ...]]] = {}
    for _ in range(n_tensors):
        name = text()
        shape = tuple(take("Q") for _ in range(take("I")))[::-1]
        kind = take("I")
        take("Q")  # where its data begins
        try:
            tensors[name] = GGMLQuantizationType(kind).name, shape
        except ValueError:
            raise DynqError(
                f"{path}: {name} has type {kind}, newer than the installed gguf package; update gguf"
            ) from None
    return metadata, tensors
