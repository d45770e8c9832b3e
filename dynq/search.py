"""A better recipe on the true KL divergence, started from the additive one.

The sensitivity table is taken at the original model and knows no interaction. At the quantized model, weights W + D,
a tensor that goes from one format to another moves the weights by d, and to second order

    KL(D + d) - KL(D) = <G, d> + 1/2 d^T F d

G, the gradient of the mean KL(p || q) there, is exact: one forward and one backward pass over text. It knows the errors
of all other tensors, which is the interaction. The second term comes from the samples of `dynq.fisher`.

The calibration text is dealt out, chunk by chunk, to three parts. Each round takes the gradient on one part and tests
proposals on another, so that a proposal is not judged by the tokens that suggested it; the two change places from
round to round. The third part is held out: of the start and all accepted steps the one with the lowest KLD there is
returned.

A round's proposals: first the knapsack with the new costs, where every change of a format also pays a price, from a
high price (few changes) to none; where none of these is accepted, exchanges of two tensors, one up and one down. A
proposal is accepted where a paired t test over chunks says that it lowers the KLD. Two rounds without success end the
search.
"""

import hashlib
import json
import re
import time
from collections import OrderedDict
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
import torch
from scipy.special import stdtrit

import dynq
from dynq import codec
from dynq.allocate import Option, Problem
from dynq.checkpoint import Checkpoint
from dynq.errors import DynqError
from dynq.evaluate import kld
from dynq.fisher import Fisher
from dynq.imatrix import Importance
from dynq.knapsack import choose
from dynq.progress import progress
from dynq.recipe import Recipe
from dynq.recorder import HEAD
from dynq.search_log import Log
from dynq.sensitivity import head_divergence, parameter_error
from dynq.torch_model import check_in_memory, set_tensor

REACH = 3  # options up and down from the present one that a round looks at
PRICES = (3e-3, 1e-3, 3e-4, 1e-4, 0.0)  # of one change, as a part of the present KLD
LEVEL = 0.1  # of the one-sided test: a proposal comes with reasons of its own, and the held-out part decides in the end
FIRST_CHUNKS = 4  # a proposal that is no better on these is tested no further
CACHE = 2 << 30  # bytes of encoded tensors that are kept
_UNITS = {"s": 1.0, "sec": 1.0, "m": 60.0, "min": 60.0, "h": 3600.0}


def parse_seconds(text: str) -> float:
    """ "90s", "10min", "1.5h" as seconds, "" as none; DynqError with examples for anything else."""
    if not text.strip():
        return 0.0
    match = re.fullmatch(r"\s*(\d+(?:\.\d*)?|\.\d+)\s*([a-z]+)\s*", text.lower())
    if not match or match[2] not in _UNITS or float(match[1]) <= 0:
        raise DynqError(f'search {text!r} is no time; write it as "90s", "10min" or "1h"')
    return float(match[1]) * _UNITS[match[2]]


def check_chunks(n: int) -> None:
    """DynqError where three parts would have less than two chunks each."""
    if n < 6:
        raise DynqError(
            f"a search needs at least 6 chunks of calibration text, not {n}: raise n_chunks, or leave it out"
        )


# --- proposals: pure functions of tables ------------------------------------------------------------------------------


@dataclass(frozen=True)
class Proposal:
    """Tensors and the formats that they would take; estimate: the change of the KLD in nats that is expected."""

    formats: dict[str, str]
    estimate: float


Costs = Mapping[str, Mapping[str, float]]
"""Tensor -> format -> expected change of the KLD against the present recipe, in nats; 0 for the present format."""


def nearby(row: Sequence[Option], present: str, reach: int = REACH) -> list[Option]:
    """The present option and up to `reach` larger and smaller ones, of those that no smaller one beats."""
    order = sorted(row, key=lambda o: (o.bytes, o.loss))
    kept: list[Option] = []
    for option in order:
        if option.format == present or not kept or option.loss < min(o.loss for o in kept):
            kept.append(option)
    at = next(i for i, option in enumerate(kept) if option.format == present)
    return kept[max(0, at - reach) : at + reach + 1]


