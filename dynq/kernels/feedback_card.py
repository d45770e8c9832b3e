"""Error feedback's kernels on torch tensors: `choose` of dynq.kernels.feedback and .feedback_books.

On a card a thread takes a row; tensors on the processor go to the kernels themselves.
"""

from functools import cache
from typing import Any

import numpy as np
import torch
from numba.core.dispatcher import Dispatcher

from dynq.kernels import feedback, feedback_books
from dynq.kernels.on_card import Known, OnCard, shared, table

_COLUMN = "[:, t : t + 1]"
_SLICES = dict.fromkeys(("w", "P", "step", "offset", "E", "codes"), _COLUMN) | {"best": "[t : t + 1]"}


@cache
def _launched(kernel: Dispatcher, known: Known) -> OnCard:
    return OnCard(kernel, known, _SLICES)


def _call(kernel: Dispatcher, known: dict[str, int], *arguments: Any) -> None:
    w = arguments[0]
    if not w.is_cuda:
        kernel(*(x.numpy() if isinstance(x, torch.Tensor) else x for x in arguments))
        return
    tensors = (shared(x) if isinstance(x, torch.Tensor) else x for x in arguments)
    given = (table(x) if isinstance(x, np.ndarray) else x for x in tensors)
    _launched(kernel, tuple(sorted(known.items())))(w.shape[1], *given)


def choose_codes(w: torch.Tensor, *arguments: Any) -> None:
    """As dynq.kernels.feedback.choose."""
    _call(feedback.choose, {"LANES": 1, "g": len(w)}, w, *arguments)


def choose_entries(
    w: torch.Tensor, P: torch.Tensor, R: torch.Tensor, step: torch.Tensor, offset: torch.Tensor, dim: int, *rest: Any
) -> None:
    """As dynq.kernels.feedback_books.choose."""
    _call(feedback_books.choose, {"LANES": 1, "g": len(w), "dim": dim}, w, P, R, step, offset, dim, *rest)
