"""Super-blocks of 256 weights as GGUF stores them: Q2_K, Q3_K, Q4_K, Q5_K, Q6_K.

In a field of two-bit codes, byte 32 h + k (h the half of 128 weights, k in 0..31) holds four weights, 32 apart::

    bits  7 6        5 4        3 2        1 0
          w[128h     w[128h     w[128h     w[128h
           +96+k]     +64+k]     +32+k]     +k]

    Q2_K   84 bytes  scales 16 x (min : 4, scale : 4) | two-bit codes 64 | d f16 | dmin f16     w = d s q - dmin m
    Q3_K  110 bytes  third bits 32 | two-bit codes 64 | scales 12 | d f16                       w = d (s - 32) (q - 4)
    Q4_K  144 bytes  d f16 | dmin f16 | scales 12 | nibbles 128                                 w = d s q - dmin m
    Q5_K  176 bytes  d f16 | dmin f16 | scales 12 | fifth bits 32 | nibbles 128                 w = d s q - dmin m
    Q6_K  210 bytes  low nibbles 128 | upper two bits 64 | scales 16 x int8 | d f16             w = d s (q - 32)

Q3_K's third bits and Q5_K's fifth bits: bit j of byte k belongs to w[32 j + k]. Q4_K's and Q5_K's nibbles: byte
32 j + k holds w[64 j + k] below and w[64 j + 32 + k] above. Q6_K's low nibbles: byte 64 h + k holds w[128 h + k] below
and w[128 h + 64 + k] above. The twelve bytes of 6-bit scales, S[0..] being scales and M[0..] minima::

    Q4_K, Q5_K (8 + 8), j < 4                       Q3_K (16), j < 8 and i < 4
    byte j       S[j+4] upper 2 : S[j] 6            byte j       S[j+8] lower 4 : S[j] lower 4
    byte 4 + j   M[j+4] upper 2 : M[j] 6            byte 8 + i   upper 2 of S[i+12], S[i+8], S[i+4], S[i],
    byte 8 + j   M[j+4] lower 4 : S[j+4] lower 4                 from the highest bits down

Source: block_q2_K to block_q6_K in llama.cpp's ggml-common.h. Decoding multiplies and subtracts in gguf-py's order.
"""

import numpy as np

from dynq.kernels._jit import kernel


@kernel
def _put_half(bits, out, b, at):
    out[b, at] = np.uint8(bits)
    out[b, at + 1] = np.uint8(bits >> 8)


@kernel
def _get_half(data, b, at, half):
    return half[np.uint32(data[b, at]) | (np.uint32(data[b, at + 1]) << np.uint32(8))]


@kernel
def pack_q2_k(codes, scales, mins, d, dmin, out):
    """codes uint8 [blocks, 256] in 0..3; scales, mins uint8 [blocks, 16] in 0..15; d, dmin uint16; out [blocks, 84]."""
    for b in range(codes.shape[0]):
        for s in range(16):
            out[b, s] = scales[b, s] | np.uint8(mins[b, s] << 4)
        for h in range(2):
            for k in range(32):
                c = 128 * h + k
                upper = (codes[b, c + 64] << 4) | (codes[b, c + 96] << 6)
                out[b, 16 + 32 * h + k] = np.uint8(codes[b, c] | (codes[b, c + 32] << 2) | upper)
        _put_half(d[b], out, b, 80)
        _put_half(dmin[b], out, b, 82)


@kernel
def pack_q3_k(codes, scales, d, out):
    """codes uint8 [blocks, 256] in 0..7 (q + 4); scales int8 [blocks, 16] in -32..31; d uint16; out [blocks, 110]."""
    for b in range(codes.shape[0]):
        for k in range(32):
            bits = np.uint8(0)
            for j in range(8):
                bits |= np.uint8((codes[b, 32 * j + k] >> 2) << j)
            out[b, k] = bits
        for h in range(2):
            for k in range(32):
                c = 128 * h + k
                upper = ((codes[b, c + 64] & 3) << 4) | ((codes[b, c + 96] & 3) << 6)
                out[b, 32 + 32 * h + k] = np.uint8((codes[b, c] & 3) | ((codes[b, c + 32] & 3) << 2) | upper)
        for j in range(8):
            out[b, 96 + j] = np.uint8(((scales[b, j] + 32) & 15) | (((scales[b, j + 8] + 32) & 15) << 4))
        for j in range(4):
            bits = np.uint8(0)
            for i in range(4):
                bits |= np.uint8(((scales[b, 4 * i + j] + 32) >> 4) << (2 * i))
            out[b, 104 + j] = bits
        _put_half(d[b], out, b, 108)


@kernel
def pack_q45_k(codes, scales, mins, d, dmin, five, out):
    """codes uint8 [blocks, 256]; scales, mins uint8 [blocks, 8] in 0..63; out [blocks, 144], or 176 with fifth bits."""
    for b in range(codes.shape[0]):
        _put_half(d[b], out, b, 0)
        _put_half(dmin[b], out, b, 2)
        for j in range(4):
            out[b, 4 + j] = np.uint8(scales[b, j] | ((scales[b, j + 4] >> 4) << 6))
            out[b, 8 + j] = np.uint8(mins[b, j] | ((mins[b, j + 4] >> 4) << 6))
            out[b, 12 + j] = np.uint8((scales[b, j + 4] & 15) | ((mins[b, j + 4] & 15) << 4))
        at = 16
        if five:
            for k in range(32):
                bits = np.uint8(0)
                for j in range(8):
                    bits |= np.uint8((codes[b, 32 * j + k] >> 4) << j)
                out[b, 16 + k] = bits
            at = 48
        for j in range(4):
            for k in range(32):
                c = 64 * j + k
                out[b, at + 32 * j + k] = np.uint8((codes[b, c] & 15) | ((codes[b, c + 32] & 15) << 4))


