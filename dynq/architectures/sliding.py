"""Layers whose attention slides over a window, and layers that see all: transformers' `layer_types` <-> GGUF."""

from typing import Any

WINDOW_KEYS = {"attention.sliding_window": "sliding_window"}
_PATTERN = "attention.sliding_window_pattern"


def pattern_to_gguf(config: dict[str, Any], arch: str) -> dict[str, Any]:
    """GGUF's key for the layers that slide."""
    return {f"{arch}.{_PATTERN}": [kind == "sliding_attention" for kind in config["layer_types"]]}


def pattern_from_gguf(metadata: dict[str, Any], arch: str, layers: int, every: int) -> list[str]:
    """transformers' `layer_types`; every: one in so many layers, the last of them, sees all where a GGUF is silent."""
    pattern = metadata.get(f"{arch}.{_PATTERN}", every)
    if isinstance(pattern, int):  # 0: none slides
        pattern = [pattern > 0 and layer % pattern < pattern - 1 for layer in range(layers)]
    return ["sliding_attention" if slides else "full_attention" for slides in pattern]
