"""Gemma 2 and Gemma 3. Norms are stored as w - 1 in transformers; the engine scales embeddings and queries itself."""

import math
from typing import Any, ClassVar

import gguf

from dynq.architectures.decoder import ATTENTION, QK_NORMS, Decoder, Module
from dynq.architectures.rope import Rope
from dynq.architectures.sliding import WINDOW_KEYS, pattern_from_gguf, pattern_to_gguf
from dynq.errors import DynqError


class _Gemma(Decoder):
    """Norms before and after attention and feed-forward; layers whose attention slides, and layers that see all."""

    norms = ("input_layernorm", "pre_feedforward_layernorm")
    activations = ("gelu_pytorch_tanh",)
    norm_plus = 1.0
    rope_types = ("default", "linear")
    every: ClassVar[int]  # one in so many layers sees all, where a GGUF does not say
    widest: ClassVar[int]  # layers of the model whose queries are scaled by the width over the heads

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        scale = config["query_pre_attn_scalar"]
        built_in = config["hidden_size"] // self.n_head if self.n_layer == self.widest else self.head_dim
        if not math.isclose(scale, built_in):
            raise DynqError(f"config.json: query_pre_attn_scalar {scale} is not supported, only {built_in} is")
        if config.get("use_bidirectional_attention"):
            raise DynqError("config.json: use_bidirectional_attention is not supported")
        if config.get("attention_bias"):
            raise DynqError("config.json: attention_bias is not supported")

    def modules(self, layer: int) -> tuple[Module, ...]:
        first, second = self.norms
        after = [(f"post_{part}_norm.weight", f"post_{name}_layernorm.weight") for part, name in _AFTER]
        return (first, *self.attention, after[0], second, *self.feed_forward, after[1])

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | pattern_to_gguf(self.config, self.name)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        arch, layers = gguf.MODEL_ARCH_NAMES[cls.arch], config["num_hidden_layers"]
        heads = config["num_attention_heads"]
        return config | {
            "layer_types": pattern_from_gguf(metadata, arch, layers, cls.every),
            "query_pre_attn_scalar": config["hidden_size"] // heads if layers == cls.widest else config["head_dim"],
        }


_AFTER = (("attention", "attention"), ("ffw", "feedforward"))


class Gemma2(_Gemma):
    """Soft caps for the scores of attention and for the logits; every other layer slides."""

    arch = gguf.MODEL_ARCH.GEMMA2
    model_types = ("gemma2",)
    every, widest = 2, 46
    keys = (
        _Gemma.keys
        | WINDOW_KEYS
        | {
            "attn_logit_softcapping": "attn_logit_softcapping",
            "final_logit_softcapping": "final_logit_softcapping",
        }
    )


class Gemma3(_Gemma):
    """A norm on each head of q and k; layers that slide have a rotary base of their own, and no scaling."""

    arch = gguf.MODEL_ARCH.GEMMA3
    model_types = ("gemma3_text",)
    attention = (*ATTENTION, *QK_NORMS)
    every, widest = 6, 62
    keys = _Gemma.keys | WINDOW_KEYS | {"final_logit_softcapping": "final_logit_softcapping"}

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.sliding_rope = Rope.from_config(config, "sliding_attention")
        if self.sliding_rope.type != "default":
            raise DynqError(f"config.json: rope type {self.sliding_rope.type!r} is not supported for sliding attention")
        if config.get("attn_logit_softcapping"):
            raise DynqError("config.json: attn_logit_softcapping is not supported for gemma3_text")

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {f"{self.name}.rope.freq_base_swa": self.sliding_rope.theta}

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        if not config.get("sliding_window"):  # so does llama.cpp: then all see all
            config["layer_types"] = ["full_attention"] * config["num_hidden_layers"]
        base = metadata.get(f"{gguf.MODEL_ARCH_NAMES[cls.arch]}.rope.freq_base_swa", 10000.0)
        sliding = {"rope_theta": base, "rope_type": "default"}
        ropes = {"full_attention": config["rope_parameters"], "sliding_attention": sliding}
        return config | {"rope_parameters": ropes}
