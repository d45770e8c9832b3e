"""Gemma 4: an embedding for each layer, last layers that attend with earlier layers' keys and values, heads that are
wider where all is seen, and in the mixture experts beside the feed-forward."""

import re
from collections.abc import Iterator, Sequence
from typing import Any

import gguf

from dynq.architectures import ROPE_FREQS
from dynq.architectures.decoder import FEED_FORWARD, Decoder, Module
from dynq.architectures.rope import Rope
from dynq.architectures.sliding import WINDOW_KEYS, pattern_from_gguf, pattern_to_gguf
from dynq.architectures.slot import Slot
from dynq.errors import DynqError

_CAP = 30.0  # of logits, where a GGUF does not say: llama.cpp's default for any model
_FULL, _SLIDING = "full_attention", "sliding_attention"
_EXPERTS: tuple[Module, ...] = (
    *("router.proj", ("ffn_gate_inp.scale", "router.scale"), ("ffn_down_exps.scale", "router.per_expert_scale")),
    *(("ffn_gate_up_exps.weight", "experts.gate_up_proj"), ("ffn_down_exps.weight", "experts.down_proj")),
    *("post_feedforward_layernorm_1", "pre_feedforward_layernorm_2", "post_feedforward_layernorm_2"),
)
_OF_THE_LAYER = ("per_layer_input_gate", "per_layer_projection", "post_per_layer_input_norm")
_OF_ALL_LAYERS = {
    "per_layer_token_embd": "embed_tokens_per_layer",
    "per_layer_model_proj": "per_layer_model_projection",
    "per_layer_proj_norm": "per_layer_projection_norm",
}
_KEYS_AND_VALUES = re.compile(r"(?:blk|model\.layers)\.(\d+)\.(?:attn_[kv](?:_norm)?|self_attn\.[kv]_(?:proj|norm))\.")


