"""Llama and Mistral."""

from dynq.architectures import ROPE_FREQS
from families.common import Wrong, other_order, rope, without

_LLAMA3 = rope(
    "llama3", 40000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=4.0, original_max_position_embeddings=256
)
MODELS = {
    "llama": ("llama", _LLAMA3),
    "llama-tied": ("llama", {**rope(), "tie_word_embeddings": True}),
    "llama-biased": ("llama", {**rope(), "attention_bias": True, "mlp_bias": True}),
    "llama-linear": ("llama", rope("linear", 5000.0, factor=4.0)),
    "mistral": ("mistral", {**rope(), "head_dim": 48, "sliding_window": None}),
}
WRONG = [
    Wrong("llama", "q and k not permuted", other_order),
    Wrong("llama", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("llama", "no rope factors", left_out=ROPE_FREQS),
    Wrong("llama", "rope factors of one", without(ROPE_FREQS, to=1.0)),
    Wrong("llama", "embedding for output", left_out="output.weight"),
    Wrong("llama", "layer norms", without("attn_norm.weight", to=1.0)),
    Wrong("llama-tied", "q and k not permuted", other_order),
    Wrong("llama-tied", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("llama-biased", "no biases of q, k and v", without("attn_q.bias", "attn_k.bias", "attn_v.bias")),
    Wrong("llama-biased", "no other biases", without("attn_output.bias", "ffn_up.bias", "ffn_down.bias")),
    Wrong("llama-biased", "biases not permuted", lambda n, a: other_order(n, a) if a.ndim == 1 else a),
    Wrong("llama-linear", "no rope scaling", metadata={"rope.scaling.type": None, "rope.scaling.factor": None}),
    Wrong("mistral", "q and k not permuted", other_order),
    Wrong("mistral", "rope base", metadata={"rope.freq_base": 10000.0}),
]
BITS: dict[str, dict[str, object]] = {"llama": {}}
