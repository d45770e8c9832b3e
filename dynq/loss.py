"""What tuning makes small: how far a model's answers, and its layers, are from the original's.

The loss has two parts. The KL divergence of the original's next-token distribution at every position is what counts,
but a chunk says little about a weight by it. What each layer gives to the next says far more: a number for each of its
features at every position, hints in the sense of FitNets (Romero et al. 2015). Their squared errors, relative to the
original's square at that position and averaged over layers and positions, are added with a weight, `hints_weight`. (At
a position, not over all: some have features that are larger by orders of magnitude, the first above all.) So are those
of what the routers of a mixture give, as if these were further layers: a token that goes to another expert is no small
change, and no gradient tells of it.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch

from dynq.devices import CPU, has_bfloat16
from dynq.evaluate import kld

CACHED = 1 << 18  # numbers of logits that a processor takes at once: they stay in its cache


def backward(model: Any, teacher: Any, ids: torch.Tensor, share: float, hints: float, rough: bool) -> float:
    """The mean KLD of chunks at all positions; `share` times the gradient of the loss goes to the model's parameters.

    ids: int64 [chunks, n_ctx]; teacher: the original; hints: their weight; rough: products are rounded where that is
    faster, and on a processor that has bfloat16 attention and activations as well.
    """
    ids = ids.to(model.device)
    with _rounded_products() if rough else nullcontext():
        logits, given = _answer(model, ids, rough)
        with torch.no_grad():
            wanted, originals = _answer(teacher, ids, rough)
            apart, slope = divergence(wanted.to(logits.device), logits)
        errors = sum(_apart(x, y.to(x.device)).to(logits.device) for x, y in zip(given, originals, strict=True))
        positions = logits.shape[:-1].numel()
        torch.autograd.backward([logits, errors * (hints / len(given) * share)], [slope.mul_(share / positions), None])
    return apart / positions


def divergence(wanted: torch.Tensor, logits: torch.Tensor) -> tuple[float, torch.Tensor]:
    """The sum of KL divergences over all positions, and its slope by the logits, q - p: float32 [..., vocab]."""
    rows = logits.shape[:-1].numel() if logits.is_cuda else max(1, CACHED // logits.shape[-1])
    slope, total = torch.empty_like(logits), 0.0
    for x, y, out in zip(*(t.flatten(0, -2).split(rows) for t in (wanted, logits, slope)), strict=True):
        log_p, log_q = kld.log_softmax(x), kld.log_softmax(y)
        p = log_p.exp()
        torch.sub(log_q.exp(), p, out=out)
        total += float(log_p.sub_(log_q).mul_(p).sum())
    return total, slope


def _apart(x: torch.Tensor, original: torch.Tensor) -> torch.Tensor:
    """The mean over positions of |x - original|^2 / |original|^2."""
    size = original.square().sum(-1).clamp_min(torch.finfo(original.dtype).tiny)
    return ((x - original).square().sum(-1) / size).mean()


def _answer(model: Any, ids: torch.Tensor, rough: bool) -> tuple[torch.Tensor, tuple[torch.Tensor, ...]]:
    """Logits [chunks, n_ctx - 1, vocab]; what each layer gives to the next, [chunks, n_ctx, width], the last normed,
    and of a mixture what each router gives, [chunks, n_ctx, experts]."""
    with torch.autocast(CPU, torch.bfloat16, enabled=rough and ids.device.type == CPU and has_bfloat16()):
        answer = model(input_ids=ids, use_cache=False, output_hidden_states=True, output_router_logits=True)
    routed = (logits.reshape(*ids.shape, -1) for logits in getattr(answer, "router_logits", None) or ())
    return answer.logits[:, :-1].float(), (*answer.hidden_states[1:], *routed)


@contextmanager
def _rounded_products() -> Iterator[None]:
    """float32 matrices are multiplied in bfloat16, or TF32 on a card, and summed in float32, where that is faster."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("medium")
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)
