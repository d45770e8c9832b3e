"""DeepSeek V2 and V3: latent attention, experts after some dense layers, and experts that every token passes.

llama.cpp attends in the latent space: `kv_b_proj` is two tensors there, keys (transposed) and values of each head.
"""

import re
from collections.abc import Sequence
from typing import Any

import gguf

from dynq.architectures.decoder import Module, Routed
from dynq.architectures.slot import Slot, View
from dynq.errors import DynqError

_SOFTMAX, _SIGMOID = 1, 2  # llama.cpp's expert_gating_func


class AfterDense(Routed):
    """Experts after some dense layers, and experts that every token passes.

    The router's scores are sigmoids, and a bias that only chooses is added to them.
    """

    shared = tuple(f"mlp.shared_experts.{part}_proj" for part in ("gate", "up", "down"))
    sigmoid: bool = True  # False: a softmax, and no bias
    keys = Routed.keys | {
        "leading_dense_block_count": "first_k_dense_replace",
        "expert_shared_count": "n_shared_experts",
        "expert_weights_scale": "routed_scaling_factor",
        "expert_group_count": "n_group",
        "expert_group_used_count": "topk_group",
    }

    def is_routed(self, layer: int) -> bool:
        return layer >= int(self.config["first_k_dense_replace"])

    def modules(self, layer: int) -> Sequence[Module]:
        has_bias = self.sigmoid and self.is_routed(layer)
        bias = [("exp_probs_b.bias", "mlp.gate.e_score_correction_bias")] if has_bias else []
        return (*super().modules(layer), *bias)

    def transformers_name(self, stored: str) -> str | None:
        layer = re.match(r"model\.layers\.(\d+)\.", stored)  # those after the last predict further tokens
        return None if layer and int(layer[1]) >= self.n_layer else super().transformers_name(stored)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | {
            f"{self.name}.expert_weights_norm": bool(self.sigmoid and self.config.get("norm_topk_prob")),
            f"{self.name}.expert_gating_func": _SIGMOID if self.sigmoid else _SOFTMAX,
        }

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        return config | {
            "n_routed_experts": config.pop("num_experts"),
            "norm_topk_prob": bool(metadata.get(f"{gguf.MODEL_ARCH_NAMES[cls.arch]}.expert_weights_norm")),
            "n_group": config.get("n_group", 1),
            "topk_group": config.get("topk_group", 1),
        }


class DeepSeek(AfterDense):
    arch = gguf.MODEL_ARCH.DEEPSEEK2
    model_types = ("deepseek_v3", "deepseek_v2")
    rope_types = ("default", "dynamic", "yarn")  # llama.cpp would scale attention for "linear" too
    yarn_settings = frozenset({"mscale", "mscale_all_dim"})
    keys = AfterDense.keys | {
        "attention.q_lora_rank": "q_lora_rank",
        "attention.kv_lora_rank": "kv_lora_rank",
        "rope.dimension_count": "qk_rope_head_dim",
        "attention.value_length_mla": "v_head_dim",
    }

    def __init__(self, config: dict[str, Any]) -> None:
        self.sigmoid = config["model_type"] == "deepseek_v3"
        if config.get("attention_bias") or config.get("mlp_bias"):
            raise DynqError("config.json: attention_bias and mlp_bias are not supported for DeepSeek")
        if not self.sigmoid and config.get("topk_method") != "greedy":
            raise DynqError(f"config.json: topk_method {config.get('topk_method')!r} is not supported, 'greedy' is")
        if self.sigmoid and not config.get("rope_interleave"):
            raise DynqError("config.json: rope_interleave false is not supported")
        super().__init__(config)
        if self.rope.settings.get("attention_factor"):
            raise DynqError("config.json: attention_factor of yarn is not supported for DeepSeek")
        self.mscale = float(self.rope.settings.get("mscale_all_dim") or 0)
        if self.mscale != (self.rope.settings.get("mscale") or 0):
            raise DynqError("config.json: mscale and mscale_all_dim that differ are not supported")

    def modules(self, layer: int) -> Sequence[Module]:
        query = ("q_a_proj", "q_a_layernorm", "q_b_proj") if self.config.get("q_lora_rank") else ("q_proj",)
        inside = (*query, "kv_a_proj_with_mqa", "kv_a_layernorm", "o_proj")
        halves = (("attn_k_b.weight", "self_attn.kv_b_proj.weight"), ("attn_v_b.weight", "self_attn.kv_b_proj.weight"))
        found = [module for module in super().modules(layer) if module not in self.attention]
        return (found[0], *(f"self_attn.{name}" for name in inside), *halves, *found[1:])

    def slot(self, kind: str, parameter: str) -> Slot:
        if kind in ("attn_k_b", "attn_v_b"):
            return Slot(parameter, _half(self.n_head, int(self.config["qk_nope_head_dim"]), keys=kind == "attn_k_b"))
        return super().slot(kind, parameter)

    def metadata(self) -> dict[str, Any]:
        config, arch = self.config, self.name
        found = super().metadata() | {
            f"{arch}.vocab_size": config["vocab_size"],
            f"{arch}.attention.q_lora_rank": config.get("q_lora_rank") or 0,
            f"{arch}.attention.head_count_kv": 1,  # the latent, which all heads share
            f"{arch}.attention.key_length": config["kv_lora_rank"] + config["qk_rope_head_dim"],
            f"{arch}.attention.value_length": config["kv_lora_rank"],
            f"{arch}.attention.key_length_mla": config["qk_nope_head_dim"] + config["qk_rope_head_dim"],
        }
        if self.rope.type == "yarn" and self.mscale:
            found[f"{arch}.rope.scaling.yarn_log_multiplier"] = 0.1 * self.mscale
        if not self.sigmoid:
            found.pop(f"{arch}.expert_group_count", None)
            found.pop(f"{arch}.expert_group_used_count", None)
        return found

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        arch = gguf.MODEL_ARCH_NAMES[cls.arch]
        if f"{arch}.attention.key_length_mla" not in metadata:
            raise DynqError(f"the GGUF has no key {arch}.attention.key_length_mla: an old conversion; convert it anew")
        rotated = metadata[f"{arch}.rope.dimension_count"]
        config = super().config_from_gguf(metadata | {f"{arch}.attention.key_length": rotated}, tensors)
        rope = config["rope_parameters"]
        if rope["rope_type"] == "yarn":
            scale = metadata.get(f"{arch}.rope.scaling.yarn_log_multiplier", 0.0) / 0.1
            rope |= {"mscale": scale, "mscale_all_dim": scale}
        is_v3 = metadata.get(f"{arch}.expert_gating_func", _SOFTMAX) == _SIGMOID
        return config | {
            "model_type": "deepseek_v3" if is_v3 else "deepseek_v2",
            "num_key_value_heads": config["num_attention_heads"],
            "q_lora_rank": config.get("q_lora_rank") or None,
            "qk_nope_head_dim": metadata[f"{arch}.attention.key_length_mla"] - rotated,
        }


def _half(heads: int, nope: int, *, keys: bool) -> View:
    """Keys `[heads, rank, nope]` or values `[heads, v, rank]` of `kv_b_proj`."""

    def view(p: Any) -> Any:
        p = p.reshape(heads, -1, p.shape[-1])
        return p[:, :nope].swapaxes(1, 2) if keys else p[:, nope:]

    return view
