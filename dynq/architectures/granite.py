"""Granite, dense: multipliers on embeddings, attention scores, residuals and logits."""

from typing import Any

import gguf

from dynq.architectures.decoder import ATTENTION, Decoder

_MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


class Granite(Decoder):
    arch = gguf.MODEL_ARCH.GRANITE
    model_types = ("granite",)
    biases = (*ATTENTION, "mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")  # attention_bias, mlp_bias
    interleaved_rope = True
    keys = Decoder.keys | _MULTIPLIERS

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | _sizes(self)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return super().config_from_gguf(metadata, tensors) | {
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        }


def _sizes(model: Decoder) -> dict[str, Any]:
    return {
        f"{model.name}.vocab_size": model.config["vocab_size"],
        f"{model.name}.rope.dimension_count": model.head_dim,
    }
