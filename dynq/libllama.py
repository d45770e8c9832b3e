"""llama.cpp's logits for every position, through its C interface (include/llama.h), which `engine.py` does not give.

llama-cpp-python (extra `bench`) and xllamacpp (extra `engine`) both export that interface. Its parameter structs grow
from version to version and are passed by value. They are opaque here: the library fills one with its defaults, dynq
sets the first two numbers and hands it back in a buffer that is larger than any of them, as the last argument. What
the library made of it is checked, so that another layout is an error and not a wrong result.
"""

from __future__ import annotations

import ctypes
import importlib.metadata
import importlib.util
import os
import re
from collections import deque
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dynq.errors import DynqError

PACKAGES = {"llama_cpp": "lib/*llama.*", "xllamacpp": "xllamacpp*.*"}  # import name -> where its library lies
_SUFFIXES = (".so", ".dylib", ".dll", ".pyd")
_ERROR = 4  # GGML_LOG_LEVEL_ERROR


class _Parameters(ctypes.Structure):
    """llama_model_params or llama_context_params; the named fields are the latter's."""

    _fields_ = (("n_ctx", ctypes.c_uint32), ("n_batch", ctypes.c_uint32), ("rest", ctypes.c_uint64 * 127))


class _Batch(ctypes.Structure):
    """llama_batch. Without positions and sequences they are those of one sequence that goes on."""

    _fields_ = (
        ("n_tokens", ctypes.c_int32),
        ("token", ctypes.c_void_p),
        ("embd", ctypes.c_void_p),
        ("pos", ctypes.c_void_p),
        ("n_seq_id", ctypes.c_void_p),
        ("seq_id", ctypes.c_void_p),
        ("logits", ctypes.c_void_p),
    )


_POINTER, _TEXT, _BOOL, _I32, _U32 = ctypes.c_void_p, ctypes.c_char_p, ctypes.c_bool, ctypes.c_int32, ctypes.c_uint32
_LOG = ctypes.CFUNCTYPE(None, ctypes.c_int, _TEXT, _POINTER)
_FUNCTIONS: dict[str, tuple[Any, list[Any]]] = {
    "llama_backend_init": (None, []),
    "llama_log_set": (None, [_LOG, _POINTER]),
    "llama_model_default_params": (_Parameters, []),
    "llama_model_load_from_file": (_POINTER, [_TEXT, _Parameters]),
    "llama_model_free": (None, [_POINTER]),
    "llama_model_get_vocab": (_POINTER, [_POINTER]),
    "llama_vocab_n_tokens": (_I32, [_POINTER]),
    "llama_tokenize": (_I32, [_POINTER, _TEXT, _I32, _POINTER, _I32, _BOOL, _BOOL]),
    "llama_context_default_params": (_Parameters, []),
    "llama_init_from_model": (_POINTER, [_POINTER, _Parameters]),
    "llama_free": (None, [_POINTER]),
    "llama_n_ctx": (_U32, [_POINTER]),
    "llama_n_batch": (_U32, [_POINTER]),
    "llama_set_n_threads": (None, [_POINTER, _I32, _I32]),
    "llama_get_memory": (_POINTER, [_POINTER]),
    "llama_memory_clear": (None, [_POINTER, _BOOL]),
    "llama_decode": (_I32, [_POINTER, _Batch]),
    "llama_get_logits_ith": (_POINTER, [_POINTER, _I32]),
}

_complaints: deque[str] = deque(maxlen=16)


@_LOG
def _listen(level: int, text: bytes, _: Any) -> None:
    if level == _ERROR:
        said = text.decode(errors="replace").strip()
        _complaints.append(re.sub(r"^((\w+|error loading model): )+", "", said))  # without the functions' names


@dataclass(frozen=True)
class Library:
    """libllama, ready to be called. name: package and version."""

    name: str
    lib: ctypes.CDLL


def find(*packages: str) -> Library:
    """The library of the first of `packages` (PACKAGES by default) that is installed and has the interface.

    llama.cpp's log goes nowhere from then on. DynqError: there is none.
    """
    reason = ""
    for package in packages or PACKAGES:
        for file in _files(package):
            try:
                lib = ctypes.CDLL(str(file))
            except OSError as error:  # built for another machine, or without what it was linked to
                reason = f"; {' '.join(str(error).split())}"
                continue
            if all(hasattr(lib, name) for name in _FUNCTIONS):
                for name, (result, arguments) in _FUNCTIONS.items():
                    function = getattr(lib, name)
                    function.restype, function.argtypes = result, arguments
                lib.llama_log_set(_listen, None)
                lib.llama_backend_init()
                distribution = package if package == "xllamacpp" else "llama-cpp-python"
                return Library(f"{distribution} {importlib.metadata.version(distribution)}", lib)
    raise DynqError(
        'llama.cpp is not installed here as a library; pip install "dynq[engine]" (ready built) or "dynq[bench]" '
        f"(built from source){reason}"
    )


