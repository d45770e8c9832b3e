"""Qwen3-Next and Qwen3.5: gated delta nets, and every so many layers an attention whose output has a gate.

llama.cpp repeats the key heads of Qwen3.5's delta nets one after the other, where transformers repeats each in place:
value heads stand in another order there, in the rows of what makes them and in the columns of what reads them.
"""

import math
from collections.abc import Sequence
from typing import Any, ClassVar

import gguf
import numpy as np

from dynq.architectures.decoder import ATTENTION, QK_NORMS, Decoder, Module, Routed
from dynq.architectures.slot import Slot
from dynq.errors import DynqError

_L2_EPSILON = 1e-6  # transformers' for the keys and queries of a delta net; llama.cpp takes that of the norms
_SECTIONS = (11, 11, 10)  # transformers' default: pairs that turn with time, height and width
_INSIDE = (
    ("ssm_conv1d.weight", "linear_attn.conv1d.weight"),
    ("ssm_dt.bias", "linear_attn.dt_bias"),
    ("ssm_a", "linear_attn.A_log"),
)


class _DeltaNet(Decoder):
    """`linear`: what a delta net multiplies by, in place of `attention`."""

    attention = (*ATTENTION, *QK_NORMS)
    linear: ClassVar[tuple[Module, ...]]
    norm_plus = 1.0
    partial_rope = True
    rope_types = ("default", "yarn")
    keys = Decoder.keys | {
        "ssm.conv_kernel": "linear_conv_kernel_dim",
        "ssm.state_size": "linear_key_head_dim",
        "ssm.group_count": "linear_num_key_heads",
        "ssm.time_step_rank": "linear_num_value_heads",
    }

    def __init__(self, config: dict[str, Any]) -> None:
        self.n_key: int = config["linear_num_key_heads"]
        self.n_value: int = config["linear_num_value_heads"]
        self.state: int = config["linear_key_head_dim"]
        if config["linear_value_head_dim"] != self.state:
            raise DynqError("config.json: linear_key_head_dim and linear_value_head_dim that differ are not supported")
        if self.n_value % self.n_key:
            raise DynqError(
                f"config.json: {self.n_value} linear value heads do not share {self.n_key} key heads evenly"
            )
        if config.get("attention_bias"):
            raise DynqError(f"config.json: attention_bias is not supported for {config['model_type']}")
        if not math.isclose(config["rms_norm_eps"], _L2_EPSILON, rel_tol=1e-3):
            raise DynqError(f"config.json: rms_norm_eps {config['rms_norm_eps']} is not supported, {_L2_EPSILON} is")
        super().__init__(config)

    def modules(self, layer: int) -> Sequence[Module]:
        found = super().modules(layer)
        if self.config["layer_types"][layer] == "full_attention":
            return found
        return (found[0], *self.linear, *(module for module in found[1:] if module not in self.attention))

    def slot(self, kind: str, parameter: str) -> Slot:
        if kind == "ssm_norm":
            return Slot(parameter)  # the gated norm is kept as it is
        return super().slot(kind, parameter)

    def required(self) -> list[str]:
        return super().required() + [name for name in self.slots if name.endswith(("ssm_dt.bias", "ssm_a"))]

    def metadata(self) -> dict[str, Any]:
        arch, types = self.name, self.config["layer_types"]
        found = super().metadata() | {
            f"{arch}.ssm.inner_size": self.n_value * self.state,
            f"{arch}.attention.recurrent_layers": [kind == "linear_attention" for kind in types],
        }
        full = [layer + 1 for layer, kind in enumerate(types) if kind == "full_attention"]
        every = full[0] if full else len(types) + 1
        if full == list(range(every, len(types) + 1, every)):  # what llama.cpp read before it knew the list
            found[f"{arch}.full_attention_interval"] = every
        return found

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        arch = gguf.MODEL_ARCH_NAMES[cls.arch]
        config = super().config_from_gguf(metadata, tensors)
        layers, every = config["num_hidden_layers"], metadata.get(f"{arch}.full_attention_interval", 4)
        regular = [(layer + 1) % every != 0 for layer in range(layers)]
        recurrent = metadata.get(f"{arch}.attention.recurrent_layers", regular)
        config["rope_parameters"].setdefault("partial_rotary_factor", 1.0)  # transformers' default is another
        return config | {
            "layer_types": ["linear_attention" if linear else "full_attention" for linear in recurrent],
            "linear_value_head_dim": metadata[f"{arch}.ssm.inner_size"] // config["linear_num_value_heads"],
        }


