"""Fisher samples: what a forward and a backward pass tell of how much each weight matters.

For every linear layer y = W x pairs (x_s, g_s) are kept at a few tokens s, where g_s = d/dy_s of
``sum_t log p(y_t)`` and the labels y_t are drawn from the model's own distribution. That makes ``E[g g^T]`` the *true*
Fisher information; with labels taken from the text it would be the empirical one, which is no curvature of the KL
divergence (Kunstner, Balles and Hennig 2019, "Limitations of the empirical Fisher approximation").

Tokens are kept with a probability that follows ``|x_s|^2 |g_s|^2``, the size that their term ``(g_s^T D x_s)^2`` can
have, and are weighted by its inverse (Horvitz and Thompson 1952). A few tokens carry most of the sum, the first
position above all, so this needs far fewer samples than a uniform choice.

One batch of sequences is one safetensors file; ``group`` names the layers that read the same input (q, k, v):

    <group>.x      float16 [n, n_in], rows of length 1 (int64 [n], token ids, for the embedding)
    <group>.length float64 [n]        |x_s|
    <group>.weight float64 [n]        inverse probability that the token was kept
    <name>.g       float16 [n, n_out], rows of length 1 (not for the head, which has a formula without)
    <name>.slope   float64 [n]        |g_s|
    <group>.in_sum2 float64 [n_in]    sum of x_j^2 over all tokens of the batch
    <name>.cross   float64 [2]        sum over tokens of c_s^2; sum over sequences of (sum_s c_s)^2: see `probe_error`
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import safe_open

from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError

UNIFORM_SHARE = 0.1  # of the draws fall on any token alike: bounds every weight, whatever the norms say
HEAD = "output.weight"


def linear_tensors(checkpoint: Checkpoint) -> list[str]:
    """Names of the quantizable tensors, in file order. Each belongs to a linear module or to the embedding."""
    return [name for name, tensor in checkpoint.tensors.items() if tensor.quantizable]


class Recorder:
    """Hooks that keep each layer's inputs and the gradient at its outputs for one batch.

    ``inputs[name]`` is float32 ``[tokens, n_in]`` (the token ids, int64 ``[tokens]``, for the embedding) and
    ``gradients[name]`` float32 ``[tokens, n_out]``. For a tied model the embedding's entry is the lookup; the head's
    entry stands under ``output.weight`` in both cases.
    """

    def __init__(self, model: torch.nn.Module, checkpoint: Checkpoint):
        self.inputs: dict[str, torch.Tensor] = {}
        self.gradients: dict[str, torch.Tensor] = {}
        self.modules: dict[str, torch.nn.Module] = {}
        self._handles = []
        names = linear_tensors(checkpoint)
        for name in names if HEAD in names else [*names, HEAD]:
            if name == HEAD:
                module: torch.nn.Module = model.get_output_embeddings()
            else:
                module = model.get_submodule(checkpoint.architecture.parameter(name).removesuffix(".weight"))
            if not isinstance(module, (torch.nn.Linear, torch.nn.Embedding)):
                raise DynqError(f"{name}: {type(module).__name__} is no linear layer, calibration has no rule for it")
            self.modules[name] = module
            self._handles.append(module.register_forward_hook(self._hook(name)))

    def _hook(self, name: str) -> Any:
        def keep(module: torch.nn.Module, args: tuple, output: torch.Tensor) -> None:
            x = args[0].detach()
            self.inputs[name] = x.reshape(-1, x.shape[-1]) if x.is_floating_point() else x.reshape(-1)
            if isinstance(module, torch.nn.Embedding):
                output.requires_grad_(True)  # no parameter needs a gradient: the graph begins here

            def keep_gradient(gradient: torch.Tensor) -> None:
                self.gradients[name] = gradient.detach().reshape(-1, gradient.shape[-1])

            output.register_hook(keep_gradient)

        return keep

    def clear(self) -> None:
        self.inputs.clear()
        self.gradients.clear()

    def close(self) -> None:
        for handle in self._handles:
            handle.remove()


def _invert(cumulative: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Index of the first entry of each row that reaches the fraction u of its last."""
    return torch.searchsorted(cumulative, u * cumulative[..., -1:]).clamp_(max=cumulative.shape[-1] - 1)


