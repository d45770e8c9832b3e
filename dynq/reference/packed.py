"""Twin of dynq.kernels.packed, which describes the packings, and of the decoders in dynq.kernels.floats: by tables."""

import numpy as np

from dynq.reference.fp4 import E2M1, E8M0

F = np.float32


def bf16(bits: np.ndarray) -> np.ndarray:
    """uint16 to float32: its upper half."""
    return (bits.astype(np.uint32) << 16).view(F)


def f16(bits: np.ndarray) -> np.ndarray:
    """uint16 to float32."""
    return bits.view(np.float16).astype(F)


def e4m3(codes: np.ndarray, scales: np.ndarray, tile: tuple[int, int]) -> np.ndarray:
    """uint8 [..., rows, columns] and float32 [..., tiles, tiles] to float32; tiles at the edges may be smaller."""
    code = np.arange(256)
    exponent, mantissa = code >> 3 & 15, code & 7
    size = np.where(exponent == 0, mantissa * 2.0**-9, (1 + mantissa / 8) * 2.0 ** (exponent - 7.0))
    size[code & 127 == 127] = np.nan
    values = np.where(code & 128, -size, size).astype(F)[codes]
    for axis, side in zip((-2, -1), tile, strict=True):
        scales = np.repeat(scales, side, axis)
    values *= scales[..., : codes.shape[-2], : codes.shape[-1]]
    return values


def mxfp4(blocks: np.ndarray, scales: np.ndarray) -> np.ndarray:
    """uint8 [..., groups, 16] and uint8 [..., groups] to float32 [..., 32 groups]."""
    values = np.stack([E2M1[blocks & 15], E2M1[blocks >> 4]], axis=-1)
    values *= np.append(E8M0, F(np.nan))[scales][..., None, None]
    return values.reshape(*blocks.shape[:-2], -1)