class _Qwen35(_DeltaNet):
    """Projections of their own for values' gates, and for the two numbers of each value head; RoPE in sections, which
    are for pictures: a text has the same position in all."""

    linear = (
        *("linear_attn.in_proj_qkv", "linear_attn.in_proj_z"),
        *_INSIDE,
        *("linear_attn.in_proj_b", "linear_attn.in_proj_a", "linear_attn.norm", "linear_attn.out_proj"),
    )

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        self.sections = tuple(self.rope.settings.get("mrope_section") or _SECTIONS)
        pairs = [pair % sum(self.sections) for pair in range(self.rotated // 2)]
        if any(pair >= 3 * self.sections[pair % 3] for pair in pairs):  # llama.cpp turns them with a fourth position
            raise DynqError(f"config.json: mrope_section {list(self.sections)} is not supported, it must be even")

    def slot(self, kind: str, parameter: str) -> Slot:
        keys = np.arange(2 * self.n_key * self.state)
        if kind in ("attn_qkv", "ssm_conv1d"):
            rows = np.concatenate([keys, len(keys) + self._values(self.state)])
            return Slot(parameter, rows=rows, merge=2 if kind == "ssm_conv1d" else 0)
        if kind == "attn_gate":
            return Slot(parameter, rows=self._values(self.state))
        if kind in ("ssm_a", "ssm_dt.bias", "ssm_alpha", "ssm_beta"):
            return Slot(parameter, rows=self._values(1), decay=kind == "ssm_a")
        if kind == "ssm_out":
            return Slot(parameter, cols=self._values(self.state))
        return super().slot(kind, parameter)

    def _values(self, size: int) -> np.ndarray:
        """llama.cpp's order of the value heads, which have so many entries each."""
        entries = np.arange(self.n_value * size).reshape(self.n_key, -1, size)
        return entries.swapaxes(0, 1).reshape(-1)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {f"{self.name}.rope.dimension_sections": [*self.sections, 0]}

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        sections = metadata.get(f"{gguf.MODEL_ARCH_NAMES[cls.arch]}.rope.dimension_sections", _SECTIONS)
        config["rope_parameters"] |= {"mrope_section": list(sections[:3]), "mrope_interleaved": True}
        return config


class Qwen35(_Qwen35):
    arch = gguf.MODEL_ARCH.QWEN35
    model_types = ("qwen3_5_text",)


class _Experts(_DeltaNet, Routed):
    """Experts in every layer, and one that every token passes, by a gate."""

    shared = tuple(f"mlp.shared_expert{part}" for part in ("_gate", ".gate_proj", ".up_proj", ".down_proj"))
    keys = _DeltaNet.keys | Routed.keys | {"expert_shared_feed_forward_length": "shared_expert_intermediate_size"}
    optional_keys = _DeltaNet.optional_keys | {"feed_forward_length"}  # of layers without experts


class Qwen35Moe(_Qwen35, _Experts):
    arch = gguf.MODEL_ARCH.QWEN35MOE
    model_types = ("qwen3_5_moe_text",)


class Qwen3Next(_Experts):
    """One projection for keys, values and their gates, and one for the two numbers of each value head; both go from
    key head to key head, and llama.cpp takes only the first apart. It repeats key heads in place."""

    arch = gguf.MODEL_ARCH.QWEN3NEXT
    model_types = ("qwen3_next",)
    linear = (
        ("attn_qkv.weight", "linear_attn.in_proj_qkvz.weight"),
        ("attn_gate.weight", "linear_attn.in_proj_qkvz.weight"),
        *_INSIDE,
        ("ssm_ba.weight", "linear_attn.in_proj_ba.weight"),
        *("linear_attn.norm", "linear_attn.out_proj"),
    )

    def __init__(self, config: dict[str, Any]) -> None:
        if config.get("mlp_only_layers") or config.get("decoder_sparse_step", 1) != 1:
            raise DynqError("config.json: mlp_only_layers and decoder_sparse_step are not supported for qwen3_next")
        if not config.get("norm_topk_prob"):
            raise DynqError("config.json: norm_topk_prob false is not supported for qwen3_next")
        super().__init__(config)

    def slot(self, kind: str, parameter: str) -> Slot:
        if kind in ("attn_qkv", "attn_gate"):
            values = self.n_value // self.n_key * self.state
            heads = np.arange(2 * self.n_key * (self.state + values)).reshape(self.n_key, -1)
            parts = np.split(heads, np.cumsum([self.state, self.state, values]), axis=1)  # q, k, v, gate
            wanted = parts[:3] if kind == "attn_qkv" else parts[3:]
            return Slot(parameter, rows=np.concatenate([part.reshape(-1) for part in wanted]))
        if kind == "ssm_conv1d":
            return Slot(parameter, merge=2)
        return Slot(parameter, decay=True) if kind == "ssm_a" else super().slot(kind, parameter)
