"""Qwen2 and Qwen3, dense and of experts."""

from typing import Any

import gguf

from dynq.architectures.decoder import ATTENTION, Decoder, Routed

_QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")


class Qwen2(Decoder):
    """Biases on q, k and v."""

    arch = gguf.MODEL_ARCH.QWEN2
    model_types = ("qwen2",)
    biases = ATTENTION[:3]


class Qwen3(Decoder):
    """A norm on each head of q and k, and heads whose size is independent of the width."""

    arch = gguf.MODEL_ARCH.QWEN3
    model_types = ("qwen3",)
    attention = (*ATTENTION, *_QK_NORMS)


class _QwenMoe(Routed):
    """Experts in every layer, or in every so many (`decoder_sparse_step`, `mlp_only_layers`)."""

    def is_routed(self, layer: int) -> bool:
        step = self.config.get("decoder_sparse_step", 1)
        return layer not in (self.config.get("mlp_only_layers") or []) and (layer + 1) % step == 0


class Qwen3Moe(_QwenMoe):
    arch = gguf.MODEL_ARCH.QWEN3MOE
    model_types = ("qwen3_moe",)
    attention = Qwen3.attention

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return super().config_from_gguf(metadata, tensors) | {"norm_topk_prob": True}
