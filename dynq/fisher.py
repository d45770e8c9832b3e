"""Fisher samples: what a forward and a backward pass tell of how much each weight matters.

For every linear layer y = W x pairs (x_s, g_s) are kept at a few tokens s, where g_s = d/dy_s of
``sum_t log p(y_t)`` and the labels y_t are drawn from the model's own distribution. That makes ``E[g g^T]`` the *true*
Fisher information; with labels taken from the text it would be the empirical one, which is no curvature of the KL
divergence (Kunstner, Balles and Hennig 2019, "Limitations of the empirical Fisher approximation").

Tokens are kept with a probability that follows ``|x_s|^2 |g_s|^2``, the size that their term ``(g_s^T D x_s)^2`` can
have, and are weighted by its inverse (Horvitz and Thompson 1952). A few tokens carry most of the sum, the first
position above all, so this needs far fewer samples than a uniform choice.

The experts of a mixture are linear layers as well, each reads the tokens that are sent to it.

One sequence is one safetensors file. A ``unit`` is one parameter (`dynq.recorder`), a ``group`` the units that read the
same input (q, k, v):

    <group>.x       float16 [n, n_in], rows of length 1 (int64 [n], token ids, for the embedding)
    <group>.length  float64 [n]        |x_s|
    <group>.weight  float64 [n]        inverse probability that the token was kept
    <group>.expert  int64 [n]          which expert read it (of a stack of experts)
    <unit>.g        float16 [n, n_out], rows of length 1 (not for the head, which has a formula without)
    <unit>.slope    float64 [n]        |g_s|
    <group>.in_sum2 float64 [n_in], [n_expert, n_in]  sum of x_j^2 over all tokens of the sequence
    <group>.counts  float64 [1], [n_expert]           tokens summed
    <unit>.cross    float64 [2]        sum over tokens of c_s^2; (sum_s c_s)^2: see `probe_error`
"""

import json
import zlib
from collections.abc import Callable, Iterator
from concurrent.futures import Executor
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from safetensors import SafetensorError, safe_open

from dynq.errors import DynqError
from dynq.recorder import HEAD, Recorder

TOGETHER = 256  # samples that a thread multiplies at a time; the last digits depend on it
UNIFORM_SHARE = 0.1  # of the draws fall on any token alike: bounds every weight, whatever the norms say


def _invert(cumulative: torch.Tensor, u: torch.Tensor) -> torch.Tensor:
    """Index of the first entry of each row that reaches the fraction u of its last."""
    return torch.searchsorted(cumulative, u * cumulative[..., -1:]).clamp_(max=cumulative.shape[-1] - 1)


def true_fisher_backward(log_p: torch.Tensor, generator: torch.Generator) -> None:
    """Backward pass of ``sum_t log p(y_t)``, y_t drawn from the model's own distribution at t.

    log_p: log-probabilities, float32 ``[batch, n_ctx, n_vocab]``, with their graph.
    """
    with torch.no_grad():
        # drawn on the CPU, by inverting the cumulative sum: the same labels on every device
        u = torch.rand(*log_p.shape[:2], 1, generator=generator, dtype=torch.float64).to(log_p.device)
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
    return (rows.float() / length.clamp(min=1e-30).float()[:, None]).half().contiguous(), length


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
    """First unit of each group -> all units that read the same input."""
    groups: dict[int, list[str]] = {}
    for unit in recorder.used:
        groups.setdefault(recorder.shares(unit), []).append(unit)
    return {units[0]: units for units in groups.values()}


