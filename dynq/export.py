"""Write a GGUF by a recipe: streaming, atomic, read back and verified."""

from __future__ import annotations

import hashlib
import io
import shutil
import struct
from collections import Counter
from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from gguf.gguf_writer import WriterState

from dynq import __version__, codec, formats, shards
from dynq.checkpoint import Checkpoint
from dynq.describe import Described, other_shapes
from dynq.encoding import Stream, encode, quantize_tensor
from dynq.errors import DynqError
from dynq.files import replacing
from dynq.gguf_reader import Reader
from dynq.imatrix import Importance
from dynq.progress import progress
from dynq.recipe import KEY, Recipe

_ALIGNMENT = gguf.GGUF_DEFAULT_ALIGNMENT
_LONGEST_NAME = max(formats.FORMATS, key=len)
# Room in `header_bytes` for what is not known before a recipe exists: its provenance, the names of texts and files.
_ROOM = 4096
_LONGEST = 1e-300 / 3  # no fraction is written with more characters


def export(
    checkpoint: Checkpoint,
    recipe: Recipe,
    importance: Importance | None,
    path: str | Path,
    *,
    imatrix_file: str = "",
    level: str = "plain",
    threads: int | None = None,
    source: Callable[[dict[str, str]], Stream] | None = None,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """Encode every tensor by the recipe and write the GGUF; `path` appears only once it is whole and verified.

    The file is written beside its place as `<path>.partial`, read back with gguf's reader (names, types, shapes, a
    hash of every tensor's bytes, metadata), flushed to the disk and renamed. In memory is one tensor at a time.
    Tensors that llama.cpp never quantizes (norms, biases) are F32; a row that does not divide into a format's blocks
    takes llama.cpp's fallback. The recipe as it was carried out is kept in the metadata.

    Args:
        importance: importance per tensor for the encoders, or None.
        imatrix_file: the name to write as `quantize.imatrix.file`.
        level: how hard the encoders search, as in `codec.quantize`.
        threads: threads of the encoders; their bytes do not depend on it.
        source: gives the bytes of all tensors for the formats that are written (in that order), instead of the encoders
            at that level.
        shard_bytes: a model that needs more is split into files of at most so many bytes, of the names that `files`
            gives; they appear all at once, the first last.

    Returns:
        bytes (of the file, or of all shards), tensor_bytes, bpw (of all tensor data), sha256 (of the file, or of the
        bytes of all shards in order), verified (True).

    Raises:
        DynqError: the recipe is not for this model, the directory is missing, the disk is full.
    """
    path = Path(path)
    recipe = _carried_out(checkpoint, recipe)
    _check_importance(checkpoint, recipe.formats, importance)
    metadata = _metadata(checkpoint, recipe, importance, imatrix_file)
    parts = _parts(checkpoint, recipe, path, shard_bytes, metadata)
    for part in parts:
        if part.path.exists() and any(part.path.samefile(file) for file in checkpoint.files):
            raise DynqError(f"{part.path}: that is the model itself; choose another --out")
    _check_room(path, sum(part.bytes for part in parts))
    tensors = (
        source(recipe.formats)
        if source
        else encode(checkpoint, recipe.formats, importance, level=level, threads=threads, desc=path.name)
    )
    whole = hashlib.sha256()
    with ExitStack() as written:
        for part in parts:
            beside = written.enter_context(replacing(part.path, part.bytes))
            digests: dict[str, str] = {}
            whole.update(part.header)
            with beside.open("wb") as file:
                file.write(part.header)
                for _ in part.formats:
                    name, _, data = next(tensors)
                    digests[name] = hashlib.sha256(data.data).hexdigest()
                    for piece in (data, np.zeros(_padded(data.nbytes) - data.nbytes, np.uint8)):
                        whole.update(piece.data)
                        file.write(piece.data)
            _verify(beside, checkpoint, part, digests)
        if next(tensors, None) is not None:
            raise AssertionError("the source gave more tensors than the recipe has")
    return {
        "bytes": sum(part.bytes for part in parts),
        "tensor_bytes": recipe.tensor_bytes,
        "bpw": recipe.bpw,
        "sha256": whole.hexdigest(),
        "verified": True,
    }


def files(checkpoint: Checkpoint, recipe: Recipe, path: str | Path, shard_bytes: int | None = None) -> list[Path]:
    """The files that `export` writes, in order: `path` alone, or its shards."""
    parts = _shares(checkpoint, _carried_out(checkpoint, recipe), shard_bytes)
    return [Path(path)] if len(parts) == 1 else [shards.shard(Path(path), i, len(parts)) for i in range(len(parts))]


@dataclass(frozen=True)
class _Part:
    """A file to write: all of the model, or one shard of it. bytes: of header and data."""

    path: Path
    formats: dict[str, str]
    metadata: dict[str, Any]
    header: bytes
    bytes: int


def _parts(
    checkpoint: Checkpoint, recipe: Recipe, path: Path, shard_bytes: int | None, metadata: dict[str, Any]
) -> list[_Part]:
    shares = _shares(checkpoint, recipe, shard_bytes)
    found = []
    for i, (file, names) in enumerate(zip(files(checkpoint, recipe, path, shard_bytes), shares, strict=True)):
        own = metadata if i == 0 else {}
        if len(shares) > 1:
            own = own | shards.keys(i, len(shares), len(recipe.formats))
        chosen = {name: recipe.formats[name] for name in names}
        header = _header(checkpoint, chosen, own)
        size = sum(_padded(formats.tensor_bytes(fmt, checkpoint.tensors[n].shape)) for n, fmt in chosen.items())
        found.append(_Part(file, chosen, own, header, len(header) + size))
    return found


def _shares(checkpoint: Checkpoint, recipe: Recipe, shard_bytes: int | None) -> list[list[str]]:
    """The tensors of each file. They depend on nothing but shapes, the recipe and the source's metadata."""
    if shard_bytes is None:
        return [list(recipe.formats)]
    shapes = {name: checkpoint.tensors[name].shape for name in recipe.formats}
    sizes = {name: _padded(formats.tensor_bytes(fmt, shapes[name])) for name, fmt in recipe.formats.items()}
    entries = {name: len(name.encode()) + 8 * len(shape) + 24 for name, shape in shapes.items()}
    draft = replace(recipe, tensor_bytes=1 << 62, bpw=_LONGEST, predicted_kld=_LONGEST)
    header = len(_header(checkpoint, recipe.formats, _metadata(checkpoint, draft, None, ""))) + _ROOM
    return shards.partition(sizes, shard_bytes, first=header, more=entries)


def apply(
    described: Described,
    checkpoint: Checkpoint,
    importance: Importance | None,
    path: str | Path,
    *,
    imatrix_file: str = "",
    level: str = "plain",
    threads: int | None = None,
    shard_bytes: int | None = None,
) -> dict[str, Any]:
    """`export` by a recipe that was made elsewhere: a file of dynq, or what the header of any GGUF says.

    Its predicted KLD was for another encoding and is left out. Shapes may differ: a recipe fits a model with the same
    tensors, wider or with more tokens. Returns what `export` does, `files`: the names of what was written,
    `fallbacks`: tensor name -> [format of the recipe, format written], of quantizable tensors whose rows do not divide
    into blocks, and `other_shapes`: tensors that have another shape in the GGUF that the recipe was read from.

    Raises:
        DynqError: before anything is written, where the names of the tensors do not match, dynq does not write a
            format, or one needs an importance matrix that is not given or lacks the tensor.
    """
    wanted, tensors = described.recipe.formats, checkpoint.tensors
    chosen = _formats(checkpoint, wanted)
    _check_importance(checkpoint, chosen, importance)
    recipe = replace(
        described.recipe,
        predicted_kld=None,
        provenance={"recipe": described.path.name, "recipe_provenance": described.recipe.provenance},
    )
    made = export(
        checkpoint,
        recipe,
        importance,
        path,
        imatrix_file=imatrix_file,
        level=level,
        threads=threads,
        shard_bytes=shard_bytes,
    )
    made["files"] = [file.name for file in files(checkpoint, recipe, path, shard_bytes)]
    fallbacks = {n: [wanted[n], f] for n, f in chosen.items() if tensors[n].quantizable and f != wanted[n]}
    other = other_shapes(described, {name: info.shape for name, info in tensors.items()})
    return made | {"fallbacks": fallbacks, "other_shapes": other}


def simulate(
    checkpoint: Checkpoint,
    recipe_formats: dict[str, str],
    importance: Importance | None,
    *,
    level: str = "plain",
    threads: int | None = None,
) -> Callable[[str], np.ndarray]:
    """What gives a tensor, by its name, as a reader of the exported file would see it: float32 in GGUF's layout.

    It encodes the same bytes as `export` and decodes them, in memory, each time that it is asked.
    """
    chosen = _formats(checkpoint, recipe_formats)
    _check_importance(checkpoint, chosen, importance)

    def read(name: str) -> np.ndarray:
        data = quantize_tensor(checkpoint, name, chosen[name], importance, level, threads)
        return codec.dequantize(data, chosen[name], threads=threads).reshape(checkpoint.tensors[name].shape)

    return read


def _check_importance(checkpoint: Checkpoint, chosen: dict[str, str], importance: Importance | None) -> None:
    """DynqError, before anything is written, where a format needs importance and there is none for its tensor."""
    for name, fmt in chosen.items():
        bare = importance is None or importance.mean(name, checkpoint.tensors[name].row) is None
        if formats.get(fmt).needs_importance and bare:
            lacks = "give one with --imatrix" if importance is None else "the one given has nothing for this tensor"
            raise DynqError(f"{name}: {fmt} needs an importance matrix; {lacks}")


def header_bytes(
    checkpoint: Checkpoint,
    recipe: Recipe | None = None,
    importance: Importance | None = None,
    imatrix_file: str = "",
) -> int:
    """Bytes of an exported file beside its tensors' data (header, metadata, padding), whatever formats it gets.

    An upper bound: for a target such as "8GB". `recipe` gives the target and the provenance that will be written;
    its formats and figures do not matter. Without one, 4 KiB are kept for them and for the names of the texts.
    """
    draft = recipe or Recipe({}, "", 0, 0.0, None)
    draft = replace(
        draft,
        formats=dict.fromkeys(checkpoint.tensors, _LONGEST_NAME),
        tensor_bytes=1 << 62,
        bpw=_LONGEST,
        predicted_kld=_LONGEST,
    )
    metadata = _metadata(checkpoint, draft, importance, imatrix_file)
    header = len(_header(checkpoint, dict.fromkeys(checkpoint.tensors, "F32"), metadata))
    padding = sum(
        max(_padded(size) - size for fmt in formats.FORMATS if (size := _size(fmt, info.shape)))
        for info in checkpoint.tensors.values()
    )
    return header + padding + (_ROOM if recipe is None else 0)


def _size(fmt: str, shape: tuple[int, ...]) -> int:
    """Bytes of a tensor, 0 if its rows do not divide into the format's blocks."""
    return 0 if shape[-1] % formats.get(fmt).block else formats.tensor_bytes(fmt, shape)


def _formats(checkpoint: Checkpoint, wanted: dict[str, str]) -> dict[str, str]:
    """The formats that the file will have, in file order. DynqError if the recipe is for another model."""
    if missing := [name for name in checkpoint.tensors if name not in wanted]:
        raise DynqError(f"the recipe has no format for {missing[0]} ({len(missing)} tensors): it is for another model")
    if unknown := [name for name in wanted if name not in checkpoint.tensors]:
        raise DynqError(
            f"the recipe names {unknown[0]}, which {checkpoint.name} does not have: it is for another model"
        )
    return {
        name: formats.usable(wanted[name], info.row) if info.quantizable else info.kept
        for name, info in checkpoint.tensors.items()
    }


def _carried_out(checkpoint: Checkpoint, recipe: Recipe) -> Recipe:
    """The recipe with the formats that are written, and their bytes."""
    chosen = _formats(checkpoint, recipe.formats)
    size = sum(formats.tensor_bytes(fmt, checkpoint.tensors[name].shape) for name, fmt in chosen.items())
    return replace(recipe, formats=chosen, tensor_bytes=size, bpw=8 * size / checkpoint.n_weights)


def _metadata(
    checkpoint: Checkpoint, recipe: Recipe, importance: Importance | None, imatrix_file: str
) -> dict[str, Any]:
    """Every key of the file: the model's own, llama.cpp's about quantization, and dynq's."""
    weights: Counter[str] = Counter()
    for name, fmt in recipe.formats.items():
        weights[fmt] += checkpoint.tensors[name].n_weights
    keys = dict(checkpoint.metadata)
    keys["general.quantization_version"] = gguf.GGML_QUANT_VERSION
    keys["general.file_type"] = _file_type(weights.most_common(1)[0][0])
    if importance is not None:
        keys["quantize.imatrix.file"] = imatrix_file
        keys["quantize.imatrix.dataset"] = ", ".join(importance.datasets)
        keys["quantize.imatrix.entries_count"] = len(importance.sums)
        keys["quantize.imatrix.chunks_count"] = importance.chunk_count
    keys["dynq.version"] = __version__
    keys[KEY] = recipe.to_json()
    # GGUF's writer drops empty values
    return {key: value for key, value in keys.items() if key in checkpoint.packed or value not in ("", [])}


def _file_type(fmt: str) -> int:
    """llama.cpp's number for the mix that is named after a format (Q4_K: Q4_K_M, MXFP4: MXFP4_MOE)."""
    names = gguf.LlamaFileType.__members__
    near = (f"MOSTLY_{fmt}", f"MOSTLY_{fmt}_M", f"MOSTLY_{fmt}_MOE", "ALL_F32")
    return int(next(names[name] for name in near if name in names))


def _header(checkpoint: Checkpoint, chosen: dict[str, str], metadata: dict[str, Any]) -> bytes:
    """A file up to the first tensor's data. Keys that stand in the source are written as they stand there."""
    buffer = io.BytesIO()
    writer = gguf.GGUFWriter(None, checkpoint.architecture.name)
    writer.kv_data[0].clear()
    packed = b"".join(checkpoint.packed[key] for key in metadata if key in checkpoint.packed)
    for key, value in metadata.items():
        if key not in checkpoint.packed:
            writer.add_key_value(key, value, _value_type(value))
    for name, fmt in chosen.items():
        shape = checkpoint.tensors[name].shape
        row = (*shape[:-1], formats.row_bytes(fmt, shape[-1]))  # gguf derives the shape from that of the bytes
        kind = gguf.GGMLQuantizationType[fmt]
        writer.add_tensor_info(name, row, np.dtype(np.uint8), formats.tensor_bytes(fmt, shape), kind)
    writer.fout, writer.state = [buffer], WriterState.EMPTY  # type: ignore[list-item]
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    written = buffer.getvalue()
    # magic, version, number of tensors; number of keys; keys
    header = written[:16] + struct.pack("<Q", len(metadata)) + packed + written[24:]
    return header.ljust(_padded(len(header)), b"\0")


def _value_type(value: Any) -> gguf.GGUFValueType:
    """NumPy's numbers keep theirs; else what llama.cpp expects: whole numbers are uint32, fractions float32."""
    if isinstance(value, np.generic):
        return gguf.GGUFValueType[value.dtype.name.upper()]
    if isinstance(value, bool):
        return gguf.GGUFValueType.BOOL
    if isinstance(value, int):
        if value < 0:
            return gguf.GGUFValueType.INT32 if value >= -(1 << 31) else gguf.GGUFValueType.INT64
        return gguf.GGUFValueType.UINT32 if value < 1 << 32 else gguf.GGUFValueType.UINT64
    if isinstance(value, float):
        return gguf.GGUFValueType.FLOAT32
    return gguf.GGUFValueType.STRING if isinstance(value, str) else gguf.GGUFValueType.ARRAY


def _padded(size: int) -> int:
    return gguf.GGUFWriter.ggml_pad(size, _ALIGNMENT)


def _check_room(path: Path, needed: int) -> None:
    free = shutil.disk_usage(path.parent).free if path.parent.is_dir() else needed
    if free < needed:
        raise DynqError(f"{path}: the disk has {free:,} bytes left, the file needs {needed:,}")


def _verify(path: Path, checkpoint: Checkpoint, part: _Part, digests: dict[str, str]) -> None:
    """Read the file with gguf's reader and compare it with what was meant. A difference is a fault of the machine."""
    reader = Reader(path)
    found = {tensor.name: tensor for tensor in reader.tensors}
    wrong = [] if list(found) == list(part.formats) else ["the list of tensors"]
    for name, tensor in progress(found.items(), total=len(found), desc="verify", unit="tensor", leave=False):
        shape = tuple(int(n) for n in tensor.shape[::-1])
        if (tensor.tensor_type.name, shape) != (part.formats.get(name), checkpoint.tensors[name].shape):
            wrong.append(f"{name}'s type or shape")
        elif hashlib.sha256(np.ascontiguousarray(tensor.data).data).hexdigest() != digests[name]:
            wrong.append(f"{name}'s data")
    packed = reader.packed()
    for key, value in part.metadata.items():
        field = reader.fields.get(key)
        if key in checkpoint.packed:
            same = packed.get(key) == checkpoint.packed[key]
        else:
            same = field is not None and _same(field.contents(), value)
        if not same:
            wrong.append(f"the key {key}")
    if wrong:
        raise DynqError(f"{path}: read back, {wrong[0]} is not what was written ({len(wrong)} faults): check the disk")


def _same(found: Any, meant: Any) -> bool:
    """Equality after GGUF's rounding of fractions to float32."""
    if isinstance(meant, float) or (isinstance(meant, list) and isinstance(meant[0], float)):
        return np.array_equal(np.asarray(found, np.float32), np.asarray(meant, np.float32))
    return bool(found == meant)
