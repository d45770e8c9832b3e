"""The table of formats: names, block sizes and bytes of every GGUF tensor type that dynq writes.

Sizes and identifiers come from gguf's constants; what is stated here is only what gguf does not know: which format
llama.cpp falls back to when a row does not divide into blocks (``tensor_type_fallback`` in llama.cpp's
``llama-quant.cpp``), whether a format may be written without importance, and where llama.cpp has fast code for it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from math import prod

from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

from dynq.errors import DynqError


@dataclass(frozen=True)
class Format:
    """One GGUF tensor type. ``block`` weights along a row are stored together in ``block_bytes`` bytes.

    hardware: where llama.cpp multiplies by it fast, and where it does not, in words.
    """

    name: str
    id: int
    block: int
    block_bytes: int
    hardware: str
    needs_importance: bool = False
    fallback: str | None = None

    @property
    def bpw(self) -> float:
        """Bits per weight."""
        return 8 * self.block_bytes / self.block


_FALLBACK = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_XS"), "IQ4_NL"),
    **dict.fromkeys(("Q2_0", "Q2_K", "Q3_K", "TQ1_0", "TQ2_0"), "Q4_0"),
    "Q4_K": "Q5_0",
    "Q5_K": "Q5_1",
    "Q6_K": "Q8_0",
}
_NEED_IMPORTANCE = ("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS")
# Everywhere is llama.cpp's CPU (x86 and ARM), CUDA, Metal and Vulkan backends, by its sources of late 2026: vec_dot of
# ggml-cpu and its repack.cpp (rows interleaved at loading, for vector instructions), mmq.cu and mmvq.cu of ggml-cuda,
# what ggml-metal and ggml-vulkan say they support. IQ1 to IQ3 look their weights up in tables: on an x86 CPU a dot
# product with them took 2 to 4 times as long as with Q4_K.
_TABLES = "GPU; slower on CPU (table look-ups)"
_HARDWARE = {
    "BF16": "everywhere; on Metal where the GPU has bfloat16",
    "Q4_0": "everywhere; CPU repacked (AVX2, ARM)",
    "Q8_0": "everywhere; CPU repacked (ARM)",
    "Q2_K": "everywhere; CPU repacked (AVX-512)",
    "Q4_K": "everywhere; CPU repacked (AVX2, ARM)",
    "Q5_K": "everywhere; CPU repacked (ARM)",
    "Q6_K": "everywhere; CPU repacked (ARM)",
    **dict.fromkeys(("IQ1_S", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S"), _TABLES),
    "IQ1_M": "GPU, slower prompts on CUDA; slower on CPU (table look-ups)",
    "IQ4_NL": "everywhere; CPU repacked (AVX2, ARM)",
    "TQ1_0": "CPU, Vulkan; not CUDA, Metal",
    "TQ2_0": "CPU, Metal, Vulkan; not CUDA",
    "MXFP4": "everywhere; native on Blackwell; CPU repacked (AVX2, ARM)",
    "NVFP4": "CPU, CUDA (native on Blackwell), Vulkan; not Metal",
    "Q1_0": "everywhere; CPU repacked (ARM)",
    "Q2_0": "GPU, ARM CPU; slower on x86 (no vector code)",
}
_NAMES = (
    *("F32", "F16", "BF16", "Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0", "Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"),
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ3_XXS", "IQ3_S", "IQ4_NL", "IQ4_XS"),
    *("TQ1_0", "TQ2_0", "MXFP4", "NVFP4", "Q1_0", "Q2_0"),
)


def _format(name: str) -> Format:
    kind = GGMLQuantizationType[name]
    block, block_bytes = GGML_QUANT_SIZES[kind]
    hardware = _HARDWARE.get(name, "everywhere")
    return Format(name, int(kind), block, block_bytes, hardware, name in _NEED_IMPORTANCE, _FALLBACK.get(name))


# gguf 0.19 does not know Q2_0 yet
FORMATS: dict[str, Format] = {name: _format(name) for name in _NAMES if name in GGMLQuantizationType.__members__}


def get(name: str) -> Format:
    """The format called `name` (exactly as GGUF spells it). DynqError, naming the known ones, if there is none."""
    try:
        return FORMATS[name]
    except KeyError:
        raise DynqError(f"unknown format {name!r}; known formats: {', '.join(FORMATS)}") from None


def row_bytes(name: str, n: int) -> int:
    """Bytes of one row of `n` weights. DynqError if `n` is not divisible by the block."""
    fmt = get(name)
    if n % fmt.block:
        raise DynqError(
            f"a row of {n} weights does not divide into {name}'s blocks of {fmt.block}; use {usable(name, n)} for it"
        )
    return n // fmt.block * fmt.block_bytes


def tensor_bytes(name: str, shape: Sequence[int]) -> int:
    """Bytes of a tensor of `shape` (rows first, row length last). DynqError if a row does not divide into blocks."""
    return prod(shape[:-1]) * row_bytes(name, shape[-1]) if shape else row_bytes(name, 1)


def usable(name: str, n: int) -> str:
    """`name`, or what llama.cpp writes in its place for rows of `n` weights: its fallback, then F16."""
    fmt = get(name)
    if n % fmt.block == 0:
        return name
    if fmt.fallback is not None and n % FORMATS[fmt.fallback].block == 0:
        return fmt.fallback
    return "F16"