class Gemma4(Decoder):
    arch = gguf.MODEL_ARCH.GEMMA4
    model_types = ("gemma4_text",)
    activations = ("gelu_pytorch_tanh",)
    partial_rope = True
    rope_types = ("proportional",)
    keys = (
        Decoder.keys
        | WINDOW_KEYS
        | {
            "attention.shared_kv_layers": "num_kv_shared_layers",
            "embedding_length_per_layer_input": "hidden_size_per_layer_input",
            "expert_count": "num_experts",
            "expert_used_count": "top_k_experts",
            "expert_feed_forward_length": "moe_intermediate_size",
        }
    )

    def __init__(self, config: dict[str, Any]) -> None:
        self.types: list[str] = config["layer_types"]
        self.first_shared: int = config["num_hidden_layers"] - config["num_kv_shared_layers"]
        self.width: int = config["hidden_size_per_layer_input"] or 0
        self.has_experts = bool(config["enable_moe_block"])
        overrides = {int(layer): some for layer, some in (config.get("per_layer_config") or {}).items()}
        full = [layer for layer, kind in enumerate(self.types) if kind == _FULL]
        widths = {overrides.get(layer, {}).get("head_dim", config["head_dim"]) for layer in full}
        if len(widths) != 1 or set(overrides) - set(full):
            raise DynqError("config.json: per_layer_config of anything but one width for all full attention is unknown")
        (self.full_head_dim,) = widths
        common = config["num_key_value_heads"]
        self.kv_heads = [
            overrides.get(layer, {}).get("num_key_value_heads", common) for layer in range(len(self.types))
        ]
        self.sliding_rope = Rope.from_config(config, _SLIDING)
        if self.sliding_rope.type != "default":
            raise DynqError(f"config.json: rope type {self.sliding_rope.type!r} is not supported for sliding attention")
        if config.get("use_bidirectional_attention") == "all":
            raise DynqError("config.json: use_bidirectional_attention 'all' is not supported")
        if config.get("attention_bias"):
            raise DynqError("config.json: attention_bias is not supported for gemma4_text")
        if self.width and config["vocab_size_per_layer_input"] != config["vocab_size"]:
            raise DynqError("config.json: vocab_size_per_layer_input must be vocab_size")
        shares = self.types[max(0, self.first_shared - 2) : self.first_shared]
        if self.first_shared < len(self.types) and shares != [_SLIDING, _FULL]:  # llama.cpp takes the last two
            raise DynqError("config.json: num_kv_shared_layers must leave a sliding and a full layer before those")
        super().__init__(config)

    @property
    def rotated(self) -> int:
        return self.full_head_dim  # some of them by nothing

    @property
    def layers_apart(self) -> bool:
        return not self.width and self.first_shared == self.n_layer

    def modules(self, layer: int) -> Sequence[Module]:
        attention = [f"self_attn.{name}" for name in ("q_proj", "q_norm", "o_proj")]
        if layer < self.first_shared:
            attention += ["self_attn.k_proj", "self_attn.k_norm"]
            if not (self.config["attention_k_eq_v"] and self.types[layer] == _FULL):
                attention.append("self_attn.v_proj")
        return (
            *("input_layernorm", *attention, "post_attention_layernorm"),
            *("pre_feedforward_layernorm", *FEED_FORWARD, "post_feedforward_layernorm"),
            *(_EXPERTS if self.has_experts else ()),
            *(_OF_THE_LAYER if self.width else ()),
            ("layer_output_scale.weight", "layer_scalar"),
        )

    def _slots(self) -> Iterator[tuple[str, Slot]]:
        for name, slot in super()._slots():
            yield name, Slot("model.rotary_emb.full_attention_inv_freq") if name == ROPE_FREQS else slot
            if name == "token_embd.weight" and self.width:
                for more, module in _OF_ALL_LAYERS.items():
                    yield f"{more}.weight", self.slot(more, f"model.{module}.weight")

    def _shared(self, name: str) -> bool:
        """Whether these are keys or values of a layer that attends with those of another."""
        found = _KEYS_AND_VALUES.match(name)
        return found is not None and int(found[1]) >= self.first_shared

    def transformers_name(self, stored: str) -> str | None:
        name = super().transformers_name(stored)
        return None if name and self._shared(name) else name

    def leaves_out(self, name: str) -> bool:
        return self._shared(name)

    def metadata(self) -> dict[str, Any]:
        arch, narrow, wide = self.name, self.head_dim, self.full_head_dim
        found = super().metadata() | pattern_to_gguf(self.config, arch)
        found |= {
            f"{arch}.attention.head_count_kv": self.kv_heads,
            f"{arch}.rope.dimension_count": wide,
            f"{arch}.rope.dimension_count_swa": narrow,
            f"{arch}.rope.freq_base_swa": self.sliding_rope.theta,
            f"{arch}.final_logit_softcapping": float(self.config.get("final_logit_softcapping") or 0.0),
        }
        for what in ("key_length", "value_length"):
            found |= {f"{arch}.attention.{what}": wide, f"{arch}.attention.{what}_swa": narrow}
        if self.config["use_double_wide_mlp"]:
            once, shared = self.config["intermediate_size"], self.n_layer - self.first_shared
            found[f"{arch}.feed_forward_length"] = [once] * self.first_shared + [2 * once] * shared
        return found

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        arch = gguf.MODEL_ARCH_NAMES[cls.arch]
        config = super().config_from_gguf(metadata, tensors)
        layers = range(config["num_hidden_layers"])
        types = pattern_from_gguf(metadata, arch, len(layers), 6)
        kv, once = config["num_key_value_heads"], config["intermediate_size"]
        kv = kv if isinstance(kv, list) else [kv] * len(layers)
        full = [layer for layer in layers if types[layer] == _FULL]
        wide = config["head_dim"]
        sliding = {"rope_type": "default", "rope_theta": metadata.get(f"{arch}.rope.freq_base_swa", 10000.0)}
        proportional = {  # how many turn is told by rope_freqs.weight
            "rope_type": "proportional",
            "rope_theta": config["rope_parameters"]["rope_theta"],
            "partial_rotary_factor": 0.25,
        }
        return config | {
            "layer_types": types,
            "head_dim": metadata.get(f"{arch}.attention.key_length_swa", wide),
            "num_key_value_heads": next((kv[layer] for layer in layers if layer not in full), kv[0]),
            "per_layer_config": {str(i): {"head_dim": wide, "num_key_value_heads": kv[i]} for i in full},
            "rope_parameters": {_FULL: proportional, _SLIDING: sliding},
            "attention_k_eq_v": any(
                f"blk.{layer}.attn_k.weight" in tensors and f"blk.{layer}.attn_v.weight" not in tensors
                for layer in full
            ),
            "final_logit_softcapping": metadata.get(f"{arch}.final_logit_softcapping", _CAP) or None,
            "vocab_size_per_layer_input": config["vocab_size"],
            "enable_moe_block": bool(config.get("num_experts")),
            "intermediate_size": once[0] if isinstance(once, list) else once,
            "use_double_wide_mlp": isinstance(once, list) and once[-1] != once[0],
        }
