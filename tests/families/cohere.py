"""Command-R and Command-A."""

from typing import Any

import numpy as np

from families.common import Wrong, other_order, rope, without

_COMMON = {**rope(), "layer_norm_eps": 1e-5, "logit_scale": 0.25}
MODELS: dict[str, tuple[str, dict[str, object]]] = {
    "cohere": ("cohere", _COMMON),
    "cohere-large": ("cohere", {**_COMMON, "use_qk_norm": True, "num_hidden_layers": 64}),
    "cohere2": ("cohere2", {**_COMMON, "num_hidden_layers": 4, "sliding_window": 12}),
    "cohere2-pattern": (
        "cohere2",
        {
            **_COMMON,
            "sliding_window": 12,
            "layer_types": ["full_attention", "sliding_attention", "full_attention"],
        },
    ),
}


def _norms_around_one(model: Any) -> None:
    """Norms of q and k are matrices, a row for each head."""
    for name, parameter in model.named_parameters():
        if name.endswith(("q_norm.weight", "k_norm.weight")):
            parameter.uniform_(0.5, 1.5)


PREPARE = {"cohere-large": _norms_around_one}


def _heads_turned(name: str, array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1, axis=0) if "attn_q_norm" in name else array


WRONG = [
    *(
        Wrong(model, what, change, metadata)
        for model in ("cohere", "cohere2")
        for what, change, metadata in (
            ("q and k permuted", other_order, {}),
            ("rope base", None, {"rope.freq_base": 10000.0}),
            ("no scale of logits", None, {"logit_scale": 1.0}),
            ("norms of one", without("attn_norm.weight", to=1.0), {}),
        )
    ),
    Wrong("cohere-large", "norm of q", without("attn_q_norm.weight", to=1.0)),
    Wrong("cohere-large", "norms of other heads", _heads_turned),
    Wrong("cohere-large", "norm of k", without("attn_k_norm.weight", to=1.0)),
    Wrong("cohere2", "window", metadata={"attention.sliding_window": 4096}),
    Wrong("cohere2", "all layers slide and are rotated", metadata={"attention.sliding_window_pattern": [True] * 4}),
    Wrong("cohere2-pattern", "usual pattern", metadata={"attention.sliding_window_pattern": None}),
]
BITS: dict[str, dict[str, object]] = {"cohere": {}, "cohere2": {}}
