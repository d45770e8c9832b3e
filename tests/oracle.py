"""llama.cpp's own encoders and decoders, through the C symbols that xllamacpp's extension module exports.

Used by the tests as the oracle and by tests/bench as the rival. Nothing here is imported by dynq itself.
"""

import ctypes
from functools import cache

import numpy as np

from dynq import formats, libllama
from dynq.errors import DynqError

_FLOATS = ctypes.POINTER(ctypes.c_float)


@cache
def library() -> ctypes.CDLL | None:
    """The library, or None when xllamacpp (the extra `engine`) is not installed."""
    try:
        lib = libllama.find("xllamacpp").lib
    except DynqError:
        return None
    lib.ggml_quantize_chunk.restype = ctypes.c_size_t
    lib.ggml_quantize_chunk.argtypes = [
        ctypes.c_int,
        _FLOATS,
        ctypes.c_void_p,
        ctypes.c_int64,
        ctypes.c_int64,
        ctypes.c_int64,
        _FLOATS,
    ]
    return lib


def quantize(
    weights: np.ndarray, name: str, importance: np.ndarray | None = None, out: np.ndarray | None = None
) -> np.ndarray:
    """`ggml_quantize_chunk` over float32 [rows, n]: uint8 [rows, row_bytes], into `out` if given. Releases the GIL."""
    lib = library()
    if lib is None:
        raise DynqError("xllamacpp is not installed; install the extra `engine`")
    weights = np.ascontiguousarray(weights, dtype=np.float32)
    rows, n = weights.shape
    if out is None:
        out = np.empty((rows, formats.row_bytes(name, n)), dtype=np.uint8)
    matrix = None
    if importance is not None:
        importance = np.ascontiguousarray(importance, dtype=np.float32)
        matrix = importance.ctypes.data_as(_FLOATS)
    kind = formats.get(name).id
    lib.ggml_quantize_chunk(kind, weights.ctypes.data_as(_FLOATS), out.ctypes.data, 0, rows, n, matrix)
    return out


def dequantize(data: np.ndarray, name: str) -> np.ndarray:
    """`dequantize_row_*` of a block format over uint8 [rows, row_bytes]: float32 [rows, n]."""
    lib = library()
    if lib is None:
        raise DynqError("xllamacpp is not installed; install the extra `engine`")
    decode = getattr(lib, f"dequantize_row_{name.lower().replace('_k', '_K')}")
    decode.argtypes = [ctypes.c_void_p, _FLOATS, ctypes.c_int64]
    decode.restype = None
    data = np.ascontiguousarray(data)
    form = formats.get(name)
    out = np.empty((len(data), data.shape[1] // form.block_bytes * form.block), np.float32)
    decode(data.ctypes.data, out.ctypes.data_as(_FLOATS), out.size)
    return out