@torch.no_grad()
def sequence_samples(recorder: Recorder, keep: int, seed: int) -> tuple[dict[str, torch.Tensor], dict[str, list[str]]]:
    """Choose ``keep`` tokens of one sequence for each group; returns (tensors, groups) as the file holds them.

    seed: each group draws by itself, so their order does not matter.
    """
    out: dict[str, torch.Tensor] = {}
    groups = _groups(recorder)
    for first, units in groups.items():
        uses = {unit: recorder.use(unit) for unit in units}
        x, expert = uses[first].x, uses[first].expert
        lookup = not x.is_floating_point()
        size = torch.zeros(len(x), dtype=torch.float64, device=x.device)
        length2 = torch.ones_like(size) if lookup else x.double().square().sum(-1)
        gradients = {unit: torch.zeros(0) if use.g is None else use.g for unit, use in uses.items()}
        for g in gradients.values():  # members of a group weigh alike, however large their gradients are
            term = length2 * torch.linalg.vector_norm(g, dim=-1).double().square()
            size += term / term.sum().clamp(min=1e-300)
        generator = torch.Generator().manual_seed(seed << 32 | zlib.crc32(first.encode()))
        index, out[f"{first}.weight"] = choose_tokens(size.cpu(), keep, generator)
        index = index.to(x.device)
        if lookup:
            out[f"{first}.x"], out[f"{first}.length"] = x[index], torch.ones(len(index), dtype=torch.float64)
        else:
            out[f"{first}.x"], out[f"{first}.length"] = _unit(x[index])
            n_expert = len(recorder.units[first]) if expert is not None else 1
            rows = torch.zeros(len(x), dtype=torch.int64, device=x.device) if expert is None else expert
            sums = torch.zeros(n_expert, x.shape[-1], dtype=torch.float64, device=x.device)
            sums.index_add_(0, rows, x.double().square())
            out[f"{first}.in_sum2"] = sums if expert is not None else sums[0]
            out[f"{first}.counts"] = torch.bincount(rows, minlength=n_expert).double()
        if expert is not None:
            out[f"{first}.expert"] = expert[index]
        for unit, g in gradients.items():
            if unit == HEAD:
                continue  # its formula needs no gradient, and an error in the logits of one token touches no other
            out[f"{unit}.g"], out[f"{unit}.slope"] = _unit(g[index])
            parameter, flipped = recorder.units[unit], unit in recorder.flipped
            # blocks lie within rows, so the rows that were looked up are enough of an embedding
            matrix = parameter[x] if lookup else parameter.swapaxes(-1, -2) if flipped else parameter
            moved = _moved(matrix, torch.arange(len(x), device=x.device) if lookup else x, expert, _probe)
            c = (moved.float() * g).sum(-1).double()
            out[f"{unit}.cross"] = torch.stack([c.square().sum(), c.sum().square()])
    return {name: values.cpu() for name, values in out.items()}, groups


def _probe(matrix: torch.Tensor) -> torch.Tensor:
    """`probe_error` in the matrix's own type."""
    return probe_error(matrix.float()).to(matrix.dtype)


def _moved(
    matrix: torch.Tensor,
    x: torch.Tensor,
    expert: torch.Tensor | None,
    error: Callable[[torch.Tensor], torch.Tensor] = lambda matrix: matrix,
) -> torch.Tensor:
    """``D x_s`` of each token, ``[n, n_out]``; the rows that are looked up, where x holds numbers.

    matrix: ``[n_out, n_in]``, of experts ``[expert, n_out, n_in]``; error: gives D of a matrix, one expert at a time.
    """
    if not x.is_floating_point():
        return error(matrix)[x]
    if expert is None:
        return x @ error(matrix).T
    out = torch.zeros(len(x), matrix.shape[-2], dtype=x.dtype, device=x.device)
    for e in expert.unique():
        rows = expert == e
        out[rows] = x[rows] @ error(matrix[e]).T
    return out


