"""gpt-oss."""

from typing import Any

import numpy as np

from families.common import Wrong, experts_turned, other_order, rope, without

_YARN = {"factor": 16.0, "original_max_position_embeddings": 32, "beta_fast": 32.0, "beta_slow": 1.0}
_MIXTURE = {
    "head_dim": 48,
    "num_hidden_layers": 4,
    "num_local_experts": 6,
    "num_experts_per_tok": 2,
    "sliding_window": 12,
}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "gpt-oss": ("gpt_oss", {**rope("yarn", **_YARN), **_MIXTURE}),
    "gpt-oss-pattern": (
        "gpt_oss",
        {**rope(), **_MIXTURE, "layer_types": ["full_attention", "full_attention", "sliding_attention"] * 2}
        | {"num_hidden_layers": 6},
    ),
}


def _loud(model: Any) -> None:
    """Biases of experts that tell, and sinks that take a good part of the attention."""
    for name, parameter in model.named_parameters():
        if name.endswith("proj_bias"):
            parameter.normal_(0, 0.3)
        elif name.endswith("sinks"):
            parameter.normal_(2.0, 1.0)


PREPARE = dict.fromkeys(MODELS, _loud)


def _halves(name: str, array: np.ndarray) -> np.ndarray:
    """Rows of every gate as if gates and ups stood in halves, not in turn."""
    if "ffn_gate_exps.weight" not in name:
        return array
    return np.concatenate([array[:, ::2], array[:, 1::2]], axis=1)


WRONG = [
    Wrong("gpt-oss", "q and k permuted", other_order),
    Wrong("gpt-oss", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("gpt-oss", "no rope scaling", metadata={"rope.scaling.type": "none"}),
    Wrong("gpt-oss", "window", metadata={"attention.sliding_window": 4096}),
    Wrong("gpt-oss", "all layers slide", metadata={"attention.sliding_window_pattern": [True] * 4}),
    Wrong("gpt-oss-pattern", "usual pattern", metadata={"attention.sliding_window_pattern": None}),
    Wrong("gpt-oss", "no sinks", without("attn_sinks.weight", to=-1e4)),
    Wrong("gpt-oss", "no biases of q, k and v", without("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    Wrong("gpt-oss", "no bias of attention's output", without("attn_output.bias")),
    Wrong("gpt-oss", "no bias of the router", without("ffn_gate_inp.bias")),
    Wrong("gpt-oss", "no biases of gate and up", without("ffn_gate_exps.bias", "ffn_up_exps.bias")),
    Wrong("gpt-oss", "no bias of down", without("ffn_down_exps.bias")),
    Wrong("gpt-oss", "rows of gate in another order", _halves),
    Wrong("gpt-oss", "experts in another order", experts_turned),
    Wrong("gpt-oss", "one expert fewer", metadata={"expert_used_count": 1}),
]
BITS: dict[str, dict[str, object]] = {"gpt-oss": {"head_dim": 64}}
