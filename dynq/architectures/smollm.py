"""SmolLM 3: a Llama of which every fourth layer has no rotary positions. llama.cpp has that step built in.

The rows of q and k are reordered in all layers: where nothing is rotated, that changes no score.
"""

from typing import Any

import gguf

from dynq.architectures.decoder import WITHOUT_FACTORS
from dynq.architectures.llama import Llama
from dynq.errors import DynqError

_STEP = 4


class SmolLM3(Llama):
    arch = gguf.MODEL_ARCH.SMOLLM3
    model_types = ("smollm3",)
    biases = ()
    rope_types = WITHOUT_FACTORS

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        rotated = [int((layer + 1) % _STEP != 0) for layer in range(self.n_layer)]
        if [int(bool(r)) for r in config["no_rope_layers"][: self.n_layer]] != rotated:
            raise DynqError(f"config.json: no_rope_layers other than every {_STEP}th layer is not supported")
        if config.get("use_sliding_window") and "sliding_attention" in config["layer_types"]:
            raise DynqError("config.json: use_sliding_window is not supported for smollm3")
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise DynqError("config.json: attention_bias and mlp_bias are not supported for smollm3")