@dataclass(frozen=True)
class Samples:
    """The samples of one tensor over all sequences.

    x float32 ``[n, n_in]`` (int64 ``[n]`` token ids for an embedding), g float32 ``[n, n_out]``, weight float64
    ``[n]``: for a term that is quadratic in both, ``sum_s weight_s f(x_s, g_s)`` estimates the sum over all tokens.
    expert: int64 ``[n]`` for a stack of experts. flipped: the parameter is ``[..., n_in, n_out]``.
    """

    x: torch.Tensor
    g: torch.Tensor
    weight: torch.Tensor
    expert: torch.Tensor | None = None
    flipped: bool = False

    def projections(
        self, error: torch.Tensor, workers: Executor | None = None, *, only: int | None = None
    ) -> torch.Tensor:
        """``g_s^T D x_s`` of each sample, float64 ``[n]``: linear in the error D, float32 in the parameter's layout.

        workers: threads that share the samples, `TOGETHER` of them at a time; all at once without. only: the error is
        the matrix of this expert alone, and samples of others have 0; summed over all experts the bytes are those of
        the stack's.
        """
        error = error.swapaxes(-1, -2) if self.flipped else error

        def of(at: slice | torch.Tensor) -> torch.Tensor:
            expert = None if self.expert is None or only is not None else self.expert[at]
            return (_moved(error, self.x[at], expert) * self.g[at]).sum(-1).double()

        step = max(1, len(self.x)) if workers is None else TOGETHER
        parts: list[slice | torch.Tensor] = [slice(i, i + step) for i in range(0, len(self.x), step)]
        if only is not None and self.expert is not None:
            own = (self.expert == only).nonzero().flatten()
            parts = [part for part in own.split(torch.bincount(own // step).tolist()) if len(part)]
        out = torch.zeros(len(self.x), dtype=torch.float64, device=self.x.device)
        for part, found in zip(parts, map(of, parts) if workers is None else workers.map(of, parts), strict=True):
            out[part] = found
        return out


@contextmanager
def _opened(path: Path) -> Iterator[Any]:
    """A file of samples. DynqError where it is damaged, or is something else."""
    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except (SafetensorError, OSError, ValueError, LookupError, TypeError, AttributeError) as error:
        raise DynqError(
            f"{path}: damaged, or no Fisher samples ({error}); delete it, calibration (notebook 03) makes it anew"
        ) from error


class Fisher:
    """Reads the sequences of a ``fisher/`` folder, one tensor at a time."""

    def __init__(self, folder: Path):
        self.paths = sorted(folder.glob("*.safetensors"))
        if not self.paths:
            raise DynqError(f"{folder}: no Fisher samples here; run the calibration first (notebook 03)")
        self.group: dict[str, str] = {}  # unit -> first unit of its group
        self.unit: dict[str, str] = {}  # GGUF name -> the parameter that it is a part of
        self.shapes: dict[str, tuple[int, ...]] = {}
        self.flipped: set[str] = set()
        self.tokens = 0
        self._files: dict[str, dict[Path, None]] = {}  # unit -> where its samples are, in the order of sequences
        for path in self.paths:
            with _opened(path) as f:
                about = json.loads(f.metadata()["about"])
                self.tokens += about["tokens"]
                for first, units in about["groups"].items():
                    self.group |= dict.fromkeys(units, first)
                    for unit in units:
                        self._files.setdefault(unit, {})[path] = None
                self.unit |= about["tensors"]
                self.shapes |= {unit: tuple(shape) for unit, shape in about["shapes"].items()}
                self.flipped |= set(about["flipped"])

    def _each(self, unit: str, *keys: str) -> Iterator[list[torch.Tensor]]:
        """These tensors of every sequence that the unit has samples of: each file is opened once."""
        for path in self._files[unit]:
            with _opened(path) as f:
                found = [f.get_tensor(key) for key in keys]
            yield found

    def samples(self, name: str, device: torch.device | str = "cpu") -> Samples:
        """The samples of a tensor (GGUF name; ``output.weight`` is the head also where it is tied), on a device."""
        unit = self.unit[name]
        group, stacked = self.group[unit], len(self.shapes[unit]) == 3
        keys = [f"{group}.x", f"{group}.length", f"{group}.weight"]
        keys += [f"{unit}.g", f"{unit}.slope"] if unit != HEAD else []  # its formula needs no gradient
        keys += [f"{group}.expert"] if stacked else []
        parts = zip(*self._each(unit, *keys), strict=True)
        x, length, weight, *others = (torch.cat(part).to(device) for part in parts)
        x = x.float() * length.float()[:, None] if x.is_floating_point() else x
        if unit == HEAD:
            return Samples(x, torch.empty(len(x), 0, device=device), weight)
        g, slope = others[0].float(), others[1].float()
        return Samples(x, g * slope[:, None], weight, others[2] if stacked else None, unit in self.flipped)

    def in_sum2(self, name: str) -> tuple[np.ndarray, np.ndarray] | None:
        """Sums of x_j^2 over all tokens, float64 ``[n_mat, n_in]`` (n_mat: experts, or 1), and how many tokens these
        are, float64 ``[n_mat]``; None for an embedding, which has no inputs."""
        group = self.group[self.unit[name]]
        with _opened(next(iter(self._files[group]))) as f:
            if f"{group}.in_sum2" not in f.keys():  # noqa: SIM118  (safe_open is no mapping)
                return None
        parts = zip(*self._each(group, f"{group}.in_sum2", f"{group}.counts"), strict=True)
        sums, counts = (np.sum([one.numpy() for one in part], axis=0) for part in parts)
        return sums.reshape(len(counts), -1), counts

    def cross_token(self, kinds: dict[str, str]) -> dict[str, float]:
        """Factor per kind of tensor by which the exact, per-sequence form exceeds the token form.

        kinds: tensor name -> kind ("attn_v"). Pooled over the layers of a kind, each layer weighing alike, since the
        estimate of one layer rests on as many squares as there are sequences. The head has 1 by construction.
        """
        ratios: dict[str, list[float]] = {}
        sums = {name: np.zeros(2) for name in kinds}
        for path in self.paths:
            with _opened(path) as f:
                for name in kinds:
                    if path in self._files[self.unit[name]]:
                        sums[name] += f.get_tensor(f"{self.unit[name]}.cross").numpy()
        for name, kind in kinds.items():
            token, sequence = sums[name]
            ratios.setdefault(kind, []).append(sequence / max(token, 1e-300))
        return {kind: float(np.mean(r)) for kind, r in ratios.items()}
