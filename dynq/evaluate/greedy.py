"""Greedy divergence: do the original and a file still write the same answer?

Both answer the same held-out prompts through the chat template, each time with the most likely token. After the first
different token the two answers go separate ways, so what counts is how many stay identical and where the others part.
"""

from collections.abc import Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np
import torch

from dynq.errors import DynqError
from dynq.evaluate.mmlu import wilson
from dynq.progress import progress
from dynq.text import Messages, answer_batch, encode_prompt, end_of_turn, prompts

BATCH = 16  # prompts that are answered together


def encode_prompts(
    tokenizer: Any, n: int | None = None, *, n_ctx: int, n_tokens: int = 32, conversations: Sequence[Messages] = ()
) -> list[list[int]]:
    """Token ids of the first n prompts (all by default) up to where the answer begins.

    n_ctx: the model's context; a prompt that leaves no room for `n_tokens` in it loses its beginning.
    conversations: each ending with a user's turn; the package's held-out prompts by default.
    """
    conversations = conversations or prompts("evaluate")
    if n is not None and n < 1:
        raise DynqError(f"{n} prompts asked for; at least 1 is needed")
    if not 0 < n_tokens < n_ctx:
        raise DynqError(f"an answer of {n_tokens} tokens asked for; the model's context is {n_ctx}")
    return [encode_prompt(tokenizer, messages)[n_tokens - n_ctx :] for messages in conversations[:n]]


def stop_tokens(original: Any, tokenizer: Any) -> set[int]:
    """What ends an answer, by the original's config and chat template. A GGUF may name fewer such tokens."""
    return end_of_turn(original, tokenizer)[0]


@torch.inference_mode()
def answer(
    model: Any,
    encoded: Sequence[Sequence[int]],
    stop: set[int],
    *,
    n_tokens: int = 32,
    batch: int = BATCH,
    desc: str = "greedy answers",
) -> list[list[int]]:
    """The model's greedy answer to each prompt: at most `n_tokens`, fewer where it ends its turn.

    stop: `stop_tokens` of the original, for all models. An empty desc means no progress bar.
    """
    answers: list[list[int]] = [[] for _ in encoded]
    order = sorted(range(len(encoded)), key=lambda at: len(encoded[at]))  # less padding
    starts = range(0, len(order), batch)
    for start in progress(starts, desc=desc, unit="batch") if desc else starts:
        rows = order[start : start + batch]
        found = answer_batch(model, [list(encoded[at]) for at in rows], n_tokens, stop, None, None)
        for at, tokens in zip(rows, found, strict=True):
            answers[at] = tokens
    return answers


@dataclass(frozen=True)
class Divergence:
    """How far the answers of a file follow the original's.

    n: answers; identical: how many are the same to their end; share, low, high: their fraction with its 95 % interval;
    mean, median: tokens before the first difference, over the answers that differ (None if none does); histogram:
    how many part at token 0, 1, 2, ...
    """

    n: int
    identical: int
    share: float
    low: float
    high: float
    mean: float | None
    median: float | None
    histogram: list[int]

    def as_dict(self) -> dict[str, Any]:
        return asdict(self)


def first_difference(a: Sequence[int], b: Sequence[int]) -> int | None:
    """Tokens before the first one that differs; where one answer ends, the other's next token differs. None: equal."""
    shorter = min(len(a), len(b))
    at = next((at for at in range(shorter) if a[at] != b[at]), shorter)
    return None if at == len(a) == len(b) else at


def compare(original: Sequence[Sequence[int]], file: Sequence[Sequence[int]], *, n_tokens: int = 32) -> Divergence:
    """original, file: answers to the same prompts, of at most `n_tokens`."""
    places = [first_difference(a, b) for a, b in zip(original, file, strict=True)]
    parted = [at for at in places if at is not None]
    n, identical = len(places), len(places) - len(parted)
    return Divergence(
        n,
        identical,
        identical / n,
        *wilson(identical, n),
        float(np.mean(parted)) if parted else None,
        float(np.median(parted)) if parted else None,
        np.bincount(np.array(parted, dtype=np.int64), minlength=n_tokens).tolist(),
    )


def beside(
    tokenizer: Any,
    encoded: Sequence[Sequence[int]],
    original: Sequence[Sequence[int]],
    file: Sequence[Sequence[int]],
) -> list[dict[str, Any]]:
    """For a report: prompt, both answers as text, what they have in common, and the first difference (None: equal).

    Those that part first come first.
    """
    rows = []
    for prompt, a, b in zip(encoded, original, file, strict=True):
        at = first_difference(a, b)
        rows.append(
            {
                "prompt": tokenizer.decode(prompt, skip_special_tokens=True),
                "common": tokenizer.decode(a[:at]),
                "original": tokenizer.decode(a),
                "file": tokenizer.decode(b),
                "first_difference": at,
            }
        )
    return sorted(rows, key=lambda row: (row["first_difference"] is None, row["first_difference"] or 0))
