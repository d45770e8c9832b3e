"""Qwen2 and Qwen2.5 (dense): biases on q, k and v."""

import gguf

from dynq.architectures import Decoder


class Qwen2(Decoder):
    arch = gguf.MODEL_ARCH.QWEN2
    model_types = ("qwen2",)
    biases = ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj")
