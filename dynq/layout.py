"""How a block's bits are laid out: which bits make up which number, and which weights that number reaches.

A block is a row of bits, bit 8 k + i being bit i (from the lowest) of byte k. Every one of them belongs to one `Field`.
The tables below say where the fields are, in the words of the drawings in dynq.kernels; they decode nothing by
themselves and nothing is decoded by them: tests flip every bit and compare with what the decoder changes.
"""

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache

import numpy as np
from gguf.quants import IQ4_NL

from dynq import formats
from dynq.errors import DynqError

E2M1 = (0.0, 0.5, 1.0, 1.5, 2.0, 3.0, 4.0, 6.0)


@dataclass(frozen=True)
class Field:
    """One number in a block.

    kind: "d", "dmin", "m" (half floats of the block), "scale", "min" (of a group of its weights), "code" (of a weight),
    "entry" (of a code book), "signs", "shift" (which way IQ1 moves its grid), "trits" (five or four weights of TQ1_0),
    "unused". index: counts the fields of a kind. bits: where it lies, its lowest bit first. weights: those that it
    reaches, and no others.
    """

    kind: str
    index: int
    bits: tuple[int, ...]
    weights: range

    def value(self, block: np.ndarray) -> int:
        """The field's bits as an unsigned integer. block: uint8 [block_bytes]."""
        return sum((int(block[bit >> 3]) >> (bit & 7) & 1) << k for k, bit in enumerate(self.bits))


@dataclass(frozen=True)
class Layout:
    """The fields of a format's block, in the order of their kinds. formula: how a weight is made from them."""

    format: str
    formula: str
    fields: tuple[Field, ...]
    numbers: dict[str, Callable[[int], float]]

    def number(self, field: Field, block: np.ndarray) -> float:
        """The field's value as it stands in the formula: a half float, a code less its offset, a level."""
        value = field.value(block)
        return self.numbers[field.kind](value) if field.kind in self.numbers else float(value)

    def of_weight(self, weight: int) -> list[Field]:
        """The fields that one weight is made from."""
        return [field for field in self.fields if weight in field.weights]

    @property
    def levels(self) -> np.ndarray:
        """What a weight's code can stand for, float32, ascending; DynqError where weights have no code of their own."""
        codes = [field for field in self.fields if field.kind == "code"]
        if not codes:
            raise DynqError(f"{self.format}: weights have no codes of their own; see its formula, {self.formula}")
        return np.unique([self.numbers["code"](value) for value in range(1 << len(codes[0].bits))]).astype(np.float32)


@cache
def layout(name: str) -> Layout:
    """The layout of a block format. DynqError for F32, F16 and BF16, which have no blocks, and unknown names."""
    form = formats.get(name)
    if form.block == 1:
        raise DynqError(f"{name} stores each weight by itself: there is no block to lay out")
    formula, numbers = _meaning(name)
    order = ("d", "dmin", "m", "scale", "min", "shift", "signs", "entry", "code", "trits", "unused")
    fields = sorted(_fields(name, form.block), key=lambda field: order.index(field.kind))
    return Layout(name, formula, tuple(fields), numbers)


# --- where the bits are -----------------------------------------------------------------------------------------------

