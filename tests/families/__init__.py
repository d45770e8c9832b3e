"""Small random models of every family, and exports that are wrong on purpose: one module a family.

MODELS: name -> (transformers' model_type, settings of its config, on top of `tiny_models.COMMON`).
WRONG: exports that must differ from the model (see `Wrong`), one for each quirk of the family.
BITS: names of the models whose 3.5bpw file is measured in torch and in the engine (one for each GGUF architecture) ->
    settings that make its rows divisible by 256, where `hidden_size` and `intermediate_size` are not enough.
PREPARE: name -> function that gives the random model's special parameters values that tell (sinks, decays, biases).
EXACT: name -> how far log-probabilities of an F32 file may be from transformers', where the engine rounds more.
FLIPS: names of mixtures where rounding to F16 makes the engine choose other experts than transformers -> settings by
    which every expert is chosen, for the comparison at F16.
"""

from collections.abc import Callable
from importlib import import_module
from pkgutil import iter_modules
from typing import Any

MODELS: dict[str, tuple[str, dict[str, Any]]] = {}
WRONG: list[Any] = []
BITS: dict[str, dict[str, Any]] = {}
PREPARE: dict[str, Callable[[Any], None]] = {}
EXACT: dict[str, float] = {}
FLIPS: dict[str, dict[str, Any]] = {}

for module in sorted(found.name for found in iter_modules(__path__)):
    if module != "common":
        family = import_module(f"families.{module}")
        MODELS |= family.MODELS
        WRONG += family.WRONG
        BITS |= family.BITS
        PREPARE |= getattr(family, "PREPARE", {})
        EXACT |= getattr(family, "EXACT", {})
        FLIPS |= getattr(family, "FLIPS", {})
