"""gpt-oss: experts with biases, attention sinks, and every other layer's attention over a window.

transformers keeps the experts' matrices as `[in, out]`, columns of gate and up in turn.
"""

import re
import warnings
from collections.abc import Sequence
from typing import Any

import gguf

from dynq.architectures.decoder import ATTENTION, Module, Routed
from dynq.architectures.sliding import WINDOW_KEYS, pattern_from_gguf, pattern_to_gguf
from dynq.architectures.slot import Slot, every, then, transposed, whole
from dynq.errors import DynqError

_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # constants in llama.cpp
_VIEWS = {"gate": ("gate_up_proj", every(2, 0)), "up": ("gate_up_proj", every(2, 1)), "down": ("down_proj", whole)}


class GptOss(Routed):
    arch = gguf.MODEL_ARCH.GPT_OSS
    model_types = ("gpt_oss",)
    router = "mlp.router"
    biases = (*ATTENTION, router)
    yarn_settings = frozenset({"truncate"})
    ties = False
    keys = Routed.keys | WINDOW_KEYS | {"expert_feed_forward_length": "intermediate_size"}

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        for name, value in _SWIGLU.items():
            if config.get(name, value) != value:
                raise DynqError(f"config.json: {name} {config[name]} is not supported, only {value} is")
        if not config.get("attention_bias"):
            raise DynqError("config.json: attention_bias false is not supported for gpt_oss")
        if not config.get("sliding_window"):
            raise DynqError("config.json: gpt_oss without sliding_window is not supported")
        if self.rope.settings.get("truncate") is False:  # as published
            warnings.warn(
                "config.json: yarn with truncate false: llama.cpp rounds the ends of the ramp, so that some dimensions "
                "of q and k turn faster in every GGUF of this model than in transformers",
                stacklevel=2,
            )

    def modules(self, layer: int) -> Sequence[Module]:
        biases = [(f"ffn_{part}_exps.bias", f"{self.experts}.{part}") for part in _VIEWS]
        return (*super().modules(layer), *biases, ("attn_sinks.weight", "self_attn.sinks"))

    def slot(self, kind: str, parameter: str) -> Slot:
        expert = re.fullmatch(r"ffn_(gate|up|down)_exps(\.bias)?", kind)
        if not expert:
            return super().slot(kind, parameter)
        fused, view = _VIEWS[expert[1]]
        parameter = f"{parameter.rpartition('.')[0]}.{fused}"
        return Slot(f"{parameter}_bias", view) if expert[2] else Slot(parameter, then(view, transposed))

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | pattern_to_gguf(self.config, self.name)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        layers = pattern_from_gguf(metadata, gguf.MODEL_ARCH_NAMES[cls.arch], config["num_hidden_layers"], every=2)
        return config | {"layer_types": layers}
