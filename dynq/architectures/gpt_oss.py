"""gpt-oss: experts with biases, attention sinks, and every other layer's attention over a window.

transformers keeps the experts' matrices as `[in, out]`, columns of gate and up in turn.
"""

import warnings
from collections.abc import Sequence
from typing import Any, ClassVar

import gguf

from dynq.architectures.decoder import ATTENTION, WITHOUT_FACTORS, Module, Routed
from dynq.architectures.sliding import WINDOW_KEYS, pattern_from_gguf, pattern_to_gguf
from dynq.architectures.slot import Slot, View, every, then, transposed, whole
from dynq.errors import DynqError

_SWIGLU = {"swiglu_alpha": 1.702, "swiglu_limit": 7.0}  # constants in llama.cpp
_GATE, _UP = every(2, 0), every(2, 1)
_BIASES = {
    "ffn_gate_exps.bias": ("gate_up_proj_bias", _GATE),
    "ffn_up_exps.bias": ("gate_up_proj_bias", _UP),
    "ffn_down_exps.bias": ("down_proj_bias", whole),
}


class GptOss(Routed):
    arch = gguf.MODEL_ARCH.GPT_OSS
    model_types = ("gpt_oss",)
    router = "mlp.router"
    biases = (*ATTENTION, router)
    rope_types = WITHOUT_FACTORS
    yarn_settings = frozenset({"truncate"})
    ties = False
    stored_experts = ()
    expert_views: ClassVar[dict[str, tuple[str, View]]] = {
        "gate": ("gate_up_proj", then(_GATE, transposed)),
        "up": ("gate_up_proj", then(_UP, transposed)),
        "down": ("down_proj", transposed),
    }
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
        biases = [(name, f"{self.experts}.{parameter}") for name, (parameter, _) in _BIASES.items()]
        return (*super().modules(layer), *biases, ("attn_sinks.weight", "self_attn.sinks"))

    def slot(self, kind: str, parameter: str) -> Slot:
        return Slot(parameter, _BIASES[kind][1]) if kind in _BIASES else super().slot(kind, parameter)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | pattern_to_gguf(self.config, self.name)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        layers = pattern_from_gguf(metadata, gguf.MODEL_ARCH_NAMES[cls.arch], config["num_hidden_layers"], every=2)
        return config | {"layer_types": layers}
