"""A chunk of text as two models read it: token by token how far they diverge, and what each held likely."""

import itertools
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch

from dynq.evaluate import kld
from dynq.evaluate.where import Guess, token_text


@dataclass(frozen=True)
class ReadToken:
    """One token of the text.

    piece: what it adds to the text, nothing where it ends inside a character. kld: of the two predictions in its place,
    in nats; followed: itself, and how likely each held it; original_top, file_top: what each held likeliest instead.
    """

    piece: str
    kld: float
    followed: Guess
    original_top: list[Guess]
    file_top: list[Guess]


@dataclass(frozen=True)
class Reading:
    """A chunk. before: the text that was read but is not scored; tokens: the scored ones, in order."""

    before: str
    tokens: list[ReadToken]

    @property
    def mean_kld(self) -> float:
        return float(np.mean([token.kld for token in self.tokens]))


@torch.inference_mode()
def read(
    original: Any, file: Any, tokens: np.ndarray, tokenizer: Any, *, first: int | None = None, top: int = 5
) -> Reading:
    """Both models over one chunk.

    original, file: from `load_model`. tokens: int32 ``[n_ctx]``; the predictions from position `first` on are scored,
    n_ctx / 2 by default as in `dynq.evaluate.kld`. top: how many guesses of each model to keep.
    """
    first = len(tokens) // 2 if first is None else first
    log_p, log_q = (
        next(kld.log_probabilities(model, tokens[None], first, desc="")).cpu() for model in (original, file)
    )
    divergence = (log_p.exp() * (log_p - log_q)).sum(-1).clamp(min=0).tolist()
    p_top, q_top = (log_p.topk(top).indices.tolist(), log_q.topk(top).indices.tolist())
    texts: dict[int, str] = {}

    def guess(place: int, token: int) -> Guess:
        text = texts.setdefault(token, token_text(tokenizer, token))
        return Guess(token, text, float(log_p[place, token].exp()), float(log_q[place, token].exp()))

    pieces = _pieces(tokenizer, tokens.tolist(), first + 1)
    scored = [
        ReadToken(
            pieces[place],
            divergence[place],
            guess(place, token),
            [guess(place, other) for other in p_top[place]],
            [guess(place, other) for other in q_top[place]],
        )
        for place, token in enumerate(tokens[first + 1 :].tolist())
    ]
    return Reading(tokenizer.decode(tokens[: first + 1].tolist()), scored)


def _pieces(tokenizer: Any, tokens: list[int], first: int) -> list[str]:
    """What each token from `first` on adds to the text: decoded alone, many lose the blank before them."""
    start = max(0, first - 4)
    # a character cut off in the middle is decoded as U+FFFD until its last token is there
    texts = [tokenizer.decode(tokens[start:end]).rstrip("\ufffd") for end in range(first, len(tokens) + 1)]
    return [after[len(before) :] for before, after in itertools.pairwise(texts)]
