"""Qwen2 and Qwen3, dense and of experts."""

from families.common import Wrong, experts_turned, other_order, rope, without

MODELS = {
    "qwen2": ("qwen2", {**rope(), "tie_word_embeddings": True}),
    "qwen2-yarn": (
        "qwen2",
        rope("yarn", factor=16.0, original_max_position_embeddings=32, attention_factor=1.0, beta_fast=32.0),
    ),
    "qwen3": ("qwen3", {**rope(), "head_dim": 48}),
    "qwen2moe": (
        "qwen2_moe",
        {
            **rope(),
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "shared_expert_intermediate_size": 192,
        },
    ),
    "qwen3moe": (
        "qwen3_moe",
        {
            **rope(),
            "head_dim": 48,
            "num_experts": 6,
            "num_experts_per_tok": 2,
            "moe_intermediate_size": 96,
            "norm_topk_prob": True,
        },
    ),
}
WRONG = [
    Wrong("qwen2", "no biases", without(".bias")),
    Wrong("qwen2", "q and k permuted", other_order),
    Wrong("qwen2", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("qwen2-yarn", "no rope scaling", metadata={"rope.scaling.type": "none"}),
    Wrong("qwen2-yarn", "usual attention factor", metadata={"rope.scaling.attn_factor": None}),
    Wrong("qwen2-yarn", "half the rope scaling", metadata={"rope.scaling.factor": 8.0}),
    Wrong("qwen3", "norm of q", without("attn_q_norm.weight", to=1.0)),
    Wrong("qwen3", "norm of k", without("attn_k_norm.weight", to=1.0)),
    Wrong("qwen3", "layer norms", without("ffn_norm.weight", to=1.0)),
    Wrong("qwen3", "q and k permuted", other_order),
    Wrong("qwen3", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("qwen2moe", "no biases", without("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    Wrong("qwen2moe", "q and k permuted", other_order),
    Wrong("qwen2moe", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("qwen2moe", "experts in another order", experts_turned),
    Wrong("qwen2moe", "one expert fewer", metadata={"expert_used_count": 1}),
    Wrong("qwen2moe", "no shared expert", without("ffn_down_shexp.weight")),
    Wrong("qwen2moe", "no gate of the shared expert", without("ffn_gate_inp_shexp.weight", to=1.0)),
    Wrong("qwen3moe", "experts in another order", experts_turned),
    Wrong("qwen3moe", "one expert fewer", metadata={"expert_used_count": 1}),
    Wrong("qwen3moe", "rope base", metadata={"rope.freq_base": 10000.0}),
]
BITS: dict[str, dict[str, object]] = {
    "qwen2": {},
    "qwen3": {"head_dim": 64},
    "qwen2moe": {"moe_intermediate_size": 256, "shared_expert_intermediate_size": 256},
    "qwen3moe": {"head_dim": 64, "moe_intermediate_size": 256},
}
