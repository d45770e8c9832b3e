"""Textbook NumPy encoders and decoders of the block formats: the slow, readable twins of the kernels.

One file for each family of dynq.kernels. What a kernel does for a lane is done here for all blocks at once, in float32
and in the same order, so the bytes are the same.
"""

from types import ModuleType

import numpy as np

from dynq import formats
from dynq.reference import fp4, iq1, iq4, iquants, scalar, ternary

FAMILIES: dict[str, ModuleType] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), scalar),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), iq1),
    **dict.fromkeys(("MXFP4", "NVFP4"), fp4),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), iq4),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), iquants),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q1_0", "Q2_0"), ternary),
}
"""Which file knows a format."""


def encode(weights: np.ndarray, name: str, importance: np.ndarray | None = None, level: str = "plain") -> np.ndarray:
    """float32 [rows, n] to uint8 [rows, row_bytes]; importance float32 [n] of mean 1, all above 0."""
    x = weights.reshape(-1, formats.get(name).block)
    w = None if importance is None else np.tile(importance, len(weights)).reshape(x.shape)
    with np.errstate(all="ignore"):
        return FAMILIES[name].encode(name, x, w, level).reshape(len(weights), -1)


def decode(data: np.ndarray, name: str) -> np.ndarray:
    """uint8 [rows, row_bytes] to float32 [rows, n]."""
    with np.errstate(all="ignore"):
        return FAMILIES[name].decode(name, data.reshape(-1, formats.get(name).block_bytes)).reshape(len(data), -1)
