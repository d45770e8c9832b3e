"""Command-R and Command-A: LayerNorms without bias, one a layer: attention and feed-forward read the same.

Both worlds rotate neighbours, so that no rows are reordered. The output uses the embedding, always.
"""

from collections.abc import Sequence
from typing import Any

import gguf

from dynq.architectures.decoder import Decoder, MaybeNormed, Module
from dynq.architectures.llama import sizes
from dynq.architectures.sliding import WINDOW_KEYS, pattern_from_gguf, pattern_to_gguf
from dynq.errors import DynqError

_NORMS_FROM = 64  # layers, from which on llama.cpp has norms of q and k


class _Cohere(Decoder):
    rope_types = ("default",)
    keys = {key: name for key, name in Decoder.keys.items() if name != "rms_norm_eps"} | {
        "attention.layer_norm_epsilon": "layer_norm_eps",
        "logit_scale": "logit_scale",
    }

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if config.get("attention_bias"):
            raise DynqError(f"config.json: attention_bias is not supported for {config['model_type']}")
        if not self.tied:
            raise DynqError(f"config.json: tie_word_embeddings false is not supported for {config['model_type']}")

    def modules(self, layer: int) -> Sequence[Module]:
        return (self.norms[0], *self.attention, *self.feed_forward)

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | sizes(self)


class Cohere(MaybeNormed, _Cohere):
    """Norms of each head of q and k, with weights of their own, in the large models."""

    arch = gguf.MODEL_ARCH.COMMAND_R
    model_types = ("cohere",)

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if bool(config.get("use_qk_norm")) != (self.n_layer >= _NORMS_FROM):
            wrong = f"config.json: use_qk_norm {config.get('use_qk_norm')} is not supported with {self.n_layer} layers"
            raise DynqError(f"{wrong}: llama.cpp has norms of q and k from {_NORMS_FROM} layers on")


class Cohere2(_Cohere):
    """Layers whose attention slides over a window; only they are rotated."""

    arch = gguf.MODEL_ARCH.COHERE2
    model_types = ("cohere2",)
    keys = _Cohere.keys | WINDOW_KEYS

    def __init__(self, config: dict[str, Any]) -> None:
        super().__init__(config)
        if not config.get("sliding_window"):
            raise DynqError("config.json: sliding_window null is not supported for cohere2")

    def metadata(self) -> dict[str, Any]:
        return super().metadata() | pattern_to_gguf(self.config, self.name)

    @classmethod
    def config_from_gguf(cls, metadata: dict[str, Any], tensors: dict[str, tuple[int, ...]]) -> dict[str, Any]:
        config = super().config_from_gguf(metadata, tensors)
        types = pattern_from_gguf(metadata, gguf.MODEL_ARCH_NAMES[cls.arch], config["num_hidden_layers"], 4)
        return config | {"layer_types": types}
