"""Llama 4."""

from typing import Any

import numpy as np

from dynq.architectures import ROPE_FREQS
from families.common import Wrong, experts_turned, other_order, rope, without

_ONE_BORDER = rope(
    "llama3", 40000.0, factor=8.0, low_freq_factor=1.0, high_freq_factor=1.0, original_max_position_embeddings=256
)
_MIXTURE = {"head_dim": 48, "num_hidden_layers": 4, "intermediate_size_mlp": 192, "num_experts_per_tok": 1}
MODELS: dict[str, tuple[str, dict[str, Any]]] = {
    "llama4-scout": ("llama4_text", {**_ONE_BORDER, **_MIXTURE, "num_local_experts": 6}),
    "llama4-maverick": (
        "llama4_text",
        {
            **rope(),
            **_MIXTURE,
            "intermediate_size": 32,
            "num_local_experts": 128,
            "interleave_moe_layer_step": 2,
            "use_qk_norm": False,
        },
    ),
}


def _in_turn(name: str, array: np.ndarray) -> np.ndarray:
    """Rows of every gate as if gates and ups stood in turn, not in halves."""
    if "ffn_gate_exps.weight" not in name:
        return array
    half = array.shape[1] // 2
    return np.stack([array[:, :half], array[:, half:]], axis=2).reshape(array.shape)


WRONG = [
    Wrong("llama4-scout", "q and k permuted", other_order),
    Wrong("llama4-scout", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("llama4-scout", "no rope factors", left_out=ROPE_FREQS),
    Wrong("llama4-scout", "rows of gate in another order", _in_turn),
    Wrong("llama4-scout", "experts in another order", experts_turned),
    Wrong("llama4-scout", "one expert more", metadata={"expert_used_count": 2}),
    Wrong("llama4-scout", "router", without("ffn_gate_inp.weight")),
    Wrong("llama4-scout", "no shared expert", without("ffn_down_shexp.weight")),
    Wrong("llama4-maverick", "q and k permuted", other_order),
    Wrong("llama4-maverick", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("llama4-maverick", "experts in another order", experts_turned),
    Wrong("llama4-maverick", "no shared expert", without("ffn_down_shexp.weight")),
]
BITS: dict[str, dict[str, object]] = {"llama4-scout": {"head_dim": 64, "intermediate_size_mlp": 256}}
