"""Importance matrices in llama.cpp's files: GGUF read and written, the legacy ``.dat`` read.

For every linear layer the file holds, per input channel, the sum over tokens of the squared input
(``<tensor>.in_sum2``) and how many tokens were summed (``<tensor>.counts``); sum / count is the *importance* that
encoders weigh errors with.
Layout after llama.cpp: ``tools/imatrix/imatrix.cpp`` (writer) and ``common/imatrix-loader.cpp`` (reader).
"""

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from gguf import GGUFWriter
from gguf.constants import Keys
from numpy.typing import NDArray

from dynq.errors import DynqError
from dynq.files import replacing, taking_apart
from dynq.gguf_reader import Reader

if TYPE_CHECKING:
    from dynq.checkpoint import TensorInfo

_SUMS, _COUNTS = ".in_sum2", ".counts"
_LONGEST_NAME = 4096  # bytes, of a tensor or a text in a legacy file
# The weight, in tokens, of the other experts' mean in an expert's own: enough to steady one that a handful of tokens
# reached, less than 2 % of one that a thousand reached.
_PRIOR_TOKENS = 16.0


@dataclass
class Importance:
    """Sums of squared inputs per tensor, as collected; `mean` turns them into importance.

    sums: GGUF tensor name -> float32 [n_mat, n], the sum over tokens of the squared input; n is the tensor's row
        length, n_mat the number of experts that are counted apart (1 for a plain linear layer).
    counts: GGUF tensor name -> float32 [n_mat], tokens summed (exact to 2^24).
    datasets: names of the texts. chunk_count, chunk_size: how many chunks of how many tokens (0 where a legacy file
        does not say).
    """

    sums: dict[str, NDArray[np.float32]]
    counts: dict[str, NDArray[np.float32]]
    datasets: list[str] = field(default_factory=list)
    chunk_count: int = 0
    chunk_size: int = 0

    def mean(self, name: str, row: int | None = None) -> NDArray[np.float32] | None:
        """Mean squared input of tensor `name`: float32 [n], or [n_mat, n] for experts; None where nothing was counted.

        Experts are shrunk toward the mean over all tokens of all experts of the tensor, which weighs as much as 16
        tokens: an expert that no token reached gets exactly that mean (llama.cpp gives it ones), one that thousands
        reached keeps its own. `rare` names the experts concerned. A tensor of one matrix is not shrunk.

        row: the tensor's row length, for files that keep several matrices as one long row under one count (the legacy
        format; 3-D tensors that are no experts): the result is then [n / row, row].
        Raises DynqError if the stored length is no multiple of `row`.
        """
        if name not in self.sums:
            return None
        sums = self.sums[name].astype(np.float64)
        counts = self.counts[name].astype(np.float64)[:, None]
        total = counts.sum()
        if total == 0:
            return None
        if len(sums) == 1:
            mean = (sums / total)[0]
            if row is not None and row != len(mean):
                if len(mean) % row:
                    raise DynqError(
                        f"importance matrix: {name} has {len(mean)} values, the tensor's rows have {row}; "
                        "it was made from another model"
                    )
                mean = mean.reshape(-1, row)
        else:
            if row is not None and row != sums.shape[1]:
                raise DynqError(
                    f"importance matrix: {name} has {sums.shape[1]} values per expert, the tensor's rows have {row}; "
                    "it was made from another model"
                )
            pooled = sums.sum(axis=0) / total
            mean = (sums + _PRIOR_TOKENS * pooled) / (counts + _PRIOR_TOKENS)
        return mean.astype(np.float32)

    def check_model(self, tensors: Mapping[str, "TensorInfo"], where: str) -> list[str]:
        """The quantizable tensors of a model that have no importance here.

        DynqError, naming the file `where`, if that is all of them, or if a tensor's rows have another length.
        """
        quantizable = [info for info in tensors.values() if info.quantizable]
        missing = []
        for info in quantizable:
            mean = self.mean(info.name, info.row)
            if mean is None:
                missing.append(info.name)
            elif mean.ndim == 2 and (len(info.shape) != 3 or len(mean) != info.shape[0]):
                raise DynqError(
                    f"{where}: {info.name} has {mean.size} values, the tensor is {'x'.join(map(str, info.shape))}; "
                    "it was made from another model"
                )
        if len(missing) == len(quantizable):
            raise DynqError(f"{where}: has none of the model's tensors; it was made from another model")
        return missing

    def covers(self, tensors: Mapping[str, "TensorInfo"]) -> bool:
        """Whether every tensor that multiplies has importance here; an embedding that is only looked up needs none."""
        looked_up = "token_embd.weight" if "output.weight" in tensors else ""
        quantizable = (info for info in tensors.values() if info.quantizable and info.name != looked_up)
        return all(self.mean(info.name, info.row) is not None for info in quantizable)

    def completed(self, other: "Importance") -> "Importance":
        """This one, and of `other` the tensors that are not here."""
        return replace(self, sums=other.sums | self.sums, counts=other.counts | self.counts)

    def rare(self, tokens: int = int(_PRIOR_TOKENS)) -> dict[str, list[int]]:
        """Experts that fewer than `tokens` tokens reached: tensor name -> their indices; only tensors that have some.

        At the default these are the experts whose `mean` is more the other experts' than their own.
        """
        found = {name: np.flatnonzero(counts < tokens).tolist() for name, counts in self.counts.items()}
        return {name: found[name] for name in sorted(found) if found[name] and len(self.counts[name]) > 1}