# first byte, bits of each, stride: byte k of a stretch of `stride` bytes holds numbers k, k + stride, ..., the first in
# its lowest bits. Where a number has several parts the lowest comes first.
Part = tuple[int, int, int]
CODES: dict[str, tuple[Part, ...]] = {
    "Q4_0": ((2, 4, 16),),
    "Q4_1": ((4, 4, 16),),
    "Q5_0": ((6, 4, 16), (2, 1, 1)),
    "Q5_1": ((8, 4, 16), (4, 1, 1)),
    "Q8_0": ((2, 8, 1),),
    "Q2_K": ((16, 2, 32),),
    "Q3_K": ((32, 2, 32), (0, 1, 32)),
    "Q4_K": ((16, 4, 32),),
    "Q5_K": ((48, 4, 32), (16, 1, 32)),
    "Q6_K": ((0, 4, 64), (128, 2, 32)),
    "IQ4_NL": ((2, 4, 16),),
    "IQ4_XS": ((8, 4, 16),),
    "MXFP4": ((1, 4, 16),),
    "NVFP4": ((4, 4, 8),),
    "TQ2_0": ((0, 2, 32),),
    "Q1_0": ((2, 1, 1),),
    "Q2_0": ((2, 2, 1),),
}
# weights that share a scale, and the scales
SCALES: dict[str, tuple[int, tuple[Part, ...]]] = {
    "Q2_K": (16, ((0, 4, 16),)),
    "Q3_K": (16, ((96, 4, 8), (104, 2, 4))),
    "Q6_K": (16, ((192, 8, 1),)),
    "IQ4_XS": (32, ((4, 4, 1), (2, 2, 1))),
    "MXFP4": (32, ((0, 8, 1),)),
    "NVFP4": (16, ((0, 8, 1),)),
    "IQ2_XS": (16, ((66, 4, 1),)),
    "IQ2_S": (16, ((74, 4, 1),)),
    "IQ3_S": (32, ((106, 4, 1),)),
}
# weights of an entry, and the entries
ENTRIES: dict[str, tuple[int, tuple[Part, ...]]] = {
    "IQ2_S": (8, ((2, 8, 1), (66, 2, 1))),
    "IQ3_XXS": (4, ((2, 8, 1),)),
    "IQ3_S": (4, ((2, 8, 1), (66, 1, 1))),
}
SIGNS: dict[str, int] = {"IQ2_S": 34, "IQ3_S": 74}  # first byte; a byte for eight weights
WORDS = {"IQ2_XXS": (6, 8), "IQ3_XXS": (66, 4)}  # first byte and distance of eight words: four times 7 signs, a scale
_D = (
    "Q4_0",
    "Q5_0",
    "Q8_0",
    "IQ4_NL",
    "IQ4_XS",
    "Q1_0",
    "Q2_0",
    "IQ1_S",
    "IQ2_XXS",
    "IQ2_XS",
    "IQ2_S",
    "IQ3_XXS",
    "IQ3_S",
)
HALVES: dict[str, tuple[tuple[str, int], ...]] = {
    **dict.fromkeys(_D, (("d", 0),)),
    **dict.fromkeys(("Q4_1", "Q5_1"), (("d", 0), ("m", 2))),
    **dict.fromkeys(("Q4_K", "Q5_K"), (("d", 0), ("dmin", 2))),
    "Q2_K": (("d", 80), ("dmin", 82)),
    "Q3_K": (("d", 108),),
    "Q6_K": (("d", 208),),
    "TQ1_0": (("d", 52),),
    "TQ2_0": (("d", 64),),
}
"""First byte of each half float."""
TRITS = ((0, 0, 32, 5), (160, 32, 16, 5), (240, 48, 4, 4))
"""First weight, first byte, bytes, trits in a byte of TQ1_0's three stretches."""


def _run(byte: int, first: int, count: int) -> tuple[int, ...]:
    """Bits first .. first + count - 1 of the little-endian number that begins at a byte."""
    return tuple(range(8 * byte + first, 8 * byte + first + count))


