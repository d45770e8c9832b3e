"""A model as GGUF sees it: names, layout and metadata of GGUF, one tensor in memory at a time."""

from __future__ import annotations

import hashlib
import math
import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cached_property, lru_cache
from pathlib import Path
from typing import Any

import gguf
import numpy as np

from dynq import architectures, formats, remote, safetensors_reader, shards, tokenizer
from dynq.architectures import Architecture
from dynq.errors import DynqError
from dynq.files import load_json, parse_yaml, read_bytes, sha256, taking_apart
from dynq.gguf_reader import Reader
from dynq.progress import progress

EMBEDDED = "dynq-tiny"
"""The name of the model inside the package."""

# a model card's bytes; characters, and brackets within brackets, of the YAML at its top
_LARGEST_CARD = 1 << 22
_PAGES, _PAGE = 64, 4096  # read of each file to tell it from another
_PLAIN_TYPES = {"F32", "F16", "BF16"}  # GGUF types that are not quantized
# Keys that the exporter writes anew, or that speak of a file that is being replaced.
_NOT_CARRIED = re.compile(r"^(GGUF\.|general\.(file_type|quantization_version|alignment)$|quantize\.|dynq\.|split\.)")
# llama.cpp's list (tensor_allows_quantization in src/llama-quant.cpp), less what only projectors have
_NOT_QUANTIZED = (
    *("_norm.weight", "ffn_gate_inp.weight", "ffn_gate_tid2eid.weight", "altup", "laurel", "per_layer_model_proj"),
    *("ssm_conv1d", "shortconv.conv.weight", "attn_rel_b.weight", "indexer.k_proj.weight", "indexer.q_proj.weight"),
    *("time_mix_first.weight", "time_mix_decay_w1.weight", "time_mix_decay_w2.weight", "time_mix_lerp_fused.weight"),
    *(f"time_mix_{part}.weight" for part in ("w0", "w1", "w2", "v0", "v1", "v2", "a0", "a1", "a2", "g1", "g2")),
)


def layer_of(name: str) -> int | None:
    """The layer of a tensor, by its GGUF name."""
    match = re.match(r"blk\.(\d+)\.", name)
    return int(match[1]) if match else None


@dataclass(frozen=True)
class TensorInfo:
    """One tensor of a model: GGUF name, shape in NumPy order (row length last), stored type ("BF16").

    kept: what it is written as if it is not quantized.
    """

    name: str
    shape: tuple[int, ...]
    dtype: str
    kept: str = "F32"

    @property
    def n_weights(self) -> int:
        return int(np.prod(self.shape, dtype=np.int64))

    @property
    def row(self) -> int:
        """Weights in a row: the direction in which blocks run."""
        return self.shape[-1]

    @property
    def stacked(self) -> bool:
        """Whether it holds matrices of one shape, [matrices, rows, row]: a stack of experts, or of heads."""
        return len(self.shape) == 3

    @property
    def n_matrices(self) -> int:
        return self.shape[0] if self.stacked else 1

    @property
    def layer(self) -> int | None:
        return layer_of(self.name)

    @property
    def kind(self) -> str:
        """The name without layer and ".weight": "attn_q", "token_embd", "attn_q.bias"."""
        return re.sub(r"^blk\.\d+\.", "", self.name).removesuffix(".weight")

    @property
    def quantizable(self) -> bool:
        """llama.cpp's rule (tensor_allows_quantization): matrices named `.weight`, no norm, router or convolution.

        A single row is a vector for ggml, which does not count dimensions of one at the end. Gemma 4's
        per_layer_model_proj, which llama-quantize leaves as it is, is quantized like any other layer.
        """
        if self.n_weights == self.row or not self.name.endswith(".weight"):
            return False
        if self.name in ("position_embd.weight", "token_types.weight"):
            return False
        return not any(part in self.name for part in _NOT_QUANTIZED)


