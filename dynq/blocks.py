"""One block of a tensor, looked at closely; one block with other scales; one tensor in all formats."""

from collections.abc import Mapping
from dataclasses import dataclass
from functools import lru_cache
from math import prod
from pathlib import Path

import numpy as np

from dynq import codec, formats
from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.gguf_reader import Reader
from dynq.imatrix import Importance
from dynq.layout import layout


@dataclass(frozen=True)
class Block:
    """Block `index` of row `row` (experts' rows counted on) of a tensor, as `format` stores it.

    data: uint8 [block_bytes]; decoded, original, importance: float32 [block], the last two None where not known.
    """

    tensor: str
    format: str
    row: int
    index: int
    data: np.ndarray
    decoded: np.ndarray
    original: np.ndarray | None = None
    importance: np.ndarray | None = None

    @property
    def error(self) -> float | None:
        """sum importance_j (w - what)^2 over the block, importance 1 if none; None without an original."""
        if self.original is None:
            return None
        return codec.weighted_error(self.original, self.decoded, self.importance)

    @property
    def relative_error(self) -> float | None:
        """The error over that of a block of zeros."""
        if self.original is None or self.error is None:
            return None
        return self.error / max(codec.weighted_error(self.original, 0 * self.original, self.importance), 1e-300)


class Blocks:
    """Any block of any tensor: of a model, encoded on the spot, or of a GGUF, as it is stored there.

    Args:
        model: where the original weights come from; it may be left out where `gguf` is given.
        gguf: a quantized file of that model. Then blocks are those of the file, each in the file's format.
        importance: of the inputs, for encoding and for the error.
        level: of the encoders.

    shapes: what can be looked at, GGUF name -> shape, row length last.
    DynqError: neither a model nor a file, or a file that is none.
    """

    def __init__(
        self,
        model: Checkpoint | None = None,
        *,
        gguf: str | Path | None = None,
        importance: Importance | None = None,
        level: str = "plain",
    ):
        codec.check_level(level)
        if model is None and gguf is None:
            raise DynqError("no model and no GGUF to look at; give one of them, or both")
        self.model, self.importance, self.level = model, importance, level
        self._stored = {}
        if gguf is not None:
            try:
                self._stored = {tensor.name: tensor for tensor in Reader(Path(gguf)).tensors}
            except (OSError, ValueError, IndexError, KeyError) as error:
                raise DynqError(f"{gguf}: not a readable GGUF ({error})") from error
        self.shapes: Mapping[str, tuple[int, ...]] = {
            name: tuple(int(n) for n in tensor.shape[::-1])
            for name, tensor in self._stored.items()
            if formats.FORMATS.get(tensor.tensor_type.name) and formats.get(tensor.tensor_type.name).block > 1
        }
        if gguf is None and model is not None:
            self.shapes = {name: info.shape for name, info in model.tensors.items() if info.quantizable}
        if not self.shapes:
            raise DynqError(f"{gguf or (model and model.path)}: no tensor here is stored in blocks, or could be")
        self._read = lru_cache(maxsize=1)(self._read_tensor)  # rows of one tensor are looked at in turn

    def formats(self, tensor: str) -> list[str]:
        """The formats that a tensor's blocks can be looked at in: the file's own, or all that its rows divide into."""
        row = self._shape(tensor)[-1]
        if tensor in self._stored:
            return [self._stored[tensor].tensor_type.name]
        bare = self._weights_of(tensor, 0) is None
        return [
            name
            for name, form in formats.FORMATS.items()
            if form.block > 1 and row % form.block == 0 and not (form.needs_importance and bare)
        ]

    def count(self, tensor: str, fmt: str) -> tuple[int, int]:
        """Rows of a tensor, and blocks in each."""
        shape = self._shape(tensor)
        return prod(shape[:-1]), shape[-1] // formats.get(fmt).block

    def block(self, tensor: str, fmt: str, row: int = 0, index: int = 0) -> Block:
        """DynqError where there is no such tensor, row or block, or not in that format."""
        if fmt not in self.formats(tensor):
            raise DynqError(f"{tensor} cannot be looked at in {fmt}; it can in {', '.join(self.formats(tensor))}")
        rows, blocks = self.count(tensor, fmt)
        if not (0 <= row < rows and 0 <= index < blocks):
            raise DynqError(f"{tensor} has rows 0 to {rows - 1} of blocks 0 to {blocks - 1}, not {index} of {row}")
        weights = self._weights_of(tensor, row)
        original = self._row(tensor, row)
        if tensor in self._stored:
            data = np.array(self._stored[tensor].data).view(np.uint8).reshape(rows, -1)[row]
        else:
            assert original is not None
            data = codec.quantize(original, fmt, weights, level=self.level, threads=1)
        form = formats.get(fmt)
        here = slice(index * form.block, (index + 1) * form.block)
        data = data.reshape(-1, form.block_bytes)[index]
        return Block(
            tensor,
            fmt,
            row,
            index,
            data,
            codec.dequantize(data, fmt, threads=1),
            None if original is None else original[here],
            None if weights is None else weights[here],
        )

    def _shape(self, tensor: str) -> tuple[int, ...]:
        if tensor not in self.shapes:
            raise DynqError(
                f"there is no tensor {tensor} with blocks; there are {', '.join(list(self.shapes)[:3])}, ..."
            )
        return self.shapes[tensor]

    def _read_tensor(self, tensor: str) -> np.ndarray:
        assert self.model is not None
        weights = self.model.read(tensor)
        return weights.reshape(-1, weights.shape[-1])

    def _row(self, tensor: str, row: int) -> np.ndarray | None:
        known = self.model is not None and tensor in self.model.tensors
        if not known:
            return None
        rows = self._read(tensor)
        if rows.shape != (prod(self._shape(tensor)[:-1]), self._shape(tensor)[-1]):
            raise DynqError(f"{tensor} has another shape in the file than in the model; they do not belong together")
        return rows[row]

    def _weights_of(self, tensor: str, row: int) -> np.ndarray | None:
        """The importance of a row's inputs."""
        shape = self._shape(tensor)
        mean = self.importance.mean(tensor, shape[-1]) if self.importance is not None else None
        return mean if mean is None or mean.ndim == 1 else mean[row // shape[-2]]


# --- one scale, by hand -----------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class ByHand:
    """A block whose weights are one scale times levels, and the error for many scales.

    weights, importance float32 [block], importance of mean 1; levels float32, ascending; scales float32 [n], all half
    floats; error: float64 [n] for each of "off" and "on", importance counted as 1 or as it is; encoder: the scale that
    the encoder chose, and its error, for each.
    """

    format: str
    weights: np.ndarray
    importance: np.ndarray
    levels: np.ndarray
    scales: np.ndarray
    error: dict[str, np.ndarray]
    encoder: dict[str, tuple[float, float]]

    @property
    def full_range(self) -> float:
        """The scale that sends the largest weight to the end of the levels: a rule that needs no search."""
        end = self.levels[0] if self.levels[0] < 0 else self.levels[-1]
        return float(self.weights[np.abs(self.weights).argmax()] / end)

    def best(self, which: str) -> int:
        """Which of the scales errs least."""
        return int(np.argmin(self.error[which]))

    def nearest(self, scale: float) -> int:
        """Which of the scales is nearest to a scale."""
        return int(np.argmin(np.abs(self.scales - scale)))

    def decoded(self, scale: float) -> np.ndarray:
        """Every weight on its nearest level: float32 [block]."""
        return _rounded(self.weights, self.levels, np.array([scale], np.float32))[0]


ONE_SCALE = ("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "TQ2_0", "Q1_0")
"""Formats whose blocks have one scale, d, and a code for each weight."""


def by_hand(weights: np.ndarray, fmt: str, importance: np.ndarray | None = None, *, n: int = 401) -> ByHand:
    """Try `n` scales on one block, equally spaced from minus to plus 1.6 times what the largest weight needs.

    weights, importance: float32 [block]; importance None counts as 1 everywhere, so "on" and "off" are the same.
    The encoder is codec.quantize on its level `search`. DynqError: a format with more than one scale in a block.
    """
    if fmt not in ONE_SCALE:
        raise DynqError(f"{fmt} has more numbers in a block than one scale; take one of {', '.join(ONE_SCALE)}")
    form = formats.get(fmt)
    if weights.shape != (form.block,):
        raise DynqError(f"a block of {fmt} has {form.block} weights, not {weights.shape}")
    levels = layout(fmt).levels
    flat = np.ones(form.block, np.float32)
    own = flat if importance is None or not importance.any() else (importance / importance.mean()).astype(np.float32)
    end = 1.6 * float(np.abs(weights).max()) / float(np.abs(levels).max())
    scales = np.linspace(-end, end, n).astype(np.float16).astype(np.float32)
    missed = (weights.astype(np.float64) - _rounded(weights, levels, scales)) ** 2
    error, encoder = {}, {}
    for which, columns in (("off", flat), ("on", own)):
        error[which] = missed @ columns.astype(np.float64)
        data = codec.quantize(weights, fmt, columns, level="search", threads=1)
        decoded = codec.dequantize(data, fmt, threads=1)
        (d,) = (field for field in layout(fmt).fields if field.kind == "d")
        encoder[which] = layout(fmt).number(d, data), codec.weighted_error(weights, decoded, columns)
    return ByHand(fmt, weights, own, levels, scales, error, encoder)


def _rounded(weights: np.ndarray, levels: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The level nearest to each weight, times the scale: float64 [scales, weights]."""
    points = scales[:, None].astype(np.float64) * levels
    distance = np.abs(weights[None, :, None] - points[:, None, :])
    return np.take_along_axis(points, distance.argmin(axis=2), axis=1)


# --- all formats on one tensor ----------------------------------------------------------------------------------------


@dataclass(frozen=True)
class FormatError:
    """What one format makes of a tensor: errors weighted by the importance, over that of a tensor of zeros.

    error: encoded with the importance; flat: encoded as if all channels mattered alike, by an importance of ones.
    """

    format: str
    bpw: float
    needs_importance: bool
    error: float
    flat: float


def format_errors(
    weights: np.ndarray, importance: np.ndarray, names: list[str] | None = None, *, threads: int | None = None
) -> list[FormatError]:
    """Every block format on a tensor, fewest bits first. weights float32 [rows, n]; importance float32 [n].

    names: default all that the rows divide into.
    """
    n = weights.shape[-1]
    chosen = names or [name for name, form in formats.FORMATS.items() if form.block > 1 and n % form.block == 0]
    whole = codec.weighted_error(weights, np.zeros_like(weights), importance)
    found = []
    for name in sorted(chosen, key=lambda name: (formats.get(name).bpw, name)):
        errors = []
        for used in (importance, np.ones_like(importance)):
            decoded = codec.dequantize(codec.quantize(weights, name, used, threads=threads), name, threads=threads)
            errors.append(codec.weighted_error(weights, decoded, importance) / whole)
        form = formats.get(name)
        found.append(FormatError(name, form.bpw, form.needs_importance, *errors))
    return found
