"""OLMo 2."""

from families.common import Wrong, other_order, rope, without

MODELS = {
    "olmo2": ("olmo2", rope()),
    "olmo2-yarn": ("olmo2", rope("yarn", factor=16.0, original_max_position_embeddings=32)),
}
WRONG = [
    Wrong("olmo2", "norm of q", without("attn_q_norm.weight", to=1.0)),
    Wrong("olmo2", "norm of k", without("attn_k_norm.weight", to=1.0)),
    Wrong("olmo2", "norm after attention", without("post_attention_norm.weight", to=1.0)),
    Wrong("olmo2", "norm after feed-forward", without("post_ffw_norm.weight", to=1.0)),
    Wrong("olmo2", "q and k permuted", other_order),
    Wrong("olmo2", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("olmo2-yarn", "no rope scaling", metadata={"rope.scaling.type": "none"}),
]
BITS: dict[str, dict[str, object]] = {"olmo2": {}}
