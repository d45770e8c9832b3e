"""Where the half floats lie that every weight of a block is multiplied by: d and, where there are offsets, dmin.

Decoding is linear in them. NVFP4 and MXFP4 have scales of eight bits in their place and no entry here.
"""

import numpy as np

AT: dict[str, tuple[int, ...]] = {
    **dict.fromkeys(("Q4_0", "Q5_0", "Q8_0", "IQ4_NL", "IQ4_XS", "Q1_0", "Q2_0", "IQ1_S"), (0,)),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), (0,)),
    **dict.fromkeys(("Q4_1", "Q5_1", "Q4_K", "Q5_K"), (0, 2)),
    "Q2_K": (80, 82),
    "Q3_K": (108,),
    "Q6_K": (208,),
    "TQ1_0": (52,),
    "TQ2_0": (64,),
    "IQ1_M": (48,),  # four words, the half float's nibbles in their upper bits, the lowest first
}
"""Format -> byte of d and of dmin (of m in Q4_1 and Q5_1) in a block."""


def get(name: str, data: np.ndarray) -> np.ndarray:
    """float16 [1 or 2, blocks] of uint8 [blocks, block_bytes]."""
    if name == "IQ1_M":
        nibbles = _words(data) >> 12 << 4 * np.arange(4, dtype=np.uint16)
        return np.bitwise_or.reduce(nibbles, axis=1)[None].view(np.float16)
    return np.stack([np.ascontiguousarray(data[:, at : at + 2]).view(np.float16)[:, 0] for at in AT[name]])


def put(name: str, data: np.ndarray, values: np.ndarray) -> None:
    """Write float16 [1 or 2, blocks] into uint8 [blocks, block_bytes], in place."""
    if name == "IQ1_M":
        nibbles = values[0].view(np.uint16)[:, None] >> 4 * np.arange(4, dtype=np.uint16) & 15
        data[:, 48:56] = (_words(data) & 0x0FFF | nibbles << 12).view(np.uint8)
        return
    for at, half in zip(AT[name], values, strict=True):
        data[:, at : at + 2] = half[:, None].view(np.uint8)


def _words(data: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(data[:, 48:56]).view(np.uint16)