def write_imatrix(path: str | Path, importance: Importance) -> None:
    """Write `importance` as llama.cpp's GGUF importance matrix; ``llama-quantize --imatrix`` reads it.

    Tensors are in order of name and the bytes depend on nothing else, so equal content gives equal files. The file
    is written beside `path`, synced and renamed: `path` is the old file or the new one, never half.
    Raises DynqError if the arrays contradict each other, hold a non-finite or negative value, or cannot be written.
    """
    writer = GGUFWriter(None, "imatrix")
    writer.kv_data[0].clear()  # llama-imatrix writes no general.architecture: the file is no model
    writer.add_type("imatrix")
    # llama-quantize refuses a file without this key and GGUFWriter leaves an empty list out
    writer.add_array(Keys.IMatrix.DATASETS, importance.datasets or ["unnamed"])
    writer.add_uint32(Keys.IMatrix.CHUNK_COUNT, importance.chunk_count)
    writer.add_uint32(Keys.IMatrix.CHUNK_SIZE, importance.chunk_size)
    if importance.sums.keys() != importance.counts.keys():
        raise DynqError("importance matrix: sums and counts name different tensors")
    for name in sorted(importance.sums):
        sums, counts = _checked(name, importance.sums[name], importance.counts[name], "importance matrix")
        # ggml drops trailing dimensions of one, so a plain layer has one dimension
        writer.add_tensor(name + _SUMS, sums if len(sums) > 1 else sums[0])
        writer.add_tensor(name + _COUNTS, counts[:, None] if len(counts) > 1 else counts)
    with replacing(path) as beside:
        writer.write_header_to_file(beside)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()


def read_imatrix(path: str | Path) -> Importance:
    """Read an importance matrix made by dynq or by llama.cpp, GGUF or legacy ``.dat``.

    Legacy files hold mean * calls per value and one count per tensor, so experts come back as one long row (see `row`
    of `Importance.mean`) and experts without data as ones, which cannot be told from real values.
    Raises DynqError naming the file if it is missing, truncated, no importance matrix, or holds impossible values.
    """
    path = Path(path)
    if path.exists() and not path.is_file():
        raise DynqError(f"{path}: the importance matrix cannot be read: not a file")
    try:
        with path.open("rb") as file:
            is_gguf = file.read(4) == b"GGUF"
    except OSError as error:
        raise DynqError(f"{path}: the importance matrix cannot be read: {error.strerror}") from error
    with taking_apart(path):
        return _read_gguf(path) if is_gguf else _read_legacy(path)


