"""llama.cpp's built-in mixes (Q4_K_M and so on) as a format per tensor: the baseline of every recipe.

The facts are those of src/llama-quant.cpp of llama.cpp, told here as a table of defaults and a rule for each kind of
tensor that departs from it; tests compare them with what libllama decides. Three things bear on a rule besides the
mix: the tensor's place among its kind (early, middle and late layers), the number of query heads that share one
key/value head, and whether there is an importance matrix.
"""

import math
from collections import Counter
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dynq import formats
from dynq.errors import DynqError

if TYPE_CHECKING:
    from dynq.checkpoint import TensorInfo

# the format of a tensor that no rule speaks of
_DEFAULT = {
    "IQ1_S": "IQ1_S",
    "IQ1_M": "IQ1_M",
    "TQ1_0": "TQ1_0",
    "TQ2_0": "TQ2_0",
    "Q1_0": "Q1_0",
    "Q2_0": "Q2_0",
    "IQ2_XXS": "IQ2_XXS",
    "IQ2_XS": "IQ2_XS",
    "IQ2_S": "IQ2_XS",
    "IQ2_M": "IQ2_S",
    "Q2_K_S": "Q2_K",
    "Q2_K": "Q2_K",
    "IQ3_XXS": "IQ3_XXS",
    "IQ3_XS": "IQ3_S",
    "Q3_K_S": "Q3_K",
    "IQ3_S": "IQ3_S",
    "IQ3_M": "IQ3_S",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "IQ4_XS": "IQ4_XS",
    "MXFP4_MOE": "MXFP4",
    "Q4_0": "Q4_0",
    "IQ4_NL": "IQ4_NL",
    "Q4_1": "Q4_1",
    "Q4_K_S": "Q4_K",
    "Q4_K_M": "Q4_K",
    "Q5_0": "Q5_0",
    "Q5_1": "Q5_1",
    "Q5_K_S": "Q5_K",
    "Q5_K_M": "Q5_K",
    "Q6_K": "Q6_K",
    "Q8_0": "Q8_0",
    "BF16": "BF16",
    "F16": "F16",
    "F32": "F32",
}
MIXES: tuple[str, ...] = tuple(name for name, fmt in _DEFAULT.items() if fmt in formats.FORMATS)
"""The names that `mix` knows, as llama-quantize spells them; one whose format gguf does not know is left out."""

BASELINES: tuple[str, ...] = (
    *("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS", "IQ2_S", "IQ2_M", "IQ3_XXS", "IQ3_XS", "IQ3_S", "IQ3_M", "IQ4_XS"),
    *("Q4_K_S", "Q4_K_M", "Q5_K_S", "Q5_K_M", "Q6_K", "Q8_0", "F16"),
)
"""The mixes a recipe is compared with, by size: those that no other of at most their size beats.

With an importance matrix KLD falls from each to the next. The rest lie above the line through these and would only
make it easier to beat: Q2_K_S to Q3_K_L (by a factor of 1.1 to 2.2 in KLD), IQ4_NL, Q4_0 to Q5_1, and the formats for
models trained in them (TQ1_0, TQ2_0, Q1_0, Q2_0, MXFP4_MOE).
"""
# Without one llama-quantize refuses the smallest, and IQ3_S and IQ3_M err more than K mixes of their size.
_WITHOUT_IMPORTANCE = ("Q2_K", "Q3_K_S", "Q3_K_M", *BASELINES[BASELINES.index("IQ4_XS") :])

# The mixes of one and two bits have rules of their own: what they favour is stored in this format.
_FAVOURED = {
    **dict.fromkeys(("IQ1_S", "IQ1_M", "IQ2_XXS", "IQ2_XS"), "Q2_K"),
    **dict.fromkeys(("IQ2_S", "IQ2_M"), "IQ3_S"),
}


