"""Gemma 2 and Gemma 3."""

from typing import Any

from families.common import Wrong, other_order, plus, rope, without

_NORMS = ("attn_norm.weight", "ffn_norm.weight", "attention_norm.weight", "ffw_norm.weight", "output_norm.weight")
_GEMMA3 = {
    "rope_parameters": {
        "full_attention": {"rope_type": "default", "rope_theta": 3000.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "head_dim": 48,
    "query_pre_attn_scalar": 48,
    "num_hidden_layers": 6,
    "sliding_window": 12,
}
_LINEAR = {
    "rope_parameters": {
        "full_attention": {"rope_type": "linear", "rope_theta": 3000.0, "factor": 4.0},
        "sliding_attention": {"rope_type": "default", "rope_theta": 100.0},
    },
    "num_hidden_layers": 4,
    "layer_types": ["full_attention", "sliding_attention", "full_attention", "sliding_attention"],
    "tie_word_embeddings": False,
    "final_logit_softcapping": 20.0,
}
MODELS = {
    "gemma2": (
        "gemma2",
        {
            **rope(),
            "head_dim": 48,
            "query_pre_attn_scalar": 48,
            "num_hidden_layers": 4,
            "sliding_window": 12,
            "attn_logit_softcapping": 4.0,
            "final_logit_softcapping": 20.0,
        },
    ),
    "gemma3": ("gemma3_text", _GEMMA3),
    "gemma3-linear": ("gemma3_text", _GEMMA3 | _LINEAR),
}
WRONG = [
    Wrong("gemma2", "norms less one", plus(-1.0, *_NORMS)),
    Wrong("gemma2", "no norm after attention", without("post_attention_norm.weight", to=1.0)),
    Wrong("gemma2", "no norm after feed-forward", without("post_ffw_norm.weight", to=1.0)),
    Wrong("gemma2", "no cap of attention", metadata={"attn_logit_softcapping": 1e6}),
    Wrong("gemma2", "another cap of logits", metadata={"final_logit_softcapping": 1e6}),
    Wrong("gemma2", "window", metadata={"attention.sliding_window": 4096}),
    Wrong("gemma2", "all layers slide", metadata={"attention.sliding_window_pattern": [True] * 4}),
    Wrong("gemma2", "q and k permuted", other_order),
    Wrong("gemma2", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("gemma3", "norms less one", plus(-1.0, *_NORMS)),
    Wrong("gemma3", "norms of q and k less one", plus(-1.0, "attn_q_norm.weight", "attn_k_norm.weight")),
    Wrong("gemma3", "norm of q", without("attn_q_norm.weight", to=1.0)),
    Wrong("gemma3", "norm of k", without("attn_k_norm.weight", to=1.0)),
    Wrong("gemma3", "no norm after attention", without("post_attention_norm.weight", to=1.0)),
    Wrong("gemma3", "no norm after feed-forward", without("post_ffw_norm.weight", to=1.0)),
    Wrong("gemma3", "window", metadata={"attention.sliding_window": 4096}),
    Wrong("gemma3", "all layers slide", metadata={"attention.sliding_window_pattern": [True] * 6}),
    Wrong("gemma3", "q and k permuted", other_order),
    Wrong("gemma3", "rope base of layers that see all", metadata={"rope.freq_base": 10.0}),
    Wrong("gemma3", "rope base of layers that slide", metadata={"rope.freq_base_swa": 3000.0}),
    Wrong("gemma3-linear", "no scaling", metadata={"rope.scaling.type": None, "rope.scaling.factor": None}),
    Wrong("gemma3-linear", "usual pattern", metadata={"attention.sliding_window_pattern": None}),
    Wrong("gemma3-linear", "no cap of logits", metadata={"final_logit_softcapping": None}),
    Wrong("gemma3-linear", "embedding for output", left_out="output.weight"),
]
BITS: dict[str, dict[str, object]] = {
    "gemma2": {"head_dim": 64, "query_pre_attn_scalar": 64},
    "gemma3": {"head_dim": 64, "query_pre_attn_scalar": 64},
}


def _norms_around_one(model: Any) -> None:
    """The norms are w + 1: of 0.5 to 1.5, as in other families."""
    for name, parameter in model.named_parameters():
        if "norm" in name:
            parameter -= 1


PREPARE = dict.fromkeys(MODELS, _norms_around_one)

# ggml computes GELU by a table of half floats (GGML_GELU_FP16), for F32 weights too. With the same table in
# transformers the difference falls from 0.0047, 0.0038 and 0.0067 to 0.0022, 0.0027 and 0.0019.
EXACT = dict.fromkeys(MODELS, 0.01)