def true_fisher_backward(model: Any, ids: torch.Tensor, generator: torch.Generator) -> None:
    """Backward pass of ``sum_t log p(y_t)``, y_t drawn from the model's own distribution at t.

    ids: int64 ``[batch, n_ctx]``.
    """
    log_p = torch.log_softmax(model(input_ids=ids, use_cache=False).logits.float(), dim=-1)
    with torch.no_grad():
        # drawn on the CPU, by inverting the cumulative sum: the same labels on every device
        u = torch.rand(*ids.shape, 1, generator=generator, dtype=torch.float64).to(log_p.device)
        labels = torch.stack([_invert(row.exp().double().cumsum(-1), at) for row, at in zip(log_p, u, strict=True)])
    log_p.gather(-1, labels).sum().backward()


def choose_tokens(size: torch.Tensor, n: int, generator: torch.Generator) -> tuple[torch.Tensor, torch.Tensor]:
    """Systematic sampling of n tokens with probabilities that follow their size.

    size: float64 ``[tokens]``, not negative. Returns (indices, weights): int64 and float64 ``[<= n + 1]``, where the
    weights are the inverse inclusion probabilities; a token whose probability would pass 1 is always taken, with
    weight 1 (Madow 1949; Horvitz and Thompson 1952).
    """
    tokens = len(size)
    if n >= tokens:
        return torch.arange(tokens), torch.ones(tokens, dtype=torch.float64)
    q = UNIFORM_SHARE / tokens + (1 - UNIFORM_SHARE) * size / size.sum().clamp(min=1e-300)
    probability = torch.ones_like(q)
    free = torch.ones(tokens, dtype=torch.bool)
    for _ in range(tokens):  # ends after few turns: each turn fixes at least one token at 1
        left = n - int((~free).sum())
        probability[free] = q[free] * (left / q[free].sum())
        over = free & (probability >= 1)
        if left <= 0 or not over.any():
            break
        probability[over] = 1.0
        free &= ~over
    ticks = torch.cumsum(probability, 0) + torch.rand(1, generator=generator, dtype=torch.float64)
    before = torch.cat([ticks[:1] - probability[:1], ticks[:-1]])
    chosen = (torch.floor(ticks) > torch.floor(before)) | (probability >= 1)
    index = chosen.nonzero().flatten()
    return index, 1.0 / probability[index]


