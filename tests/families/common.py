"""What the models of all families share, and ways to spoil an export."""

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch

Change = Callable[[str, np.ndarray], np.ndarray]


@dataclass(frozen=True)
class Wrong:
    """A wrong export: of which model, what is wrong, how tensors change (GGUF name and values to values), metadata keys
    after "<arch>." that change (None: left out), a tensor that is left out; or, where llama.cpp has something built in,
    settings with which transformers does it otherwise."""

    model: str
    what: str
    change: Change | None = None
    metadata: dict[str, Any] = field(default_factory=dict)
    left_out: str | None = None
    config: dict[str, Any] = field(default_factory=dict)


def rope(kind: str = "default", theta: float = 300.0, **settings: Any) -> dict[str, Any]:
    return {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **settings}}


def other_order(name: str, array: np.ndarray) -> np.ndarray:
    """q and k, of 4 and 2 heads, in the order of rows that the family does not have."""
    for part, heads in (("attn_q.", 4), ("attn_k.", 2)):
        if part in name:
            return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
    return array


def without(*endings: str, to: float = 0.0) -> Change:
    """Tensors with one of these name endings made constant."""
    return lambda name, array: np.full_like(array, to) if name.endswith(endings) else array


def plus(value: float, *endings: str) -> Change:
    """A number added to tensors with one of these name endings: the offset of a norm."""
    return lambda name, array: array + np.float32(value) if name.endswith(endings) else array


def experts_turned(name: str, array: np.ndarray) -> np.ndarray:
    """Every expert's down projection in its neighbour's place."""
    return np.roll(array, 1, axis=0) if "ffn_down_exps.weight" in name else array


def experts_biased(model: Any) -> None:
    """Biases that change the choice of experts; they are buffers, and zero in a new model."""
    for name, buffer in model.named_buffers():
        if name.endswith("e_score_correction_bias"):
            buffer.copy_(torch.randn(buffer.shape) * 0.3)
