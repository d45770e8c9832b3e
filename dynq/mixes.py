"""llama.cpp's built-in mixes (Q4_K_M and so on) as a format per tensor: the baseline of every recipe.

The facts are those of src/llama-quant.cpp of llama.cpp, told here as a table of defaults and a rule for each kind of
tensor that departs from it; tests compare them with what libllama decides. Three things bear on a rule besides the
mix: the tensor's place among its kind (early, middle and late layers), the number of query heads that share one
key/value head, and whether there is an importance matrix.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, NamedTuple

from dynq import formats
from dynq.errors import DynqError

if TYPE_CHECKING:
    from dynq.checkpoint import TensorInfo

# the format of a tensor that no rule speaks of
_DEFAULT = {
    "Q2_K_S": "Q2_K",
    "Q2_K": "Q2_K",
    "Q3_K_S": "Q3_K",
    "Q3_K_M": "Q3_K",
    "Q3_K_L": "Q3_K",
    "Q4_0": "Q4_0",
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
}
MIXES: tuple[str, ...] = tuple(_DEFAULT)
"""The names that `mix` knows, as llama-quantize spells them."""
BASELINES: tuple[str, ...] = tuple(m for m in MIXES if "K" in m or m in ("Q8_0", "F16"))
"""The mixes a recipe is compared with: the best ones known at their sizes (the older Q4_0 kind is not)."""


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
        missing = [k for k in ("attention.head_count", "block_count") if f"{arch}.{k}" not in metadata]
        if missing:
            raise DynqError(f"the metadata lacks {arch}.{missing[0]}, on which llama.cpp's mixes depend")
        heads = _first(metadata[f"{arch}.attention.head_count"])
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


def _attn_v(name: str, default: str, i: int, n: int, model: _Model) -> str:
    """Values (and fused qkv), number i of n: small where heads are shared, and dear, so often better stored."""
    fmt = default
    if name == "Q2_K":
        fmt = "Q4_K" if model.shared >= 4 else "Q3_K"
    elif name == "Q2_K_S" and model.shared >= 4:
        fmt = "Q4_K"
    elif name == "Q3_K_M":
        fmt = "Q5_K" if i < 2 else "Q4_K"
    elif name == "Q3_K_L" or (name == "Q4_K_S" and i < 4):
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
        return "Q5_K" if name in ("Q2_K", "Q3_K_S", "Q3_K_M", "Q4_K_S", "Q4_K_M") else default
    return {"Q2_K": "Q3_K", "Q3_K_M": "Q4_K", "Q3_K_L": "Q5_K"}.get(name, default)


def _output(default: str, row: int) -> str:
    """The output head, and the embedding where the two are one tensor."""
    if row % formats.get(default).block:
        return "Q8_0"
    return default if default == "Q8_0" else "Q6_K"


def mix(
    name: str, tensors: "Mapping[str, TensorInfo]", metadata: Mapping[str, Any], has_importance: bool
) -> dict[str, str]:
    """The format that llama.cpp's mix `name` gives each tensor, in the order of `tensors`, after its row fallbacks.

    tensors: every tensor of the file; those not quantizable get F32. metadata: the GGUF's key/values (architecture,
    numbers of layers, heads and experts). Q2_K_S is only made with an importance matrix; here it can be asked for
    without. Falcon's own rules are left out. DynqError: an unknown name, metadata that lack a number.
    """
    if name not in _DEFAULT:
        raise DynqError(f"no mix {name!r}; llama.cpp's mixes are {', '.join(MIXES)}")
    default = _DEFAULT[name]
    model = _Model.of(metadata, has_importance)
    tied = "output.weight" not in tensors
    result = dict.fromkeys(tensors, "F32")

    # Places are counted in libllama's order of tensors: by layer, then by name.
    quantizable = sorted((t for t in tensors.values() if t.quantizable), key=lambda t: (_layer(t), t.name))
    n_values = sum(_is_values(t.kind) for t in quantizable)
    values = downs = 0
    for tensor in quantizable:
        fmt = default
        if default not in ("F16", "BF16"):
            kind = tensor.kind
            if kind == "output" or (tied and kind == "token_embd"):
                fmt = _output(default, tensor.shape[-1])
            elif _is_values(kind):
                fmt = _attn_v(name, default, values, n_values, model)
                values += 1
            elif kind.startswith("ffn_down"):
                fmt = _ffn_down(name, default, _layer(tensor) if model.experts > 1 else downs, model.layers, model)
                downs += 1
            elif kind == "attn_k" and model.experts == 8:
                fmt = "Q8_0"
            elif kind == "attn_output":
                fmt = _attn_output(name, default, model)
        result[tensor.name] = formats.usable(fmt, tensor.shape[-1])
    return result


def _layer(tensor: "TensorInfo") -> int:
    return -1 if tensor.layer is None else tensor.layer


def _is_values(kind: str) -> bool:
    return kind in ("attn_v", "attn_qkv", "attn_kv_b")


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

    Of mixes of the same size the last in BASELINES stands for all. Q2_K_S counts only with an importance matrix.
    """
    by_size = {
        mix_bytes(name, tensors, metadata, has_importance): name
        for name in BASELINES
        if has_importance or name != "Q2_K_S"
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

    KLDs in nats, positive; ValueError otherwise. Outside of the two nothing is extrapolated (`Neighbours.inside`).
    """
    (size_a, kld_a), (size_b, kld_b) = sorted((below, above))
    if kld_a <= 0 or kld_b <= 0:
        raise ValueError(f"KLDs of {kld_a} and {kld_b} have no logarithm")
    if tensor_bytes <= size_a or size_a == size_b:
        return kld_a
    if tensor_bytes >= size_b:
        return kld_b
    part = (tensor_bytes - size_a) / (size_b - size_a)
    return math.exp((1 - part) * math.log(kld_a) + part * math.log(kld_b))
