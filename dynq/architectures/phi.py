"""Phi-3 and Phi-4: q, k and v in one matrix, gate and up in another; longrope.

The sliding window is written and read again, but llama.cpp attends to the whole context. It takes longrope's factors
for long texts where the context is set larger than the original one, transformers where the text is longer.
"""

from typing import Any

import gguf

from dynq.architectures.decoder import Decoder


class Phi3(Decoder):
    arch = gguf.MODEL_ARCH.PHI3
    model_types = ("phi3",)
    attention = ("self_attn.qkv_proj", "self_attn.o_proj")
    feed_forward = ("mlp.gate_up_proj", "mlp.down_proj")
    partial_rope = True
    rope_types = ("default", "longrope")
    keys = Decoder.keys | {"rope.scaling.original_context_length": "original_max_position_embeddings"}

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {f"{self.name}.attention.sliding_window": self.config.get("sliding_window") or 0}

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        window = metadata.get(f"{gguf.MODEL_ARCH_NAMES[cls.arch]}.attention.sliding_window")
        return super().config_from_gguf(metadata, tensors) | {"sliding_window": window or None}