def _files(package: str) -> list[Path]:
    spec = importlib.util.find_spec(package)
    if spec is None or spec.origin is None:
        return []
    return sorted(file for file in Path(spec.origin).parent.glob(PACKAGES[package]) if file.suffix in _SUFFIXES)


class Llama:
    """A GGUF opened in llama.cpp with its defaults, as ``llama-perplexity`` has them. Leaving the context frees it.

    n_ctx: tokens of a chunk. DynqError: llama.cpp does not open the file, or the library is laid out in another way.
    """

    def __init__(self, library: Library, path: Path, *, n_ctx: int, threads: int) -> None:
        self.path, self._lib = path, library.lib
        self._context = None
        _complaints.clear()
        self._model = self._lib.llama_model_load_from_file(os.fsencode(path), self._lib.llama_model_default_params())
        if not self._model:
            raise self._refused("does not open this file")
        self._vocab = self._lib.llama_model_get_vocab(self._model)
        self.n_vocab = int(self._lib.llama_vocab_n_tokens(self._vocab))
        parameters = self._lib.llama_context_default_params()
        parameters.n_ctx = parameters.n_batch = n_ctx
        self._context = self._lib.llama_init_from_model(self._model, parameters)
        if not self._context:
            self.close()
            raise self._refused(f"has no room for {n_ctx} tokens")
        # llama.cpp rounds n_ctx up to a multiple of 256
        got = self._lib.llama_n_ctx(self._context), self._lib.llama_n_batch(self._context)
        if not (n_ctx <= got[0] < n_ctx + 256 and n_ctx <= got[1] <= got[0]):
            self.close()
            raise DynqError(
                f"{library.name}: its llama.cpp takes other parameters than dynq knows; try another version"
            )
        self._lib.llama_set_n_threads(self._context, threads, threads)

    def _refused(self, what: str) -> DynqError:
        # the first complaint is the cause; those after it say that loading failed
        reason = f" ({_complaints[0]})" if _complaints else ""
        return DynqError(f"{self.path}: llama.cpp {what}{reason}")

    def __enter__(self) -> Llama:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def close(self) -> None:
        """Free the model; nothing happens the second time."""
        if self._context:
            self._lib.llama_free(self._context)
        if self._model:
            self._lib.llama_model_free(self._model)
        self._context = self._model = None

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text; special tokens in it count as those. add_special: with the first one that a text has."""
        data = text.encode()
        room = np.empty(len(data) + 8, np.int32)  # no token is less than a byte, but those at the ends
        made = self._lib.llama_tokenize(self._vocab, data, len(data), room.ctypes.data, len(room), add_special, True)
        if made < 0:
            raise self._refused("cannot tokenize the text")
        return [int(token) for token in room[:made]]

    def logits(self, tokens: np.ndarray, first: int) -> np.ndarray:
        """Logits float32 ``[n - 1 - first, n_vocab]`` after the tokens ``first .. n - 2`` of a text of its own.

        tokens int32 ``[n]``, n at most n_ctx. DynqError where llama.cpp gives none.
        """
        tokens, last = np.ascontiguousarray(tokens, np.int32), len(tokens) - 2
        wanted = np.zeros(len(tokens), np.int8)
        wanted[first : last + 1] = 1
        _complaints.clear()
        self._lib.llama_memory_clear(self._lib.llama_get_memory(self._context), True)
        batch = _Batch(n_tokens=len(tokens), token=tokens.ctypes.data, logits=wanted.ctypes.data)
        if status := self._lib.llama_decode(self._context, batch):
            raise self._refused(f"gives no logits, status {status}")
        start, end = (self._lib.llama_get_logits_ith(self._context, i) for i in (first, last))
        if not start or not end or end - start != 4 * (last - first) * self.n_vocab:
            raise self._refused("gives other logits than asked for; try another version of the library")
        rows = ctypes.cast(start, ctypes.POINTER(ctypes.c_float))
        return np.ctypeslib.as_array(rows, (last + 1 - first, self.n_vocab)).copy()