def allocations(problem: Problem, present: Mapping[str, str], costs: Costs, kld: float) -> list[Proposal]:
    """The knapsack with new costs, a proposal for each of PRICES that gives another one; few changes first."""
    sizes = {name: {o.format: o.bytes for o in row} for name, row in problem.options.items()}
    found: list[Proposal] = []
    for price in PRICES:
        loss = [
            [c + (price * kld if fmt != present[name] else 0) for fmt, c in row.items()] for name, row in costs.items()
        ]
        picked = choose([[sizes[name][fmt] for fmt in row] for name, row in costs.items()], loss, problem.room)
        changed = {
            name: fmt
            for (name, row), j in zip(costs.items(), picked, strict=True)
            if (fmt := list(row)[j]) != present[name]
        }
        if changed and all(changed != proposal.formats for proposal in found):
            found.append(Proposal(changed, sum(costs[name][fmt] for name, fmt in changed.items())))
    return found


def exchanges(problem: Problem, present: Mapping[str, str], costs: Costs, most: int = 400) -> list[Proposal]:
    """Single changes and pairs that fit and are expected to gain, best first; each tensor in at most one of them.

    most: changes that are paired with each other; of more, those are taken that are best at the price of a byte.
    """
    sizes = {name: {o.format: o.bytes for o in row} for name, row in problem.options.items()}
    left = problem.room - sum(sizes[name][present[name]] for name in sizes)
    changes = [
        (name, fmt, sizes[name][fmt] - sizes[name][present[name]], cost)
        for name, row in costs.items()
        for fmt, cost in row.items()
        if fmt != present[name]
    ]
    if not changes:
        return []
    step = np.array([c[2] for c in changes], dtype=np.float64)
    cost = np.array([c[3] for c in changes])
    keep = np.argsort(cost + _price(step, cost) * step, kind="stable")[:most]
    step, cost = step[keep], cost[keep]
    # pairs i < j, and each change with nothing (the last row)
    step_, cost_ = np.append(step, 0.0), np.append(cost, 0.0)
    total, size = cost_[:, None] + cost_[None], step_[:, None] + step_[None]
    i, j = np.nonzero(np.triu((total < 0) & (size <= left), 1))
    order = np.argsort(total[i, j], kind="stable")
    found: list[Proposal] = []
    taken: set[str] = set()
    for a, b in zip(i[order], j[order], strict=True):
        pair = [changes[keep[k]] for k in (a, b) if k < len(keep)]
        names = {c[0] for c in pair}
        if len(names) == len(pair) and not names & taken:
            taken |= names
            found.append(Proposal({c[0]: c[1] for c in pair}, sum(c[3] for c in pair)))
    return found


def _price(step: np.ndarray, cost: np.ndarray) -> float:
    """Nats for a byte: between what the best change up gains and what the cheapest change down loses."""
    up, down = step > 0, step < 0
    gain = float((-cost[up] / step[up]).max(initial=0.0))
    loss = float((cost[down] / -step[down]).min(initial=np.inf))
    return float(np.sqrt(max(gain, 0.0) * max(loss, 0.0))) if np.isfinite(loss) else max(gain, 0.0)


def paired(before: np.ndarray, after: np.ndarray) -> float:
    """t of the differences after - before over the chunks of one text, whose tokens are not independent."""
    d = np.asarray(after, np.float64) - np.asarray(before, np.float64)
    return float(d.mean() / max(d.std(ddof=1) / np.sqrt(len(d)), 1e-300))


def significant(t: float, chunks: int) -> bool:
    """Whether t over so many chunks says "lower", with an error of LEVEL."""
    return bool(t < stdtrit(chunks - 1, LEVEL))  # Student's t


# --- the driver -------------------------------------------------------------------------------------------------------


