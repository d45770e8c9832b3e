"""Which way the outputs of a model's layers matter together: second moments of their gradients.

At a token, y = W x is an output and g the gradient of ``sum_t log p(y_t)`` there, for labels drawn from the model's own
distribution (`dynq.fisher`). An error D of W changes the output by D x, so what ``(g^T D x)^2`` says of directions of
the output is summed up as |x|^2 g g^T: `dynq.coupling` wants the sums.
"""

from __future__ import annotations

from collections.abc import Mapping
from functools import partial
from typing import Any

import numpy as np
import torch

from dynq.checkpoint import Checkpoint
from dynq.fisher import true_fisher_backward
from dynq.progress import progress
from dynq.recorder import Recorder
from dynq.threads import each, one_thread_each

ASIDE = 4  # of so many chunks one judges how far the others are trusted


def collect(
    model: Any,
    checkpoint: Checkpoint,
    rows: Mapping[str, np.ndarray],
    tokens: np.ndarray,
    *,
    threads: int | None = None,
) -> dict[str, list[tuple[np.ndarray, np.ndarray]]]:
    """GGUF name -> for each matrix (one, or those of a stack of experts) sums of |x|^2 g g^T over the tokens that it
    read, float32 [rows, rows]: of chunks to fit, and of those kept aside.

    rows: name -> which outputs of its product the rows are. tokens int32 [n_chunks, n_ctx]; one chunk finds nothing.
    threads: chunks that are read at once on a CPU, by default as many as torch has threads. Sums run over chunks in
    their order, so the bytes do not depend on it.
    """
    chunks = range(len(tokens))
    if not rows or len(chunks) < 2:
        return {}
    aside = chunks[min(ASIDE, len(chunks)) - 1 :: ASIDE]
    model.requires_grad_(False)
    count = {name: checkpoint.tensors[name].n_matrices for name in rows}
    matrices = [(name, e) for name in rows for e in range(count[name])]
    sums = {key: [torch.zeros(len(rows[key[0]]), len(rows[key[0]])) for _ in range(2)] for key in matrices}
    found: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor | None]]] = {}

    def begin(layer: Any, args: tuple, out: torch.Tensor) -> None:
        if not out.requires_grad:
            out.requires_grad_(True)  # no parameter needs a gradient: the graph begins here

    def backward(i: int) -> None:
        found[i] = {}
        recorder = Recorder(model, checkpoint, rows)
        ids = torch.from_numpy(tokens[i : i + 1].astype(np.int64)).to(model.device)
        with recorder:
            logits = model(input_ids=ids, use_cache=False).logits
        true_fisher_backward(torch.log_softmax(logits.float(), dim=-1), torch.Generator().manual_seed(i))
        for name, own in rows.items():
            if recorder.tensors[name] in recorder.used:
                use = recorder.use(recorder.tensors[name])
                if use.g is not None:
                    at = torch.from_numpy(own).to(use.g.device)
                    found[i][name] = use.g[:, at] * use.x.float().norm(dim=-1)[:, None], use.expert

    def add(at_once: range, k: int) -> None:
        name, e = matrices[k]
        for i in at_once:
            if name in found[i]:
                g, expert = found[i][name]
                g = g if expert is None else g[expert == e]
                if len(g):
                    sums[name, e][i in aside] += (g.T @ g).cpu()

    handle = model.get_input_embeddings().register_forward_hook(begin)
    at_a_time = (threads or torch.get_num_threads()) if model.device.type == "cpu" else 1
    try:
        with (
            torch.enable_grad(),
            progress(total=len(chunks), desc="output gradients", unit="chunk") as bar,
            one_thread_each(at_a_time) as workers,
        ):
            for start in range(0, len(chunks), at_a_time):
                at_once = chunks[start : start + at_a_time]
                each(workers, backward, at_once, bar)
                each(workers, partial(add, at_once), range(len(matrices)))
                found.clear()
    finally:
        handle.remove()
    pairs = {key: (fit.numpy(), kept.numpy()) for key, (fit, kept) in sums.items()}
    return {name: [pairs[name, e] for e in range(count[name])] for name in rows}
