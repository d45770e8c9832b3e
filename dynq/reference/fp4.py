"""Twin of dynq.kernels.fp4, which draws the layouts and describes the method: MXFP4 and NVFP4.

Arrays are [groups, weights]. Here a table of thresholds finds the nearest code, so it checks the kernel's bit tricks.
"""

import numpy as np

from dynq.reference.scalar import _sum

F = np.float32
VALUES = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], F)
E2M1 = np.concatenate([VALUES, -VALUES])
E8M0 = np.ldexp(1.0, np.arange(255) - 127).astype(F)
UE4M3 = np.array([m / 512 if e == 0 else 2.0 ** (e - 7) * (1 + m / 8) for e in range(16) for m in range(8)], F)
# ties go to the code with an even mantissa
_MIDDLES = (VALUES[1:] + VALUES[:-1]) / F(2)
_THRESHOLDS = np.where(np.arange(7) % 2 == 0, np.nextafter(_MIDDLES, F(9)), _MIDDLES)


def encode(name: str, x: np.ndarray, w: np.ndarray | None, level: str) -> np.ndarray:
    """float32 [blocks, block] to uint8 [blocks, block_bytes]; w float32 like x, the importance, or None."""
    width = 32 if name == "MXFP4" else 16
    sizes = np.abs(x).reshape(-1, width)
    weights = np.ones_like(sizes) if w is None else w.reshape(-1, width)
    scales = fit(name, sizes, weights, level == "search")
    codes = _codes(sizes, _values(name)[scales]) + F(8) * np.signbit(x.reshape(-1, width))
    codes = codes.astype(np.uint8)
    pairs = codes[:, : width // 2] | codes[:, width // 2 :] << 4
    return np.concatenate([part.reshape(len(x), -1) for part in (scales.astype(np.uint8), pairs)], axis=1)


def decode(name: str, blocks: np.ndarray) -> np.ndarray:
    """uint8 [blocks, block_bytes] to float32 [blocks, block]."""
    heads, width = (1, 32) if name == "MXFP4" else (4, 16)
    if name == "MXFP4":
        half = np.ldexp(F(1), blocks[:, :1].astype(int) - 128)
    else:
        half = np.where(blocks[:, :4] == 0x7F, F(0), UE4M3[blocks[:, :4] & 0x7F] / F(2))
    pairs = blocks[:, heads:].reshape(len(blocks), heads, width // 2)
    codes = np.concatenate([pairs & 15, pairs >> 4], axis=2)
    twice = F(2) * E2M1[codes] + F(0)  # the code of -0 is 0, as in gguf-py
    return (twice * half[:, :, None]).reshape(len(blocks), -1)


def fit(name: str, sizes: np.ndarray, w: np.ndarray, exact: bool) -> np.ndarray:
    """The scale's byte of each group, int64 [groups]; sizes, the magnitudes, and w float32 [groups, width]."""
    values, largest = _values(name), sizes.max(axis=1)
    if name == "MXFP4":
        lowest, last, paired, below, above = 0, 252, 1, 1, 1
        base = np.clip((largest.view(np.uint32) >> 23).astype(int) - 2, lowest, last)
    else:
        lowest, last, paired, below, above = 1, 126, 16, 1, 8
        base = np.clip(np.searchsorted(values, largest / F(6), side="right") - 1, lowest, last)
    best, found = np.full(len(sizes), np.inf, F), base

    def tried(offset: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """The bytes, sizes / scale, and the square of scale / base's scale."""
        byte = np.clip(base + offset, lowest, last)
        t = sizes * (F(1) / values[byte])[:, None]
        return byte, t, (values[byte] / values[base]) ** 2

    def keep_better(offset: int, live: np.ndarray) -> None:
        nonlocal best, found
        byte, t, ratio = tried(offset)
        miss = t - VALUES[_codes(t, np.ones_like(best))]
        error = _sum(w * miss * miss) * ratio
        better = live & (error < best)
        best, found = np.where(better, error, best), np.where(better, byte, found)

    everywhere = np.ones(len(sizes), bool)
    for offset in [*range(above + 1), *range(-1, -below - 1, -1)]:
        keep_better(offset, everywhere)
    if not exact:
        return found
    for offset in range(above + 1, last + 1):
        byte = base + offset
        spare = values[np.minimum(byte, last)] * F(2.5) >= largest
        live = (byte <= last) & ((byte < paired) | ~spare)
        if not live.any():
            break
        keep_better(offset, live)
    live = everywhere
    for offset in range(-below - 1, -last - 1, -1):
        _, t, ratio = tried(offset)
        over = np.maximum(t - F(6), F(0))
        live = live & (base + offset >= lowest) & (_sum(w * over * over) * ratio < best)
        if not live.any():
            break
        keep_better(offset, live)
    return found


def _codes(sizes: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """The codes 0..7 nearest to sizes [groups, width] / scales [groups]."""
    return np.searchsorted(_THRESHOLDS, sizes * (F(1) / scales)[:, None], side="right")


def _values(name: str) -> np.ndarray:
    return E8M0 if name == "MXFP4" else UE4M3[:127]