def improve(
    checkpoint: Checkpoint,
    model: Any,
    problem: Problem,
    recipe: Recipe,
    importance: Importance | None,
    tokens: np.ndarray,
    folder: Path,
    name: str,
    *,
    seconds: float,
    level: str = "plain",
    threads: int | None = None,
    max_tried: int | None = None,
) -> Recipe:
    """The recipe with the lowest held-out KLD among `recipe` and the steps accepted in `seconds` from it.

    model: the original in transformers, float32; it holds the result's weights afterwards. problem: with the pins,
    profile and bytes of the target. tokens: int32 ``[n_chunks, n_ctx]``, the calibration text. folder: a run folder
    with ``fisher/``; ``<name>.search.jsonl`` is written there, a header, the start and a line for each proposal; a
    search that was cut off goes on from it, and the seconds it had used count. level: of the encoders. max_tried: stop
    after so many proposals.

    DynqError where there are fewer than six chunks.
    """
    check_chunks(len(tokens))
    codec.check_level(level)
    check_in_memory(model, "a search")
    about = {"formats": recipe.formats, "target": recipe.target, "room": problem.room, "level": level}
    about |= {"model": checkpoint.fingerprint, "dynq": dynq.__version__, "tokens": tokens.tolist()}
    about |= {"options": [[name, *row] for name, row in problem.options.items()]}
    log = Log(folder / f"{name}.search.jsonl", hashlib.sha256(json.dumps(about).encode()).hexdigest())
    kept = folder / "search"
    try:
        reference = kld.make_reference(model, tokens, kept, first=0, desc="original")
        parts = [kld.Reference(tokens[i::3], 0, reference.depth[i::3]) for i in range(3)]
        bench = Bench(checkpoint, model, Fisher(folder / "fisher"), importance, level, threads)
        climb = Climb(problem, bench, parts[:2], parts[2], log, seconds, max_tried)
        climb.run({tensor: recipe.formats[tensor] for tensor in problem.options})
        taken, told = climb.best()
        return problem.recipe(taken, recipe.provenance | {"search": told | {"level": level}})
    finally:
        log.close()
        for suffix in (".u16", ".json"):
            kept.with_suffix(suffix).unlink(missing_ok=True)