def _packed(parts: tuple[Part, ...], count: int) -> Iterator[tuple[int, ...]]:
    """The bits of each of `count` numbers."""
    for number in range(count):
        bits: tuple[int, ...] = ()
        for at, width, stride in parts:
            stretch, inside = divmod(number, 8 // width * stride)
            bits += _run(at + stretch * stride + inside % stride, inside // stride * width, width)
        yield bits


def _fields(name: str, block: int) -> Iterator[Field]:
    for kind, at in HALVES.get(name, ()):
        yield Field(kind, 0, _run(at, 0, 16), range(block))
    if name in CODES:
        for i, bits in enumerate(_packed(CODES[name], block)):
            yield Field("code", i, bits, range(i, i + 1))
    if name in SCALES:
        group, parts = SCALES[name]
        for i, bits in enumerate(_packed(parts, block // group)):
            if name == "NVFP4":
                yield Field("unused", i, bits[7:], range(0))
                bits = bits[:7]
            yield Field("scale", i, bits, _group(i, group))
    if name in ENTRIES:
        group, parts = ENTRIES[name]
        for i, bits in enumerate(_packed(parts, block // group)):
            yield Field("entry", i, bits, _group(i, group))
    if name in SIGNS:
        for i in range(32):
            yield Field("signs", i, _run(SIGNS[name] + i, 0, 8), _group(i, 8))
    if name in WORDS:
        at, distance = WORDS[name]
        for s in range(8):
            yield Field("scale", s, _run(at + distance * s, 28, 4), _group(s, 32))
            for k in range(4):
                yield Field("signs", 4 * s + k, _run(at + distance * s, 7 * k, 7), _group(4 * s + k, 8))
    if name == "Q2_K":
        for i, bits in enumerate(_packed(((0, 4, 16),), 32)):
            if i >= 16:
                yield Field("min", i - 16, bits, _group(i - 16, 16))
    elif name in ("Q4_K", "Q5_K"):
        yield from _six_bits()
    elif name == "IQ2_XXS":
        for i in range(32):
            yield Field("entry", i, _run(2 + 8 * (i // 4) + i % 4, 0, 8), _group(i, 8))
    elif name == "IQ2_XS":
        for i in range(32):
            yield Field("entry", i, _run(2 + 2 * i, 0, 9), _group(i, 8))
            yield Field("signs", i, _run(2 + 2 * i, 9, 7), _group(i, 8))
    elif name == "IQ1_S":
        for i in range(32):
            yield Field("entry", i, _run(2 + i, 0, 8) + _run(34 + i // 4 * 2, 3 * (i % 4), 3), _group(i, 8))
        for s in range(8):
            yield Field("scale", s, _run(34 + 2 * s, 12, 3), _group(s, 32))
            yield Field("shift", s, _run(34 + 2 * s, 15, 1), _group(s, 32))
    elif name == "IQ1_M":
        yield Field("d", 0, sum((_run(48 + 2 * k, 12, 4) for k in range(4)), ()), range(block))
        for i in range(32):
            yield Field("entry", i, _run(i, 0, 8) + _run(32 + i // 2, i % 2 * 4, 3), _group(i, 8))
            yield Field("shift", i, _run(32 + i // 2, i % 2 * 4 + 3, 1), _group(i, 8))
        for s in range(16):
            yield Field("scale", s, _run(48 + s // 4 * 2, s % 4 * 3, 3), _group(s, 16))
    elif name == "TQ1_0":
        i = 0
        for first, at, width, trits in TRITS:
            for k in range(width):
                yield Field("trits", i, _run(at + k, 0, 8), range(first + k, first + k + trits * width, width))
                i += 1


def _group(index: int, size: int) -> range:
    return range(index * size, (index + 1) * size)


def _six_bits() -> Iterator[Field]:
    """Eight scales and eight minima of 6 bits in bytes 4 to 15 of Q4_K and Q5_K."""
    for kind, at, high in (("scale", 4, 0), ("min", 8, 4)):
        for i in range(8):
            bits = _run(at + i, 0, 6) if i < 4 else _run(8 + i, high, 4) + _run(at + i - 4, 6, 2)
            yield Field(kind, i, bits, _group(i, 32))


# --- what the bits mean -----------------------------------------------------------------------------------------------


def _half(value: int) -> float:
    return float(np.array(value, np.uint16).view(np.float16))


def _less(offset: int) -> Callable[[int], float]:
    return lambda value: float(value - offset)


def _signed(value: int) -> float:
    return float((value ^ 128) - 128)


def _e2m1(value: int) -> float:
    return -E2M1[value & 7] if value & 8 else E2M1[value & 7]


def _ue4m3(value: int) -> float:
    if value == 0x7F:
        return 0.0
    e, m = value >> 3, value & 7
    return 2.0 ** (e - 7) * (1 + m / 8) if e else 2.0**-6 * m / 8


def _meaning(name: str) -> tuple[str, dict[str, Callable[[int], float]]]:
    """The formula, and how values of fields enter it."""
    halves = dict.fromkeys(("d", "dmin", "m"), _half)
    plain: dict[str, tuple[str, dict[str, Callable[[int], float]]]] = {
        "Q4_0": ("w = d (q - 8)", {"code": _less(8)}),
        "Q5_0": ("w = d (q - 16)", {"code": _less(16)}),
        "Q8_0": ("w = d q", {"code": _signed}),
        "Q3_K": ("w = d (s - 32) (q - 4)", {"scale": _less(32), "code": _less(4)}),
        "Q6_K": ("w = d s (q - 32)", {"scale": _signed, "code": _less(32)}),
        "IQ4_NL": ("w = d book[q]", {"code": lambda value: float(IQ4_NL.kvalues[value])}),
        "IQ4_XS": ("w = d (s - 32) book[q]", {"scale": _less(32), "code": lambda value: float(IQ4_NL.kvalues[value])}),
        "TQ1_0": ("w = d (trit - 1)", {}),
        "TQ2_0": ("w = d (q - 1)", {"code": _less(1)}),
        "Q1_0": ("w = d or -d", {"code": lambda value: 2.0 * value - 1}),
        "Q2_0": ("w = d (q - 1)", {"code": _less(1)}),
        "MXFP4": ("w = 2^(s - 127) e2m1[q]", {"scale": lambda value: 2.0 ** (value - 127), "code": _e2m1}),
        "NVFP4": ("w = ue4m3[s] e2m1[q]", {"scale": _ue4m3, "code": _e2m1}),
    }
    affine: dict[str, Callable[[int], float]] = {"code": float}
    plain |= dict.fromkeys(("Q4_1", "Q5_1"), ("w = d q + m", affine))
    plain |= dict.fromkeys(("Q2_K", "Q4_K", "Q5_K"), ("w = d s q - dmin m", affine))
    if name in plain:
        formula, numbers = plain[name]
        return formula, halves | numbers
    if name.startswith("IQ1"):
        shift = {"scale": lambda value: 2.0 * value + 1, "shift": lambda value: -0.125 if value else 0.125}
        return "w = d (2 s + 1) (book[entry] + shift)", halves | shift
    step = {"IQ3_XXS": 0.5, "IQ3_S": 2.0}.get(name, 0.25)
    shown = {0.25: "/ 4", 0.5: "/ 2", 2.0: "2"}[step]
    formula = f"w = ± d (s + 1/2) {shown} book[entry]"
    return formula, halves | {"scale": lambda value: (0.5 + value) * step}
