"""Mixtral: Llama with experts in every layer, under llama.cpp's `llama` too."""

from typing import Any

import gguf

from dynq.architectures.decoder import Decoder, Routed
from dynq.architectures.llama import sizes


class Mixtral(Routed):
    arch = gguf.MODEL_ARCH.LLAMA
    model_types = ("mixtral",)
    interleaved_rope = True
    stored_experts = ("w1", "w3", "w2")
    renamed = ((r"\.block_sparse_moe\.", ".mlp."),)
    keys = Decoder.keys | {"expert_used_count": "num_experts_per_tok"}

    @classmethod
    def reads(cls, metadata: dict[str, Any]) -> bool:
        return super().reads(metadata) and bool(metadata.get("llama.expert_count"))

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | sizes(self)