class Checkpoint:
    """An opened model. See `open_checkpoint`.

    Attributes:
        name, path: the model's name and the directory or file it came from.
        url: where those were copied from, "" if they were not.
        architecture, config: names and layouts of the family; transformers' config as a dict.
        metadata: every key that an exported GGUF carries, tokenizer included, without the exporter's own.
        tensors: GGUF name -> TensorInfo, in file order.
        files: what makes up the model; the shards of a split GGUF in order, the first of which is `path`.
        notes: what a user should know of how the model is treated, a sentence each.
        packed: of a GGUF, those keys of `metadata` as the bytes that the file has for them, name and type included.
        tied: whether the output uses the embedding's weights.
        requantized: whether the source is itself quantized.
    """

    def __init__(
        self,
        name: str,
        path: Path,
        architecture: Architecture,
        metadata: dict[str, Any],
        tensors: dict[str, TensorInfo],
        read: Callable[[str], np.ndarray],
        files: list[Path],
        requantized: bool = False,
        packed: dict[str, bytes] | None = None,
        notes: list[str] | None = None,
        matrices: Callable[[str], Iterator[np.ndarray]] | None = None,
    ) -> None:
        self.name = name
        self.path = path
        self.url = ""
        self.architecture = architecture
        self.config = architecture.config
        self.metadata = metadata
        self.tensors = tensors
        self.tied = "output.weight" not in tensors
        self.requantized = requantized
        self.files = files
        self.packed = packed or {}
        self.notes = notes or []
        self._read, self._matrices = read, matrices
        self._stamps = [_stamp(file) for file in files]

    @property
    def n_weights(self) -> int:
        return sum(info.n_weights for info in self.tensors.values())

    def read(self, name: str) -> np.ndarray:
        """One tensor, float32, C-contiguous, in GGUF's layout.

        DynqError if it holds NaN or infinity, or if a file has changed since the model was opened.
        """
        if name not in self.tensors:
            raise DynqError(f"{self.path}: there is no tensor {name}")
        try:
            with taking_apart(f"{self.path}: tensor {name}"):
                return np.ascontiguousarray(self._read(name), dtype=np.float32)
        finally:
            self.check_unchanged()

    def check_unchanged(self) -> None:
        """DynqError, naming it, where a file is not the one that was opened.

        By size, time and inode, which costs nothing; contents are hashed once each time that a model is opened.
        """
        for file, stamp in zip(self.files, self._stamps, strict=True):
            if _stamp(file) != stamp:
                raise DynqError(
                    f"{file}: has changed while it was worked on; nothing that was made of it counts: "
                    "let it be complete, then run the same command again"
                )

    def matrices(self, name: str) -> Iterator[np.ndarray]:
        """The matrices of a tensor, as `read` gives them: of a stack of experts one after the other, else itself."""
        info = self.tensors[name]
        if not info.stacked:
            yield self.read(name)
        elif self._matrices is None:
            yield from self.read(name)
        else:
            found = self._matrices(name)
            for i in range(info.n_matrices):
                try:
                    with taking_apart(f"{self.path}: tensor {name}, matrix {i}"):
                        matrix = np.ascontiguousarray(next(found), dtype=np.float32)
                finally:
                    self.check_unchanged()
                yield matrix

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the names and contents of the files that make up the model."""
        whole = hashlib.sha256()
        with progress(total=sum(p.stat().st_size for p in self.files), desc="hash", unit="B", leave=False) as bar:
            for path in self.files:
                digest = sha256(path, bar.update)
                # A single file's name is its owner's choice; inside a directory names have a meaning.
                label = path.name if len(self.files) > 1 else ""
                whole.update(f"{label}\0{digest}\n".encode())
        self.check_unchanged()
        return whole.hexdigest()

    @cached_property
    def _stamp(self) -> str:
        """A hash of the files' sizes and of pages here and there: another model at the same path has another."""
        digest = hashlib.sha256()
        for path in self.files:
            size = path.stat().st_size
            digest.update(f"{size}\0".encode())
            with path.open("rb") as file:
                for i in range(_PAGES):
                    file.seek(size * i // _PAGES)
                    digest.update(file.read(_PAGE))
        return digest.hexdigest()

    def __reduce__(self) -> tuple[Callable[..., Checkpoint], tuple[str, bool, str]]:
        """It travels as its path or URL, see `dynq.cluster`: the process that it comes to opens the same there."""
        embedded = self.path == Path(__file__).parent / "data" / EMBEDDED
        model = EMBEDDED if embedded else self.url or str(self.path.resolve())
        return _opened_elsewhere, (model, self.requantized, self._stamp)


@lru_cache(maxsize=2)  # the original and a file of it
def _opened_elsewhere(model: str, requantized: bool, stamp: str) -> Checkpoint:
    checkpoint = open_checkpoint(model, requantized)
    if checkpoint._stamp != stamp:
        raise DynqError(f"{model}: not the model that the run reads; put the same files there")
    return checkpoint


def _stamp(file: Path) -> tuple[int, ...]:
    """What tells that a file was written to or replaced; nothing of one that is gone. Only compared, never ordered."""
    try:
        found = file.stat()
    except OSError:
        return ()
    return found.st_size, found.st_mtime_ns, found.st_ino


def open_checkpoint(model: str | Path, allow_requantize: bool = False) -> Checkpoint:
    """Open a model without loading it.

    Args:
        model: a Hugging Face directory (safetensors, sharded or not), a GGUF file, a hub id ("Qwen/Qwen3-0.6B"),
            a URL of a directory or a GGUF file (see `dynq.remote`), or "dynq-tiny", the model inside the package.
        allow_requantize: accept a GGUF that is already quantized.

    Raises:
        DynqError: nothing there; a file missing, truncated or of an unknown kind; an unsupported architecture,
            tokenizer or tensor; a quantized GGUF without `allow_requantize`.
    """
    if str(model) == EMBEDDED:
        return _open_directory(Path(__file__).parent / "data" / EMBEDDED, EMBEDDED)
    path = Path(model).expanduser()
    with taking_apart(path):
        if path.is_file():
            return _open_gguf(path, allow_requantize)
        if path.is_dir():
            return _open_directory(path, path.resolve().name)
    if remote.is_url(str(model)):
        checkpoint = open_checkpoint(remote.copied(str(model)), allow_requantize)
        checkpoint.url = str(model)
        return checkpoint
    if re.fullmatch(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*", str(model)):
        return _open_directory(remote.from_hub(str(model)), str(model).partition("/")[2])
    raise DynqError(f"{model}: no such file or directory, no URL (s3://...) and not a hub id (owner/name)")


# --- Hugging Face directories ---------------------------------------------------------------------------------------


def _open_directory(path: Path, name: str) -> Checkpoint:
    with taking_apart(path / "config.json"):
        architecture = architectures.for_config(load_json(path / "config.json", "not a Hugging Face model directory"))
    shards = safetensors_reader.files(path)
    stored = safetensors_reader.Directory(architecture, path, shards)
    if missing := [architecture.slot_of(n) for n in architecture.required() if n not in stored.shapes]:
        first = missing[0].stored.format(0) or missing[0].parameter
        raise DynqError(f"{path}: {len(missing)} tensors are missing, the first is {first}; fetch the model again")
    config, embedding = architecture.config, stored.shapes["token_embd.weight"]
    if embedding != (config["vocab_size"], config["hidden_size"]):
        wanted = config["vocab_size"], config["hidden_size"]
        raise DynqError(f"{path}: model.embed_tokens.weight has shape {embedding}, config.json implies {wanted}")
    extra = architecture.extra_tensors()
    tensors = {}
    for n in architecture.slots:
        if n in stored.shapes:
            tensors[n] = TensorInfo(n, stored.shapes[n], stored.dtypes[n])
        elif n in extra:
            tensors[n] = TensorInfo(n, extra[n].shape, "F32")

    def read(n: str) -> np.ndarray:
        return extra[n] if n in extra else stored.read(n)

    n_weights = sum(info.n_weights for info in tensors.values())
    metadata = _general(path, architecture, n_weights) | architecture.metadata()
    metadata |= tokenizer.from_directory(path, config["vocab_size"])
    metadata["general.name"] = tokenizer.name_that_tells(metadata)
    files = [p for p in sorted(path.glob("*.json")) if p.name not in ("train_result.json", "trainer_state.json")]
    files += [*sorted(path.glob("*.jinja")), *sorted(path.glob("tokenizer.model")), *shards]
    notes = []
    if stored.towers:
        notes.append(
            f"{stored.towers} tensors for images or sound are left out: llama.cpp takes them from a projector file "
            "(mmproj-*.gguf); keep the publisher's beside the result"
        )
    return Checkpoint(name, path, architecture, metadata, tensors, read, files, notes=notes, matrices=stored.matrices)


def _general(path: Path, architecture: Architecture, n_weights: int) -> dict[str, Any]:
    """The `general.*` keys: name, size and licence from the model card and the directory's name, by gguf's rules."""
    _check_card(path / "README.md")
    if (sampling := path / "generation_config.json").exists():
        load_json(sampling, "")  # gguf reads it again, without a look at what it is
    card = gguf.Metadata.load(None, path, None, n_weights)
    card.name = card.name or path.name
    card.size_label = card.size_label or gguf.size_label(n_weights, n_weights, 0, 0)
    writer = gguf.GGUFWriter(None, architecture.name)
    writer.add_type(gguf.GGUFType.MODEL)
    card.set_gguf_meta_model(writer)
    return {key: value.value for key, value in writer.kv_data[0].items()}


def _check_card(path: Path) -> None:
    """DynqError where gguf would not get through the YAML at the top of a model card, or not soon."""
    if not path.exists():
        return
    text = read_bytes(path, _LARGEST_CARD).decode("utf-8")
    lines = text.splitlines()
    if lines[:1] != ["---"]:
        return
    front = "\n".join(lines[1 : lines.index("---", 1) if "---" in lines[1:] else None]).replace("\t", "  ")
    parse_yaml(front, f"{path}: the YAML at its top")


# --- GGUF files -----------------------------------------------------------------------------------------------------


def _without_further_tokens(fields: dict[str, Any]) -> tuple[dict[str, Any], float]:
    """Metadata of a model without the layers that predict further tokens, which follow the others; its last layer."""
    arch = fields.get("general.architecture")
    further, layers = f"{arch}.nextn_predict_layers", f"{arch}.block_count"
    if not fields.get(further):
        return fields, math.inf
    total, last = fields[layers], fields[layers] - fields[further]
    kept = {
        key: value[:last] if isinstance(value, list) and len(value) == total and key.startswith(f"{arch}.") else value
        for key, value in fields.items()
        if key != further
    }
    return kept | {layers: last}, last - 1


def _open_gguf(path: Path, allow_requantize: bool) -> Checkpoint:
    safetensors_reader.check_no_pickle(path)
    files = shards.of(path)
    readers = [Reader(file) for file in files]
    whole, packed = {k: field.contents() for k, field in readers[0].fields.items()}, readers[0].packed()
    _check_shards(files, readers)
    every = {tensor.name: tensor for reader in readers for tensor in reader.tensors}
    fields, last = _without_further_tokens(whole)
    stored = {name: tensor for name, tensor in every.items() if (layer_of(name) or 0) <= last}
    shapes = {name: tuple(int(n) for n in tensor.shape[::-1]) for name, tensor in every.items()}
    try:
        architecture = architectures.for_gguf(fields, {name: shapes[name] for name in stored})
    except DynqError as error:
        raise DynqError(f"{path}: {error}") from None
    if not architecture.known:  # llama.cpp may want what dynq's families leave out
        fields, stored = whole, every
    types = {n: tensor.tensor_type.name for n, tensor in stored.items()}
    if architecture.known:
        stored = {n: tensor for n, tensor in stored.items() if not architecture.leaves_out(n)}
        tensors = {n: TensorInfo(n, shapes[n], types[n]) for n in stored}
        for n in tensors:
            architecture.slot_of(n)  # raises for a tensor that the family does not have
    else:  # what llama.cpp may expect of such a tensor is what the file has
        tensors = {n: TensorInfo(n, shapes[n], types[n], types[n]) for n in stored}
        if odd := [n for n, info in tensors.items() if info.kept not in formats.FORMATS]:
            raise DynqError(f"{path}: {odd[0]} has type {types[odd[0]]}, which dynq does not write")
    if missing := [n for n in architecture.required() if n not in tensors]:
        raise DynqError(f"{path}: {len(missing)} tensors are missing, the first is {missing[0]}; fetch the file again")
    quantized = sorted({info.dtype for info in tensors.values()} - _PLAIN_TYPES)
    if quantized and not allow_requantize:
        raise DynqError(
            f"{path}: already quantized ({', '.join(quantized)}), and quantizing again loses more; "
            "give the 16-bit original, or allow it with --allow-requantize"
        )

    def read(n: str, i: int | None = None) -> np.ndarray:
        from dynq import codec  # brings Numba; headers are read without it

        tensor = stored[n]
        kind = tensor.tensor_type.name
        data, shape = (tensor.data, shapes[n]) if i is None else (tensor.data[i], shapes[n][1:])
        if kind in formats.FORMATS:
            array = codec.dequantize(data.view(np.uint8), kind).reshape(shape)
        else:
            try:
                array = gguf.quants.dequantize(data, tensor.tensor_type).reshape(shape)
            except NotImplementedError:
                raise DynqError(f"{path}: tensor {n} has type {kind}, for which there is no decoder") from None
        safetensors_reader.check_finite(array, f"{path}: tensor {n}")
        return array

    def matrices(n: str) -> Iterator[np.ndarray]:
        return (read(n, i) for i in range(shapes[n][0]))

    metadata = {key: value for key, value in fields.items() if not _NOT_CARRIED.match(key)}
    notes = []
    if not architecture.known:
        notes.append(
            f"dynq does not know the architecture {architecture.name!r}: sensitivities are estimated from the weights, "
            "not measured"
        )
    for projector in sorted(path.parent.glob("*mmproj*.gguf")):
        notes.append(f"{projector.name} beside the model is left as it is; llama.cpp takes it with --mmproj")
    return Checkpoint(
        shards.unsplit(path).stem,
        files[0],
        architecture,
        metadata,
        tensors,
        read,
        files,
        bool(quantized),
        {key: packed[key] for key in metadata if key in packed and fields[key] is whole[key]},
        notes,
        matrices,
    )


def _check_shards(files: list[Path], readers: list[Reader]) -> None:
    """DynqError where files do not say of themselves what their names say, or do not hold all tensors together."""

    def number(reader: Reader, key: str, default: int) -> int:
        field = reader.fields.get(f"split.{key}")
        return int(field.contents()) if field else default

    for i, (file, reader) in enumerate(zip(files, readers, strict=True)):
        index, count = number(reader, "no", 0), number(reader, "count", 1)
        if (index, count) != (i, len(files)) and max(count, len(files)) > 1:
            raise DynqError(
                f"{file}: it says that it is shard {index + 1} of {count}; shards are called "
                f"NAME-00001-of-{count:05d}.gguf and so on: give it its name back, or fetch it again"
            )
    held = sum(len(reader.tensors) for reader in readers)
    if (meant := number(readers[0], "tensors.count", held)) != held:
        raise DynqError(f"{files[0]}: the shards should hold {meant} tensors, they hold {held}; fetch them again")
