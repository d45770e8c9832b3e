"""The divergence of a file at twice the speed: matrix products in bfloat16, where that does not show in the result.

Rounding adds a divergence of its own, the floor. It is measured on the file itself, bfloat16 against float32, over a
sample of the text: in the original it is lower, whose weights often are bfloat16 already. bfloat16 is used where the
floor is below 2 % of the divergence that is reported. The residual stream, norms, attention and the head stay float32:
a model that is bfloat16 throughout has a floor four to six times as high.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from functools import partial, reduce
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch.nn import functional
from torch.overrides import TorchFunctionMode

from dynq import layerwise
from dynq.checkpoint import Checkpoint
from dynq.cluster import held, runs, tasks
from dynq.devices import has_bfloat16
from dynq.evaluate import kld
from dynq.torch_model import load_model

if TYPE_CHECKING:
    from distributed import Client

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


class _Here:
    """A model at hand."""

    def __init__(self, model: Any):
        self.model = model
        self._coarse: Bfloat16Products | None = None

    def floor(self, base: kld.Base) -> float | None:
        """Of bfloat16, in nats; None where it is not tried."""
        if self.model.device.type != "cpu" or not has_bfloat16() or layerwise.reader(self.model):
            return None
        return _floor(self.model, self._products(), base.tokens)

    def measure(self, base: kld.Base, skip: int, chunks: int | None, coarse: bool, desc: str) -> kld.TokenScores:
        """As `kld.measure`; coarse: in bfloat16."""
        if not coarse:
            self.clear()
        with self._products() if coarse else nullcontext():
            return kld.measure(self.model, base, skip=skip, chunks=chunks, desc=desc)

    def _products(self) -> Bfloat16Products:
        self._coarse = self._coarse or Bfloat16Products(self.model)
        return self._coarse

    def clear(self) -> None:
        """Give copies of weights back."""
        self._coarse = None


class _ByWorkers:
    """The same by a cluster, whose workers read the model, once each, and share the chunks."""

    def __init__(self, cluster: Client, config: Checkpoint, weights: Checkpoint):
        self._cluster, self._models = cluster, (config, weights)

    def floor(self, base: kld.Base) -> float | None:
        return next(tasks(partial(_floor_there, *self._models), [base], self._cluster))

    def measure(self, base: kld.Base, skip: int, chunks: int | None, coarse: bool, desc: str) -> kld.TokenScores:
        rows = range(skip, len(base.tokens) if chunks is None else chunks)
        parts = runs(self._cluster, self._models[0], rows, kld.BATCH)
        there = partial(_measured_there, *self._models, base, coarse)
        found = tasks(there, parts, self._cluster, total=len(parts), desc=desc, unit="batch")
        return reduce(_joined, found)

    def clear(self) -> None:
        pass


def _there(config: Checkpoint, weights: Checkpoint) -> _Here:
    return held(("evaluate", config, weights), lambda: _Here(load_model(config, read=weights.read)))


def reference_by_workers(cluster: Client, checkpoint: Checkpoint, tokens: np.ndarray, path: Path) -> kld.Reference:
    """`kld.make_reference` of a checkpoint, by the workers of a cluster; written here."""
    first, n_vocab = tokens.shape[1] // 2, checkpoint.tensors["token_embd.weight"].shape[0]
    rows = runs(cluster, checkpoint, range(len(tokens)), kld.BATCH)
    parts = [tokens[run.start : run.stop] for run in rows]
    there = partial(_depths_there, checkpoint, first)
    found = tasks(there, parts, cluster, total=len(parts), desc="original", unit="batch")
    return kld.keep_depths(chain.from_iterable(found), tokens, first, n_vocab, path)


def _depths_there(checkpoint: Checkpoint, first: int, tokens: np.ndarray) -> list[np.ndarray]:
    here = _there(checkpoint, checkpoint)
    with layerwise.alone(here.model):
        return [kld.depth_of(log_p) for log_p in kld.log_probabilities(here.model, tokens, first, desc="")]


def _floor_there(config: Checkpoint, weights: Checkpoint, base: kld.Base) -> float | None:
    return _there(config, weights).floor(base)


def _measured_there(
    config: Checkpoint, weights: Checkpoint, base: kld.Base, coarse: bool, rows: range
) -> kld.TokenScores:
    here = _there(config, weights)
    with layerwise.alone(here.model):
        return here.measure(base, rows.start, rows.stop, coarse, "")


def measure(model: Any, base: kld.Base, *, desc: str = "evaluate") -> tuple[kld.TokenScores, Arithmetic]:
    """What `kld.measure` gives, in bfloat16 where its floor allows it, and what was computed in.

    model: float32, as `load_model` gives it. On another device than the CPU, on a processor without bfloat16, and
    where layers are read one by one, everything is float32.
    """
    return _measure(_Here(model), base, desc)


def measure_by_workers(
    cluster: Client, config: Checkpoint, weights: Checkpoint, base: kld.Base, *, desc: str = "evaluate"
) -> tuple[kld.TokenScores, Arithmetic]:
    """`measure` of the model of one checkpoint with the weights of another, by the workers of a cluster."""
    return _measure(_ByWorkers(cluster, config, weights), base, desc)


def _measure(where: _Here | _ByWorkers, base: kld.Base, desc: str) -> tuple[kld.TokenScores, Arithmetic]:
    floor = where.floor(base)
    if floor is None:
        return where.measure(base, 0, None, False, desc), Arithmetic("float32", None)
    more = len(base.tokens) > 1
    try:
        scores = where.measure(base, 0, 1, True, "" if more else desc)
        if floor < SHARE * float(scores.kld.mean()):  # files of many bits mostly end here
            if more:
                scores = _joined(scores, where.measure(base, 1, None, True, desc))
            if floor < SHARE * float(scores.kld.mean()):
                return scores, Arithmetic("bfloat16", floor)
    finally:
        where.clear()
    return where.measure(base, 0, None, False, desc), Arithmetic("float32", floor)


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
