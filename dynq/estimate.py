"""Sensitivities that are estimated and not measured: for models that dynq cannot run.

A tensor's predicted KL divergence is, in the models that can be measured, close to a constant of its class times its
relative error: weighted by importance, the squared error over the squared weights. Within a tensor the factor hardly
depends on the format (its logarithm varies by 0.1 to 0.2), and from model to model the classes keep their order. The
tensors of L layers share the residual stream's variance, so what each of them may spoil falls with 1 / L.

The constants in `PRIOR` are geometric means, over four small trained models (12 layers of Qwen 3, 4 of Llama, 6 of
Gemma 3, 3 of Qwen 3 MoE), of each class's mean factor. ``tests/bench/prior.py`` measures them again and says how good
they are on a model that they were not taken from.
"""

import math
import re
from collections.abc import Iterable, Mapping

import numpy as np
import pyarrow as pa

from dynq import codec, formats
from dynq.checkpoint import Checkpoint, TensorInfo
from dynq.encoding import importance_of, matrices, usable
from dynq.errors import DynqError
from dynq.imatrix import Importance
from dynq.progress import progress
from dynq.sensitivity import SCHEMA

PRIOR: dict[str, float] = {
    "token_embd": 0.80,  # where the output has weights of its own
    "output": 4.9,
    "attn_q": 0.21,
    "attn_k": 0.38,
    "attn_v": 1.0,
    "attn_output": 0.66,
    "ffn_gate": 1.4,
    "ffn_up": 1.1,
    "ffn_down": 1.9,
}
"""Class -> nats of divergence for a relative error of 1, times the number of layers where it is inside of one."""

# What other names stand for: parts of the same kind, or of the same place in a layer. A fused tensor has the sum.
_ALIKE = {
    "attn_qkv": ("attn_q", "attn_k", "attn_v"),
    "attn_kv_b": ("attn_k", "attn_v"),
    "attn_k_b": ("attn_k",),
    "attn_v_b": ("attn_v",),
    "attn_q_a": ("attn_q",),
    "attn_q_b": ("attn_q",),
    "attn_out": ("attn_output",),
    "ssm_in": ("ffn_gate", "ffn_up"),
    "ssm_out": ("ffn_down",),
    "time_mix_receptance": ("attn_q",),
    "time_mix_key": ("attn_k",),
    "time_mix_value": ("attn_v",),
    "time_mix_output": ("attn_output",),
    "channel_mix_key": ("ffn_up",),
    "channel_mix_value": ("ffn_down",),
}
INSIDE = ("attn_q", "attn_k", "attn_v", "attn_output", "ffn_gate", "ffn_up", "ffn_down")


def class_of(info: TensorInfo, tied: bool) -> str:
    """The class that a tensor's factor is taken from: its kind, experts' matrices as any others."""
    kind = info.name.removesuffix(".weight").rpartition(".")[2]
    kind = re.sub(r"_(exps|shexp|chexps)$", "", re.sub(r"^cross_", "", kind))
    return "output" if kind == "token_embd" and tied else kind


def factor(kind: str, layers: int, prior: Mapping[str, float] = PRIOR) -> float:
    """Nats of divergence for a relative error of 1, from a class and the number of layers.

    A class that was never measured has the geometric mean of those inside of layers.
    """
    if kind in prior and kind not in INSIDE:
        return prior[kind]
    parts = [kind] if kind in prior else _ALIKE.get(kind, ())
    if parts:
        return sum(prior[part] for part in parts) / layers
    return math.exp(float(np.mean([math.log(prior[part]) for part in INSIDE]))) / layers


def estimate(
    checkpoint: Checkpoint,
    importance: Importance | None,
    candidates: Iterable[str],
    *,
    level: str = "plain",
    prior: Mapping[str, float] = PRIOR,
    threads: int | None = None,
) -> pa.Table:
    """A table like that of `sensitivity.sensitivity` for a model that cannot be run; no errors of the estimates.

    Without importance all inputs count alike, and formats that need it are left out.
    """
    candidates = tuple(candidates)
    layers = layer_count(checkpoint.tensors)
    names = [name for name, info in checkpoint.tensors.items() if info.quantizable]
    rows = []
    for name in progress(names, desc="estimate", unit="tensor"):
        info = checkpoint.tensors[name]
        mean = importance_of(checkpoint, name, importance)
        fmts = usable(candidates, info.row, mean)
        if not fmts:
            raise DynqError(f"{name}: {', '.join(candidates)} all need importance; give an --imatrix, or add Q2_K")
        power, errors = 0.0, dict.fromkeys(fmts, 0.0)
        for weight, own in matrices(checkpoint, name, mean):
            power += codec.weighted_error(weight, np.zeros_like(weight), own)
            for fmt in fmts:
                data = codec.quantize(weight, fmt, own, level=level, threads=threads)
                errors[fmt] += codec.weighted_error(weight, codec.dequantize(data, fmt, threads=threads), own)
        scale = factor(class_of(info, checkpoint.tied), layers, prior) / power if power else 0.0
        found = []
        for fmt, error in errors.items():
            size = formats.tensor_bytes(fmt, info.shape)
            row = {"tensor": name, "kind": info.kind, "format": fmt, "bytes": size, "bpw": 8 * size / info.n_weights}
            found.append(row | {"predicted_kld": scale * error, "weighted_error": error})
        rows += sorted(found, key=lambda row: (row["bytes"], row["format"]))
    return pa.Table.from_pylist([{k: row.get(k) for k in SCHEMA.names} for row in rows], schema=SCHEMA)


def layer_count(tensors: Mapping[str, TensorInfo]) -> int:
    """Layers of a model, by the names of its tensors; those of an encoder count as well."""
    found = {match[1] for name in tensors if (match := re.match(r"((?:\w+\.)?blk\.\d+)\.", name))}
    return max(1, len(found))
