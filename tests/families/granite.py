"""Granite, dense and of experts."""

from typing import Any

from families.common import Wrong, experts_turned, other_order, rope, without

_MULTIPLIERS = {
    "embedding_multiplier": 2.5,
    "attention_multiplier": 0.3,
    "residual_multiplier": 0.6,
    "logits_scaling": 2.0,
}
_EXPERTS = {**rope(), **_MULTIPLIERS, "num_local_experts": 6, "num_experts_per_tok": 2}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "granite": ("granite", {**rope(), **_MULTIPLIERS, "tie_word_embeddings": True}),
    "granite-biased": ("granite", {**rope(), **_MULTIPLIERS, "attention_bias": True, "mlp_bias": True}),
    "granitemoe": ("granitemoe", {**_EXPERTS, "attention_bias": True}),
    "granitemoe-shared": (
        "granitemoeshared",
        {**_EXPERTS, "shared_intermediate_size": 96, "tie_word_embeddings": True},
    ),
}
WRONG = [
    *(
        Wrong(model, what, metadata={key: value})
        for model in ("granite", "granitemoe")
        for what, key, value in (
            ("embedding multiplier", "embedding_scale", None),
            ("attention multiplier", "attention.scale", None),
            ("residual multiplier", "residual_scale", None),
            ("logits scaling", "logit_scale", 1.0),
            ("rope base", "rope.freq_base", 10000.0),
        )
    ),
    Wrong("granite", "q and k not permuted", other_order),
    Wrong("granitemoe", "q and k not permuted", other_order),
    Wrong("granitemoe", "experts in another order", experts_turned),
    Wrong("granitemoe", "one expert fewer", metadata={"expert_used_count": 1}),
    Wrong("granitemoe", "no biases", without(".bias")),
    Wrong("granitemoe-shared", "no shared expert", without("ffn_down_shexp.weight")),
    Wrong("granite-biased", "no biases of q, k and v", without("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    Wrong("granite-biased", "no other biases", without("attn_output.bias", "ffn_up.bias", "ffn_down.bias")),
]
BITS: dict[str, dict[str, object]] = {"granite": {}, "granitemoe-shared": {"shared_intermediate_size": 256}}
