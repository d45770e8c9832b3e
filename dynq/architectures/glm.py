"""GLM-4, dense (0414), and the mixtures GLM-4.5 to 4.7. Half of a head's dimensions are rotated.

No rows are reordered: both worlds rotate neighbours in GLM-4, halves in the mixtures.
"""

from typing import Any

import gguf

from dynq.architectures.decoder import ATTENTION, WITHOUT_FACTORS, Decoder, MaybeNormed, Module
from dynq.architectures.deepseek import AfterDense
from dynq.errors import DynqError


class _Glm(Decoder):
    """Biases on q, k and v (`attention_bias`)."""

    biases = ATTENTION[:3]
    partial_rope = True
    rope_types = WITHOUT_FACTORS

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        sections = metadata.get(f"{gguf.MODEL_ARCH_NAMES[cls.arch]}.rope.dimension_sections")
        if any(sections or ()):
            raise DynqError("the GGUF is the text part of a model that sees (rope.dimension_sections): not supported")
        config = super().config_from_gguf(metadata, tensors)
        return config | {
            "attention_bias": "blk.0.attn_q.bias" in tensors,
            "partial_rotary_factor": config["rope_parameters"].get("partial_rotary_factor", 1.0),  # their default: half
        }


class Glm4(_Glm):
    """Gate and up in one matrix; norms before and after attention and feed-forward."""

    arch = gguf.MODEL_ARCH.GLM4
    model_types = ("glm4",)
    feed_forward = ("mlp.gate_up_proj", "mlp.down_proj")

    def modules(self, layer: int) -> tuple[Module, ...]:
        first, second = self.norms
        return (
            first,
            *self.attention,
            "post_self_attn_layernorm",
            second,
            *self.feed_forward,
            "post_mlp_layernorm",
        )


class Glm4Moe(MaybeNormed, _Glm, AfterDense):
    """Norms of each head of q and k in the large models (`use_qk_norm`)."""

    arch = gguf.MODEL_ARCH.GLM4_MOE
    model_types = ("glm4_moe",)
