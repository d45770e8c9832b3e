"""DeepSeek V2 and V3."""

import numpy as np

from families.common import Wrong, experts_biased, experts_turned, rope, without

_LATENT = {
    "num_key_value_heads": 4,
    "kv_lora_rank": 64,
    "q_lora_rank": 96,
    "qk_nope_head_dim": 48,
    "qk_rope_head_dim": 32,
    "v_head_dim": 40,
    "moe_intermediate_size": 96,
    "n_shared_experts": 2,
    "n_routed_experts": 8,
    "num_experts_per_tok": 2,
    "first_k_dense_replace": 1,
}
_YARN = {"factor": 16.0, "original_max_position_embeddings": 32, "mscale": 1.0, "mscale_all_dim": 1.0}
_V3 = _LATENT | {"n_group": 4, "topk_group": 2, "routed_scaling_factor": 2.5, "norm_topk_prob": True}
MODELS = {
    "deepseek3": ("deepseek_v3", {**rope(), **_V3}),
    "deepseek3-yarn": ("deepseek_v3", {**rope("yarn", **_YARN), **_V3}),
    "deepseek2": ("deepseek_v2", {**rope(), **_LATENT}),
    "deepseek2-lite": ("deepseek_v2", {**rope("yarn", **_YARN), **_LATENT, "q_lora_rank": None}),
}
FLIPS = {
    "deepseek3-yarn": {"num_experts_per_tok": 8, "n_group": 1, "topk_group": 1},
    "deepseek2": {"num_experts_per_tok": 8},
}


PREPARE = {"deepseek3": experts_biased, "deepseek3-yarn": experts_biased}


def _heads_turned(name: str, array: np.ndarray) -> np.ndarray:
    return np.roll(array, 1, axis=0) if "attn_v_b" in name else array


def _keys_not_transposed(name: str, array: np.ndarray) -> np.ndarray:
    return array.swapaxes(1, 2).reshape(array.shape) if "attn_k_b" in name else array


def _halves(name: str, array: np.ndarray) -> np.ndarray:
    """The rotated rows of keys as halves, not as neighbours."""
    if "attn_kv_a_mqa" not in name:
        return array
    return np.concatenate([array[:64], array[64:].reshape(2, 16, -1).swapaxes(0, 1).reshape(32, -1)])


WRONG = [
    Wrong("deepseek2-lite", "no rope scaling", metadata={"rope.scaling.type": "none"}),
    Wrong("deepseek3", "keys not transposed", _keys_not_transposed),
    Wrong("deepseek3", "values of other heads", _heads_turned),
    Wrong("deepseek3", "rotated as halves", _halves),
    Wrong("deepseek3", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("deepseek3", "norm of q", without("attn_q_a_norm.weight", to=1.0)),
    Wrong("deepseek3", "norm of the latent", without("attn_kv_a_norm.weight", to=1.0)),
    Wrong("deepseek3", "no bias of experts", without("exp_probs_b.bias")),
    Wrong("deepseek3", "no groups", metadata={"expert_group_count": 1, "expert_group_used_count": 1}),
    Wrong("deepseek3", "no scale of experts", metadata={"expert_weights_scale": 1.0}),
    Wrong("deepseek3", "softmax", metadata={"expert_gating_func": 1}),
    Wrong("deepseek3", "not normed", metadata={"expert_weights_norm": False}),
    Wrong("deepseek3", "experts in another order", experts_turned),
    Wrong("deepseek3", "no shared experts", without("ffn_down_shexp.weight")),
    Wrong("deepseek3-yarn", "no rope scaling", metadata={"rope.scaling.type": "none"}),
    Wrong("deepseek3-yarn", "no multiplier", metadata={"rope.scaling.yarn_log_multiplier": None}),
    Wrong("deepseek2-lite", "sigmoid", metadata={"expert_gating_func": 2}),
    Wrong("deepseek2-lite", "normed", metadata={"expert_weights_norm": True}),
    Wrong("deepseek2-lite", "no multiplier", metadata={"rope.scaling.yarn_log_multiplier": None}),
]
_WIDE = {"kv_lora_rank": 256, "q_lora_rank": 256, "v_head_dim": 64, "moe_intermediate_size": 256}
BITS: dict[str, dict[str, object]] = {"deepseek3": _WIDE}
