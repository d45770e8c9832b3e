"""The divergence of a file at twice the speed: matrix products in bfloat16, where that does not show in the result.

Rounding adds a divergence of its own, the floor. It is measured on the file itself, bfloat16 against float32, over a
sample of the text: in the original it is lower, whose weights often are bfloat16 already. bfloat16 is used where the
floor is below 2 % of the divergence that is reported. The residual stream, norms, attention and the head stay float32:
a model that is bfloat16 throughout has a floor four to six times as high.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dynq import layerwise
from dynq.evaluate import kld

SHARE = 0.02  # of the reported KLD, at most
SAMPLE_CHUNKS, SAMPLE_TOKENS = 2, 64  # the floor's mean over them is right to about a tenth
QUERIES = 128  # attended at once: each block sees only the keys up to its end


@dataclass(frozen=True)
class Arithmetic:
    """What matrix products were computed in.

    dtype: "float32" or "bfloat16"; floor: nats that bfloat16 adds or would have added, None where it was not tried.
    """

    dtype: str
    floor: float | None


class Bfloat16Products(TorchFunctionMode):
    """Inside of it, a model's linear layers but its head multiply in bfloat16; everything else stays float32.

    Copies of the weights are kept until `clear`: 2 bytes each. Causal attention is computed in blocks of queries, which
    spares the keys that lie ahead; torch's kernel computes and masks them.
    """

    def __init__(self, model: Any):
        super().__init__()
        self._head = model.get_output_embeddings().weight
        self._weights: dict[torch.Tensor, torch.Tensor] = {}

    def clear(self) -> None:
        """Give the copies back."""
        self._weights.clear()

    def __torch_function__(
        self,
        func: Callable[..., Any],
        types: Any,
        args: tuple[Any, ...] = (),
        kwargs: Mapping[str, Any] | None = None,
    ) -> Any:
        kwargs = dict(kwargs or {})
        if func is functional.linear and args[1] is not self._head:
            return self._linear(*args, **kwargs)
        if func is functional.scaled_dot_product_attention and kwargs.get("is_causal") and _square(*args[:2]):
            return _causal_attention(*args, **kwargs | {"is_causal": False})
        return func(*args, **kwargs)

    def _linear(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None = None) -> torch.Tensor:
        if weight not in self._weights:
            self._weights[weight] = weight.bfloat16()
        product = functional.linear(x.bfloat16(), self._weights[weight]).float()
        return product if bias is None else product.add_(bias)


def _square(query: torch.Tensor, key: torch.Tensor) -> bool:
    return query.shape[-2] == key.shape[-2]


def _causal_attention(query: torch.Tensor, key: torch.Tensor, value: torch.Tensor, **settings: Any) -> torch.Tensor:
    """`scaled_dot_product_attention` with is_causal; ``[..., tokens, head]`` each."""
    tokens = query.shape[-2]
    parts = []
    for start in range(0, tokens, QUERIES):
        end = min(start + QUERIES, tokens)
        seen = torch.ones(end - start, end, dtype=torch.bool).tril(start)
        own = query[..., start:end, :], key[..., :end, :], value[..., :end, :]
        parts.append(functional.scaled_dot_product_attention(*own, **settings | {"attn_mask": seen}))
    return torch.cat(parts, -2)


def has_bfloat16() -> bool:
    """Whether the processor multiplies bfloat16 itself; where torch emulates it, it is no faster than float32."""
    native = torch.cpu._is_avx512_bf16_supported() or torch.cpu._is_amx_tile_supported()
    return torch.backends.mkldnn.is_available() and bool(native)


def measure(model: Any, base: kld.Base, *, desc: str = "evaluate") -> tuple[kld.TokenScores, Arithmetic]:
    """What `kld.measure` gives, in bfloat16 where its floor allows it, and what was computed in.

    model: float32, as `load_model` gives it. On another device than the CPU, on a processor without bfloat16, and
    where layers are read one by one, everything is float32.
    """
    if model.device.type != "cpu" or not has_bfloat16() or layerwise.reader(model):
        return kld.measure(model, base, desc=desc), Arithmetic("float32", None)
    coarse = Bfloat16Products(model)
    floor = _floor(model, coarse, base.tokens)

    def allowed(scores: kld.TokenScores) -> bool:
        return floor < SHARE * float(scores.kld.mean())

    try:
        with coarse:
            scores = kld.measure(model, base, chunks=1, desc="" if len(base.tokens) > 1 else desc)
            if allowed(scores):  # files of many bits mostly end here
                if len(base.tokens) > 1:
                    scores = _joined(scores, kld.measure(model, base, skip=1, desc=desc))
                if allowed(scores):
                    return scores, Arithmetic("bfloat16", floor)
    finally:
        coarse.clear()
    return kld.measure(model, base, desc=desc), Arithmetic("float32", floor)


def _joined(first: kld.TokenScores, rest: kld.TokenScores) -> kld.TokenScores:
    return kld.TokenScores(*map(np.concatenate, zip(vars(first).values(), vars(rest).values(), strict=True)))


@torch.inference_mode()
def _floor(model: Any, coarse: Bfloat16Products, tokens: np.ndarray) -> float:
    """Mean KLD in nats of the model in bfloat16 against itself in float32, over all positions of a sample."""
    step = -(-len(tokens) // SAMPLE_CHUNKS)
    sample = tokens[::step, :SAMPLE_TOKENS]
    exact = kld.log_softmax(kld.forward(model, sample, 0))
    with coarse:
        rounded = kld.log_softmax(kld.forward(model, sample, 0))
    return float((exact.exp() * (exact - rounded)).sum(-1).double().mean())
