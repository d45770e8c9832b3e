"""Model families: tensor names, layouts and metadata, Hugging Face <-> GGUF.

One small file a family. A family is a class derived from `decoder.Decoder` or `decoder.Routed` (or, where nothing fits,
straight from `Architecture`) in a module of this folder; every module of it is imported.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from importlib import import_module
from pkgutil import iter_modules
from typing import Any, ClassVar

import gguf
import numpy as np

from dynq.architectures.slot import Slot
from dynq.errors import DynqError

ROPE_FREQS = "rope_freqs.weight"

_EXPERTS = ("num_experts", "num_local_experts", "n_routed_experts")
_MOST = dict.fromkeys(_EXPERTS, 1 << 12) | {
    "num_hidden_layers": 1 << 10,
    "num_nextn_predict_layers": 1 << 10,
    "num_attention_heads": 1 << 12,
    "num_key_value_heads": 1 << 12,
    "head_dim": 1 << 14,
    "hidden_size": 1 << 18,
    "intermediate_size": 1 << 22,
    "moe_intermediate_size": 1 << 22,
    "vocab_size": 1 << 21,
    "max_position_embeddings": 1 << 31,
}
_MOST_MATRICES = 1 << 17  # layers times experts; Kimi K2 has 23,424

FAMILIES: list[type[Architecture]] = []

# The text model inside a multimodal checkpoint: its tensors under the names that it has alone.
_TEXT_PREFIX = re.compile(r"^(?:language_model\.(?:model\.)?|model\.language_model\.(?:model\.)?)(?!lm_head)")
# Tensors that no GGUF of a text model has: the other towers, and buffers and heads that old or large checkpoints carry.
_LEFT_OUT = re.compile(
    r"rotary_emb\.inv_freq$|attention\.masked_bias$|^mtp\.|^(?:model\.)?(?:vision_|visual|audio_|multi_modal_|mm_|embed_vision|embed_audio)"
)


class Architecture:
    """One model's names, layouts and metadata; bound to its config.

    Attributes: `config` (transformers config as a dict, complete with its defaults), `name` (GGUF's architecture name),
    `slots` (GGUF tensor name -> where it stands in transformers, every tensor that the family may have, in file order).
    """

    arch: ClassVar[gguf.MODEL_ARCH]
    model_types: ClassVar[tuple[str, ...]]  # config.json's model_type; the first is written for a GGUF
    renamed: ClassVar[tuple[tuple[str, str], ...]] = ()  # (pattern, replacement): checkpoint names -> transformers'
    known: ClassVar[bool] = True  # whether transformers can be filled with the model's tensors, so that it runs here

    def __init_subclass__(cls) -> None:
        if "arch" in cls.__dict__:
            FAMILIES.append(cls)

    def __init__(self, config: dict[str, Any]) -> None:
        self.config = config
        self.name = gguf.MODEL_ARCH_NAMES[self.arch]
        self.slots = dict(self._slots())

    @classmethod
    def reads(cls, metadata: dict[str, Any]) -> bool:
        """Whether a GGUF with this metadata is of this family: several may share one GGUF architecture."""
        return bool(gguf.MODEL_ARCH_NAMES[cls.arch] == metadata.get("general.architecture"))

    def _slots(self) -> Iterator[tuple[str, Slot]]:
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

    def slot_of(self, name: str) -> Slot:
        """The slot of a GGUF tensor. DynqError if the family has no such tensor."""
        try:
            return self.slots[name]
        except KeyError:
            raise DynqError(f"tensor {name}: the architecture {self.name} has none of this name") from None

    def parameter(self, name: str) -> str:
        """The transformers parameter (or buffer) that a GGUF tensor is, or is a part of. DynqError as `slot_of`."""
        return self.slot_of(name).parameter

    def transformers_name(self, stored: str) -> str | None:
        """The parameter that a tensor of a checkpoint is, by transformers' name; None if it is left out."""
        name = _TEXT_PREFIX.sub("model.", stored).removeprefix("language_model.")
        for pattern, replacement in self.renamed:
            name = re.sub(pattern, replacement, name)
        return None if _LEFT_OUT.search(name) else name

    @property
    def layers_apart(self) -> bool:
        """Whether a layer is given what the one before it made, positions and masks, and nothing else that is made."""
        return True

    def leaves_out(self, name: str) -> bool:
        """Whether files of this GGUF architecture may hold a tensor that no model uses."""
        return False

    def to_torch(self, name: str, values: np.ndarray) -> np.ndarray:
        """The values that a GGUF tensor's slot takes: others only where transformers computes them otherwise."""
        return values

    def complete(self, model: Any) -> None:
        """Give a new transformers model what it makes in its first forward pass, and a slot has to find."""

    def logits(self, z: Any) -> Any:
        """What the model does with the output of its head (a tensor): a scale, a soft cap, or nothing."""
        return z

    def extra_tensors(self) -> dict[str, np.ndarray]:
        """Tensors that a GGUF holds and a Hugging Face checkpoint computes (GGUF layout, float32)."""
        return {}


class Unknown(Architecture):
    """A GGUF of an architecture that no family here knows: names and metadata as they are, nothing of its layers."""

    known = False

    def __init__(self, name: str) -> None:
        self.config = {}
        self.name = name
        self.slots = {}

    def required(self) -> list[str]:
        return []


def supported() -> list[str]:
    """The `model_type`s of transformers that can be opened."""
    return sorted(model_type for family in FAMILIES for model_type in family.model_types)


def for_config(config: dict[str, Any]) -> Architecture:
    """The architecture of a transformers config; of its text model where it is multimodal.

    DynqError names an unknown one and lists the known, or says which value transformers does not take.
    """
    text = dict(config.get("text_config") or {})
    for key in ("tie_word_embeddings", "bos_token_id", "eos_token_id", "quantization_config"):
        if text and key in config:
            text.setdefault(key, config[key])
    config = text or config
    for family in FAMILIES:
        if config.get("model_type") in family.model_types:
            return family(_completed(config))
    wanted = config.get("model_type") or ", ".join(config.get("architectures") or ["(none named)"])
    raise DynqError(
        f"config.json: the architecture {wanted!r} is not supported; supported are {', '.join(supported())}"
    )


def _check_sizes(config: dict[str, Any]) -> None:
    """DynqError for numbers that no model has, before lists of as many things are made."""
    for key, most in _MOST.items():
        value = config.get(key)
        if isinstance(value, int) and not 0 <= value <= most:
            raise DynqError(f"config.json: {key} is {value}, at most {most:,} is believed; fetch the model again")
    layers, experts = config.get("num_hidden_layers"), max((config.get(key) or 0 for key in _EXPERTS), default=0)
    if isinstance(layers, int) and layers * experts > _MOST_MATRICES:
        raise DynqError(f"config.json: {layers} layers of {experts} experts, more than any model has")


def _completed(config: dict[str, Any]) -> dict[str, Any]:
    """With transformers' defaults for what config.json leaves out, and its present names for old ones."""
    import transformers  # brings torch

    _check_sizes(config)
    kept = {key: config[key] for key in ("quantization_config",) if key in config}
    try:
        return transformers.CONFIG_MAPPING[config["model_type"]].from_dict(config).to_dict() | kept
    except Exception as error:  # its validators raise their own, the library's and Python's errors
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        raise DynqError(f"config.json: {' '.join(lines) or type(error).__name__}") from error


def for_gguf(metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> Architecture:
    """The architecture of a GGUF, from its metadata and tensor shapes (NumPy order); `Unknown` if no family reads it.

    DynqError where the file is no language model: a projector for images or sound, an adapter, an importance matrix.
    """
    name, kind = metadata.get("general.architecture"), metadata.get("general.type", "model")
    if name == "clip" or kind == "mmproj":
        raise DynqError(
            "a projector for images or sound (mmproj), no language model: give the language model's GGUF, and keep "
            "this file as it is beside the result; llama.cpp takes it with --mmproj"
        )
    if kind != "model" or not isinstance(name, str):
        raise DynqError(f"a GGUF of type {kind!r} and architecture {name!r}, not a model")
    for family in FAMILIES:
        if family.reads(metadata):
            return family(_completed(family.config_from_gguf(metadata, tensors)))
    return Unknown(name)


for _found in sorted(module.name for module in iter_modules(__path__)):
    import_module(f"{__name__}.{_found}")  # importing a family registers it
