"""Qwen3.5 and Qwen3-Next.

Heads of delta nets are 128 wide, as in every published model. A norm takes away how long their outputs are, so rounding
to F16 shows where one is short: at widths of 32, 64 and 128 it moves log-probabilities by 0.05 to 0.14, 0.03 to 0.05
and 0.02 to 0.03 (four, three and four models; the inputs of the first layer's keys and values alone make most of that).
"""

from typing import Any

import numpy as np
import torch

from families.common import Wrong, experts_turned, other_order, plus, rope, without

_KEYS, _SHARED, _WIDTH = 2, 3, 128  # three value heads to a key head: an order that is not its own inverse
_DELTA = {
    "num_hidden_layers": 4,
    "full_attention_interval": 2,
    "rms_norm_eps": 1e-6,
    "head_dim": 64,
    "linear_num_key_heads": _KEYS,
    "linear_num_value_heads": _KEYS * _SHARED,
    "linear_key_head_dim": _WIDTH,
    "linear_value_head_dim": _WIDTH,
}
_SECTIONS = {"partial_rotary_factor": 0.25, "mrope_section": [3, 3, 2], "mrope_interleaved": True}
_EXPERTS = {
    "num_experts": 6,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 96,
    "shared_expert_intermediate_size": 64,
}
_YARN = {"factor": 16.0, "original_max_position_embeddings": 32, "partial_rotary_factor": 0.5}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "qwen35": ("qwen3_5_text", {**_DELTA, **rope(**_SECTIONS), "tie_word_embeddings": True}),
    "qwen35-uneven": (
        "qwen3_5_text",
        {
            **_DELTA,
            **rope("yarn", **_YARN),
            "layer_types": ["full_attention", "linear_attention", "linear_attention", "full_attention"],
            "linear_num_value_heads": _KEYS,
        },
    ),
    "qwen35moe": ("qwen3_5_moe_text", {**_DELTA, **rope(**_SECTIONS), **_EXPERTS}),
    "qwen3next": ("qwen3_next", {**_DELTA, **rope(partial_rotary_factor=0.25), **_EXPERTS}),
}


def _prepared(model: Any) -> None:
    """Norms that are w + 1: of 0.5 to 1.5, as in other families. Logarithms of decays that come back exactly."""
    for name, parameter in model.named_parameters():
        if "norm" in name and "linear_attn" not in name:
            parameter -= 1
        if name.endswith("A_log"):
            parameter.copy_(torch.from_numpy(np.log(np.exp(parameter.numpy()))))


PREPARE = dict.fromkeys(MODELS, _prepared)


def _grouped(*kinds: str) -> Any:
    """Value heads of these tensors in transformers' order."""

    def change(name: str, array: np.ndarray) -> np.ndarray:
        if not any(f".{kind}" in name for kind in kinds):
            return array
        if "ssm_out" in name:
            return back(array.T, _WIDTH).T
        if "attn_qkv" in name or "ssm_conv1d" in name:
            keys = 2 * _KEYS * _WIDTH
            return np.concatenate([array[:keys], back(array[keys:], _WIDTH)])
        return back(array, _WIDTH if "attn_gate" in name else 1)

    def back(array: np.ndarray, size: int) -> np.ndarray:
        return array.reshape(_SHARED, _KEYS, size, *array.shape[1:]).swapaxes(0, 1).reshape(array.shape)

    return change


def _gates_apart(name: str, array: np.ndarray) -> np.ndarray:
    """All queries before all gates, not head by head."""
    return array.reshape(4, 2, 64, -1).swapaxes(0, 1).reshape(array.shape) if "attn_q.weight" in name else array


def _logarithms(name: str, array: np.ndarray) -> np.ndarray:
    return np.log(-array) if name.endswith("ssm_a") else array


def _tiled(name: str, array: np.ndarray) -> np.ndarray:
    """Value heads of gates in the order of Qwen3.5."""
    if "attn_gate" not in name:
        return array
    return array.reshape(_KEYS, _SHARED, _WIDTH, -1).swapaxes(0, 1).reshape(array.shape)


