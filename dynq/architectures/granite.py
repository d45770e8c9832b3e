"""Granite, dense: a Llama with multipliers on embeddings, attention scores, residuals and logits."""

import gguf

from dynq.architectures.llama import Llama


class Granite(Llama):
    arch = gguf.MODEL_ARCH.GRANITE
    model_types = ("granite",)
    keys = Llama.keys | {
        "embedding_scale": "embedding_multiplier",
        "attention.scale": "attention_multiplier",
        "residual_scale": "residual_multiplier",
        "logit_scale": "logits_scaling",
    }