@kernel
def pack_q6_k(codes, scales, d, out):
    """codes uint8 [blocks, 256] in 0..63 (q + 32); scales int8 [blocks, 16]; d uint16 [blocks]; out [blocks, 210]."""
    for b in range(codes.shape[0]):
        for h in range(2):
            for k in range(64):
                c = 128 * h + k
                out[b, 64 * h + k] = np.uint8((codes[b, c] & 15) | ((codes[b, c + 64] & 15) << 4))
            for k in range(32):
                c = 128 * h + k
                upper = ((codes[b, c + 64] >> 4) << 4) | ((codes[b, c + 96] >> 4) << 6)
                out[b, 128 + 32 * h + k] = np.uint8((codes[b, c] >> 4) | ((codes[b, c + 32] >> 4) << 2) | upper)
        for s in range(16):
            out[b, 192 + s] = np.uint8(scales[b, s])
        _put_half(d[b], out, b, 208)


@kernel
def decode_q2_k(data, half, out):
    """Blocks uint8 [blocks, 84] to float32 [blocks, 256]; `half` is the float32 of every half float, by its bits."""
    for b in range(data.shape[0]):
        d, dmin = _get_half(data, b, 80, half), _get_half(data, b, 82, half)
        for s in range(16):
            scale = d * np.float32(data[b, s] & np.uint8(15))
            offset = dmin * np.float32(data[b, s] >> np.uint8(4))
            at, shift = 16 + 32 * (s // 8) + 16 * (s % 2), np.uint8(2 * (s % 8 // 2))
            for k in range(16):
                code = np.int32(np.uint8(data[b, at + k] >> shift) & np.uint8(3))
                out[b, 16 * s + k] = scale * np.float32(code) - offset


@kernel
def decode_q3_k(data, half, out):
    """As decode_q2_k, for Q3_K."""
    for b in range(data.shape[0]):
        d = _get_half(data, b, 108, half)
        for s in range(16):
            lower = (data[b, 96 + s % 8] >> (4 * (s // 8))) & 15
            upper = (data[b, 104 + s % 4] >> (2 * (s // 4))) & 3
            scale = d * np.float32(np.int32(lower | (upper << 4)) - np.int32(32))
            at, shift, bit = 16 * (s % 2), np.uint8(2 * (s % 8 // 2)), np.uint8(s // 2)
            two = 32 + 32 * (s // 8) + at
            for k in range(16):
                code = np.int32(np.uint8(data[b, two + k] >> shift) & np.uint8(3))
                third = np.int32(np.uint8(data[b, at + k] >> bit) & np.uint8(1))
                out[b, 16 * s + k] = scale * np.float32(code + third * np.int32(4) - np.int32(4))


@kernel
def decode_q45_k(data, half, five, out):
    """As decode_q2_k, for Q4_K, or for Q5_K where `five`."""
    start = 48 if five else 16
    for b in range(data.shape[0]):
        d, dmin = _get_half(data, b, 0, half), _get_half(data, b, 2, half)
        for s in range(8):
            if s < 4:
                scale, minimum = data[b, 4 + s] & 63, data[b, 8 + s] & 63
            else:
                scale = (data[b, 8 + s] & 15) | ((data[b, s] >> 6) << 4)
                minimum = (data[b, 8 + s] >> 4) | ((data[b, 4 + s] >> 6) << 4)
            step, offset = d * np.float32(scale), dmin * np.float32(minimum)
            at, shift, bit = start + 32 * (s // 2), np.uint8(4 * (s % 2)), np.uint8(s)
            if five:
                for k in range(32):
                    code = np.int32(np.uint8(data[b, at + k] >> shift) & np.uint8(15))
                    fifth = np.int32(np.uint8(data[b, 16 + k] >> bit) & np.uint8(1))
                    out[b, 32 * s + k] = step * np.float32(code + fifth * np.int32(16)) - offset
            else:
                for k in range(32):
                    code = np.int32(np.uint8(data[b, at + k] >> shift) & np.uint8(15))
                    out[b, 32 * s + k] = step * np.float32(code) - offset


@kernel
def decode_q6_k(data, half, out):
    """As decode_q2_k, for Q6_K."""
    for b in range(data.shape[0]):
        d = _get_half(data, b, 208, half)
        for s in range(16):
            scale = d * np.float32(np.int8(data[b, 192 + s]))
            h, quarter, at = s // 8, s % 8 // 2, 16 * (s % 2)
            low = 64 * h + 32 * (quarter % 2) + at
            high = 128 + 32 * h + at
            shift, upper = np.uint8(4 * (quarter // 2)), np.uint8(2 * quarter)
            for k in range(16):
                code = np.int32(np.uint8(data[b, low + k] >> shift) & np.uint8(15))
                two = np.int32(np.uint8(data[b, high + k] >> upper) & np.uint8(3))
                out[b, 16 * s + k] = scale * np.float32(code + two * np.int32(16) - np.int32(32))
