"""Passages that a file is judged by."""

import json
from pathlib import Path
from typing import Any

import numpy as np

from dynq.errors import DynqError
from dynq.text import further_chunks, prompts


def passages(file: Path, tokenizer: Any, *, n_ctx: int, chunks: int, skip: int) -> np.ndarray:
    """int32 [chunks or fewer, n_ctx] of a text, its first `skip` chunks left out; DynqError where it has no more."""
    found = further_chunks(str(file), tokenizer, n_ctx=n_ctx, skip=skip, most=chunks)
    if not found:
        raise DynqError(f"{file}: no more than {skip} chunks of {n_ctx} tokens; skip fewer, or take a longer text")
    return np.array(found, np.int32)


def write_languages(file: Path) -> Path:
    """The package's prompts in other languages than English that are kept for evaluation, as chats for `load_text`."""
    lines = (json.dumps({"messages": messages}) + "\n" for messages in prompts("evaluate", foreign=True))
    file.write_text("".join(lines), encoding="utf-8")
    return file
