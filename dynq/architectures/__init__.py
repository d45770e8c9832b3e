"""Model families: tensor names, layouts and metadata, Hugging Face <-> GGUF.

One small file a family. A family is a class derived from `Decoder` (the common shape: attention with grouped
keys, gated feed-forward, RMS norms) or straight from `Architecture`, and is registered by being imported here.
"""

from __future__ import annotations

import re
from typing import Any, ClassVar

import gguf
import numpy as np

from dynq.architectures.rope import Rope
from dynq.errors import DynqError

ROPE_FREQS = "rope_freqs.weight"
_INV_FREQ = "model.rotary_emb.inv_freq"  # transformers' buffer that stands for rope_freqs.weight

_FAMILIES: list[type[Architecture]] = []


class Architecture:
    """One model's names, layouts and metadata; bound to its config.

    Attributes: `config` (transformers config as a dict), `name` (GGUF's architecture name).
    """

    arch: ClassVar[gguf.MODEL_ARCH]
    model_types: ClassVar[tuple[str, ...]]  # config.json's model_type; the first is written for a GGUF

    def __init_subclass__(cls) -> None:
        if "arch" in cls.__dict__:
            _FAMILIES.append(cls)

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.name = gguf.MODEL_ARCH_NAMES[self.arch]
        self._parameters = self._names()  # GGUF name -> transformers parameter
        self._gguf_names = {parameter: name for name, parameter in self._parameters.items()}

    def _names(self) -> dict[str, str]:
        """Every tensor that the family may have, in file order: GGUF name -> transformers parameter."""
        raise NotImplementedError

    def required(self) -> list[str]:
        """GGUF names without which a checkpoint is not complete."""
        raise NotImplementedError

    def metadata(self) -> dict[str, Any]:
        """GGUF hyperparameters (`<arch>.*` keys)."""
        raise NotImplementedError

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        """A transformers config from GGUF metadata and tensor shapes (NumPy order)."""
        raise NotImplementedError

    def names(self) -> list[str]:
        """Every GGUF tensor name that the family may have, in file order."""
        return list(self._parameters)

    def parameter(self, name: str) -> str:
        """The transformers parameter (or buffer) behind a GGUF tensor. DynqError if the family has no such tensor."""
        try:
            return self._parameters[name]
        except KeyError:
            raise DynqError(f"tensor {name}: the architecture {self.name} has none of this name") from None

    def gguf_name(self, parameter: str) -> str | None:
        """The GGUF tensor behind a transformers parameter, None if there is none."""
        return self._gguf_names.get(parameter)

    def to_gguf(self, name: str, array: np.ndarray) -> np.ndarray:
        """transformers' layout -> GGUF's, for the tensor of this GGUF name. Same shape and dtype."""
        return array

    def to_torch(self, name: str, array: np.ndarray) -> np.ndarray:
        """GGUF's layout -> transformers': the inverse of `to_gguf`."""
        return array

    def extra_tensors(self) -> dict[str, np.ndarray]:
        """Tensors that a GGUF holds and a Hugging Face checkpoint computes (GGUF layout, float32)."""
        return {}