@dataclass
class Bench:
    """A model whose tensors change formats: measures, gradients, costs."""

    checkpoint: Checkpoint
    model: Any
    fisher: Fisher
    importance: Importance | None
    level: str
    threads: int | None
    formats: dict[str, str] = field(default_factory=dict)  # what the model holds
    _encoded: "OrderedDict[tuple[str, str], np.ndarray]" = field(default_factory=OrderedDict)
    _projected: dict[tuple[str, str], torch.Tensor] = field(default_factory=dict)

    def __post_init__(self) -> None:
        for parameter in self.model.parameters():
            parameter.requires_grad_(False)
        kinds = {n: t.kind for n, t in self.checkpoint.tensors.items() if t.quantizable and n != HEAD}
        self._factors = self.fisher.cross_token(kinds)

    def decoded(self, name: str, fmt: str) -> np.ndarray:
        """A tensor as `fmt` stores it, float32 in GGUF's layout. Encoded once, while CACHE has room."""
        if (name, fmt) in self._encoded:
            self._encoded.move_to_end((name, fmt))
        else:
            weight = self.checkpoint.read(name)
            mean = self.importance.mean(name, weight.shape[-1]) if self.importance else None
            self._encoded[name, fmt] = codec.quantize(weight, fmt, mean, level=self.level, threads=self.threads)
            while sum(data.nbytes for data in self._encoded.values()) > CACHE and len(self._encoded) > 1:
                self._encoded.popitem(last=False)
        return codec.dequantize(self._encoded[name, fmt], fmt, threads=self.threads)

    def put(self, formats: Mapping[str, str]) -> None:
        """Make the model hold these tensors in these formats; others stay."""
        for name, fmt in formats.items():
            if self.formats.get(name) != fmt:
                set_tensor(self.model, self.checkpoint, name, self.decoded(name, fmt))
                self.formats[name] = fmt

    def measure(self, part: kld.Reference, chunks: slice = slice(None)) -> np.ndarray:
        """Mean KLD of each chunk, float64 ``[chunks]``."""
        some = kld.Reference(part.tokens[chunks], part.first, part.depth[chunks])
        scores = kld.measure(self.model, some, desc="", batch=1)
        return scores.kld.reshape(len(some.tokens), -1).mean(1)

    def gradient(self, part: kld.Reference) -> tuple[dict[str, torch.Tensor], np.ndarray]:
        """Of the mean KL(p || q) with respect to each tensor (GGUF's layout), and that KLD of each chunk."""
        architecture = self.checkpoint.architecture
        parameters = {name: self.model.get_parameter(architecture.parameter(name)) for name in self.formats}
        each = []
        try:
            for parameter in parameters.values():
                parameter.requires_grad_(True)
            for chunk, ids in enumerate(torch.from_numpy(part.tokens.astype(np.int64)).to(self.model.device)):
                logits = self.model(input_ids=ids[None], use_cache=False).logits[0, part.first : -1].float()
                log_p = part.coded(chunk).log_probs(logits.device)
                value = (log_p.exp() * (log_p - torch.log_softmax(logits, -1))).sum(-1).mean()
                (value / len(part.tokens)).backward()
                each.append(float(value.detach()))
            gradients = {n: architecture.slot_of(n).gather(p.grad) for n, p in parameters.items()}
        finally:
            for parameter in parameters.values():
                parameter.requires_grad_(False)
                parameter.grad = None
        return gradients, np.array(each)

    def costs(self, name: str, options: Sequence[Option], gradient: torch.Tensor) -> dict[str, float]:
        """Format -> <G, d> + 1/2 d^T F d for the change d from what the model holds, in nats per token."""
        present = self.formats[name]
        architecture, shape = self.checkpoint.architecture, self.fisher.shapes[self.fisher.unit[name]]
        weight, here = self.checkpoint.read(name), self.decoded(name, present)
        is_head = name == HEAD or (self.checkpoint.tied and name == "token_embd.weight")
        place = gradient.device
        head = self.fisher.samples(HEAD, place) if is_head else None
        samples = self.fisher.samples(name, place) if name != HEAD else None
        result = {present: 0.0}
        for fmt in (o.format for o in options if o.format != present):
            there = self.decoded(name, fmt)
            second = 0.0
            if samples is not None:
                for f, w in ((present, here), (fmt, there)):
                    if (name, f) not in self._projected:
                        error = parameter_error(architecture, name, w - weight, shape).to(place)
                        self._projected[name, f] = samples.projections(error)
                moved = self._projected[name, fmt] - self._projected[name, present]
                factor = self._factors[self.checkpoint.tensors[name].kind]
                second += factor * float((0.5 * samples.weight * moved.square()).sum())
            change = torch.from_numpy(there - here).to(place)
            if head is not None:
                own = torch.from_numpy(weight).to(place)
                second += head_divergence(own, change, head, architecture.logits)[0]
            first = float((gradient.double() * change.double()).sum())
            result[fmt] = first + second / self.fisher.tokens
        return result


class _Over(Exception):
    """The time, or the number of proposals, is used up."""


