"""Encode and decode one tensor: checks, dispatch to the kernels, threads.

A tensor is cut into runs of whole rows, each encoded on its own by compiled code that releases the GIL. Blocks never
reach over a row and no sum reaches over a block, so the bytes do not depend on the number of threads.
"""

import os
from collections.abc import Callable, Iterable
from concurrent.futures import ThreadPoolExecutor

import numpy as np

from dynq import formats
from dynq.errors import DynqError
from dynq.kernels import FAMILIES, ON_CARD, errors, floats

CHUNK = 1 << 17  # weights encoded at a time by one thread: the chunk and its codes stay in a core's cache
CARD_CHUNK = 1 << 21  # weights encoded at a time on a card: other threads pack meanwhile what it has found
# least importance, of the mean and of the largest in a block: keeps least squares solvable for channels never seen
FLOOR = 1e-6
LEVELS = ("plain", "search")
F = np.float32


def quantize(
    weights: np.ndarray,
    fmt: str,
    importance: np.ndarray | None = None,
    *,
    level: str = "plain",
    threads: int | None = None,
    device: str = "cpu",
) -> np.ndarray:
    """Encode float32 weights [..., n] as `fmt`: uint8 [..., row_bytes].

    importance: float32 [n], at least 0 (an imatrix's mean square of each input channel), the same for all rows; or
    [experts, n] for weights [experts, rows, n]. The encoder then minimises sum importance_j (w - what)^2. All zero
    counts as none being known: all channels weigh the same. On level `plain`
    Q4_0, Q4_1, Q5_0 and Q5_1 are rounded without a search where no importance is given, as llama.cpp does; Q8_0, F16,
    BF16 and F32 never use it. Values beyond the largest half float are stored as that one.

    level: `plain` searches about as far as llama.cpp does; `search` tries more scales in up to four times the time and
    errs less on any tensor of some size, though not in every single block.
    threads: default all cores; the bytes do not depend on it.
    device: where scales are searched, as torch names it; on a card for the families in dynq.kernels.ON_CARD, other
    formats stay on the processor. Nearly all codes are the same on both (dynq.kernels.on_card).
    DynqError for an unknown format, a row that does not
    divide into blocks, NaN or infinity (with the position), and an importance that does not fit.
    """
    check_level(level)
    weights = np.asarray(weights)
    if importance is not None and np.ndim(importance) == 2:
        return _quantize_experts(weights, fmt, np.asarray(importance), level, threads, device)
    if weights.ndim == 0 or weights.shape[-1] == 0:
        raise DynqError(f"quantize needs rows of weights, got an array of shape {weights.shape}")
    n = weights.shape[-1]
    size = formats.row_bytes(fmt, n)
    rows = np.ascontiguousarray(weights, dtype=F).reshape(-1, n)
    columns = None if importance is None else _columns(importance, n, formats.get(fmt).block)
    if columns is None and formats.get(fmt).needs_importance:
        raise DynqError(
            f"{fmt} cannot be encoded without importance: give an importance matrix, or take another format"
        )
    out = np.empty((rows.shape[0], size), np.uint8)
    on_card = device.startswith("cuda") and FAMILIES.get(fmt) in ON_CARD
    encode = _encoder(fmt, columns, level, on_card)

    def work(part: slice) -> None:
        _check_finite(rows, part, weights.shape)
        encode(rows[part], out[part])

    spread(work, len(rows), max(1, (CARD_CHUNK if on_card else CHUNK) // n), threads)
    return out.reshape(*weights.shape[:-1], size)


def check_level(level: str, more: tuple[str, ...] = ()) -> None:
    """DynqError where there is no such level of encoding. more: levels beyond those of `quantize`."""
    levels = (*LEVELS, *more)
    if level not in levels:
        raise DynqError(f"no level {level!r} of encoding; the levels are {', '.join(levels[:-1])} and {levels[-1]}")


def _quantize_experts(
    weights: np.ndarray, fmt: str, importance: np.ndarray, level: str, threads: int | None, device: str
) -> np.ndarray:
    _check_experts(weights, importance)
    out = np.empty((*weights.shape[:2], formats.row_bytes(fmt, weights.shape[2])), np.uint8)
    for expert, (w, own) in enumerate(zip(weights, importance, strict=True)):
        out[expert] = quantize(w, fmt, own, level=level, threads=threads, device=device)
    return out


def _check_experts(weights: np.ndarray, importance: np.ndarray) -> None:
    if weights.ndim != 3 or len(weights) != len(importance):
        raise DynqError(f"importance {importance.shape} of experts does not fit weights {weights.shape}")


def dequantize(data: np.ndarray, fmt: str, *, threads: int | None = None) -> np.ndarray:
    """Decode uint8 [..., row_bytes] of `fmt` to float32 [..., n], bit for bit as gguf-py does.

    DynqError for an unknown format, another dtype, or bytes that do not divide into blocks.
    """
    data = np.asarray(data)
    if data.dtype != np.uint8 or data.ndim == 0 or data.shape[-1] == 0:
        raise DynqError(f"dequantize needs rows of uint8, got {data.dtype} of shape {data.shape}")
    form = formats.get(fmt)
    size = data.shape[-1]
    if size % form.block_bytes:
        raise DynqError(f"a row of {size} bytes does not divide into {fmt}'s blocks of {form.block_bytes} bytes")
    n = size // form.block_bytes * form.block
    rows = np.ascontiguousarray(data).reshape(-1, size)
    out = np.empty((rows.shape[0], n), F)
    decode = _decoder(fmt)
    spread(lambda part: decode(rows[part], out[part]), len(rows), max(1, CHUNK // n), threads)
    return out.reshape(*data.shape[:-1], n)


def weighted_error(weights: np.ndarray, decoded: np.ndarray, importance: np.ndarray | None = None) -> float:
    """sum importance_j (w - what)^2 over [..., n], in float64; importance as in `quantize`, 1 if None.

    DynqError where shapes differ.
    """
    weights, decoded = np.asarray(weights), np.asarray(decoded)
    if importance is not None and np.ndim(importance) == 2:
        _check_experts(weights, np.asarray(importance))
        return sum(weighted_error(*expert) for expert in zip(weights, decoded, importance, strict=True))
    if weights.shape != decoded.shape or weights.ndim == 0:
        raise DynqError(f"weights {weights.shape} and decoded {decoded.shape} differ in shape")
    n = weights.shape[-1]
    columns = np.ones(n) if importance is None else np.ascontiguousarray(importance, np.float64)
    if columns.shape != (n,):
        raise DynqError(f"importance has shape {columns.shape}, the rows have {n} weights")
    sums = np.empty(weights.size // n if n else 0)
    a, b = (np.ascontiguousarray(x, dtype=F).reshape(-1, n) for x in (weights, decoded))
    errors.weighted_error(a, b, columns, sums)
    return float(sums.sum())


def warmup(names: Iterable[str] | None = None) -> None:
    """Compile the kernels of these formats (default: all), or load them from the cache, so that no later call waits."""
    for name in formats.FORMATS if names is None else names:
        n = formats.get(name).block
        weights = np.linspace(-1, 1, n, dtype=F)[None]
        for importance in (None, np.ones(n, F)):
            for level in LEVELS if importance is not None or not formats.get(name).needs_importance else ():
                weighted_error(weights, dequantize(quantize(weights, name, importance, level=level), name))


def _columns(importance: np.ndarray, n: int, block: int) -> np.ndarray:
    """The importance as the kernels want it: float32 [n] of mean 1, none below FLOOR of its block's largest.

    A wider range than that inside one block would leave float32 no digits for the small ones in the least squares.
    """
    values = np.asarray(importance, dtype=np.float64)
    if values.shape != (n,):
        raise DynqError(f"importance has shape {values.shape}, the rows have {n} weights")
    if not np.isfinite(values).all():
        raise DynqError(f"importance is not finite at column {int(np.argmin(np.isfinite(values)))}")
    if (values < 0).any():
        raise DynqError(f"importance is negative at column {int(np.argmax(values < 0))}")
    largest = values.max(initial=0.0)
    if largest == 0:
        return np.ones(n, F)
    values = values / largest  # first, so that the mean cannot overflow
    values = np.maximum(values / values.mean(), FLOOR)
    blocks = values.reshape(-1, block)
    return np.maximum(blocks, FLOOR * blocks.max(1, keepdims=True)).ravel().astype(F)


def _check_finite(rows: np.ndarray, part: slice, shape: tuple[int, ...]) -> None:
    if floats.largest_bits(rows[part].view(np.uint32).ravel()) >= 0x7F800000:
        finite = np.isfinite(rows[part])
        flat = part.start * rows.shape[1] + int(np.argmin(finite))
        where = tuple(int(i) for i in np.unravel_index(flat, shape))
        raise DynqError(f"weight {where} of {shape} is {rows.ravel()[flat]}; only finite weights can be encoded")


def spread(work: Callable[[slice], None], rows: int, step: int, threads: int | None) -> None:
    """Call `work` for runs of `step` rows, on `threads` threads (None: all cores); raise the first error."""
    parts = [slice(start, min(start + step, rows)) for start in range(0, rows, step)]
    workers = min(len(parts), threads or cores())
    if workers <= 1:
        for part in parts:
            work(part)
        return
    with ThreadPoolExecutor(workers) as pool:
        try:
            for done in [pool.submit(work, part) for part in parts]:
                done.result()
        except BaseException:
            pool.shutdown(cancel_futures=True)
            raise


_most = 0  # cores that are left to this process, 0 for all


def one_core() -> None:
    """From now on `cores` are one: other processes use the rest."""
    global _most
    _most = 1


def cores() -> int:
    """How many cores this process may use."""
    return _most or (len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1)


Encode = Callable[[np.ndarray, np.ndarray], None]


def _encoder(name: str, columns: np.ndarray | None, level: str, on_card: bool) -> Encode:
    """The function (float32 [rows, n], uint8 [rows, row_bytes] to fill) of a format."""
    if name in _FLOATS:
        return _FLOATS[name]
    form = formats.get(name)
    w = None if columns is None else columns.reshape(-1, form.block)
    run: tuple[Callable[..., None], ...] = ()
    if on_card:
        from dynq.kernels import on_card as card

        run = (card.run,)

    def encode(rows: np.ndarray, out: np.ndarray) -> None:
        FAMILIES[name].encode(name, rows.reshape(-1, form.block), w, level, out.reshape(-1, form.block_bytes), *run)

    return encode


def _decoder(name: str) -> Encode:
    """The function (uint8 [rows, row_bytes], float32 [rows, n] to fill) of a format."""
    form = formats.get(name)

    def decode(rows: np.ndarray, out: np.ndarray) -> None:
        if name == "F32":
            out[:] = rows.view(F)
        elif name == "F16":
            floats.decode_f16(rows.view(np.uint16).ravel(), out.ravel())
        elif name == "BF16":
            floats.decode_bf16(rows.view(np.uint16).ravel(), out.view(np.uint32).ravel())
        else:
            FAMILIES[name].decode(name, rows.reshape(-1, form.block_bytes), out.reshape(-1, form.block))

    return decode


def _encode_f32(rows: np.ndarray, out: np.ndarray) -> None:
    out.view(F)[:] = rows


def _encode_f16(rows: np.ndarray, out: np.ndarray) -> None:
    floats.encode_f16(rows.view(np.uint32).ravel(), out.view(np.uint16).ravel())


def _encode_bf16(rows: np.ndarray, out: np.ndarray) -> None:
    floats.encode_bf16(rows.view(np.uint32).ravel(), out.view(np.uint16).ravel())


_FLOATS = {"F32": _encode_f32, "F16": _encode_f16, "BF16": _encode_bf16}