class Decoder(Architecture):
    """The common decoder: RMS norm, grouped-query attention with rotary positions, gated SiLU feed-forward."""

    layer_modules: ClassVar[tuple[str, ...]] = (
        "input_layernorm",
        "self_attn.q_proj",
        "self_attn.k_proj",
        "self_attn.v_proj",
        "self_attn.o_proj",
        "post_attention_layernorm",
        "mlp.gate_proj",
        "mlp.up_proj",
        "mlp.down_proj",
    )
    biases: ClassVar[tuple[str, ...]] = ()  # modules that carry a bias
    default_head_dim: ClassVar[int | None] = (
        None  # transformers' default where config.json is silent; None: width / heads
    )
    interleaved_rope: ClassVar[bool] = False  # llama.cpp rotates neighbours (2i, 2i+1) and not halves (i, i + dim/2)

    def __init__(self, config: dict[str, Any]) -> None:
        for key in ("hidden_size", "num_hidden_layers", "num_attention_heads", "intermediate_size", "vocab_size"):
            if not isinstance(config.get(key), int):
                raise DynqError(f"config.json: {key} is missing or not a whole number")
        if (act := config.get("hidden_act", "silu")) != "silu":
            raise DynqError(f"config.json: hidden_act {act!r} is not supported, only 'silu' is")
        self.n_layer: int = config["num_hidden_layers"]
        self.n_head: int = config["num_attention_heads"]
        self.n_head_kv: int = config.get("num_key_value_heads") or self.n_head
        self.head_dim: int = config.get("head_dim") or self.default_head_dim or config["hidden_size"] // self.n_head
        self.tied: bool = bool(config.get("tie_word_embeddings", False))
        self.rope = Rope.from_config(config)
        super().__init__(config)

    def _names(self) -> dict[str, str]:
        to_gguf = gguf.get_tensor_name_map(self.arch, self.n_layer)
        modules = ["model.embed_tokens"]
        for layer in range(self.n_layer):
            modules += [f"model.layers.{layer}.{module}" for module in self.layer_modules]
        modules += ["model.norm", "lm_head"]
        names = {ROPE_FREQS: _INV_FREQ}
        for module in modules:
            name = to_gguf.get_name(module)
            names[f"{name}.weight"] = f"{module}.weight"
            if module.partition(".layers.")[2].partition(".")[2] in self.biases:
                names[f"{name}.bias"] = f"{module}.bias"
        return names

    def required(self) -> list[str]:
        names = [name for name in self._parameters if name.endswith(".weight") and name != ROPE_FREQS]
        return [name for name in names if not (self.tied and name == "output.weight")]

    def metadata(self) -> dict[str, Any]:
        config, arch = self.config, self.name
        keys: dict[str, Any] = {
            "block_count": self.n_layer,
            "context_length": int(config.get("max_position_embeddings", 2048)),
            "embedding_length": config["hidden_size"],
            "feed_forward_length": config["intermediate_size"],
            "attention.head_count": self.n_head,
            "attention.head_count_kv": self.n_head_kv,
            "attention.layer_norm_rms_epsilon": float(config.get("rms_norm_eps", 1e-6)),
        }
        if config.get("head_dim") or self.default_head_dim:
            keys |= {"attention.key_length": self.head_dim, "attention.value_length": self.head_dim}
        return {f"{arch}.{key}": value for key, value in keys.items()} | self.rope.to_gguf(arch)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        arch = gguf.MODEL_ARCH_NAMES[cls.arch]

        def get(key: str) -> Any:
            try:
                return metadata[f"{arch}.{key}"]
            except KeyError:
                raise DynqError(f"the GGUF has no key {arch}.{key}: it is not a complete model") from None

        heads = get("attention.head_count")
        if "token_embd.weight" not in tensors:
            raise DynqError("the GGUF has no tensor token_embd.weight: it is not a complete model")
        head_dim = metadata.get(f"{arch}.attention.key_length", get("embedding_length") // heads)
        rotated = metadata.get(f"{arch}.rope.dimension_count", head_dim)
        if rotated != head_dim:
            raise DynqError(f"the GGUF rotates {rotated} of {head_dim} dimensions of a head: not supported for {arch}")
        ids = {f"{key}_token_id": metadata.get(f"tokenizer.ggml.{key}_token_id") for key in ("bos", "eos")}
        return {
            "model_type": cls.model_types[0],
            "vocab_size": tensors["token_embd.weight"][0],
            "hidden_size": get("embedding_length"),
            "intermediate_size": get("feed_forward_length"),
            "num_hidden_layers": get("block_count"),
            "num_attention_heads": heads,
            "num_key_value_heads": metadata.get(f"{arch}.attention.head_count_kv", heads),
            "head_dim": head_dim,
            "hidden_act": "silu",
            "max_position_embeddings": get("context_length"),
            "rms_norm_eps": get("attention.layer_norm_rms_epsilon"),
            "rope_parameters": Rope.from_gguf(metadata, arch).to_config(),
            "tie_word_embeddings": "output.weight" not in tensors,
            **ids,
        }

    def extra_tensors(self) -> dict[str, np.ndarray]:
        factors = self.rope.factors(self.head_dim)
        return {} if factors is None else {ROPE_FREQS: factors}

    def to_gguf(self, name: str, array: np.ndarray) -> np.ndarray:
        if name == ROPE_FREQS:
            return (self.rope.inverse_frequencies(self.head_dim) / array).astype(np.float32)
        if heads := self._rotated_heads(name):
            # halves [head, 2, dim/2] -> neighbours [head, dim/2, 2]
            return array.reshape(heads, 2, -1, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array

    def to_torch(self, name: str, array: np.ndarray) -> np.ndarray:
        if name == ROPE_FREQS:
            return (self.rope.inverse_frequencies(self.head_dim) / array).astype(np.float32)
        if heads := self._rotated_heads(name):
            return array.reshape(heads, -1, 2, *array.shape[1:]).swapaxes(1, 2).reshape(array.shape)
        return array

    def _rotated_heads(self, name: str) -> int:
        """Heads whose rows the two worlds order differently in this tensor; 0 if it is the same in both."""
        if not self.interleaved_rope:
            return 0
        kind = re.sub(r"^blk\.\d+\.", "", name).partition(".")[0]
        return {"attn_q": self.n_head, "attn_k": self.n_head_kv}.get(kind, 0)


def supported() -> list[str]:
    """The `model_type`s of transformers that can be opened."""
    return sorted(model_type for family in _FAMILIES for model_type in family.model_types)


def for_config(config: dict[str, Any]) -> Architecture:
    """The architecture of a transformers config. DynqError names an unknown one and lists the known."""
    for family in _FAMILIES:
        if config.get("model_type") in family.model_types:
            return family(config)
    wanted = config.get("model_type") or ", ".join(config.get("architectures") or ["(none named)"])
    raise DynqError(
        f"config.json: the architecture {wanted!r} is not supported; supported are {', '.join(supported())}"
    )


def for_gguf(metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Architecture:
    """The architecture of a GGUF, from its metadata and tensor shapes (NumPy order). DynqError as `for_config`."""
    wanted = metadata.get("general.architecture")
    for family in _FAMILIES:
        if gguf.MODEL_ARCH_NAMES[family.arch] == wanted:
            return family(family.config_from_gguf(metadata, tensors))
    known = ", ".join(sorted({gguf.MODEL_ARCH_NAMES[family.arch] for family in _FAMILIES}))
    raise DynqError(f"the GGUF's architecture {wanted!r} is not supported; supported are {known}")


from dynq.architectures import llama, qwen2, qwen3  # noqa: E402, F401  (importing a family registers it)
