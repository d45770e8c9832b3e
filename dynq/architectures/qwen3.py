"""Qwen3 (dense): a norm on each head of q and k, and heads whose size is independent of the width."""

import gguf

from dynq.architectures import Decoder


class Qwen3(Decoder):
    arch = gguf.MODEL_ARCH.QWEN3
    model_types = ("qwen3",)
    layer_modules = (*Decoder.layer_modules[:5], "self_attn.q_norm", "self_attn.k_norm", *Decoder.layer_modules[5:])
    default_head_dim = 128
