"""Llama and Mistral. llama.cpp's `llama` rotates neighbouring pairs, so the rows of q and k are reordered.

Mistral's sliding window is not written: llama.cpp's `llama` attends to the whole context.
"""

from typing import Any, ClassVar

import gguf

from dynq.architectures.decoder import ATTENTION, FEED_FORWARD, Decoder


class Llama(Decoder):
    arch = gguf.MODEL_ARCH.LLAMA
    model_types: ClassVar[tuple[str, ...]] = ("llama", "mistral")
    biases: ClassVar[tuple[str, ...]] = (*ATTENTION, *FEED_FORWARD)  # attention_bias, mlp_bias
    interleaved_rope = True

    @classmethod
    def reads(cls, metadata: dict[str, Any]) -> bool:
        return super().reads(metadata) and not metadata.get("llama.expert_count")

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | sizes(self)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        return super().config_from_gguf(metadata, tensors) | {
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "mlp_bias": "blk.0.ffn_up.bias" in tensors,
        }


def sizes(model: Decoder) -> dict[str, Any]:
    """Keys that Llama and its relatives have besides a decoder's."""
    return {
        f"{model.name}.vocab_size": model.config["vocab_size"],
        f"{model.name}.rope.dimension_count": model.head_dim,
    }
