"""Experts of a mixture: how many tokens reached each, and more text for those that hardly any did.

A router sends few tokens to some experts, and an importance of five tokens is noise. Such an expert's importance gets
the inputs of further text, of which only those tokens count that are sent to it. Its sensitivity stays what the
calibration text itself says: that an expert is rarely used is real.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import replace
from itertools import islice
from typing import Any

import numpy as np
import torch

from dynq.checkpoint import Checkpoint
from dynq.fisher import Fisher
from dynq.imatrix import Importance
from dynq.layerwise import reader
from dynq.progress import progress
from dynq.recorder import Recorder
from dynq.text import encode_prompt, further_chunks, prompts, sample_chats
from dynq.threads import one_thread_each

WANTED = 64
"""Tokens under which an expert is starved: its own mean then weighs less than four times the other experts'."""
_AT_ONCE = 8  # prompts that are sampled at once


def stacks(checkpoint: Checkpoint) -> list[str]:
    """GGUF names of the tensors that hold a matrix for each expert of a layer."""
    return [name for name, info in checkpoint.tensors.items() if info.quantizable and "_exps" in info.kind]


def tokens_seen(checkpoint: Checkpoint, fisher: Fisher) -> dict[int, np.ndarray]:
    """Layer -> tokens of the calibration text that each of its experts read, int64 ``[n_expert]``."""
    seen: dict[int, np.ndarray] = {}
    for name in stacks(checkpoint):
        layer, found = checkpoint.tensors[name].layer, fisher.in_sum2(name)
        if layer is not None and layer not in seen and found is not None:
            seen[layer] = found[1].astype(np.int64)
    return seen


def starved(counts: np.ndarray, wanted: int = WANTED) -> list[int]:
    """The experts that fewer than `wanted` tokens reached."""
    return [int(expert) for expert in np.flatnonzero(counts < wanted)]


def top_up(
    checkpoint: Checkpoint,
    model: Any,
    tokenizer: Any,
    importance: Importance,
    *,
    spec: str,
    n_ctx: int,
    n_chunks: int,
    limit: int,
    seed: int = 0,
    wanted: int = WANTED,
) -> tuple[Importance, int]:
    """The importance with more tokens for starved experts, and how many tokens of further text were read for it.

    The text is what follows in the files of `spec` (as `dynq.text.load_text` takes it) behind the first `n_chunks`
    chunks of `n_ctx` tokens; then answers that the model gives to the prompts that come with dynq, those first that
    send most tokens to starved experts. It ends when none is starved, or after `limit` chunks. Nothing
    is read for a model that does not fit into memory.
    """
    names = [name for name in stacks(checkpoint) if name in importance.counts]
    if reader(model):  # every text would read the whole model once more
        return importance, 0
    if limit < 1 or not any(starved(importance.counts[name], wanted) for name in names):
        return importance, 0
    sums = {name: importance.sums[name].astype(np.float64) for name in names}
    counts = {name: importance.counts[name].astype(np.float64) for name in names}
    at_once = torch.get_num_threads() if model.device.type == "cpu" else 1

    def seen(ids: Sequence[int]) -> Iterator[tuple[str, np.ndarray, np.ndarray]]:
        """Tensor, what it read of one text, in the order of its columns, and the expert of each row of that."""
        recorder = Recorder(model, checkpoint)
        with torch.no_grad(), recorder:
            model(input_ids=torch.tensor([list(ids)], device=model.device), use_cache=False)
        for name in names:
            unit = recorder.tensors[name]
            if unit not in recorder.used:
                continue  # no token of a short text reached this layer's experts, or all of it is elsewhere
            use = recorder.use(unit)
            shape, flipped = tuple(recorder.units[unit].shape), unit in recorder.flipped
            columns = checkpoint.architecture.slot_of(name).columns(shape, flipped)
            if use.expert is not None and columns is not None:
                yield name, use.x.cpu().numpy()[:, columns], use.expert.cpu().numpy()

    def reach(ids: Sequence[int]) -> int:
        return sum(int((counts[name] < wanted)[expert].sum()) for name, _, expert in seen(ids))

    def read_ahead(texts: Iterator[list[int]]) -> Iterator[tuple[list[int], list[tuple[str, np.ndarray, np.ndarray]]]]:
        """Each text and what was seen of it: several side by side, in their order."""
        while some := list(islice(texts, at_once)):
            with one_thread_each(at_once) as workers:
                found = list(workers.map(lambda ids: list(seen(ids)), some))
            yield from zip(some, found, strict=True)

    def texts() -> Iterator[list[int]]:
        yield from further_chunks(spec, tokenizer, n_ctx=n_ctx, skip=n_chunks, most=limit)
        generator = torch.Generator().manual_seed(seed + 1)
        asked = [ids for messages in prompts("calibrate") if (ids := encode_prompt(tokenizer, messages)[: n_ctx // 2])]
        with one_thread_each(at_once) as workers:
            reached = progress(
                workers.map(reach, asked), total=len(asked), desc="prompts for starved experts", unit="prompt"
            )
            found = list(reached)
        order = np.argsort(np.negative(found), kind="stable")
        for at in range(0, len(order), _AT_ONCE):
            batch = [asked[i] for i in order[at : at + _AT_ONCE]]
            yield from sample_chats(model, tokenizer, batch, max_tokens=n_ctx, generator=generator)

    read = 0
    with progress(total=limit * n_ctx, desc="text for starved experts", unit="tok") as bar:
        for ids, uses in read_ahead(_up_to(texts(), limit * n_ctx)):
            for name, x, expert in uses:
                for e in starved(counts[name], wanted):
                    rows = x[expert == e].astype(np.float64)
                    sums[name][e] += np.square(rows).sum(axis=0)
                    counts[name][e] += len(rows)
            read += len(ids)
            bar.update(len(ids))
            if not any(starved(counts[name], wanted) for name in names):
                break
    return replace(
        importance,
        sums=importance.sums | {name: values.astype(np.float32) for name, values in sums.items()},
        counts=importance.counts | {name: values.astype(np.float32) for name, values in counts.items()},
    ), read


def _up_to(texts: Iterable[list[int]], tokens: int) -> Iterator[list[int]]:
    """Texts until they hold so many tokens; the last one is cut."""
    for ids in texts:
        if ids[:tokens]:
            yield ids[:tokens]
        tokens -= len(ids)
        if tokens <= 0:
            return


def expert_rows(seen: Mapping[int, np.ndarray], importance: Importance, checkpoint: Checkpoint) -> list[dict[str, Any]]:
    """A row for each layer: tokens of its experts, and those that stay starved after the top-up (by number)."""
    first: dict[int, str] = {}
    for name in stacks(checkpoint):
        first.setdefault(checkpoint.tensors[name].layer or 0, name)
    rows = []
    for layer, counts in seen.items():
        after = importance.counts.get(first[layer], counts)
        rows.append(
            {
                "layer": layer,
                "experts": len(counts),
                "tokens, fewest": int(counts.min()),
                "median": int(np.median(counts)),
                "most": int(counts.max()),
                f"under {WANTED}": len(starved(counts)),
                "with more text": len(starved(after)),
                "starved": ", ".join(map(str, starved(after))) or "none",
            }
        )
    return rows
