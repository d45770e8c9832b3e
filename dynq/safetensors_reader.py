"""Tensors of a Hugging Face directory, by GGUF name: found in safetensors files, decoded, brought into GGUF's layout.

Besides plain numbers two packings are read, in which large models are published: float8 with a scale for each tile of
128 x 128 weights (DeepSeek V3: `weight`, `weight_scale_inv`), and MXFP4 (gpt-oss: `_blocks`, `_scales`).

A tensor is read piece by piece on all cores: a thread reads a piece of the file, and a kernel decodes it and sees
whether it is finite while it is in the core's cache. In memory is the result alone.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass, replace
from math import prod
from pathlib import Path
from typing import Any, Protocol

import numpy as np

from dynq.architectures import Architecture
from dynq.architectures.slot import Slot
from dynq.errors import DynqError
from dynq.files import is_plain, load_json, parse_json, taking_apart

_TOWER = re.compile(r"(^|\.)(vision|visual|audio|multi_modal|mm_|embed_vision|embed_audio)")
_TYPES = {"F64": "<f8", "F32": "<f4", "F16": "<f2", "BF16": "<u2", "F8_E4M3": "u1", "U8": "u1"}
_LONGEST_HEADER = 1 << 25  # bytes; a hundred thousand tensors take 15 MB
_PIECE = 1 << 20  # weights that a thread reads at once
_FLOATS = ("F64", "F32", "F16", "BF16")
_TILE = (128, 128)  # of float8 weights, where config.json does not say
_INFINITY = 0x7F800000  # its bits, and least of those of what is not finite


class _Readable(Protocol):
    """A parameter in a checkpoint: where it comes from (for messages), its shape and stored type.

    load: its values as float32, in `out` where that is given, and whether they are all finite.
    one: of a stack the i-th matrix, as a stack of one.
    """

    @property
    def where(self) -> str: ...
    @property
    def shape(self) -> tuple[int, ...]: ...
    @property
    def dtype(self) -> str: ...
    def load(self, out: np.ndarray | None = None) -> tuple[np.ndarray, bool]: ...
    def one(self, i: int) -> _Readable: ...


@dataclass(frozen=True)
class _Stored:
    """Where a tensor lies in a safetensors file."""

    path: Path
    name: str
    dtype: str
    shape: tuple[int, ...]
    offset: int

    @property
    def where(self) -> str:
        return f"{self.path}: tensor {self.name}"

    @property
    def n_bytes(self) -> int:
        return prod(self.shape) * np.dtype(_TYPES[self.dtype]).itemsize

    def one(self, i: int) -> _Stored:
        return replace(self, shape=(1, *self.shape[1:]), offset=self.offset + i * (self.n_bytes // self.shape[0]))

    def raw(self, part: slice, out: np.ndarray | None = None) -> np.ndarray:
        """What is stored of a run of entries, in C order; in `out` where that is given."""
        dtype = np.dtype(_TYPES[self.dtype])
        out = np.empty(part.stop - part.start, dtype) if out is None else out
        with self.path.open("rb") as file:
            file.seek(self.offset + part.start * dtype.itemsize)
            if file.readinto(out.view(np.uint8).data) < out.nbytes:
                raise DynqError(f"{self.where}: the file ends before it does; fetch the file again")
        return out

    def load(self, out: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
        from dynq.kernels import floats, packed

        out = np.empty(self.shape, np.float32) if out is None else out
        flat = out.reshape(-1)
        bits, one = flat.view(np.uint32), np.ones((1, 1), np.float32)

        def decode(part: slice) -> int:
            raw = self.raw(part, flat[part] if self.dtype == "F32" else None)
            if self.dtype == "BF16":
                return floats.decode_bf16(raw, bits[part])
            if self.dtype == "F16":
                return floats.decode_f16(raw.view(np.uint16), flat[part])
            if self.dtype == "F8_E4M3":
                return packed.decode_e4m3(raw[None], one, np.zeros(1, np.int64), len(raw), flat[None, part])
            if self.dtype != "F32":
                flat[part] = raw
            return floats.largest_bits(bits[part])

        return out, _filled(flat.size, 1, decode)


def _filled(rows: int, n: int, decode: Callable[[slice], int]) -> bool:
    """Whether all weights are finite, when `decode` has filled all runs of rows of n weights: of each it tells the bits
    of the largest magnitude."""
    from dynq import codec  # brings Numba; headers are read without it

    largest: list[int] = []
    codec.spread(lambda part: largest.append(decode(part)), rows, max(1, _PIECE // n), None)
    return max(largest) < _INFINITY


@dataclass(frozen=True)
class _Scaled:
    """A float8 matrix, or a stack of them, and the factor of each of its tiles: those at the edges may be smaller."""

    codes: _Stored
    scales: _Stored
    tile: tuple[int, ...]

    dtype = "F8_E4M3"

    def __post_init__(self) -> None:
        if len(self.tile) != 2 or not all(type(side) is int and side > 0 for side in self.tile):
            raise DynqError(f"{self.where}: config.json says tiles of {list(self.tile)}; fetch it again")
        if self.codes.dtype != self.dtype or self.scales.dtype not in _FLOATS:
            types = f"{self.codes.dtype} with scales in {self.scales.dtype}"
            raise DynqError(f"{self.where} is in {types}, which is not read; F8_E4M3 with scales in F32 or BF16 is")
        if len(self.shape) < 2:
            raise DynqError(f"{self.where} has shape {list(self.shape)}: only matrices have tiles with scales")
        *stack, rows, columns = self.shape
        tiles = (*stack, -(-rows // self.tile[0]), -(-columns // self.tile[1]))
        _check_shape(self.scales, tiles, f"{self.codes.name} {list(self.shape)} in tiles of {list(self.tile)}")

    @property
    def where(self) -> str:
        return self.codes.where

    @property
    def shape(self) -> tuple[int, ...]:
        return self.codes.shape

    def one(self, i: int) -> _Scaled:
        return _Scaled(self.codes.one(i), self.scales.one(i), self.tile)

    def load(self, out: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
        from dynq.kernels import packed

        out = np.empty(self.shape, np.float32) if out is None else out
        scales, _ = self.scales.load()
        *_, rows, n = self.shape
        flat, tiles, row = out.reshape(-1, n), scales.reshape(-1, scales.shape[-1]), np.arange(out.size // n)
        tile_rows = row // rows * scales.shape[-2] + row % rows // self.tile[0]

        def decode(part: slice) -> int:
            codes = self.codes.raw(slice(part.start * n, part.stop * n)).reshape(-1, n)
            return packed.decode_e4m3(codes, tiles, tile_rows[part], min(n, self.tile[1]), flat[part])

        return out, _filled(len(flat), n, decode)


@dataclass(frozen=True)
class _Mxfp4:
    """Experts in MXFP4: blocks uint8 [expert, out, in / 32, 16], scales uint8 [expert, out, in / 32].

    Scales are powers of two (bias 127, all ones is NaN). A byte of a block holds two neighbours, the first in its lower
    half. The parameter is [expert, in, out].
    """

    blocks: _Stored
    scales: _Stored

    dtype = "MXFP4"

    def __post_init__(self) -> None:
        _check_shape(self.blocks, (*self.blocks.shape[:3], 16), "MXFP4")
        _check_shape(self.scales, self.blocks.shape[:3], f"{self.blocks.name} {list(self.blocks.shape)}")
        for item in (self.blocks, self.scales):
            if item.dtype != "U8":
                raise DynqError(f"{item.where} is in {item.dtype}, MXFP4 wants U8")

    @property
    def where(self) -> str:
        return self.blocks.where

    @property
    def shape(self) -> tuple[int, ...]:
        experts, out, groups, half = self.blocks.shape
        return experts, groups * half * 2, out

    def one(self, i: int) -> _Mxfp4:
        return _Mxfp4(self.blocks.one(i), self.scales.one(i))

    def load(self, out: np.ndarray | None = None) -> tuple[np.ndarray, bool]:
        from dynq.kernels import packed

        experts, n, groups, _ = self.blocks.shape
        values = np.empty((experts, n, 32 * groups), np.float32)
        flat, both = values.reshape(-1, 32), values.reshape(-1, 32).view(np.uint64)

        def decode(part: slice) -> int:
            codes = self.blocks.raw(slice(16 * part.start, 16 * part.stop)).reshape(-1, 16)
            tables = packed.pairs(), packed.powers()
            return packed.decode_pairs(codes, self.scales.raw(part), *tables, both[part], flat[part])

        finite = _filled(len(flat), 32, decode)
        values = values.swapaxes(1, 2)
        if out is not None:
            out[...] = values
        return values, finite


def _check_shape(item: _Readable, wanted: tuple[int, ...], why: str) -> None:
    if item.shape != wanted:
        raise DynqError(f"{item.where} has shape {list(item.shape)}, {why} wants {list(wanted)}; fetch it again")


def files(path: Path) -> list[Path]:
    """The safetensors files of a directory, each known to exist."""
    index = path / "model.safetensors.index.json"
    if not index.exists():
        if (single := path / "model.safetensors").exists():
            return [single]
        if (path / "adapter_config.json").exists():
            raise DynqError(
                f"{path}: a LoRA adapter, not a model; merge it into its base model first (peft: merge_and_unload, "
                "save_pretrained) and give that directory"
            )
        for found in sorted(path.iterdir()):
            check_no_pickle(found)
        raise DynqError(f"{path}: no model.safetensors and no {index.name}; only safetensors weights are read")
    with taking_apart(index):
        names = sorted(set(load_json(index, "no index").get("weight_map", {}).values()))
        for name in names:
            if not is_plain(name) or not name.endswith(".safetensors"):
                raise DynqError(f"{index}: {name!r} is no name of a safetensors file beside it; fetch it again")
    for name in names:
        if not (path / name).is_file():
            raise DynqError(f"{path / name}: this shard is missing, though {index.name} names it; fetch it again")
    return [path / name for name in names]


def check_no_pickle(path: Path) -> None:
    """DynqError for weights in PyTorch's format: to open them runs the code that they hold."""
    if path.suffix.lower() in (".bin", ".pt", ".pth", ".ckpt", ".pkl"):
        raise DynqError(
            f"{path}: weights in PyTorch's pickle format are never loaded, they can hold code; convert them to "
            "safetensors (transformers: save_pretrained) or to GGUF"
        )