@dataclass(frozen=True)
class _Model:
    """What the rules need to know of a model."""

    shared: int  # query heads to one key/value head
    layers: int
    experts: int
    is_70b: bool
    has_importance: bool

    @classmethod
    def of(cls, metadata: Mapping[str, Any], has_importance: bool) -> "_Model":
        arch = metadata.get("general.architecture")
        if f"{arch}.block_count" not in metadata:
            raise DynqError(f"the metadata lacks {arch}.block_count, on which llama.cpp's mixes depend")
        heads = _first(metadata.get(f"{arch}.attention.head_count", 0))  # a model without attention has none
        kv_heads = _first(metadata.get(f"{arch}.attention.head_count_kv", heads))
        layers = int(metadata[f"{arch}.block_count"])
        experts = int(metadata.get(f"{arch}.expert_count", 0))
        # What libllama takes for a 70B: by the number of layers, in the Llama family with grouped heads only.
        llama_70b = arch == "llama" and kv_heads != heads and experts != 8
        return cls(
            shared=heads // kv_heads if kv_heads else 0,
            layers=layers,
            experts=experts,
            is_70b=layers == 80 and (llama_70b or arch == "qwen2"),
            has_importance=has_importance,
        )


def _first(value: Any) -> int:
    """The number itself, or that of the first layer where there is one per layer."""
    return int(value) if isinstance(value, int) or not hasattr(value, "__len__") else int(value[0])


def _gets_more(i: int, n: int) -> bool:
    """The first and last eighth of the layers, and every third between: those that the _M mixes favour."""
    return i < n // 8 or i >= 7 * n // 8 or (i - n // 8) % 3 == 2


def _few_bits(name: str, default: str, kind: str, i: int, model: _Model) -> str:
    """What the mixes of `_FAVOURED` make of an inner tensor, number i of its kind."""
    if kind == "attn_v":
        return "Q4_K" if model.shared >= 4 or model.experts >= 4 else _FAVOURED[name]
    if kind == "attn_k" and model.experts == 8:
        return "Q4_K"
    if kind == "ffn_down" and i < model.layers // 8:
        return _FAVOURED[name]
    if kind == "attn_output":
        more = {"IQ1_S": "IQ2_XXS", "IQ1_M": "IQ2_XXS", "IQ2_S": "IQ3_S", "IQ2_M": "IQ3_S"}
        return "Q5_K" if model.experts == 8 else more.get(name, default)
    return default


def _attn_q_k(name: str, default: str, kind: str, model: _Model) -> str:
    if kind == "attn_k" and model.experts == 8:
        return "Q8_0"
    return {"IQ3_XXS": "IQ2_S", "IQ3_XS": "IQ3_XXS"}.get(name, default)


def _ffn_gate_up(name: str, default: str, i: int, n: int) -> str:
    """The two first feed-forward matrices of layer i of n."""
    return "IQ3_XXS" if name == "IQ3_XS" and n // 8 <= i < 7 * n // 8 else default


def _attn_v(name: str, default: str, i: int, n: int, model: _Model) -> str:
    """Values (and fused qkv), number i of n: small where heads are shared, and dear, so often better stored."""
    fmt = default
    if name == "Q2_K":
        fmt = "Q4_K" if model.shared >= 4 else "Q3_K"
    elif (name in ("Q2_K_S", "IQ3_XXS", "IQ3_XS", "IQ3_S") and model.shared >= 4) or name == "IQ3_M":
        fmt = "Q4_K"
    elif name == "IQ3_XXS" and not model.has_importance:
        fmt = "IQ3_S"
    elif name == "Q3_K_M":
        fmt = "Q5_K" if i < 2 else "Q4_K"
    elif name == "Q3_K_L" or (name == "Q4_K_S" and i < 4) or (name in ("IQ4_NL", "IQ4_XS") and model.shared >= 4):
        fmt = "Q5_K"
    elif name in ("Q4_K_M", "Q5_K_M") and _gets_more(i, n):
        fmt = "Q6_K"
    if model.is_70b and fmt in ("Q3_K", "Q4_K"):
        fmt = "Q5_K"
    return "Q8_0" if model.experts == 8 else fmt


