"""Rotary position settings: a transformers config <-> GGUF keys, and the factors of llama3 and longrope."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dynq.errors import DynqError

# Settings of yarn for which llama.cpp reads no key -> what it does (`llama_context`, `ggml_rope_yarn_corr_dims`). There
# are keys for the first three, but only Grok's loader reads them.
_YARN_FIXED = {
    "beta_fast": 32,
    "beta_slow": 1,
    "extrapolation_factor": 1,
    "truncate": True,
    "mscale": 0,
    "mscale_all_dim": 0,
}
# "dynamic" changes nothing below the trained context length, and llama.cpp has no such mode: it is written as none.
_TYPES = ("default", "linear", "dynamic", "yarn", "llama3", "longrope", "proportional")
_STILL = 1e30  # divides the frequencies of pairs that do not turn


@dataclass(frozen=True)
class Rope:
    """Base, scaling type and the scaling's own settings, under the names of transformers' `rope_parameters`.

    partial: the fraction of a head's dimensions that is rotated.
    """

    theta: float = 10000.0
    type: str = "default"
    settings: dict[str, Any] = field(default_factory=dict)
    partial: float = 1.0

    @classmethod
    def from_config(cls, config: dict[str, Any], layer_type: str = "full_attention") -> Rope:
        """From a transformers config: `rope_parameters` (version 5), or `rope_theta` with `rope_scaling` (before).

        layer_type: whose settings, where kinds of layers have their own.
        """
        parameters = dict(config.get("rope_parameters") or {})
        parameters = parameters.get(layer_type, parameters)
        settings = dict(config.get("rope_scaling") or {}) | parameters
        theta = settings.pop("rope_theta", None) or config.get("rope_theta") or 10000.0
        old_name = settings.pop("type", None)
        kind = settings.pop("rope_type", None) or old_name or "default"
        if kind not in _TYPES:
            raise DynqError(f"config.json: rope type {kind!r} is not supported here; known are {', '.join(_TYPES)}")
        partial = settings.pop("partial_rotary_factor", None) or config.get("partial_rotary_factor") or 1.0
        if kind not in ("default", "longrope", "proportional") and "factor" not in settings:
            raise DynqError(f"config.json: rope type {kind!r} has no 'factor'")
        if kind in ("yarn", "longrope"):
            longest = config.get("max_position_embeddings")
            old = settings.setdefault(
                "original_max_position_embeddings", config.get("original_max_position_embeddings") or longest
            )
            if kind == "longrope" and settings.get("factor") is None:
                settings["factor"] = longest / old
        return cls(float(theta), kind, settings, float(partial))

    @classmethod
    def from_gguf(cls, metadata: dict[str, Any], arch: str, head_dim: int, longrope: bool = False) -> Rope:
        """From GGUF keys. llama3's settings are not among them: they live in the tensor `rope_freqs.weight`, and
        longrope's factors in two tensors, whose presence `longrope` tells; here they are ones.

        A factor without a type is a linear one, in older files `rope.scale_linear` (llama.cpp's `load_hparams`).
        """

        def get(key: str) -> Any:
            return metadata.get(f"{arch}.rope.{key}")

        theta = float(get("freq_base") or 10000.0)
        partial = (get("dimension_count") or head_dim) / head_dim
        factor = get("scaling.factor") or get("scale_linear")
        kind = get("scaling.type") or ("linear" if factor not in (None, 0.0, 1.0) else "none")
        kind = "longrope" if longrope else kind
        if kind == "none":
            return cls(theta, partial=partial)
        settings: dict[str, Any] = {"factor": factor}
        if kind in ("yarn", "longrope"):
            settings["original_max_position_embeddings"] = get("scaling.original_context_length")
        if kind == "longrope":
            ones = [1.0] * (round(head_dim * partial) // 2)
            attention = get("scaling.attn_factor") or 1.0
            settings |= {"attention_factor": attention, "short_factor": ones, "long_factor": ones}
        if kind == "yarn" and get("scaling.attn_factor"):
            settings["attention_factor"] = get("scaling.attn_factor") * _yarn_factor(float(factor))
        return cls.from_config(
            {
                "max_position_embeddings": metadata.get(f"{arch}.context_length"),
                "rope_parameters": {k: v for k, v in settings.items() if v is not None}
                | {"rope_theta": theta, "rope_type": kind, "partial_rotary_factor": partial},
            }
        )

    def check_yarn(self, taken: frozenset[str]) -> None:
        """DynqError for a setting of yarn that llama.cpp would not follow, unless the family takes care of it."""
        for name, value in _YARN_FIXED.items():
            if self.type == "yarn" and name not in taken and self.settings.get(name) not in (None, value):
                wrong = f"config.json: {name} {self.settings[name]} of yarn is not supported"
                raise DynqError(f"{wrong}: llama.cpp has {value} for every model")

    def to_config(self) -> dict[str, Any]:
        """transformers' `rope_parameters`."""
        partial = {} if self.partial == 1 else {"partial_rotary_factor": self.partial}
        return {"rope_theta": self.theta, "rope_type": self.type, **partial, **self.settings}

    def to_gguf(self, arch: str) -> dict[str, Any]:
        """GGUF keys, as llama.cpp reads them."""
        keys: dict[str, Any] = {}
        if self.type in ("linear", "yarn"):
            keys["scaling.type"] = self.type
            keys["scaling.factor"] = float(self.settings["factor"])
        if self.type in ("yarn", "longrope"):
            keys["scaling.original_context_length"] = int(self.settings["original_max_position_embeddings"])
        if self.type == "longrope":
            keys["scaling.type"] = "longrope"
            keys["scaling.attn_factor"] = self.attention_factor
        if self.type == "yarn" and self.settings.get("attention_factor"):
            usual = _yarn_factor(float(self.settings["factor"]))
            keys["scaling.attn_factor"] = float(self.settings["attention_factor"]) / usual
        keys["freq_base"] = self.theta
        return {f"{arch}.rope.{key}": value for key, value in keys.items()}

    @property
    def attention_factor(self) -> float:
        """longrope's multiplier of what is rotated; where none is given, by the rule of transformers
        (`_compute_longrope_parameters`) and of llama.cpp's converter."""
        given = self.settings.get("attention_factor")
        if given is not None:
            return float(given)
        factor, old = self.settings["factor"], self.settings["original_max_position_embeddings"]
        return math.sqrt(1 + math.log(factor) / math.log(old)) if factor > 1 else 1.0

    def inverse_frequencies(self, dim: int) -> np.ndarray:
        """Unscaled angular step of each rotated pair, float64 [dim / 2]."""
        return self.theta ** (-np.arange(0, dim, 2, dtype=np.float64) / dim)

    def factors(self, dim: int) -> np.ndarray | None:
        """The divisor of each frequency, float32 [dim / 2]; None for types that have none of their own.

        Proportional: the pairs behind the rotated fraction stand still, and the others turn as if all did.
        Llama 3.1's rule: wavelengths shorter than `old / high_freq_factor` are kept, longer than
        `old / low_freq_factor` are stretched by `factor`, and between the two the inverse blends linearly.
        """
        if self.type == "proportional":
            turned = int(self.partial * dim // 2)
            factors = np.full(dim // 2, self.settings.get("factor", 1.0), np.float32)
            factors[turned:] = _STILL
            return factors
        if self.type != "llama3":
            return None
        factor = float(self.settings["factor"])
        low = float(self.settings.get("low_freq_factor", 1.0))
        high = float(self.settings.get("high_freq_factor", 4.0))
        old = float(self.settings.get("original_max_position_embeddings", 8192))
        turns = old * self.inverse_frequencies(dim) / (2 * math.pi)  # full turns within the old context
        # Llama 4 has one border: low and high are the same
        keep = np.clip((turns - low) / (high - low), 0.0, 1.0) if high != low else turns >= low
        return (1.0 / ((1.0 - keep) / factor + keep)).astype(np.float32)


def _yarn_factor(factor: float) -> float:
    """By how much yarn lengthens queries and keys where nothing else is said (transformers and llama.cpp alike)."""
    return 0.1 * math.log(factor) + 1 if factor > 1 else 1.0
