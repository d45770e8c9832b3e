"""Which way the outputs of a model's layers matter together: second moments of their gradients.

At a token, y = W x is an output and g the gradient of ``sum_t log p(y_t)`` there, for labels drawn from the model's own
distribution (`dynq.fisher`). An error D of W changes the output by D x, so what ``(g^T D x)^2`` says of directions of
the output is summed up as |x|^2 g g^T: `dynq.coupling` wants the sums.
"""

from __future__ import annotations

import threading
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
import torch

from dynq.fisher import true_fisher_backward
from dynq.progress import progress
from dynq.threads import each, one_thread_each

ASIDE = 4  # of so many chunks one judges how far the others are trusted


def collect(
    model: Any,
    layers: Mapping[str, tuple[torch.nn.Linear, np.ndarray]],
    tokens: np.ndarray,
    *,
    threads: int | None = None,
) -> dict[str, tuple[np.ndarray, np.ndarray]]:
    """Name -> sums of |x|^2 g g^T over tokens, float32 [rows, rows]: of chunks to fit, and of those kept aside.

    layers: name -> linear layer, and which of its outputs the rows are. tokens int32 [n_chunks, n_ctx]; one chunk finds
    nothing. threads: chunks that are read at once on a CPU, by default as many as torch has threads. Sums run over
    chunks in their order, so the bytes do not depend on it.
    """
    chunks = range(len(tokens))
    if not layers or len(chunks) < 2:
        return {}
    aside = chunks[min(ASIDE, len(chunks)) - 1 :: ASIDE]
    model.requires_grad_(False)
    sums = {name: [torch.zeros(len(rows), len(rows)) for _ in range(2)] for name, (_, rows) in layers.items()}
    found: dict[int, dict[str, torch.Tensor]] = {}
    local = threading.local()  # a chunk has a thread of its own

    def keep(name: str, rows: torch.Tensor, layer: Any, args: tuple, out: torch.Tensor) -> None:
        own, size = local.own, args[0].detach().reshape(-1, args[0].shape[-1]).float().norm(dim=-1)

        def take(g: torch.Tensor) -> None:
            own[name] = g.reshape(-1, g.shape[-1])[:, rows].float() * size[:, None]

        if out.requires_grad:
            out.register_hook(take)

    def begin(layer: Any, args: tuple, out: torch.Tensor) -> None:
        if not out.requires_grad:
            out.requires_grad_(True)  # no parameter needs a gradient: the graph begins here

    def backward(i: int) -> None:
        found[i] = local.own = {}
        ids = torch.from_numpy(tokens[i : i + 1].astype(np.int64)).to(model.device)
        logits = model(input_ids=ids, use_cache=False).logits
        true_fisher_backward(torch.log_softmax(logits.float(), dim=-1), torch.Generator().manual_seed(i))

    def add(at_once: range, names: Sequence[str], k: int) -> None:
        for i in at_once:
            g = found[i].get(names[k])
            if g is not None:
                sums[names[k]][i in aside] += (g.T @ g).cpu()

    handles = [model.get_input_embeddings().register_forward_hook(begin)]
    for name, (layer, rows) in layers.items():
        handles.append(layer.register_forward_hook(partial(keep, name, torch.from_numpy(rows).to(model.device))))
    count = (threads or torch.get_num_threads()) if model.device.type == "cpu" else 1
    try:
        with (
            torch.enable_grad(),
            progress(total=len(chunks), desc="output gradients", unit="chunk") as bar,
            one_thread_each(count) as workers,
        ):
            for start in range(0, len(chunks), count):
                at_once = chunks[start : start + count]
                each(workers, backward, at_once, bar)
                each(workers, partial(add, at_once, list(layers)), range(len(layers)))
                found.clear()
    finally:
        for handle in handles:
            handle.remove()
    return {name: (fit.numpy(), kept.numpy()) for name, (fit, kept) in sums.items()}
