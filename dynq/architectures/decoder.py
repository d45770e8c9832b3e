"""The common decoder: attention with grouped keys and rotary positions, gated feed-forward, dense or of experts."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from typing import Any, ClassVar

import gguf
import numpy as np

from dynq.architectures import ROPE_FREQS, Architecture
from dynq.architectures.rope import Rope
from dynq.architectures.slot import Slot, View, neighbours, part, whole
from dynq.errors import DynqError

_LONG, _SHORT = "rope_factors_long.weight", "rope_factors_short.weight"
# GGUF's divisors of the frequencies -> where transformers has the quotients
_FREQUENCIES = {
    ROPE_FREQS: "model.rotary_emb.inv_freq",
    _LONG: "model.rotary_emb.long_inv_freq",
    _SHORT: "model.rotary_emb.original_inv_freq",
}

ATTENTION = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj", "self_attn.o_proj")
QK_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
FEED_FORWARD = ("mlp.gate_proj", "mlp.up_proj", "mlp.down_proj")

WITHOUT_FACTORS = ("default", "linear", "dynamic", "yarn")
"""Types of rope where llama.cpp reads no rope_freqs.weight."""

Module = str | tuple[str, str]
"""A linear layer or norm inside a decoder layer ("mlp.up_proj"), whose GGUF name gguf's tensor map knows; or a pair,
where it does not: a name inside a GGUF's block, the parameter inside a layer ("attn_sinks.weight", "self_attn.sinks").
"""


class Decoder(Architecture):
    """RMS norms, grouped-query attention with rotary positions, gated feed-forward. What a family may say:

    `modules` and `slot`: the tensors of a layer and how they are laid out; `keys`: metadata that is a config value
    under another name, used in both directions; `metadata` and `config_from_gguf`, where that is not enough.
    """

    attention: ClassVar[tuple[Module, ...]] = ATTENTION
    feed_forward: ClassVar[tuple[Module, ...]] = FEED_FORWARD
    norms: ClassVar[tuple[Module, ...]] = ("input_layernorm", "post_attention_layernorm")
    biases: ClassVar[tuple[str, ...]] = ()  # modules that may carry a bias
    activations: ClassVar[tuple[str, ...]] = ("silu",)
    interleaved_rope: ClassVar[bool] = False  # llama.cpp rotates neighbours (2i, 2i+1) and not halves (i, i + dim/2)
    partial_rope: ClassVar[bool] = False  # only some dimensions of a head may be rotated
    rope_types: ClassVar[tuple[str, ...]] = (*WITHOUT_FACTORS, "llama3")
    yarn_settings: ClassVar[frozenset[str]] = frozenset()  # those that the family itself cares for
    ties: ClassVar[bool] = True  # the embedding may be the output's too
    norm_plus: ClassVar[float] = 0.0  # what GGUF adds to the weights of norms
    keys: ClassVar[dict[str, str]] = {
        "block_count": "num_hidden_layers",
        "context_length": "max_position_embeddings",
        "embedding_length": "hidden_size",
        "feed_forward_length": "intermediate_size",
        "attention.head_count": "num_attention_heads",
        "attention.head_count_kv": "num_key_value_heads",
        "attention.layer_norm_rms_epsilon": "rms_norm_eps",
    }
    """Key after "<arch>." -> name in the config. A value that is None is not written."""
    optional_keys: ClassVar[frozenset[str]] = frozenset({"attention.head_count_kv"})

    def __init__(self, config: dict[str, Any]) -> None:
        act = config.get("hidden_act") or config.get("hidden_activation") or self.activations[0]
        if act not in self.activations:
            raise DynqError(f"config.json: hidden_act {act!r} is not supported, only {self.activations[0]!r} is")
        self.n_layer: int = config["num_hidden_layers"]
        self.n_head: int = config["num_attention_heads"]
        self.n_head_kv: int = config.get("num_key_value_heads") or self.n_head
        self.head_dim: int = config.get("head_dim") or config["hidden_size"] // self.n_head
        self.tied: bool = bool(config.get("tie_word_embeddings", False))
        self.rope = Rope.from_config(config)
        if self.rope.type not in self.rope_types:
            raise DynqError(f"config.json: rope type {self.rope.type!r} is not supported for {config['model_type']}")
        self.rope.check_yarn(self.yarn_settings)
        if self.tied and not self.ties:
            raise DynqError(f"config.json: tie_word_embeddings is not supported for {config['model_type']}")
        if self.rope.partial != 1 and not self.partial_rope:
            turned = f"config.json: {self.rotated} of {self.head_dim} dimensions of a head are rotated"
            raise DynqError(f"{turned}: not supported for {config['model_type']}")
        super().__init__(config)

    # --- tensors ------------------------------------------------------------------------------------------------------

    def modules(self, layer: int) -> Sequence[Module]:
        """What one layer has, in the order of the file."""
        first, second = self.norms
        return (first, *self.attention, second, *self.feed_forward)

    def slot(self, kind: str, parameter: str) -> Slot:
        """The slot of one tensor; kind: its GGUF name without the layer and ".weight" ("attn_q", "attn_q.bias")."""
        heads = {"attn_q": self.n_head, "attn_k": self.n_head_kv}.get(kind.removesuffix(".bias"))
        if self.interleaved_rope and heads:
            return Slot(parameter, **neighbours(heads))
        return Slot(parameter, plus=self.norm_plus if kind.endswith("_norm") else 0.0)

    def _slots(self) -> Iterator[tuple[str, Slot]]:
        names = gguf.get_tensor_name_map(self.arch, self.n_layer)
        for name, buffer in _FREQUENCIES.items():
            yield name, Slot(buffer)
        yield "token_embd.weight", self.slot("token_embd", "model.embed_tokens.weight")
        for layer in range(self.n_layer):
            inside = f"model.layers.{layer}"
            for module in self.modules(layer):
                if isinstance(module, tuple):
                    name, parameter = module
                    yield f"blk.{layer}.{name}", self.slot(name.removesuffix(".weight"), f"{inside}.{parameter}")
                    continue
                known = names.get_name(f"{inside}.{module}")
                if known is None:
                    raise DynqError(f"gguf has no name for {module} in the architecture {self.name}")
                kind = known.removeprefix(f"blk.{layer}.")
                yield f"{known}.weight", self.slot(kind, f"{inside}.{module}.weight")
                if module in self.biases:
                    yield f"{known}.bias", self.slot(f"{kind}.bias", f"{inside}.{module}.bias")
        yield "output_norm.weight", self.slot("output_norm", "model.norm.weight")
        yield "output.weight", self.slot("output", "lm_head.weight")

    def required(self) -> list[str]:
        names = [name for name in self.slots if name.endswith(".weight") and name not in _FREQUENCIES]
        return [name for name in names if not (self.tied and name == "output.weight")]

    def extra_tensors(self) -> dict[str, np.ndarray]:
        if self.rope.type == "longrope":
            kept = {_LONG: "long_factor", _SHORT: "short_factor"}
            return {name: np.array(self.rope.settings[key], np.float32) for name, key in kept.items()}
        factors = self.rope.factors(self.rotated)
        return {} if factors is None else {ROPE_FREQS: factors}

    def to_torch(self, name: str, values: np.ndarray) -> np.ndarray:
        if name in _FREQUENCIES:
            return (self.rope.inverse_frequencies(self.rotated) / values).astype(np.float32)
        return values

    def complete(self, model: Any) -> None:
        if self.rope.type == "longrope":
            rotary = model.model.rotary_emb
            rotary.long_inv_freq = rotary.original_inv_freq.clone()

    def logits(self, z: Any) -> Any:
        z = z * (self.config.get("logit_scale") or 1) / (self.config.get("logits_scaling") or 1)
        cap = self.config.get("final_logit_softcapping")
        return (z / cap).tanh() * cap if cap else z

    # --- metadata -----------------------------------------------------------------------------------------------------

    @property
    def rotated(self) -> int:
        """Dimensions of a head that are rotated."""
        return int(self.head_dim * self.rope.partial)

    def metadata(self) -> dict[str, Any]:
        arch = self.name
        found = {f"{arch}.{key}": _number(key, self.config.get(name)) for key, name in self.keys.items()}
        if self.config.get("head_dim"):
            found |= {f"{arch}.attention.key_length": self.head_dim, f"{arch}.attention.value_length": self.head_dim}
        if self.rope.partial != 1:
            found[f"{arch}.rope.dimension_count"] = self.rotated
        return {key: value for key, value in found.items() if value is not None} | self.rope.to_gguf(arch)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        arch = gguf.MODEL_ARCH_NAMES[cls.arch]
        if "token_embd.weight" not in tensors:
            raise DynqError("the GGUF has no tensor token_embd.weight: it is not a complete model")
        config: dict[str, Any] = {"model_type": cls.model_types[0], "vocab_size": tensors["token_embd.weight"][0]}
        for key, name in cls.keys.items():
            value = metadata.get(f"{arch}.{key}")
            if value is not None:
                config[name] = value
            elif key in Decoder.keys and key not in cls.optional_keys:
                raise DynqError(f"the GGUF has no key {arch}.{key}: it is not a complete model")
        config.setdefault("num_key_value_heads", config["num_attention_heads"])
        head_dim = metadata.get(f"{arch}.attention.key_length", config["hidden_size"] // config["num_attention_heads"])
        roles = {"bos": "bos", "eos": "eos", "pad": "padding"}  # None too: a default may lie beyond the vocabulary
        ids = {f"{role}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for role, key in roles.items()}
        rope = Rope.from_gguf(metadata, arch, head_dim, longrope=_LONG in tensors)
        return config | {
            "head_dim": head_dim,
            "rope_parameters": rope.to_config(),
            "tie_word_embeddings": "output.weight" not in tensors,
            **ids,
        }


_FRACTIONS = ("epsilon", "scale", "softcapping", "factor", "freq_base", "scaling")


def _number(key: str, value: Any) -> Any:
    """As a fraction where llama.cpp reads one: configs write 30 for 30.0."""
    return float(value) if key.endswith(_FRACTIONS) and value is not None else value


class MaybeNormed(Decoder):
    """A decoder that has norms of each head of q and k, after its other tensors, in some models (`use_qk_norm`)."""

    def modules(self, layer: int) -> Sequence[Module]:
        return (*super().modules(layer), *(QK_NORMS if self.config.get("use_qk_norm") else ()))

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        norms = "blk.0.attn_q_norm.weight" in tensors
        return super().config_from_gguf(metadata, tensors) | {"use_qk_norm": norms}


class Routed(Decoder):
    """A decoder whose feed-forward is a choice of experts in some or all layers.

    Their weights are one 3-D tensor for gate, up and down each in a GGUF (`ffn_gate_exps [expert, out, in]`), two
    parameters in transformers (gate before up in `mlp.experts.gate_up_proj`), and in most checkpoints matrices.
    """

    experts: ClassVar[str] = "mlp.experts"
    router: ClassVar[Module] = "mlp.gate"
    shared: ClassVar[tuple[Module, ...]] = ()  # experts that every token passes, and their gate
    stored_experts: ClassVar[tuple[str, ...]] = ("gate_proj", "up_proj", "down_proj")  # none: never kept one by one
    expert_views: ClassVar[dict[str, tuple[str, View]]] = {
        "gate": ("gate_up_proj", part(0, 2, 1)),
        "up": ("gate_up_proj", part(1, 2, 1)),
        "down": ("down_proj", whole),
    }
    """Part of an expert -> transformers' parameter and the view of it that is the GGUF tensor."""
    keys = Decoder.keys | {
        "expert_used_count": "num_experts_per_tok",
        "expert_feed_forward_length": "moe_intermediate_size",
    }

    @property
    def n_expert(self) -> int:
        """Experts of a layer, not counting shared ones."""
        names = ("num_experts", "num_local_experts", "n_routed_experts")
        return int(next(self.config[name] for name in names if self.config.get(name)))

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {f"{self.name}.expert_count": self.n_expert}

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        experts = metadata.get(f"{gguf.MODEL_ARCH_NAMES[cls.arch]}.expert_count")
        return super().config_from_gguf(metadata, tensors) | {"num_experts": experts}

    def is_routed(self, layer: int) -> bool:
        """Whether this layer has experts."""
        return True

    def modules(self, layer: int) -> Sequence[Module]:
        if not self.is_routed(layer):
            return super().modules(layer)
        first, second = self.norms
        experts = [(f"ffn_{part}_exps.weight", f"{self.experts}.{part}") for part in self.expert_views]
        return (first, *self.attention, second, self.router, *experts, *self.shared)

    def slot(self, kind: str, parameter: str) -> Slot:
        expert = re.fullmatch(r"ffn_(gate|up|down)_exps", kind)
        if not expert:
            return super().slot(kind, parameter)
        fused, view = self.expert_views[expert[1]]
        experts = parameter.rpartition(".")[0]
        if not self.stored_experts:
            return Slot(f"{experts}.{fused}", view)
        stored = self.stored_experts[list(self.expert_views).index(expert[1])]
        return Slot(f"{experts}.{fused}", view, stored=f"{experts}.{{}}.{stored}.weight", parts=self.n_expert)
