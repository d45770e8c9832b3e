"""OLMo 2: norms after attention and feed-forward, and one norm over all heads of q and of k."""

from typing import Any

import gguf

from dynq.architectures.decoder import ATTENTION, FEED_FORWARD, QK_NORMS, WITHOUT_FACTORS, Decoder
from dynq.errors import DynqError


class Olmo2(Decoder):
    arch = gguf.MODEL_ARCH.OLMO2
    model_types = ("olmo2",)
    rope_types = WITHOUT_FACTORS
    ties = False
    attention = (*ATTENTION, *QK_NORMS)
    norms = ("post_attention_layernorm", "post_feedforward_layernorm")

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if config.get("attention_bias"):
            raise DynqError("config.json: attention_bias is not supported for olmo2")

    def modules(self, layer: int) -> tuple[str | tuple[str, str], ...]:
        after_attention, after_feed_forward = self.norms
        return (*self.attention, after_attention, *FEED_FORWARD, after_feed_forward)
