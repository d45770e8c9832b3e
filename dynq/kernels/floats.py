"""F16 and BF16, and the search for weights that are no numbers. All on the bits of float32, so that loops vectorise.

float32  s eeeeeeee mmmmmmmmmmmmmmmmmmmmmmm      F16  s eeeee mmmmmmmmmm      BF16  s eeeeeeee mmmmmmm
"""

import numpy as np

from dynq.kernels._jit import kernel
from dynq.kernels._once import once

U = np.uint32
MAGNITUDE = U(0x7FFFFFFF)
HALF = np.float32(0.5)
TO_NORMAL = np.float32(2.0**112)  # a half float's exponent bias against a float32's
SMALLEST = np.float32(2.0**-24)  # half float


@kernel
def half(value):
    """Bits of the half float nearest to a float32, ties to even; beyond the largest, the largest. Without branches."""
    bits = np.float32(value).view(U)
    magnitude = U(bits & U(0x7FFFFFFF))
    odd = U(U(magnitude >> U(13)) & U(1))
    normal = U(U(U(U(magnitude + U(0xFFF)) + odd) - U(0x38000000)) >> U(13))
    # below 2^-14 a half float is a multiple of 2^-24, which is what the sum with one half is rounded to
    tiny = U(np.float32(U(magnitude).view(np.float32) + HALF).view(U) - U(0x3F000000))
    result = tiny if magnitude < U(0x38800000) else normal
    result = result if result < U(0x7BFF) else U(0x7BFF)
    return np.uint16(result | U(U(bits >> U(16)) & U(0x8000)))


@kernel
def single(bits):
    """The float32 of a finite half float's bits."""
    h = U(bits)
    magnitude = U(U(h & U(0x7FFF)) << U(13)).view(np.float32) * TO_NORMAL
    return U(np.float32(magnitude).view(U) | U(U(h & U(0x8000)) << U(16))).view(np.float32)


@kernel
def put_half(bits, out, b, at):
    """Write the bits of a half float into bytes `at` and `at` + 1 of block b, the low byte first."""
    out[b, at] = np.uint8(bits)
    out[b, at + 1] = np.uint8(bits >> 8)


@kernel
def get_half(data, b, at, half):
    """The float32 of the half float at byte `at` of block b; `half` is half_table()."""
    return half[np.uint32(data[b, at]) | (np.uint32(data[b, at + 1]) << np.uint32(8))]


@once
def half_table() -> np.ndarray:
    """The float32 of each half float, by its bits: float32 [65536]."""
    return np.arange(1 << 16, dtype=np.uint16).view(np.float16).astype(np.float32)


@kernel
def largest_bits(bits):
    """The largest magnitude among float32 given by their bits, uint32 [n]; 0x7F800000 and more mean infinity or NaN."""
    largest = U(0)
    for i in range(bits.shape[0]):
        magnitude = U(bits[i] & MAGNITUDE)
        largest = magnitude if magnitude > largest else largest
    return largest


@kernel
def encode_f16(bits, out):
    """Bits of finite float32 to the nearest half floats (ties to even), uint16 [n]; beyond the largest, the largest."""
    for i in range(bits.shape[0]):
        magnitude = U(bits[i] & MAGNITUDE)
        odd = U(U(magnitude >> U(13)) & U(1))
        normal = U(U(U(magnitude + U(0xFFF)) + odd) - U(0x38000000)) >> U(13)
        # below 2^-14 a half float is a multiple of 2^-24, which is what the sum with one half is rounded to
        tiny = U(np.float32(magnitude.view(np.float32) + HALF).view(U) - U(0x3F000000))
        value = tiny if magnitude < U(0x38800000) else U(normal)
        value = value if value < U(0x7BFF) else U(0x7BFF)
        out[i] = np.uint16(value | U(U(bits[i] >> U(16)) & U(0x8000)))


@kernel
def encode_bf16(bits, out):
    """Bits of finite float32 to the nearest BF16 (ties to even), uint16 [n]; beyond the largest, the largest."""
    for i in range(bits.shape[0]):
        magnitude = U(bits[i] & MAGNITUDE)
        value = U(U(U(magnitude + U(0x7FFF)) + U(U(magnitude >> U(16)) & U(1))) >> U(16))
        value = value if value < U(0x7F7F) else U(0x7F7F)
        out[i] = np.uint16(value | U(U(bits[i] >> U(16)) & U(0x8000)))


@kernel
def decode_f16(halves, out):
    """Bits of half floats, uint16 [n], to float32 [n]. Infinity and NaN stay what they are. Returns `largest_bits`."""
    largest = U(0)
    for i in range(halves.shape[0]):
        h = U(halves[i])
        m = U(h & U(0x7FFF))
        # no product of what is below float32's normal numbers: processors take a hundred times as long for one
        tiny = np.float32(np.float32(np.int32(m)) * SMALLEST).view(U)
        normal = U(U(m << U(13)) + U(0x38000000))  # the exponent's bias is 15, here 127
        normal = normal if m < U(0x7C00) else U(U(m << U(13)) | U(0x7F800000))
        value = tiny if m < U(0x400) else normal
        largest = value if value > largest else largest
        out[i] = U(value | U(U(h & U(0x8000)) << U(16))).view(np.float32)
    return largest


@kernel
def decode_bf16(upper, out):
    """Bits of BF16, uint16 [n], to float32 given by its bits, uint32 [n]. Returns `largest_bits`."""
    largest = U(0)
    for i in range(upper.shape[0]):
        value = U(U(upper[i]) << U(16))
        magnitude = U(value & MAGNITUDE)
        largest = magnitude if magnitude > largest else largest
        out[i] = value
    return largest
