"""Phi-3 and Phi-4."""

from typing import Any

import numpy as np

from families.common import Wrong, other_order, rope, without


def _longrope(original: int, pairs: int) -> dict[str, Any]:
    """Factors of so many rotated pairs: more than 16 for texts longer than the original context, up to 4 for others."""
    long, short = np.linspace(1, 24, pairs).tolist(), np.linspace(1, 4, pairs).tolist()
    return rope(
        "longrope",
        long_factor=long,
        short_factor=short,
        original_max_position_embeddings=original,
        partial_rotary_factor=0.75,
    ) | {"original_max_position_embeddings": original}


_COMMON = {"pad_token_id": None}
# Names without "phi3": by that name llama.cpp would look for tokens that the tiny tokenizer does not have.
MODELS = {
    "phi": ("phi3", {**rope(), **_COMMON, "sliding_window": None}),
    "phi-partial": ("phi3", {**rope(partial_rotary_factor=0.75), **_COMMON, "tie_word_embeddings": True}),
    "phi-long": ("phi3", {**_longrope(32, 12), **_COMMON}),
    "phi-short": ("phi3", {**_longrope(256, 12), **_COMMON}),
}


def _sharp(model: Any) -> None:
    """Rows of q and k as large as in models where they are matrices of their own."""
    for layer in model.model.layers:
        weight = layer.self_attn.qkv_proj.weight
        weight[: -layer.self_attn.num_key_value_heads * layer.self_attn.head_dim] *= 1.5
        weight.copy_(weight.half())


# longrope's attention factor sharpens phi-long: its scores are 1 + ln 16 / ln 32 = 1.8 times as large, where 1.5 for q
# and k gives 2.25. With both F16 differs by 0.045 to 0.075 on three seeds, so by 0.017 to 0.024 (F32 0.0001 in all).
PREPARE = dict.fromkeys(("phi", "phi-partial", "phi-short"), _sharp)


def _turned(name: str, array: np.ndarray) -> np.ndarray:
    """q and k rotated as neighbours."""
    if "attn_qkv" not in name:
        return array
    q, k, v = np.split(array, [array.shape[0] // 2, array.shape[0] * 3 // 4])
    return np.concatenate([other_order("attn_q.", q), other_order("attn_k.", k), v])


def _in_another_order(name: str, array: np.ndarray) -> np.ndarray:
    """v before k, up before gate."""
    if "attn_qkv" in name:
        q, k, v = np.split(array, [array.shape[0] // 2, array.shape[0] * 3 // 4])
        return np.concatenate([q, v, k])
    return np.roll(array, array.shape[0] // 2, axis=0) if "ffn_up" in name else array


WRONG = [
    Wrong("phi", "q and k permuted", _turned),
    Wrong("phi", "v before k, up before gate", _in_another_order),
    Wrong("phi", "up before gate", lambda n, a: _in_another_order(n, a) if "ffn_up" in n else a),
    Wrong("phi", "rope base", metadata={"rope.freq_base": 10000.0}),
    Wrong("phi-partial", "all dimensions rotated", metadata={"rope.dimension_count": None}),
    Wrong("phi-long", "no factors", without("rope_factors_long.weight", to=1.0)),
    Wrong("phi-long", "factors of short texts", metadata={"rope.scaling.original_context_length": 4096}),
    Wrong("phi-long", "no attention factor", metadata={"rope.scaling.attn_factor": None}),
    Wrong("phi-short", "no factors", without("rope_factors_short.weight", to=1.0)),
    Wrong("phi-short", "factors of long texts", metadata={"rope.scaling.original_context_length": 32}),
]
BITS: dict[str, dict[str, object]] = {"phi-long": _longrope(32, 24)}