def _checked(
    name: str, sums: NDArray[Any], counts: NDArray[Any], where: str | Path
) -> tuple[NDArray[np.float32], NDArray[np.float32]]:
    """The two arrays as contiguous float32, after a look at shapes and values."""
    sums = np.ascontiguousarray(sums, dtype=np.float32)
    counts = np.ascontiguousarray(counts, dtype=np.float32)
    if sums.ndim != 2 or sums.size == 0 or counts.shape != sums.shape[:1]:
        raise DynqError(f"{where}: {name} has sums of shape {sums.shape} and counts of shape {counts.shape}")
    for label, array in (("sums", sums), ("counts", counts)):
        bad = np.flatnonzero(~(np.isfinite(array) & (array >= 0)))
        if bad.size:
            value = array.ravel()[bad[0]]
            raise DynqError(f"{where}: {label} of {name} hold {value} at position {bad[0]}; make the file anew")
    return sums, counts


def _read_gguf(path: Path) -> Importance:
    reader = Reader(path)

    def value(key: str) -> Any:
        entry = reader.get_field(key)
        return None if entry is None else entry.contents()

    kind = value(Keys.General.TYPE)
    if kind != "imatrix":
        raise DynqError(f"{path}: a GGUF file of type {kind or 'model'!r}, not an importance matrix")
    tensors: dict[str, dict[str, NDArray[np.float32]]] = {_SUMS: {}, _COUNTS: {}}
    for tensor in reader.tensors:
        for suffix, found in tensors.items():
            if tensor.name.endswith(suffix):
                if tensor.data.dtype != np.float32:
                    raise DynqError(f"{path}: {tensor.name} is {tensor.tensor_type.name}, must be F32")
                found[tensor.name.removesuffix(suffix)] = tensor.data
    if not tensors[_SUMS] or tensors[_SUMS].keys() != tensors[_COUNTS].keys():
        odd = sorted(tensors[_SUMS].keys() ^ tensors[_COUNTS].keys())
        raise DynqError(f"{path}: sums without counts or the reverse: {', '.join(odd[:3]) or 'no tensors at all'}")
    result = Importance(
        sums={},
        counts={},
        datasets=[str(text) for text in value(Keys.IMatrix.DATASETS) or []],
        chunk_count=int(value(Keys.IMatrix.CHUNK_COUNT) or 0),
        chunk_size=int(value(Keys.IMatrix.CHUNK_SIZE) or 0),
    )
    for name in sorted(tensors[_SUMS]):
        counts = tensors[_COUNTS][name].reshape(-1)
        sums = tensors[_SUMS][name]
        # a copy, so that nothing holds the memory map open
        result.sums[name], result.counts[name] = _checked(
            name, sums.reshape(len(counts), -1).copy(), counts.copy(), path
        )
    return result


def _read_legacy(path: Path) -> Importance:
    """int32 n_entries; per entry: int32 length, name, int32 calls, int32 n, float32 [n]; int32 chunks, text name."""
    size, at = path.stat().st_size, 0
    data = np.memmap(path, np.uint8, "r") if size else np.empty(0, np.uint8)

    def take(length: int) -> NDArray[np.uint8]:
        nonlocal at
        if length < 0 or at + length > size:
            raise DynqError(
                f"{path}: no importance matrix, or a truncated one ({length} bytes expected at byte {at} of {size}); "
                "make it anew"
            )
        at += length
        return data[at - length : at]

    def integer() -> int:
        return int.from_bytes(take(4).tobytes(), "little", signed=True)

    def text() -> str:
        length = integer()
        if length > _LONGEST_NAME:
            raise DynqError(f"{path}: no importance matrix (a name of {length:,} bytes at byte {at}); make it anew")
        return take(length).tobytes().decode()

    entries: dict[str, tuple[int, NDArray[np.float32]]] = {}
    for _ in range(integer()):
        name, calls, n = text(), integer(), integer()
        if n < 1 or calls < 0 or not name or name in entries:
            raise DynqError(
                f"{path}: no importance matrix (entry {len(entries)}, {name!r}, has {n} values and {calls} calls); "
                "make it anew"
            )
        entries[name] = calls or 1, take(4 * n).view("<f4")  # without calls the values are means already
    if not entries:
        raise DynqError(f"{path}: no importance matrix (it has no entries); make it anew")
    result = Importance(sums={}, counts={})
    if at < size:  # files of the first versions end here
        result.chunk_count = integer()
    if at < size:
        result.datasets = [found] if (found := text()) else []
    for name, (calls, sums) in entries.items():  # only now is anything copied
        result.sums[name], result.counts[name] = _checked(name, sums[None].copy(), np.array([calls]), path)
    return result
