"""The packings in which large models are published, to float32: float8 in tiles, and MXFP4 as gpt-oss has it.

    E4M3  s eeee mmm   2^(e - 7) (1 + m / 8); 2^-6 m / 8 where e is 0; NaN where all but s are 1; there is no infinity

A matrix in float8 has a factor for each of its tiles. Of MXFP4 a group is 16 bytes of two neighbours each, the first in
the lower half, and a scale (dynq.kernels.fp4 has both codes, in GGUF's order). -0 stays what it is.

As in dynq.kernels.floats, a decoder says what the largest magnitude is by its bits: from 0x7F800000 on some value is
infinity or NaN.

Source: OCP 8-bit Floating Point Specification (OFP8) 1.0; OCP Microscaling Formats (MX) v1.0; how they are stored:
DeepSeek V3's and gpt-oss's checkpoints.
"""

import numpy as np

from dynq.kernels._jit import kernel
from dynq.kernels._once import once
from dynq.kernels.floats import MAGNITUDE

U = np.uint32
TINY = np.float32(2.0**-9)  # the smallest number of E4M3
NAN = U(0x7FC00000)


@kernel
def decode_e4m3(codes, scales, tile_rows, width, out):
    """uint8 [rows, n] to float32 [rows, n]: row i has the factors scales[tile_rows[i]], each for `width` columns."""
    largest = U(0)
    for i in range(codes.shape[0]):
        for t in range(scales.shape[1]):
            scale = scales[tile_rows[i], t]
            code, value = codes[i, t * width : (t + 1) * width], out[i, t * width : (t + 1) * width]
            for j in range(code.shape[0]):
                c = U(code[j])
                m = U(c & U(127))
                normal = U(U(m << U(20)) + U(0x3C000000))  # the exponent's bias is 7, here 127
                tiny = np.float32(np.float32(np.int32(m)) * TINY).view(U)
                bits = tiny if m < U(8) else normal
                bits = bits if m < U(127) else NAN
                bits = U(bits | U(U(c & U(128)) << U(24)))
                product = np.float32(bits.view(np.float32) * scale)
                value[j] = product
                magnitude = U(product.view(U) & MAGNITUDE)
                largest = magnitude if magnitude > largest else largest
    return largest


@kernel
def decode_pairs(blocks, scales, pairs, powers, both, out):
    """Codes uint8 [groups, 16] and scales uint8 [groups] to float32 [groups, 32].

    pairs, powers: the tables below. both: `out` as uint64 [groups, 16], for a table is looked up word by word.
    """
    for g in range(blocks.shape[0]):
        for k in range(16):
            both[g, k] = pairs[blocks[g, k]]
    largest = U(0)
    for g in range(blocks.shape[0]):
        scale = powers[scales[g]]
        for i in range(32):
            product = np.float32(out[g, i] * scale)
            out[g, i] = product
            magnitude = U(product.view(U) & MAGNITUDE)
            largest = magnitude if magnitude > largest else largest
    return largest


@once
def pairs() -> np.ndarray:
    """The two values of a byte with two codes of E2M1, float32 [2] as uint64 [256]."""
    size = np.array([0, 0.5, 1, 1.5, 2, 3, 4, 6], np.float32)  # section 5.3.3
    value, byte = np.concatenate([size, -size]), np.arange(256)
    return np.stack([value[byte & 15], value[byte >> 4]], axis=1).view(np.uint64).ravel()


@once
def powers() -> np.ndarray:
    """The value of each E8M0, float32 [256]: powers of two, all ones is NaN (section 5.4.1)."""
    return np.append(np.ldexp(np.float32(1), np.arange(255) - 127), np.float32(np.nan))