def _projections_apart(name: str, array: np.ndarray) -> np.ndarray:
    """All betas before all alphas, not from key head to key head."""
    if "ssm_ba" not in name:
        return array
    return array.reshape(_KEYS, 2, _SHARED, -1).swapaxes(0, 1).reshape(array.shape)


def _rows_as_stored(name: str, array: np.ndarray) -> np.ndarray:
    """Keys and values from key head to key head, as transformers has them."""
    if "attn_qkv" not in name:
        return array
    q, k, v = np.split(array, [_KEYS * _WIDTH, 2 * _KEYS * _WIDTH])
    return np.concatenate([part.reshape(_KEYS, -1, array.shape[1]) for part in (q, k, v)], axis=1).reshape(array.shape)


_NORMS = ("attn_norm.weight", "post_attention_norm.weight", "output_norm.weight")
_EVERYWHERE = ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_a", "ssm_dt", "ssm_alpha", "ssm_beta", "ssm_out")
WRONG = [
    Wrong("qwen35", "value heads as in transformers", _grouped(*_EVERYWHERE)),
    Wrong("qwen35", "decays of other heads", _grouped("ssm_a", "ssm_dt", "ssm_alpha")),
    *(
        Wrong("qwen35", f"{kind} of other heads", _grouped(kind))
        for kind in ("attn_qkv", "attn_gate", "ssm_conv1d", "ssm_beta", "ssm_out")
    ),
    Wrong("qwen35", "logarithms of decays", _logarithms),
    Wrong("qwen35", "no bias of time steps", without("ssm_dt.bias")),
    Wrong("qwen35", "norms less one", plus(-1.0, *_NORMS)),
    Wrong("qwen35", "norms of q and k less one", plus(-1.0, "attn_q_norm.weight", "attn_k_norm.weight")),
    Wrong("qwen35", "gated norm and one", plus(1.0, "ssm_norm.weight")),
    Wrong("qwen35", "gates apart from queries", _gates_apart),
    Wrong("qwen35", "q and k permuted", other_order),
    Wrong("qwen35", "all of a head rotated", metadata={"rope.dimension_count": 64}),
    Wrong("qwen35", "one section", metadata={"rope.dimension_sections": [8, 0, 0, 0]}),
    Wrong("qwen35", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("qwen35-uneven", "no rope scaling", metadata={"rope.scaling.type": "none"}),
    Wrong("qwen35moe", "value heads as in transformers", _grouped(*_EVERYWHERE)),
    Wrong("qwen3next", "gates in the order of Qwen3.5", _tiled),
    Wrong("qwen3next", "betas apart from alphas", _projections_apart),
    Wrong("qwen3next", "keys and values as stored", _rows_as_stored),
    Wrong("qwen3next", "logarithms of decays", _logarithms),
    Wrong("qwen3next", "no bias of time steps", without("ssm_dt.bias")),
    Wrong("qwen3next", "norms of q and k less one", plus(-1.0, "attn_q_norm.weight", "attn_k_norm.weight")),
    Wrong("qwen3next", "gated norm and one", plus(1.0, "ssm_norm.weight")),
    Wrong("qwen3next", "gates apart from queries", _gates_apart),
    Wrong("qwen3next", "all of a head rotated", metadata={"rope.dimension_count": 64}),
    Wrong("qwen3next", "rope base", metadata={"rope.freq_base": 10000.0}),
    *(
        Wrong(model, what, change)
        for model in ("qwen35moe", "qwen3next")
        for what, change in (
            ("experts in another order", experts_turned),
            ("no shared expert", without("ffn_down_shexp.weight")),
            ("shared expert without its gate", without("ffn_gate_inp_shexp.weight")),
            ("norms less one", plus(-1.0, *_NORMS)),
        )
    ),
    *(Wrong(model, "one expert fewer", metadata={"expert_used_count": 1}) for model in ("qwen35moe", "qwen3next")),
]
_WIDE: dict[str, object] = {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256}
BITS: dict[str, dict[str, object]] = {
    "qwen35": {},
    "qwen35moe": _WIDE,
    "qwen3next": _WIDE,
}