def _header(path: Path) -> list[_Stored]:
    """The tensors of one safetensors file. DynqError where the file contradicts itself, or ends before its data does.

    Layout: the header's length as a little-endian uint64, the header as JSON, the data.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if size < 8 or length > size - 8:
            raise DynqError(f"{path}: truncated or not a safetensors file ({size:,} bytes); fetch it again")
        if length > _LONGEST_HEADER:
            raise DynqError(f"{path}: a header of {length:,} bytes, more than any model has; fetch it again")
        header = parse_json(file.read(length), path, unique=True)
    with taking_apart(path):
        header.pop("__metadata__", None)
        found = [_stored(path, name, entry, 8 + length) for name, entry in header.items()]
    free, before = 0, ""
    for item in sorted(found, key=lambda item: item.offset):
        if item.offset < free:
            raise DynqError(f"{path}: the tensors {before} and {item.name} overlap; fetch it again")
        free, before = item.offset + item.n_bytes, item.name
    if size < free:
        raise DynqError(f"{path}: truncated, {size:,} bytes of {free:,}; fetch it again")
    return found


def _stored(path: Path, name: str, entry: dict[str, Any], start: int) -> _Stored:
    dtype, shape, (begin, end) = entry["dtype"], entry["shape"], entry["data_offsets"]
    if dtype not in _TYPES:
        raise DynqError(f"{path}: tensor {name} has type {dtype}, which is not read; known are {', '.join(_TYPES)}")
    if not all(type(n) is int and n >= 0 for n in (*shape, begin, end)):
        raise DynqError(f"{path}: tensor {name} has the shape {shape} at {[begin, end]}; fetch it again")
    stored = _Stored(path, name, dtype, tuple(shape), start + begin)
    if stored.n_bytes != end - begin:
        raise DynqError(
            f"{path}: tensor {name} has {end - begin:,} bytes, its shape wants {stored.n_bytes:,}; fetch it again"
        )
    return stored


def _unpacked(found: dict[str, _Stored], quantization: dict[str, Any] | None, path: Path) -> dict[str, _Readable]:
    """Parameters by name: packed ones put together from their pieces."""
    method = (quantization or {}).get("quant_method")
    if method not in (None, "fp8", "mxfp4"):
        raise DynqError(
            f"{path}: quantized already ({method}), and quantizing again loses more; give the 16-bit original"
        )
    readable: dict[str, _Readable] = {**found}
    for name, item in found.items():
        if name.endswith("_scale_inv") and (base := name.removesuffix("_scale_inv")) in found:
            with taking_apart(path / "config.json"):
                tile = tuple((quantization or {}).get("weight_block_size") or _TILE)
            readable[base] = _Scaled(found[base], item, tile)
            del readable[name]
        elif name.endswith("_scales") and (blocks := name.removesuffix("_scales") + "_blocks") in found:
            readable[name.removesuffix("_scales")] = _Mxfp4(found[blocks], item)
            del readable[name], readable[blocks]
    for rest in readable.values():
        if isinstance(rest, _Stored) and (rest.dtype == "U8" or (rest.dtype == "F8_E4M3" and method == "fp8")):
            scales = "its scales or its blocks are" if rest.dtype == "U8" else f"{rest.name}_scale_inv is"
            raise DynqError(f"{rest.where} is packed ({rest.dtype}), but {scales} missing; fetch the model again")
    return readable


class Directory:
    """The tensors that the safetensors files of a directory hold, by GGUF name.

    shapes, dtypes: GGUF name -> shape in NumPy order, stored type; only tensors that are there. What no GGUF of a text
    model has a place for is left out; towers: how many tensors of that are for images and sound.

    DynqError: a file is damaged, a tensor has a type that is not read or no place in the architecture.
    """

    def __init__(self, architecture: Architecture, path: Path, shards: Iterable[Path]):
        self._slots = architecture.slots
        found: dict[str, _Stored] = {}
        self.towers = 0
        for shard in shards:
            for item in _header(shard):
                name = architecture.transformers_name(item.name)
                if name is None:
                    self.towers += bool(_TOWER.search(item.name))
                    continue
                if name in found:
                    raise DynqError(f"{item.where} is there twice, also as {found[name].where}; fetch the model again")
                if 0 in item.shape:
                    raise DynqError(f"{item.where} is empty; fetch the model again")
                found[name] = item
        self._found = _unpacked(found, architecture.config.get("quantization_config"), path)
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.dtypes: dict[str, str] = {}
        used: set[str] = set()
        for name, slot in self._slots.items():
            names = self._names(slot)
            used.update(names)
            if name == "output.weight" and architecture.config.get("tie_word_embeddings"):
                continue  # some checkpoints store the tied head twice
            if all(part in self._found for part in names):
                first = self._found[names[0]]
                whole = slot.parameter in self._found
                self.shapes[name] = slot.shape(first.shape) if whole else (len(names), *first.shape)
                self.dtypes[name] = first.dtype
        if strange := [name for name in self._found if name not in used]:
            where = self._found[strange[0]].where
            raise DynqError(f"{where} has no place in the architecture {architecture.name}")

    def _names(self, slot: Slot) -> list[str]:
        """What a checkpoint holds for a slot: the whole parameter, or the matrices that are stacked to it."""
        if not slot.stored or slot.parameter in self._found:
            return [slot.parameter]
        return [slot.stored.format(i) for i in range(slot.parts)]

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, in GGUF's layout. DynqError if it holds NaN or infinity."""
        slot = self._slots[name]
        if slot.parameter in self._found:
            return slot.take(_finite(self._found[slot.parameter], name))
        out = np.empty(self.shapes[name], np.float32)
        for i, part in enumerate(self._names(slot)):
            _check_shape(self._found[part], out.shape[1:], f"the stack {name}")
            _finite(self._found[part], name, out[i])
        return out

    def matrices(self, name: str) -> Iterator[np.ndarray]:
        """The matrices of a stack, as `read` gives them all, one after the other."""
        slot = self._slots[name]
        whole = self._found.get(slot.parameter)
        if whole is None:
            for part in self._names(slot):
                _check_shape(self._found[part], self.shapes[name][1:], f"the stack {name}")
                yield _finite(self._found[part], name)
        elif len(whole.shape) < 3:  # a stack in GGUF alone, as the heads of DeepSeek's kv_b are
            yield from self.read(name)
        else:
            for i in range(whole.shape[0]):
                yield slot.take(_finite(whole.one(i), name))[0]


def _finite(item: _Readable, name: str, out: np.ndarray | None = None) -> np.ndarray:
    """Values of what is stored for a GGUF tensor, in `out` if given. DynqError if it holds NaN or infinity."""
    array, finite = item.load(out)
    if not finite:
        check_finite(array, f"{item.where} ({name})")
    return array


def check_finite(array: np.ndarray, where: str) -> None:
    """DynqError, naming the place and how many, if an array holds NaN or infinity."""
    if np.isfinite(array).all():
        return
    position = tuple(int(i) for i in np.unravel_index(int(np.argmin(np.isfinite(array))), array.shape))
    bad = int(array.size - np.isfinite(array).sum())
    raise DynqError(
        f"{where} holds {array[position]} at {list(position)} ({bad:,} such values): "
        "the checkpoint is damaged, fetch it again"
    )
