"""Llama 4: experts scaled before and not after, one that every token passes, and layers without rotary positions.

llama.cpp knows the numbers of these models by heart: which layers rotate and attend in chunks, the size of chunks, and
by how much queries grow with the position. transformers keeps the experts' matrices as `[in, out]`.
"""

from typing import Any, ClassVar

import gguf

from dynq.architectures.decoder import Module, Routed
from dynq.architectures.llama import sizes
from dynq.architectures.slot import View, part, then, transposed
from dynq.errors import DynqError

_BUILT_IN = {
    "attention_chunk_size": 8192,
    "attn_temperature_tuning": True,
    "floor_scale": 8192,
    "attn_scale": 0.1,
    "attention_bias": False,
}
_NO_ROPE_EVERY = 4
_WITHOUT_NORMS = 128  # experts of the model whose queries and keys have no norm


class Llama4(Routed):
    arch = gguf.MODEL_ARCH.LLAMA4
    model_types = ("llama4_text",)
    feed_forward = tuple(f"feed_forward.{part}_proj" for part in ("gate", "up", "down"))
    experts = "feed_forward.experts"
    router = "feed_forward.router"
    shared: ClassVar[tuple[Module, ...]] = tuple(
        f"feed_forward.shared_expert.{part}_proj" for part in ("gate", "up", "down")
    )
    stored_experts = ()
    expert_views: ClassVar[dict[str, tuple[str, View]]] = {
        "gate": ("gate_up_proj", then(part(0, 2, 2), transposed)),
        "up": ("gate_up_proj", then(part(1, 2, 2), transposed)),
        "down": ("down_proj", transposed),
    }
    keys = Routed.keys | {
        "feed_forward_length": "intermediate_size_mlp",
        "expert_feed_forward_length": "intermediate_size",
        "interleave_moe_layer_step": "interleave_moe_layer_step",
    }

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        layers = range(self.n_layer)
        rotated = [int((layer + 1) % _NO_ROPE_EVERY != 0) for layer in layers]
        wanted = _BUILT_IN | {
            "use_qk_norm": self.n_expert != _WITHOUT_NORMS,
            "no_rope_layers": rotated,
            "layer_types": ["chunked_attention" if rotates else "full_attention" for rotates in rotated],
            "moe_layers": [layer for layer in layers if self.is_routed(layer)],
        }
        for name, value in wanted.items():
            if config[name] != value:
                raise DynqError(f"config.json: {name} {config[name]} is not supported, llama.cpp has {value}")

    def is_routed(self, layer: int) -> bool:
        return (layer + 1) % int(self.config["interleave_moe_layer_step"]) == 0

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | sizes(self)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        if metadata.get("llama4.attention.sliding_window") == 0:
            raise DynqError("the GGUF has llama4.attention.sliding_window 0, a model without chunks: not supported")
        experts = config.pop("num_experts")
        return config | {"num_local_experts": experts, "use_qk_norm": experts != _WITHOUT_NORMS}
