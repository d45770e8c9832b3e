"""Blocks of 32 weights as GGUF stores them: Q4_0, Q4_1, Q5_0, Q5_1, Q8_0.

Half floats are little-endian; byte k of a nibble field holds weight k below and weight k + 16 above::

    Q4_0  18 bytes   d f16 | 16 x (w[k+16] : 4, w[k] : 4)                      w = d (q - 8)
    Q4_1  20 bytes   d f16 | m f16 | 16 nibble pairs                           w = d q + m
    Q5_0  22 bytes   d f16 | fifth bits, bit k of 32 for w[k] | nibble pairs   w = d (q - 16)
    Q5_1  24 bytes   d f16 | m f16 | fifth bits | nibble pairs                 w = d q + m
    Q8_0  34 bytes   d f16 | 32 x int8                                         w = d q

Source: block_q4_0 to block_q8_0 in llama.cpp's ggml-common.h. Decoding multiplies and adds in gguf-py's order.
"""

import numpy as np

from dynq.kernels._jit import kernel


@kernel
def pack(codes, d, m, affine, five, out):
    """Codes from 0 (uint8 [blocks, 32]) and half floats (uint16 [blocks]) to Q4_0 .. Q5_1 blocks in `out`."""
    for b in range(codes.shape[0]):
        out[b, 0] = np.uint8(d[b])
        out[b, 1] = np.uint8(d[b] >> 8)
        at = 2
        if affine:
            out[b, 2] = np.uint8(m[b])
            out[b, 3] = np.uint8(m[b] >> 8)
            at = 4
        if five:
            for byte in range(4):
                bits = np.uint8(0)
                for k in range(8):
                    bits |= np.uint8((codes[b, 8 * byte + k] >> 4) << k)
                out[b, at + byte] = bits
            at += 4
        for k in range(16):
            out[b, at + k] = np.uint8((codes[b, k] & 15) | ((codes[b, k + 16] & 15) << 4))


@kernel
def pack_q8_0(codes, d, out):
    """Codes from 0 (q + 128) and half floats to Q8_0 blocks."""
    for b in range(codes.shape[0]):
        out[b, 0] = np.uint8(d[b])
        out[b, 1] = np.uint8(d[b] >> 8)
        for k in range(32):
            out[b, 2 + k] = codes[b, k] ^ np.uint8(128)


@kernel
def decode(data, half, affine, five, out):
    """Blocks uint8 [blocks, bytes] to float32 [blocks, 32]; `half` is the float32 of every half float, by its bits."""
    low = np.int32(0 if affine else (16 if five else 8))
    for b in range(data.shape[0]):
        d = half[np.uint32(data[b, 0]) | (np.uint32(data[b, 1]) << np.uint32(8))]
        at = 2
        m = np.float32(0)
        if affine:
            m = half[np.uint32(data[b, 2]) | (np.uint32(data[b, 3]) << np.uint32(8))]
            at = 4
        fifth = np.uint32(0)
        if five:
            for byte in range(4):
                fifth |= np.uint32(data[b, at + byte]) << np.uint32(8 * byte)
            at += 4
        for k in range(16):
            pair = np.int32(data[b, at + k])
            below = (pair & np.int32(15)) | ((np.int32(fifth >> np.uint32(k)) & np.int32(1)) << np.int32(4))
            above = (pair >> np.int32(4)) | ((np.int32(fifth >> np.uint32(k + 16)) & np.int32(1)) << np.int32(4))
            out[b, k] = d * np.float32(below - low)
            out[b, k + 16] = d * np.float32(above - low)
        if affine:
            for k in range(32):
                out[b, k] += m


@kernel
def decode_q8_0(data, half, out):
    """As decode, for Q8_0."""
    for b in range(data.shape[0]):
        d = half[np.uint32(data[b, 0]) | (np.uint32(data[b, 1]) << np.uint32(8))]
        for k in range(32):
            out[b, k] = np.float32(np.int8(data[b, 2 + k])) * d