def _unit(rows: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Rows of length 1 as float16 (what their range was no longer matters) and their lengths as float64."""
    length = rows.double().square().sum(-1).sqrt()
    return (rows / length.clamp(min=1e-30).to(rows.dtype)[:, None]).half().cpu().contiguous(), length.cpu()


def probe_error(weight: torch.Tensor, block: int = 32) -> torch.Tensor:
    """A plain 3-bit rounding error of a weight matrix, same shape: what the cross-token factor is measured with.

    The token form of the sensitivity adds ``(g_s^T D x_s)^2`` over tokens; the exact one squares the sum over a
    sequence. How far the two differ depends on the kind of tensor and hardly on D, so one D serves all formats.
    """
    rows = weight if weight.shape[-1] % block == 0 else torch.nn.functional.pad(weight, (0, -weight.shape[-1] % block))
    blocks = rows.reshape(-1, block)
    scale = blocks.abs().amax(-1, keepdim=True).clamp(min=1e-30) / 3.5
    rounded = (torch.floor(blocks / scale) + 0.5).clamp_(-3.5, 3.5) * scale
    return (rounded - blocks).reshape(rows.shape)[..., : weight.shape[-1]]


def _groups(recorder: Recorder) -> dict[str, list[str]]:
    """First name of each group -> all names that read the same input."""
    groups: dict[int, list[str]] = {}
    for name, x in recorder.inputs.items():
        groups.setdefault(x.data_ptr(), []).append(name)
    return {names[0]: names for names in groups.values()}


@torch.no_grad()
def batch_samples(
    recorder: Recorder, sequences: int, keep: int, generator: torch.Generator
) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """Choose ``keep`` tokens for each group of one batch; returns (tensors, groups) as the file holds them."""
    out: dict[str, torch.Tensor] = {}
    groups = _groups(recorder)
    for first, names in groups.items():
        x = recorder.inputs[first]
        lookup = not x.is_floating_point()
        length2 = torch.ones(len(x), dtype=torch.float64) if lookup else x.double().square().sum(-1).cpu()
        size = torch.zeros(len(x), dtype=torch.float64)
        for name in names:  # members of a group weigh alike, however large their gradients are
            term = length2 * torch.linalg.vector_norm(recorder.gradients[name], dim=-1).double().square().cpu()
            size += term / term.sum().clamp(min=1e-300)
        index, out[f"{first}.weight"] = choose_tokens(size, keep, generator)
        index = index.to(x.device)
        if lookup:
            out[f"{first}.x"], out[f"{first}.length"] = x[index].cpu(), torch.ones(len(index), dtype=torch.float64)
        else:
            out[f"{first}.x"], out[f"{first}.length"] = _unit(x[index])
            out[f"{first}.in_sum2"] = x.double().square().sum(0).cpu()
        for name in names:
            g = recorder.gradients[name]
            if name == HEAD:
                continue  # its formula needs no gradient, and an error in the logits of one token touches no other
            out[f"{name}.g"], out[f"{name}.slope"] = _unit(g[index])
            weight = recorder.modules[name].weight
            # blocks lie within rows, so the rows that were looked up are enough of an embedding
            moved = probe_error(weight[x]) if lookup else x @ probe_error(weight).T
            c = (moved * g).sum(-1).double().reshape(sequences, -1)
            out[f"{name}.cross"] = torch.stack([c.square().sum(), c.sum(-1).square().sum()]).cpu()
    return out, groups


@dataclass(frozen=True)
class Samples:
    """The samples of one tensor over all batches.

    x float32 ``[n, n_in]`` (int64 ``[n]`` token ids for an embedding), g float32 ``[n, n_out]``, weight float64
    ``[n]``: for a term that is quadratic in both, ``sum_s weight_s f(x_s, g_s)`` estimates the sum over all tokens.
    """

    x: torch.Tensor
    g: torch.Tensor
    weight: torch.Tensor


class Fisher:
    """Reads the batches of a ``fisher/`` folder, one tensor at a time."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.safetensors"))
        if not self.paths:
            raise DynqError(f"{folder}: no Fisher samples here; run the calibration first (notebook 03)")
        self.group: dict[str, str] = {}
        self.tokens = 0
        for path in self.paths:
            with safe_open(path, framework="pt") as f:
                batch = json.loads(f.metadata()["batch"])
            self.tokens += batch["tokens"]
            self.group = {name: first for first, names in batch["groups"].items() for name in names}

    def _each(self, key: str) -> Iterator[torch.Tensor]:
        for path in self.paths:
            with safe_open(path, framework="pt") as f:
                yield f.get_tensor(key)

    def samples(self, name: str) -> Samples:
        """The samples of a tensor (GGUF name; ``output.weight`` is the head also where it is tied)."""
        group = self.group[name]
        x, length, weight = (self._all(f"{group}.{what}") for what in ("x", "length", "weight"))
        x = x.float() * length.float()[:, None] if x.is_floating_point() else x
        if name == HEAD:  # its formula needs no gradient
            return Samples(x, torch.empty(len(x), 0), weight)
        return Samples(x, self._all(f"{name}.g").float() * self._all(f"{name}.slope").float()[:, None], weight)

    def _all(self, key: str) -> torch.Tensor:
        return torch.cat(list(self._each(key)))

    def in_sum2(self, name: str) -> np.ndarray | None:
        """Sum of x_j^2 over all tokens, float64 ``[n_in]``; None for an embedding, which has no inputs."""
        key = f"{self.group[name]}.in_sum2"
        with safe_open(self.paths[0], framework="pt") as f:
            if key not in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                return None
        return np.sum([part.numpy() for part in self._each(key)], axis=0)

    def cross_token(self, kinds: dict[str, str]) -> dict[str, float]:
        """Factor per kind of tensor by which the exact, per-sequence form exceeds the token form.

        kinds: tensor name -> kind ("attn_v"). Pooled over the layers of a kind, each layer weighing alike, since the
        estimate of one layer rests on as many squares as there are sequences. The head has 1 by construction.
        """
        ratios: dict[str, list[float]] = {}
        for name, kind in kinds.items():
            token, sequence = np.sum([part.numpy() for part in self._each(f"{name}.cross")], axis=0)
            ratios.setdefault(kind, []).append(sequence / max(token, 1e-300))
        return {kind: float(np.mean(r)) for kind, r in ratios.items()}