@dataclass
class Climb:
    """The search itself: rounds of proposals, each tried on the model, recorded in the log."""

    problem: Problem
    bench: Bench
    fit: Sequence[kld.Reference]
    held_out: kld.Reference
    log: Log
    seconds: float
    max_tried: int | None = None

    def __post_init__(self) -> None:
        self.steps: list[tuple[dict[str, str], float]] = []  # formats of each accepted step, and its held-out KLD
        self.tried = 0
        self._begun, self._before = time.monotonic(), self.log.used
        self._present: dict[str, str] = {}
        self._known: dict[int, np.ndarray] = {}  # part -> KLD of each chunk at the present formats
        self._refused: list[dict[str, str]] = []  # changes of the present formats, in this round

    def run(self, start: Mapping[str, str]) -> None:
        """Fill `steps`, the start first."""
        self._present = dict(start)
        bar = progress(total=round(self.seconds), desc="search", unit="s")
        self._bar = bar
        try:
            line = self.log.replay("start")
            if line is None:
                self.bench.put(start)
                line = {"start": True, "bytes": self._bytes(start), "kld_held_out": self._held_out()}
                line = self.log.add(line | {"seconds": self._used()})
            self.steps = [(dict(start), line["kld_held_out"])]
            number, quiet = 0, 0
            while quiet < 2:
                quiet = 0 if self._round(number) else quiet + 1
                number += 1
        except _Over:
            pass
        finally:
            bar.close()

    def best(self) -> tuple[dict[str, str], dict[str, Any]]:
        """The formats of the step with the lowest held-out KLD, and what there is to tell of the search."""
        i = int(np.argmin([held for _, held in self.steps]))
        fit = []
        for formats, _ in (self.steps[0], self.steps[i]):
            self.bench.put(formats)
            fit.append(float(np.concatenate([self.bench.measure(part) for part in self.fit]).mean()))
        told = {"tried": self.tried, "accepted": len(self.steps) - 1, "taken": i, "kld_fit": fit}
        return self.steps[i][0], told | {"kld_held_out": [self.steps[0][1], self.steps[i][1]]}

    def _round(self, number: int) -> bool:
        """One gradient and its proposals; whether any was accepted."""
        accepted, done = False, -1
        begin = dict(self._present)
        self._refused = []
        while (line := self.log.replay("tried")) is not None and line["round"] == number:
            self._take(line)
            accepted, done = accepted or line["accepted"], line["proposal"]
        if line is not None:  # of the next round
            self.log.old.appendleft(line)
            return accepted
        test = 1 - number % 2
        for i, proposal in enumerate(self._proposals(begin, number % 2)):
            if i <= done:
                continue
            if proposal is None:  # between allocations and exchanges
                if accepted:
                    break
                continue
            line = self._try(proposal, test)
            if line is not None:
                self._take(self.log.add({"round": number, "proposal": i} | line))
                accepted = accepted or line["accepted"]
        return accepted

    def _proposals(self, begin: dict[str, str], part: int) -> Iterator[Proposal | None]:
        self._check()
        self.bench.put(begin)
        gradients, each = self.bench.gradient(self.fit[part])
        costs = {}
        for name, row in self.problem.options.items():
            self._check()
            costs[name] = self.bench.costs(name, nearby(row, begin[name]), gradients.pop(name))
        self.bench.put(self._present)
        yield from allocations(self.problem, begin, costs, float(each.mean()))
        yield None
        yield from exchanges(self.problem, begin, costs)

    def _try(self, proposal: Proposal, test: int) -> dict[str, Any] | None:
        """Measure a proposal; the line to log, or None where there is nothing to try."""
        new = {**self._present, **proposal.formats}
        changed = {name: fmt for name, fmt in new.items() if fmt != self._present[name]}
        if not changed or changed in self._refused or self._bytes(new) > self.problem.room:
            return None
        self._check()
        part = self.fit[test]
        if test not in self._known:
            self._known[test] = self.bench.measure(part)
        before = self._known[test]
        self.bench.put(new)
        after = self.bench.measure(part, slice(FIRST_CHUNKS))
        if len(after) < len(before) and after.mean() < before[: len(after)].mean():
            after = np.concatenate([after, self.bench.measure(part, slice(FIRST_CHUNKS, None))])
        t = paired(before[: len(after)], after)
        accepted = len(after) == len(before) and significant(t, len(after))
        line: dict[str, Any] = {
            "tried": {name: [self._present[name], fmt] for name, fmt in changed.items()},
            "estimate": proposal.estimate,
            "kld": [float(before[: len(after)].mean()), float(after.mean())],
            "t": t,
            "chunks": len(after),
            "bytes": self._bytes(new),
            "accepted": accepted,
        }
        if accepted:
            self._known = {test: after}
            line["kld_held_out"] = self._held_out()
        else:
            self.bench.put(self._present)
        return line | {"seconds": self._used()}

    def _take(self, line: Mapping[str, Any]) -> None:
        self.tried += 1
        changed = {name: new for name, (_, new) in line["tried"].items()}
        if not line["accepted"]:
            self._refused.append(changed)
        else:
            self._refused = []
            self._present = self._present | changed
            self.steps.append((self._present, line["kld_held_out"]))

    def _held_out(self) -> float:
        return float(self.bench.measure(self.held_out).mean())

    def _bytes(self, formats: Mapping[str, str]) -> int:
        return sum(option.bytes for option in self.problem.chosen(formats).values())

    def _used(self) -> float:
        return round(self._before + time.monotonic() - self._begun, 1)

    def _check(self) -> None:
        used = self._used()
        self._bar.update(min(round(used), round(self.seconds)) - self._bar.n)
        if used >= self.seconds or (self.max_tried is not None and self.tried >= self.max_tried):
            raise _Over
