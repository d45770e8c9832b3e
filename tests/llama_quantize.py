"""llama.cpp's own quantizer, `llama_model_quantize` of libllama, through llama-cpp-python (the extra `bench`).

Used by tests as the oracle of mixes and recipes, and by tests/bench as the rival. Nothing here is imported by dynq.
"""

import ctypes
import functools
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import gguf
import numpy as np
from numpy.typing import NDArray

# llama_ftype of include/llama.h
FILE_TYPES = {"F32": 0, "F16": 1, "Q4_0": 2, "Q4_1": 3, "Q8_0": 7, "Q5_0": 8, "Q5_1": 9, "Q2_K": 10, "Q3_K_S": 11}
FILE_TYPES |= {"Q3_K_M": 12, "Q3_K_L": 13, "Q4_K_S": 14, "Q4_K_M": 15, "Q5_K_S": 16, "Q5_K_M": 17, "Q6_K": 18}
FILE_TYPES |= {"IQ2_XXS": 19, "IQ2_XS": 20, "Q2_K_S": 21, "IQ3_XS": 22, "IQ3_XXS": 23, "IQ1_S": 24, "IQ4_NL": 25}
FILE_TYPES |= {"IQ3_S": 26, "IQ3_M": 27, "IQ2_S": 28, "IQ2_M": 29, "IQ4_XS": 30, "IQ1_M": 31, "BF16": 32}
FILE_TYPES |= {"TQ1_0": 36, "TQ2_0": 37, "MXFP4_MOE": 38, "Q1_0": 40, "Q2_0": 41}

_FLOATS = ctypes.POINTER(ctypes.c_float)


def quantize(
    source: Path,
    target: Path | None,
    mix: str,
    importance: Mapping[str, NDArray[np.float32]] | None = None,
    overrides: str = "",
    threads: int = 1,
) -> tuple[bool, str]:
    """Write `source` as `mix` to `target`, as llama-quantize does; (whether it succeeded, what libllama logged).

    target: None for a dry run. importance: tensor -> mean squared inputs, float32 ``[n]``; any entry at all makes it
    "with an importance matrix". overrides: the text of a --tensor-type-file.
    """
    import llama_cpp

    lines: list[str] = []

    @llama_cpp.llama_log_callback
    def log(level: int, text: bytes, user_data: object) -> None:
        lines.append(text.decode(errors="replace"))

    params = llama_cpp.llama_model_quantize_default_params()
    params.ftype, params.dry_run, params.nthread = FILE_TYPES[mix], target is None, threads
    entry = llama_cpp.llama_model_imatrix_data
    values = {name: np.ascontiguousarray(mean, np.float32) for name, mean in (importance or {}).items()}
    # a null name ends the list
    rows = [entry(name.encode(), mean.ctypes.data_as(_FLOATS), mean.size) for name, mean in values.items()]
    matrix = (entry * (len(rows) + 1))(*rows, entry(None, None, 0))
    if rows:
        params.imatrix = ctypes.cast(matrix, ctypes.POINTER(entry))
    # as llama-quantize reads the file: words, cut at the first "=", the pattern in lower case
    pairs = [word.partition("=")[::2] for word in overrides.split()]
    override = llama_cpp.llama_model_tensor_override
    kinds = [(pattern.lower().encode(), int(gguf.GGMLQuantizationType[kind.upper()])) for pattern, kind in pairs]
    table = (override * (len(kinds) + 1))(*(override(*kind) for kind in kinds), override(None, 0))
    if kinds:
        params.tt_overrides = ctypes.cast(table, ctypes.POINTER(override))
    llama_cpp.llama_log_set(log, ctypes.c_void_p())
    try:
        failed = llama_cpp.llama_model_quantize(
            str(source).encode(), str(target).encode() if target else b"", ctypes.byref(params)
        )
    finally:
        llama_cpp.llama_log_set(_silent(), ctypes.c_void_p())
    return not failed, "".join(lines)


@functools.cache  # libllama keeps the pointer
def _silent() -> Any:
    import llama_cpp

    return llama_cpp.llama_log_callback(lambda level, text, user_data: None)
