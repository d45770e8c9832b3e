"""Where it hurts: the tokens a file predicts worst, and the tensors that cost it most."""

from collections.abc import Collection
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

import numpy as np
import torch

from dynq import formats
from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld
from dynq.progress import progress
from dynq.torch_model import set_tensor

# --- tokens ---------------------------------------------------------------------------------------------------------


@dataclass(frozen=True)
class Guess:
    """One token as the next one, and how likely original and file hold it."""

    token: int
    text: str
    original: float
    file: float


@dataclass(frozen=True)
class Divergent:
    """A scored position: the text before it, the token that followed, and both models' most likely ones.

    kld: nats; chunk, position: of the token that followed, in the reference's tokens.
    """

    kld: float
    chunk: int
    position: int
    before: str
    followed: Guess
    original_top: list[Guess]
    file_top: list[Guess]


@torch.inference_mode()
def worst_tokens(
    model: Any,
    reference: kld.Reference,
    scores: kld.TokenScores,
    tokenizer: Any,
    *,
    k: int = 20,
    top: int = 5,
    before: int = 48,
) -> list[Divergent]:
    """The k scored positions with the largest divergence, the worst first.

    scores: what `kld.measure` gave for this model and reference. before: tokens of context to show.
    """
    worst = np.argsort(-scores.kld, kind="stable")[:k]
    found = []
    for index in progress(worst.tolist(), desc="worst tokens", unit="token", leave=False):
        chunk, place = divmod(index, reference.scored)
        at = reference.first + place + 1  # of the token that followed
        tokens = reference.tokens[chunk]
        ids = torch.from_numpy(tokens[None, :at].astype(np.int64)).to(model.device)
        q = model(input_ids=ids, use_cache=False, logits_to_keep=1).logits[0, -1].float().softmax(-1).cpu()
        p = reference.coded(chunk).log_probs()[place].exp()

        def guess(token: int, p: torch.Tensor = p, q: torch.Tensor = q) -> Guess:
            return Guess(token, token_text(tokenizer, token), float(p[token]), float(q[token]))

        found.append(
            Divergent(
                float(scores.kld[index]),
                chunk,
                at,
                tokenizer.decode(tokens[max(0, at - before) : at].tolist()),
                guess(int(tokens[at])),
                [guess(token) for token in p.topk(top).indices.tolist()],
                [guess(token) for token in q.topk(top).indices.tolist()],
            )
        )
    return found


def token_text(tokenizer: Any, token: int) -> str:
    """A token as text; one that ends inside a character as the tokenizer writes it."""
    text = tokenizer.decode([token])
    return str(tokenizer.convert_ids_to_tokens(token)) if not text or "\ufffd" in text else str(text)


# --- tensors --------------------------------------------------------------------------------------------------------

GROUPINGS = ("tensor", "layer", "kind", "model")


@dataclass(frozen=True)
class Restored:
    """A group of tensors put back to full precision.

    name: the tensor, layer ("blk.3", or the tensor's name outside layers) or kind ("attn_q"); tensors: those that
    changed; formats: what the file stores them in; bytes: what they take in it. kld: of the file with them restored;
    saved: what that is less than the file's own, and its standard error over tokens.
    """

    name: str
    tensors: list[str]
    formats: str
    bytes: int
    kld: float
    saved: float
    saved_error: float


@dataclass(frozen=True)
class Costs:
    """kld: of the file as it is; rows: the costliest group first; skipped: groups left out by a limit."""

    kld: float
    rows: list[Restored]
    skipped: int


def cost_of_tensors(
    model: Any,
    original: Checkpoint,
    file: Checkpoint,
    reference: kld.Reference,
    *,
    by: str = "tensor",
    among: Collection[str] | None = None,
    limit: int | None = None,
    chunks: int | None = None,
) -> Costs:
    """Put one group of tensors at a time back to full precision in a quantized model, and measure what that saves.

    Each group is a run over the text. On a large model look at layers or kinds first, then at the tensors `among` the
    worst ones; or take a `limit`.

    Args:
        model: the file's, from `load_model`; it is left as it was.
        original, file: where the full precision comes from, and what the file stores.
        reference: of the original.
        by: "tensor", "layer", "kind", or "model" (all at once: what is left is the evaluation's own noise).
        among: only tensors whose name, layer or kind is one of these.
        limit: so many groups, evenly spaced in the file's order.
        chunks: the first so many chunks of the reference.

    Raises:
        DynqError: the file has a tensor that the original has not; an unknown grouping; nothing is left to measure.
    """
    groups = _groups(file, by, among)
    names = list(groups)
    if limit is not None and limit < len(names):
        names = [names[at] for at in np.linspace(0, len(names) - 1, max(limit, 1)).round().astype(int).tolist()]
    whole = kld.measure(model, reference, chunks=chunks, desc="")
    rows = []
    for name in progress(names, desc=f"restore by {by}", unit=by):
        kept: dict[str, torch.Tensor] = {}
        changed = []
        try:
            for tensor in groups[name]:
                parameter = file.architecture.parameter(tensor)
                values = attrgetter(parameter)(model)
                before = values.detach().clone()
                kept.setdefault(parameter, before)
                set_tensor(model, file, tensor, original.read(_source(tensor, original, file)))
                if not torch.equal(before, values):
                    changed.append(tensor)
            if changed:  # what a file stores whole costs nothing
                restored = kld.measure(model, reference, chunks=chunks, desc="")
                rows.append(_row(name, changed, file, whole.kld, restored.kld))
        finally:
            with torch.no_grad():
                for parameter, before in kept.items():
                    attrgetter(parameter)(model).copy_(before)
    rows.sort(key=lambda row: -row.saved)
    return Costs(float(whole.kld.mean()), rows, len(groups) - len(names))


def _groups(file: Checkpoint, by: str, among: Collection[str] | None) -> dict[str, list[str]]:
    if by not in GROUPINGS:
        raise DynqError(f"tensors cannot be grouped by {by!r}; there are {', '.join(GROUPINGS)}")
    groups: dict[str, list[str]] = {}
    for name, info in file.tensors.items():
        layer = name if info.layer is None else f"blk.{info.layer}"
        if among is None or not {name, layer, info.kind}.isdisjoint(among):
            label = {"tensor": name, "layer": layer, "kind": info.kind, "model": "model"}[by]
            groups.setdefault(label, []).append(name)
    if not groups:
        raise DynqError(f"{file.path}: no tensor, layer or kind is called {', '.join(sorted(among or ()))}")
    return groups


def _source(tensor: str, original: Checkpoint, file: Checkpoint) -> str:
    """The original's name of a file's tensor. Some files store the output apart where the original ties it."""
    if tensor == "output.weight" and original.tied:
        return "token_embd.weight"
    if tensor not in original.tensors:
        raise DynqError(f"{file.path}: the original {original.path} has no tensor {tensor}; not the same model")
    return tensor


def _row(name: str, changed: list[str], file: Checkpoint, whole: np.ndarray, restored: np.ndarray) -> Restored:
    infos = [file.tensors[tensor] for tensor in changed]
    saved, error = kld.mean_and_error(whole - restored)
    return Restored(
        name,
        changed,
        ", ".join(sorted({info.dtype for info in infos})),
        sum(formats.tensor_bytes(info.dtype, info.shape) for info in infos),
        float(restored.mean()),
        saved,
        error,
    )
