"""Numba kernels, one file a family of formats. Nothing here checks its input: dynq.codec does.

Every family offers ``encode(name, x, w, level, out)`` and ``decode(name, data, out)`` over whole blocks: x float32
[blocks, block], finite; w float32 [blocks of a row, block], the importance of mean 1, all above 0, or None; level
`plain` or `search`; data and out uint8 [blocks, block_bytes]. Those in ON_CARD take one argument more, who runs the
kernels that search.
"""

from types import ModuleType

from dynq.kernels import fp4, iq1, iq4, iquants, kquants, legacy, ternary

FAMILIES: dict[str, ModuleType] = {
    **dict.fromkeys(("Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"), legacy),
    **dict.fromkeys(("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"), kquants),
    **dict.fromkeys(("IQ1_S", "IQ1_M"), iq1),
    **dict.fromkeys(("MXFP4", "NVFP4"), fp4),
    **dict.fromkeys(("IQ4_NL", "IQ4_XS"), iq4),
    **dict.fromkeys(("IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), iquants),
    **dict.fromkeys(("TQ1_0", "TQ2_0", "Q1_0", "Q2_0"), ternary),
}
"""Which file knows a block format. F32, F16 and BF16 are dynq.kernels.floats'."""
ON_CARD = (legacy, kquants, iq1, iq4, iquants)
"""Families whose `encode` takes who runs the kernels that search: dynq.kernels.on_card, for a graphics card."""
