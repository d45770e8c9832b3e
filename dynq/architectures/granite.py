"""Granite, dense and of experts: multipliers on embeddings, attention scores, residuals and logits."""

from collections.abc import Sequence
from typing import Any

import gguf

from dynq.architectures.decoder import ATTENTION, Decoder, Module, Routed
from dynq.architectures.llama import Llama, sizes
from dynq.architectures.slot import Slot, part
from dynq.errors import DynqError

_MULTIPLIERS = {
    "embedding_scale": "embedding_multiplier",
    "attention.scale": "attention_multiplier",
    "residual_scale": "residual_multiplier",
    "logit_scale": "logits_scaling",
}


class Granite(Llama):
    arch = gguf.MODEL_ARCH.GRANITE
    model_types = ("granite",)
    keys = Llama.keys | _MULTIPLIERS

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        if metadata.get("granite.rope.scaling.finetuned") is False:  # so llama.cpp keeps Granite 4's dense models
            raise DynqError("the GGUF's model has no rotary positions (rope.scaling.finetuned false): not supported")
        return super().config_from_gguf(metadata, tensors)


class GraniteMoe(Routed):
    """Experts in every layer; in some models (`granitemoeshared`) also one that every token passes."""

    arch = gguf.MODEL_ARCH.GRANITE_MOE
    model_types = ("granitemoe", "granitemoeshared")
    biases = ATTENTION  # attention_bias
    interleaved_rope = True
    experts = "block_sparse_moe.experts"
    router = ("ffn_gate_inp.weight", "block_sparse_moe.router.weight")
    shared = (
        ("ffn_gate_shexp.weight", "shared_mlp.input_linear.weight"),
        ("ffn_up_shexp.weight", "shared_mlp.input_linear.weight"),
        "shared_mlp.output_linear",
    )
    renamed = (
        (r"block_sparse_moe\.input_linear\.weight$", "block_sparse_moe.experts.gate_up_proj"),
        (r"block_sparse_moe\.output_linear\.weight$", "block_sparse_moe.experts.down_proj"),
        (r"block_sparse_moe\.router\.layer\.weight$", "block_sparse_moe.router.weight"),
    )
    keys = (
        Decoder.keys
        | _MULTIPLIERS
        | {
            "expert_used_count": "num_experts_per_tok",
            "expert_shared_feed_forward_length": "shared_intermediate_size",
        }
    )

    def __init__(self, config: dict[str, Any]) -> None:
        if not config.get("num_local_experts"):
            raise DynqError(f"config.json: num_local_experts 0 is not supported for {config['model_type']}")
        super().__init__(config)

    def modules(self, layer: int) -> Sequence[Module]:
        found = super().modules(layer)
        return found if self.config.get("shared_intermediate_size") else found[: -len(self.shared)]

    def slot(self, kind: str, parameter: str) -> Slot:
        if kind in ("ffn_gate_shexp", "ffn_up_shexp"):
            return Slot(parameter, part(int(kind == "ffn_up_shexp"), 2, 0))
        return super().slot(kind, parameter)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | sizes(self)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        return config | {
            "model_type": "granitemoeshared" if config.get("shared_intermediate_size") else "granitemoe",
            "num_local_experts": config.pop("num_experts"),
            "attention_bias": "blk.0.attn_q.bias" in tensors,
        }