def _ffn_down(name: str, default: str, i: int, n: int, model: _Model) -> str:
    """The second feed-forward matrix of layer i of n."""
    early = i < n // 8
    if name == "Q2_K":
        return "Q3_K"
    if name == "Q2_K_S" and early:
        return "Q4_K"
    if name == "IQ3_XXS" and not model.has_importance:
        return "Q4_K" if early else "Q3_K"
    if name == "IQ3_M" and (early or (model.experts == 8 and _gets_more(i, n))):
        return "Q4_K"
    if name in ("IQ4_NL", "IQ4_XS") and early and not model.has_importance:
        return "Q5_K"
    if name == "Q3_K_M":
        return "Q5_K" if i < n // 16 else "Q4_K"
    if name == "Q3_K_L" or (name == "Q4_K_S" and early):
        return "Q5_K"
    if name in ("Q4_K_M", "Q5_K_M") and _gets_more(i, n):
        return "Q6_K"
    if name in ("Q4_0", "Q5_0") and model.has_importance and early:
        return {"Q4_0": "Q4_1", "Q5_0": "Q5_1"}[name]
    return default


def _attn_output(name: str, default: str, model: _Model) -> str:
    if model.experts == 8:
        few = ("Q2_K", "IQ3_XXS", "IQ3_XS", "Q3_K_S", "IQ3_S", "IQ3_M", "Q3_K_M")
        return "Q5_K" if name in (*few, "IQ4_XS", "IQ4_NL", "Q4_K_S", "Q4_K_M") else default
    more = {"Q2_K": "Q3_K", "IQ3_XXS": "IQ3_S", "IQ3_M": "Q4_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}
    return more.get(name, default)


def _output(name: str, default: str, row: int) -> str:
    """The output head, and the embedding where the two are one tensor."""
    if default in ("Q8_0", "MXFP4") or row % formats.get(default).block:
        return "Q8_0"
    return "Q5_K" if name in _FAVOURED or name == "IQ3_XXS" else "Q6_K"


def _token_embd(name: str, default: str) -> str:
    """The embedding where the output head is another tensor."""
    if name in ("TQ1_0", "TQ2_0", "Q2_0"):
        return "Q4_K"
    return "IQ3_S" if name == "IQ3_XXS" else _FAVOURED.get(name, default)


def mix(
    name: str, tensors: "Mapping[str, TensorInfo]", metadata: Mapping[str, Any], has_importance: bool
) -> dict[str, str]:
    """The format that llama.cpp's mix `name` gives each tensor, in the order of `tensors`, after its row fallbacks.

    tensors: every tensor of the file; those not quantizable are kept. metadata: the GGUF's key/values (architecture,
    numbers of layers, heads and experts). has_importance: whether there is an importance matrix. Without one this is
    what a dry run of llama-quantize shows, also of mixes that it then refuses to write (Q2_K_S, IQ1_S to IQ3_XS).
    Falcon's own rules are left out. DynqError: an unknown name, metadata that lack a number, a row for which
    llama-quantize has no fallback (Q1_0).
    """
    if name not in MIXES:
        raise DynqError(f"no mix {name!r}; llama.cpp's mixes are {', '.join(MIXES)}")
    default = _DEFAULT[name]
    model = _Model.of(metadata, has_importance)
    tied = "output.weight" not in tensors
    result = {name: info.kept for name, info in tensors.items()}

    # Places are counted in libllama's order of tensors: by layer, then by name.
    quantizable = sorted((t for t in tensors.values() if t.quantizable), key=lambda t: (_layer(t), t.name))
    n_values = sum(_kind(t) == "attn_v" for t in quantizable)
    seen: Counter[str] = Counter()
    for tensor in quantizable:
        kind = _kind(tensor)
        by_layer = model.experts > 1 and kind.startswith("ffn_") and name not in _FAVOURED
        i = _layer(tensor) if by_layer else seen[kind]
        seen[kind] += 1
        fmt = default
        if default in ("F32", "F16", "BF16"):
            pass
        elif kind == "per_layer_model_proj":
            fmt = "F16"  # llama-quantize leaves it as it is
        elif kind == "output" or (tied and kind == "token_embd"):
            fmt = _output(name, default, tensor.row)
        elif name == "MXFP4_MOE":
            fmt = "MXFP4" if len(tensor.shape) > 2 and tensor.shape[-3] > 1 else "Q8_0"
        elif kind in ("token_embd", "per_layer_token_embd"):
            fmt = _token_embd(name, default)
        elif name in _FAVOURED:
            fmt = _few_bits(name, default, kind, i, model)
        elif kind == "attn_v":
            fmt = _attn_v(name, default, i, n_values, model)
        elif kind in ("attn_q", "attn_k"):
            fmt = _attn_q_k(name, default, kind, model)
        elif kind == "ffn_down":
            fmt = _ffn_down(name, default, i, model.layers, model)
        elif kind in ("ffn_gate", "ffn_up"):
            fmt = _ffn_gate_up(name, default, i, model.layers)
        elif kind == "attn_output":
            fmt = _attn_output(name, default, model)
        result[tensor.name] = _fitting(fmt, tensor)
    return result


def _layer(tensor: "TensorInfo") -> int:
    return -1 if tensor.layer is None else tensor.layer


def _kind(tensor: "TensorInfo") -> str:
    """The kind as the rules see it: fused and latent values are values, experts' matrices are as any others."""
    if tensor.kind in ("attn_qkv", "attn_kv_b"):
        return "attn_v"
    return next((kind for kind in ("ffn_down", "ffn_gate", "ffn_up") if tensor.kind.startswith(kind)), tensor.kind)


def _fitting(fmt: str, tensor: "TensorInfo") -> str:
    """`fmt` or its fallback. llama-quantize knows none for Q1_0, and gives up."""
    form = formats.get(fmt)
    if tensor.row % form.block and form.block > 32 and form.fallback is None:
        raise DynqError(f"{tensor.name}: llama.cpp has no fallback for rows of {tensor.row} weights in {fmt}")
    return formats.usable(fmt, tensor.row)


def mix_bytes(name: str, tensors: "Mapping[str, TensorInfo]", metadata: Mapping[str, Any], has_importance: bool) -> int:
    """Bytes of all tensor data (no padding) of the mix `name`."""
    chosen = mix(name, tensors, metadata, has_importance)
    return sum(formats.tensor_bytes(fmt, tensors[tensor].shape) for tensor, fmt in chosen.items())


class Neighbours(NamedTuple):
    """The two mixes around a size; inside: False beyond the smallest or the largest, and then both are that one."""

    below: str
    above: str
    inside: bool


def neighbours(
    tensor_bytes: int, tensors: "Mapping[str, TensorInfo]", metadata: Mapping[str, Any], has_importance: bool
) -> Neighbours:
    """The largest of BASELINES with at most `tensor_bytes` and the smallest with at least that many.

    Of mixes of the same size (where rows do not divide into blocks) the last stands for all. Without an importance
    matrix those that need one do not count, and Q2_K, Q3_K_S and Q3_K_M do.
    """
    by_size = {
        mix_bytes(name, tensors, metadata, has_importance): name
        for name in (BASELINES if has_importance else _WITHOUT_IMPORTANCE)
    }
    below = max((size for size in by_size if size <= tensor_bytes), default=None)
    above = min((size for size in by_size if size >= tensor_bytes), default=None)
    nearest = (
        by_size[below if below is not None else min(by_size)],
        by_size[above if above is not None else max(by_size)],
    )
    if below is None or above is None:
        one = nearest[1] if below is None else nearest[0]
        return Neighbours(one, one, False)
    return Neighbours(*nearest, True)


def interpolate_kld(tensor_bytes: float, below: tuple[float, float], above: tuple[float, float]) -> float:
    """The KLD of mixes at `tensor_bytes`: log KLD linear in bytes between two (bytes, KLD), the nearer one outside.

    KLDs in nats, positive; ValueError otherwise. Where the larger mix is no better, the smaller one's KLD throughout.
    Outside of the two nothing is extrapolated (`Neighbours.inside`).
    """
    (size_a, kld_a), (size_b, kld_b) = sorted((below, above))
    if kld_a <= 0 or kld_b <= 0:
        raise ValueError(f"KLDs of {kld_a} and {kld_b} have no logarithm")
    if tensor_bytes <= size_a or size_a == size_b or kld_b >= kld_a:
        return kld_a
    if tensor_bytes >= size_b:
        return kld_b
    part = (tensor_bytes - size_a) / (size_b - size_a)
    return math.exp((1 - part) * math.log(kld_a) + part * math.log(kld_b))
