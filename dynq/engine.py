"""llama.cpp itself, from the package `xllamacpp`: opens a file and generates from it (extra `engine`)."""

from __future__ import annotations

import json
import urllib.error
import urllib.request
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Any

from dynq.errors import DynqError


@dataclass(frozen=True)
class Generation:
    """What the engine generated.

    text, tokens: the continuation, without the prompt.
    top_logprobs: per token, {token id: natural log-probability} of the most likely ones, before any sampling. Empty
        where llama.cpp does not give them for every token (it leaves out those that end inside a character).
    """

    text: str
    tokens: list[int]
    top_logprobs: list[dict[int, float]]


class Engine:
    """A GGUF opened in llama.cpp, on the CPU. A context manager: leaving it frees the model.

    Args:
        path: a GGUF file.
        n_ctx: tokens of context.
        threads: CPU threads.
        exact: keep keys and values in float32 and attention unfused, for comparisons; else llama.cpp's defaults.

    Raises:
        DynqError: xllamacpp is not installed, or llama.cpp does not open the file.
    """

    def __init__(self, path: str | Path, *, n_ctx: int = 2048, threads: int = 2, exact: bool = False) -> None:
        try:
            import xllamacpp
        except ImportError:
            raise DynqError('llama.cpp is not installed here; pip install "dynq[engine]"') from None
        if not Path(path).is_file():
            raise DynqError(f"{path}: no such file")
        self.path = Path(path)
        self._ran = False
        params = xllamacpp.CommonParams()
        params.model.path = str(path)
        params.n_ctx, params.n_parallel, params.n_gpu_layers = n_ctx, 1, 0
        params.cpuparams.n_threads = params.cpuparams_batch.n_threads = threads
        params.verbosity = -1  # errors only
        params.warmup = params.fit_params = False
        # not used here; the file's own is a stranger's program, which llama.cpp runs to see what it is like
        params.chat_template = "chatml"
        if exact:
            params.flash_attn_type = xllamacpp.llama_flash_attn_type.LLAMA_FLASH_ATTN_TYPE_DISABLED
            params.cache_type_k = params.cache_type_v = xllamacpp.ggml_type.GGML_TYPE_F32
        try:
            self._server: Any = xllamacpp.Server(params)
        except Exception as error:  # the binding raises whatever its C++ side threw
            raise DynqError(f"{path}: llama.cpp does not open this file ({error})") from error

    def __enter__(self) -> Engine:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if not self._ran:
            # A server that is freed before its loop runs waits for the end of that loop for ever: the loop begins
            # afterwards and overwrites the word that it should end. Whatever the loop has answered, it runs.
            with suppress(DynqError):
                self.generate([0], 1, top=0)
        self._server = None

    def generate(
        self, prompt: str | Sequence[int], n_tokens: int = 64, *, top: int = 20, ignore_eos: bool = False
    ) -> Generation:
        """Continue a prompt (text, or token ids) greedily.

        Args:
            n_tokens: at most so many; fewer if the model ends its answer, unless `ignore_eos`.
            top: log-probabilities to return per token.
        """
        self._ran = True
        answer = self._post(
            "completion",
            {
                "prompt": prompt if isinstance(prompt, str) else [int(token) for token in prompt],
                "n_predict": n_tokens,
                "temperature": 0.0,
                "n_probs": top,
                "ignore_eos": ignore_eos,
                "return_tokens": True,
                "cache_prompt": False,
            },
        )
        steps = answer.get("completion_probabilities", [])
        tops = [{entry["id"]: entry["logprob"] for entry in step["top_logprobs"]} for step in steps]
        whole = [step["id"] for step in steps] == answer["tokens"]
        return Generation(answer["content"], answer["tokens"], tops if whole else [])

    def tokenize(self, text: str, *, add_special: bool = False) -> list[int]:
        """Token ids of a text in llama.cpp. Special tokens in the text are recognised.

        add_special: put first and last tokens where the file asks for them.
        """
        request = {"content": text, "add_special": add_special, "parse_special": True}
        return list(self._post("tokenize", request)["tokens"])

    def _post(self, route: str, body: dict[str, Any]) -> dict[str, Any]:
        request = urllib.request.Request(
            f"{self._server.listening_address}/{route}", json.dumps(body).encode(), {"Content-Type": "application/json"}
        )
        try:
            with urllib.request.urlopen(request) as response:
                return dict(json.load(response))
        except urllib.error.HTTPError as error:
            reason = error.read().decode(errors="replace").strip()
            raise DynqError(f"{self.path}: llama.cpp refused the request: {reason}") from error


def generate(path: str | Path, prompt: str | Sequence[int], n_tokens: int = 64, *, top: int = 20) -> Generation:
    """Open a GGUF in llama.cpp, continue a prompt greedily, close it. See `Engine`."""
    with Engine(path) as engine:
        return engine.generate(prompt, n_tokens, top=top)
