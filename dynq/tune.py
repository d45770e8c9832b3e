"""Distillation of an encoded model by the gradient of the KLD: scales of blocks, norms and biases, and codes.

Encoders make the error of weights or of a layer's outputs small; this makes that of the model small (`dynq.loss`).
Integer scales stay. A block's weights are linear in its half floats, ``w = d u - dmin v``, so that with multipliers a
and b of d and dmin, 1 at the start, ``w = a u + b v`` and the gradient is ``sum_block (dL/dw) u``, ``sum_block (dL/dw)
v``. Norms and biases, F32 in the file, have a multiplier for each value. Codes follow latent numbers (dynq.latent).
Adam (Kingma and Ba 2015) takes the steps; the result is rounded to half floats. Scales as the parameters of
distillation: PV-Tuning (Malinovskii et al. 2024), EfficientQAT (Chen et al. 2024); the latter moves weights between
codes too.

How far to step is not known beforehand: at 2 bits a step may be five times as long as at 4. For multipliers it is a
fraction of the tensor's relative error, for latent numbers one of the distance of codes. Steps grow shorter like a
cosine, and are halved each time that a pass over the text hardly lowers the KLD on chunks kept aside, as the file would
be written. The best state is returned, and the bytes as they came where that gains nothing.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch

from dynq import codec, formats, latent
from dynq.checkpoint import Checkpoint
from dynq.encoding import Stream
from dynq.errors import DynqError
from dynq.evaluate import kld
from dynq.files import replacing
from dynq.kernels import halves, scales
from dynq.latent import Latent, movable
from dynq.layer_inputs import kept_aside
from dynq.layerwise import reader
from dynq.loss import backward
from dynq.memory import fits
from dynq.progress import progress
from dynq.schedule import BETAS, chunks_a_step, hints_weight, length, passes_over, side_by_side
from dynq.teacher import Teacher
from dynq.threads import power_of_two
from dynq.torch_model import device_of, load_model, set_tensor

Tensors = dict[str, tuple[str, np.ndarray]]
Aims = Callable[[str], np.ndarray | None]

RATE = 0.005  # of a tensor's relative error: one step of a multiplier
COPIES = 7  # in float32: the tuned model, latent numbers and their points, gradient, two of Adam's, codes and turns
CODES = 0.022  # of the distance of two codes: one step of a latent number whose gradients agree
LIMITS = (0.5, 2.0)  # of a multiplier
LEAST = 0.001  # of the KLD on chunks kept aside: a pass that gains less halves the rate
HALVINGS = 2  # before the search ends
JUDGES = 2  # chunks of a domain: they only choose among a few states, on the same tokens
LOSSLESS = 1e-3  # relative error of all tensors up to which nothing is tuned: 16 bits
ROUGH = 0.02  # the same, from which on products may be rounded: beside it an error of 2^-9 is small


def unknown(name: str) -> None:
    """Of no tensor is it known where its latent numbers should begin."""


@dataclass(frozen=True)
class Tuned:
    """tensors: as given, with other half floats and F32 vectors. kld: on the chunks kept aside, before and after.

    steps: how many were taken; tuned: half floats and values of F32 vectors that could change; codes: share of all
    weights that have another code now; history: rate and KLD on the chunks kept aside after each pass.
    """

    tensors: Tensors
    kld: tuple[float, float]
    steps: int
    tuned: int
    codes: float
    history: tuple[tuple[float, float], ...]


def tune(
    checkpoint: Checkpoint,
    teacher: Any,
    tensors: Tensors,
    tokens: np.ndarray,
    aside: np.ndarray,
    *,
    seed: int = 0,
    batch: int | None = None,
    passes: int = 10,
    rate: float = RATE,
    codes: float = CODES,
    aims: Aims = unknown,
) -> Tuned:
    """Tune the scales of an encoded model.

    Args:
        teacher: the original model in transformers, as `load_model` gives it; on its device the work is done.
        tensors: GGUF name -> (format, uint8 [..., row_bytes]), all of the model; not changed.
        tokens, aside: int [chunks, n_ctx] to fit, and to decide when to stop, from other passages.
        batch: chunks a step, by default `chunks_a_step`; passes: over the tokens, at most; rate: of multipliers, codes:
            of latent numbers, see the module; 0: the codes stay.
        aims: GGUF name -> what each weight alone would best be, float32 [rows, n] (`dynq.layer_inputs.aim`), toward
            which latent numbers begin; None: toward the original.

    In memory at most: the teacher, the float32 model that is tuned, the gradient of its largest tensor, activations of
    one chunk of both (`side_by_side` of a small vocabulary), and of the model's size 4 % (formats of 256 weights) to
    30 % (of 32) for multipliers and what Adam keeps, twice that and 6 % more where there are offsets; where codes move,
    the model `COPIES` times in all. The same input gives the same bytes for the same seed on a CPU; with MKL (x86)
    whatever the number of threads, of which a power of two is taken (`dynq.threads.power_of_two`).
    DynqError: no chunks, a tensor is missing or does not fit the model, its answers are not finite.
    """
    for what, chunks in (("to fit", tokens), ("kept aside", aside)):
        if chunks.ndim != 2 or len(chunks) == 0 or chunks.shape[1] < 2:
            raise DynqError(f"tokens {what} are [chunks, n_ctx], got shape {chunks.shape}")
    with power_of_two():
        search = _Search(checkpoint, teacher, tensors, tokens, aside, rate, codes, aims)
        return search.run(seed, batch or chunks_a_step(len(tokens), passes), passes)


def tuned(
    encoded: Callable[[dict[str, str]], Stream],
    checkpoint: Checkpoint,
    chosen: dict[str, str],
    *,
    teacher: Any,
    tokens: np.ndarray,
    domains: Sequence[str],
    passes: int,
    codes: bool,
    report: Path,
    aims: Aims = unknown,
) -> Stream:
    """What `encoded` gives for the chosen formats, tuned; a source for `dynq.export.export`.

    tokens int32 [n_chunks, n_ctx], domains: of each chunk; `kept_aside` of them, `JUDGES` of a domain at most, judge,
    and without any nothing is tuned. (Feedback has chosen by them and then fitted them too; tuning has not.)
    codes: whether codes move too, where `moves` says so; aims: see `tune`.
    passes: -1 for as many as the text is long for, -2 for twice as many (`schedule.passes_over`).
    report: a JSON file that gets kld (before, after), steps, tuned, codes and history, see `Tuned`, or reason.
    """
    if reader(teacher):
        _write(report, {"reason": "the model does not fit into memory"})
        yield from encoded(chosen)
        return
    tensors = {name: (fmt, data) for name, fmt, data in encoded(chosen)}
    aside = kept_aside(domains, JUDGES)
    told: dict[str, Any]
    if aside.any() and not aside.all():
        fit, judges, rate = tokens[~aside], tokens[aside], CODES if moves(checkpoint, teacher, codes) else 0.0
        passes = passes_over(len(tokens), passes)
        found = tune(checkpoint, teacher, tensors, fit, judges, passes=passes, codes=rate, aims=aims)
        tensors = found.tensors
        told = {
            "kld": found.kld,
            "steps": found.steps,
            "tuned": found.tuned,
            "codes": found.codes,
            "history": [(scale, value if np.isfinite(value) else None) for scale, value in found.history],
        }
    else:
        told = {"reason": f"{len(tokens)} chunks of calibration text are too few to keep some aside"}
    _write(report, told)
    for name, (fmt, data) in tensors.items():
        yield name, fmt, data


def moves(checkpoint: Checkpoint, teacher: Any, codes: bool) -> bool:
    """Whether codes that may move do: memory must hold the model `COPIES` times more."""
    return codes and fits(checkpoint, device_of(teacher), copies=COPIES)


def _write(report: Path, told: dict[str, Any]) -> None:
    with replacing(report) as beside:
        beside.write_text(json.dumps(told))


class _Blocks:
    """The multipliers of one tensor, its latent numbers, and its part of a parameter in the model.

    m float32 [1 or 2, rows, blocks of a row], in GGUF's order of rows; of an F32 vector each value is a block.
    now: the multipliers that the parameter holds. rate: a full step. latent: None where codes stay, and then the
    parameter is multiplied in place; codes: those of the start.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        name: str,
        fmt: str,
        data: np.ndarray,
        parameter: Any,
        rate: float,
        codes: bool,
        aims: Aims,
    ):
        self.name, self.fmt, self.data, self.parameter, self.rate = name, fmt, data, parameter, rate
        shape = checkpoint.tensors[name].shape
        self.slot, self.vector, self.form = checkpoint.architecture.slot_of(name), len(shape) == 1, formats.get(fmt)
        if self.vector:
            stored = data.view(np.float32).reshape(1, -1, 1)
        else:
            values = halves.get(fmt, self._flat(data)).astype(np.float32)
            stored = values.reshape(-1, int(np.prod(shape[:-1])), shape[-1] // self.form.block)
        self.halves = torch.from_numpy(stored).to(parameter.device)
        self.m = torch.ones_like(self.halves)
        self.m.grad = torch.zeros_like(self.m)
        self.now = self.m.clone()
        self.offsets = self._offsets() if len(self.m) == 2 else None
        self.latent = None
        if codes and not self.vector and movable(fmt):
            aim = aims(name)
            toward = checkpoint.read(name).reshape(-1, shape[-1]) if aim is None else aim
            self.latent = Latent(fmt, data, toward, parameter.device)
        self.codes = None if self.latent is None else self.latent.codes()

    def _flat(self, data: np.ndarray) -> np.ndarray:
        return data.reshape(-1, self.form.block_bytes)

    @property
    def weights(self) -> torch.Tensor:
        """What the model holds for this tensor, as GGUF has it: the parameter itself where that is the same."""
        values = self.slot.gather(self.parameter.detach())
        return values + self.slot.plus if self.slot.plus else values

    def _offsets(self) -> torch.Tensor:
        """What dmin adds to the weights of each group: float32 [rows, blocks, groups of a block]."""
        _, dmin, _, lm = scales.read(self.fmt, self._flat(self.data))
        added = -(dmin * lm).T
        return torch.from_numpy(np.ascontiguousarray(added)).to(self.m.device).view(*self.m.shape[1:], -1)

    def _blocks(self, values: Any) -> Any:
        """[rows, blocks, weights of a block]"""
        return values.reshape(*self.m.shape[1:], -1)

    def _groups(self, values: Any, offsets: torch.Tensor) -> Any:
        """[rows, blocks, groups, weights of a group]"""
        return values.reshape(*offsets.shape, -1)

    @torch.no_grad()
    def take(self, gradient: Any) -> None:
        """dL/dm from the parameter's gradient: w = a u + b v, and v is known group by group."""
        gradient, a = self.slot.gather(gradient), self.now[0]
        if self.latent is not None:
            self.latent.take(gradient, a)
        total = torch.linalg.vecdot(self._blocks(gradient), self._blocks(self.weights))
        if self.offsets is not None:
            lower = (self._groups(gradient, self.offsets).sum(-1) * self.offsets).sum(-1)
            self.m.grad[1] += lower
            total -= self.now[1] * lower
        self.m.grad[0] += total / a

    @torch.no_grad()
    def move(self, m: torch.Tensor) -> None:
        """Bring the parameter to these multipliers, and to the codes of the latent numbers."""
        if self.latent is not None:
            weights, lower = self._blocks(self.latent.weights(m[0])), m[-1]
        else:
            ratio = m[0] / self.now[0]
            weights, lower = self._blocks(self.weights).mul_(ratio[..., None]), m[-1] - self.now[-1] * ratio
        if self.offsets is not None:
            self._groups(weights, self.offsets).add_((self.offsets * lower[..., None])[..., None])
        if self.latent is not None or not self.slot.same:
            self.slot.put(self.parameter, weights)
        self.now = m.clone()

    def state(self) -> tuple[torch.Tensor, torch.Tensor | None]:
        """What `encoded` needs: multipliers and codes."""
        return self.m.clone(), None if self.latent is None else self.latent.codes()

    def rounded(self, m: torch.Tensor) -> torch.Tensor:
        """The multipliers of what can be stored; 1 where that would be 0 or infinity."""
        if self.vector:
            return m
        new = (self.halves * m).half().float()
        kept = (self.halves == 0) | (new == 0) | ~torch.isfinite(new)
        return torch.where(kept, 1.0, new / self.halves)

    def encoded(self, m: torch.Tensor, codes: torch.Tensor | None) -> np.ndarray:
        """The tensor's bytes with multipliers of `rounded`, and with other codes where there are some."""
        values = (self.halves * m).cpu().numpy()
        if self.vector:
            return values.view(np.uint8).reshape(self.data.shape)
        out = self.data if codes is None else latent.encoded(self.fmt, self.data, codes.cpu().numpy())
        out = out.copy()
        halves.put(self.fmt, self._flat(out), values.astype(np.float16).reshape(len(values), -1))
        return out


class _Search:
    """The model, its blocks, and the best multipliers so far."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        teacher: Any,
        tensors: Tensors,
        tokens: np.ndarray,
        aside: np.ndarray,
        rate: float,
        codes_rate: float,
        aims: Aims,
    ):
        self.codes_rate, self.hints = codes_rate, hints_weight(tokens.size)
        self.checkpoint, self.teacher, self.tensors, self.tokens = checkpoint, teacher, tensors, tokens
        self.aside = Teacher(checkpoint, teacher, aside, "teacher, kept aside")
        self.model = load_model(checkpoint, self._decoded(tensors), device=device_of(teacher))
        self.model.requires_grad_(False)
        parameters = dict(self.model.named_parameters())
        errors = {name: self._error(name) for name in tensors if checkpoint.tensors[name].quantizable}
        sizes = np.array([checkpoint.tensors[name].n_weights for name in errors])
        mean = float(np.average(list(errors.values()), weights=sizes)) if errors else 0.0
        self.rough = mean > ROUGH
        self.blocks = []
        for name, (fmt, data) in tensors.items() if mean > LOSSLESS else ():
            slot, vector = checkpoint.architecture.slot_of(name), len(checkpoint.tensors[name].shape) == 1
            parameter = parameters.get(slot.parameter)
            if parameter is None or slot.decay:  # multiplying a decay adds to its logarithm: no multiplier's gradient
                continue
            if fmt in halves.AT or (fmt == "F32" and vector):
                size = rate * errors.get(name, mean)
                self.blocks.append(_Blocks(checkpoint, name, fmt, data, parameter, size, codes_rate > 0, aims))
        self.hooks = [
            self._hook(parameter) for parameter in {id(b.parameter): b.parameter for b in self.blocks}.values()
        ]

    def _hook(self, parameter: Any) -> Any:
        """Gradients go to the multipliers as soon as they are there, and are let go of."""
        parameter.requires_grad_(True)
        blocks = [b for b in self.blocks if b.parameter is parameter]

        def take(parameter: Any) -> None:
            for b in blocks:
                b.take(parameter.grad)
            parameter.grad = None

        return parameter.register_post_accumulate_grad_hook(take)

    def _decoded(self, tensors: Tensors) -> Any:
        for name, (fmt, data) in tensors.items():
            yield name, codec.dequantize(data, fmt).reshape(self.checkpoint.tensors[name].shape)

    def _error(self, name: str) -> float:
        """|W - What| / |W|."""
        fmt, data = self.tensors[name]
        weights = self.checkpoint.read(name)
        decoded = codec.dequantize(data, fmt).reshape(weights.shape)
        size = float(np.linalg.norm(weights))
        return float(np.linalg.norm(weights - decoded)) / size if size else 0.0

    def measured(self) -> float:
        """Mean KLD on the chunks kept aside, at every position; infinite where it is NaN."""
        value = float(kld.measure(self.model, self.aside, batch=1, desc="").kld.mean())
        return value if np.isfinite(value) else np.inf

    def run(self, seed: int, batch: int, passes: int) -> Tuned:
        rng, n = np.random.default_rng(seed), len(self.tokens)
        before = best = self.measured()
        if not np.isfinite(before):
            raise DynqError(
                f"{self.checkpoint.name}: the encoded model's answers are not finite; take tune=0, or more bits"
            )
        if not self.blocks:
            return Tuned(dict(self.tensors), (before, before), 0, 0, 0.0, ())
        kept = [b.state() for b in self.blocks]
        history: list[tuple[float, float]] = []
        scale, taken, halvings = 1.0, 0, 0
        adam = self.adam()
        total = passes * -(-n // batch)
        with progress(total=total, desc="tune", unit="step") as bar:
            for _ in range(passes):
                order = rng.permutation(n)
                for start in range(0, n, batch):
                    taken += 1
                    full = scale * length(taken, total)
                    loss = self._step(adam, order[start : start + batch], full)
                    bar.set_postfix_str(f"KLD {loss:.4f}, kept aside {best:.4f} of {before:.4f}")
                    bar.update()
                self.move([b.rounded(b.m) for b in self.blocks])
                found = self.measured()
                history.append((full, found))
                if found >= (1 - LEAST) * best:
                    halvings, scale = halvings + 1, scale / 2
                if found < best:
                    best, kept = found, [b.state() for b in self.blocks]
                if halvings > HALVINGS:
                    break
                self.move([b.m for b in self.blocks])
        return self._result(kept, before, taken, tuple(history))

    def _result(
        self,
        kept: list[tuple[torch.Tensor, torch.Tensor | None]],
        before: float,
        taken: int,
        history: tuple[tuple[float, float], ...],
    ) -> Tuned:
        """What is written, measured as a reader will see it: the start where it is no better."""
        out = dict(self.tensors)
        for hook in self.hooks:
            hook.remove()
        for b, (m, codes) in zip(self.blocks, kept, strict=True):
            out[b.name] = b.fmt, b.encoded(b.rounded(m), codes)
            set_tensor(self.model, self.checkpoint, b.name, next(self._decoded({b.name: out[b.name]}))[1])
        after = self.measured()
        if not after < before:
            out, after = dict(self.tensors), before
            kept = [(b.m, b.codes) for b in self.blocks]
        moved = sum(
            0 if codes is None else int((codes != b.codes).sum())
            for b, (_, codes) in zip(self.blocks, kept, strict=True)
        )
        share = moved / sum(self.checkpoint.tensors[name].n_weights for name in out)
        return Tuned(out, (before, after), taken, sum(b.m.numel() for b in self.blocks), share, history)

    def adam(self) -> torch.optim.Adam:
        """What takes the steps of multipliers; `full` of a group: its full step. Latent numbers take their own."""
        return torch.optim.Adam([{"params": [b.m], "full": b.rate} for b in self.blocks], betas=BETAS)

    def _step(self, adam: torch.optim.Adam, chunks: np.ndarray, scale: float) -> float:
        """One step, `scale` of each tensor's rate; the mean KLD of its chunks, before it."""
        found = self.gradient(chunks, self.rough)
        for group in adam.param_groups:
            group["lr"] = scale * group["full"]
        adam.step()
        for b in self.blocks:
            b.m.clamp_(*LIMITS)
            if b.latent is not None:
                b.latent.step(scale * self.codes_rate)
        self.move([b.m for b in self.blocks])
        return found

    def gradient(self, chunks: np.ndarray, rough: bool = False) -> float:
        """The mean KLD of chunks at all positions; the gradient of the loss by the multipliers in their `grad`.

        rough: see `dynq.loss.backward`.
        """
        for b in self.blocks:
            b.m.grad.zero_()
            if b.latent is not None:
                b.latent.grad.zero_()
        found = 0.0
        at_once = side_by_side(self.tokens.shape[1], self.checkpoint.tensors["token_embd.weight"].shape[0])
        for start in range(0, len(chunks), at_once):
            part = chunks[start : start + at_once]
            ids, share = torch.from_numpy(self.tokens[part].astype(np.int64)), len(part) / len(chunks)
            found += share * backward(self.model, self.teacher, ids, share, self.hints, rough)
        for b in self.blocks:
            for grad in (b.m.grad, *([] if b.latent is None else [b.latent.grad])):
                grad.nan_to_num_(0.0, 0.0, 0.0)  # multipliers that overflow are undone, not kept as NaN
        return found

    def move(self, multipliers: list[torch.Tensor]) -> None:
        for b, m in zip(self.blocks, multipliers, strict=True):
            b.move(m)
