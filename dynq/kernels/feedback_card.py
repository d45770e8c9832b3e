"""Error feedback's kernels on torch tensors: `choose` of dynq.kernels.feedback and .feedback_books, a thread for a row."""

from functools import cache
from typing import Any

import numpy as np
import torch

from dynq.kernels import feedback, feedback_books
from dynq.kernels.on_card import OnCard

_COLUMN = "[:, t : t + 1]"
_SLICES = dict.fromkeys(("w", "P", "step", "offset", "E", "codes"), _COLUMN) | {"best": "[t : t + 1]"}


@cache
def _codes(group: int) -> OnCard:
    return OnCard(feedback.choose, {"LANES": 1, "g": group}, _SLICES)


@cache
def _entries(group: int, dim: int) -> OnCard:
    return OnCard(feedback_books.choose, {"LANES": 1, "g": group, "dim": dim}, _SLICES)


def choose_codes(w: torch.Tensor, *arguments: Any) -> None:
    """As dynq.kernels.feedback.choose."""
    _codes(len(w))(w.shape[1], w, *arguments)


def choose_entries(
    w: torch.Tensor,
    P: torch.Tensor,
    R: torch.Tensor,
    step: torch.Tensor,
    offset: torch.Tensor,
    dim: int,
    book: np.ndarray,
    *arguments: Any,
) -> None:
    """As dynq.kernels.feedback_books.choose."""
    _entries(len(w), dim)(w.shape[1], w, P, R, step, offset, dim, book, *arguments)
