"""Qwen2 and Qwen3, dense and of experts."""

from typing import Any, ClassVar

import gguf

from dynq.architectures.decoder import ATTENTION, QK_NORMS, WITHOUT_FACTORS, Decoder, Routed
from dynq.errors import DynqError


class _Qwen(Decoder):
    """Every layer sees all."""

    rope_types = WITHOUT_FACTORS

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("use_sliding_window"):
            raise DynqError(f"config.json: use_sliding_window is not supported for {config['model_type']}")
        super().__init__(config)


class Qwen2(_Qwen):
    """Biases on q, k and v."""

    arch = gguf.MODEL_ARCH.QWEN2
    model_types = ("qwen2",)
    biases = ATTENTION[:3]


class Qwen3(_Qwen):
    """A norm on each head of q and k, and heads whose size is independent of the width."""

    arch = gguf.MODEL_ARCH.QWEN3
    model_types = ("qwen3",)
    attention = (*ATTENTION, *QK_NORMS)


class _QwenMoe(_Qwen, Routed):
    """Experts in every layer. Whether the weights of the chosen ones are brought to a sum of 1 is not in a GGUF."""

    normed: ClassVar[bool]

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if bool(config.get("norm_topk_prob")) != self.normed:
            wanted = str(self.normed).lower()
            raise DynqError(f"config.json: {config['model_type']} is supported with norm_topk_prob {wanted} only")
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise DynqError(f"config.json: layers without experts are not supported for {config['model_type']}")

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return super().config_from_gguf(metadata, tensors) | {"norm_topk_prob": cls.normed}


class Qwen2Moe(_QwenMoe):
    """Besides the chosen experts one that every token passes, with a gate of its own."""

    arch = gguf.MODEL_ARCH.QWEN2MOE
    model_types = ("qwen2_moe",)
    biases = Qwen2.biases
    normed = False
    ties = False
    shared = (*(f"mlp.shared_expert.{part}_proj" for part in ("gate", "up", "down")), "mlp.shared_expert_gate")
    keys = Routed.keys | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if not config.get("qkv_bias", True):
            raise DynqError("config.json: qkv_bias false is not supported for qwen2_moe")

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        sizes = {"moe_intermediate_size": "blk.0.ffn_down_exps.weight"}  # early files have no keys for them
        sizes["shared_expert_intermediate_size"] = "blk.0.ffn_down_shexp.weight"
        known = {name: tensors[tensor][-1] for name, tensor in sizes.items() if tensor in tensors}
        return super().config_from_gguf(metadata, tensors) | known


class Qwen3Moe(_QwenMoe):
    arch = gguf.MODEL_ARCH.QWEN3MOE
    model_types = ("qwen3_moe",)
    attention = Qwen3.attention
    normed = True
