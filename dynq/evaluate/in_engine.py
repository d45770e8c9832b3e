"""Original and files compared in llama.cpp alone: for models that dynq cannot run.

llama.cpp's arithmetic, which quantizes activations too, is on both sides. What is read are the user's own text files
or the held-out prompts that come with dynq, tokenized by llama.cpp: nothing is sampled from the model.
"""

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynq import export, libllama
from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld
from dynq.evaluate.compare import Contender, Meter, Unmeasured
from dynq.imatrix import Importance
from dynq.progress import progress
from dynq.recipe import Recipe
from dynq.text import load_text, prompts, text_files


class InEngine:
    """Writes what is to be scored as a file, unless it is one, and runs it in llama.cpp."""

    def __init__(
        self,
        library: libllama.Library,
        checkpoint: Checkpoint,
        importance: Importance | None,
        tokens: np.ndarray,
        threads: int | None = None,
    ):
        self.about: list[Any] = ["llama.cpp", library.name]
        self._made = Path()
        self._library, self._checkpoint, self._tokens = library, checkpoint, tokens
        self._importance, self._threads = importance, threads

    def _logits(self, file: Path, first: int, label: str) -> Iterator[torch.Tensor]:
        with opened(self._library, file, self._tokens.shape[1]) as model:
            for chunk in progress(self._tokens, desc=f"{label}: llama.cpp", unit="chunk"):
                yield torch.from_numpy(model.logits(chunk, first))

    def reference(self, path: Path) -> kld.Reference:
        self._made = path.with_name("mix.gguf")
        file, first = self._checkpoint.path, self._tokens.shape[1] // 2
        with opened(self._library, file, self._tokens.shape[1]) as model:
            n_vocab = model.n_vocab
        log_probs = (kld.log_softmax(logits) for logits in self._logits(file, first, "original"))
        return kld.keep_reference(log_probs, self._tokens, first, n_vocab, path)

    def score(self, contender: Contender, file: Path | None, reference: kld.Reference) -> dict[str, Any]:
        if file:
            return self._measured(file, contender.label, reference)
        try:
            recipe = Recipe(contender.formats, contender.label, 0, 0.0, None)
            export.export(self._checkpoint, recipe, self._importance, self._made, threads=self._threads)
            return self._measured(self._made, contender.label, reference)
        finally:
            self._made.unlink(missing_ok=True)

    def _measured(self, file: Path, label: str, reference: kld.Reference) -> dict[str, Any]:
        scores = kld.score(self._logits(file, reference.first, label), reference)
        if not np.isfinite(scores.kld).all():
            raise DynqError(f"{file}: llama.cpp's answers are not finite numbers somewhere in the text")
        return {"statistics": kld.statistics(scores), "dtype": "llama.cpp", "floor": None}


def opened(library: libllama.Library, file: Path, n_ctx: int) -> libllama.Llama:
    """A file in llama.cpp, on as many threads as torch has."""
    return libllama.Llama(library, file, n_ctx=n_ctx, threads=torch.get_num_threads())


class _Tokenizer:
    """llama.cpp's tokenizer as `dynq.text` takes one: no chat template, so chats are read as bare contents."""

    chat_template = None

    def __init__(self, model: libllama.Llama):
        self._model = model
        with_first, bare = model.tokenize("a", add_special=True), model.tokenize("a")
        self.bos_token_id = with_first[0] if with_first[:1] != bare[:1] else None

    def __call__(self, text: str, add_special_tokens: bool = True, verbose: bool = False) -> dict[str, list[int]]:
        return {"input_ids": self._model.tokenize(text, add_special=add_special_tokens)}


def meter(
    checkpoint: Checkpoint,
    importance: Importance | None,
    spec: str,
    *,
    n_ctx: int,
    n_chunks: int,
    folder: Path,
    threads: int | None = None,
) -> tuple[Meter, dict[str, Any]]:
    """What measures a model that only llama.cpp runs, and what is said of the text that it reads.

    spec: text files as `dynq.text.load_text` takes them, or "" for the prompts that come with dynq. Where llama.cpp is
    not installed or does not open the original, nothing is measured, and the description says why.
    DynqError: a text file that cannot be read or is too short.
    """
    for file in text_files(spec):
        if not file.is_file():
            raise DynqError(f"{file}: no such file (eval_text)")
    try:
        library = libllama.find()
        model = opened(library, checkpoint.path, n_ctx)
    except DynqError as error:
        return Unmeasured(), {"description": f"not measured: {error}", "sha256": "", "chunks": 0, "n_ctx": n_ctx}
    with model:
        own = folder / "prompts.txt"
        try:
            if not spec:
                texts = (turn["content"] for conversation in prompts("evaluate") for turn in conversation)
                own.write_text("\n\n".join(texts), encoding="utf-8")
            text = load_text(spec or str(own), _Tokenizer(model), n_ctx=n_ctx, n_chunks=n_chunks, seed=0)
        finally:
            own.unlink(missing_ok=True)
    description = text.description if spec else text.description.replace("prompts.txt", "the prompts of dynq")
    described = {"description": description, "sha256": text.sha256, "chunks": len(text.tokens), "n_ctx": n_ctx}
    return InEngine(library, checkpoint, importance, text.tokens, threads), described
