"""The needs of whole commands, beside what there is: shown before anything long begins, refused where it cannot fit."""

from __future__ import annotations

import shutil
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any, TextIO

from dynq import memory, needs
from dynq.allocate import candidates, parse_target, target_bytes
from dynq.errors import DynqError
from dynq.evaluate.greedy import BATCH
from dynq.evaluate.tasks import ANSWER_TOKENS, COST_CHUNKS, COST_GROUPS, Asked
from dynq.folder import RunFolder, file_safe
from dynq.machine import F32, Machine
from dynq.needs import Need, Shape
from dynq.recipe import Recipe
from dynq.schedule import passes_over
from dynq.tables import text_table
from dynq.text import text_files

if TYPE_CHECKING:
    from dynq.checkpoint import Checkpoint

LONG = 60.0  # seconds from which on the table is worth its lines
FAMILIES = 5  # domains of a sampled text: four families of prompts, and documents
MIXES = 2  # of llama.cpp beside each file
NEEDED = 0.9  # of the memory reckoned: where that much is not there, it cannot fit


@dataclass(frozen=True)
class Reckoning:
    """The needs of steps that are still to be done, in order, beside the machine and its free disk.

    instead: step -> what to do where its memory is not there.
    """

    needs: Sequence[Need]
    machine: Machine
    disk: float
    instead: Mapping[str, str]

    @property
    def seconds(self) -> float:
        return sum(need.seconds(self.machine) for need in self.needs)

    @property
    def memory(self) -> float:
        return max((need.memory for need in self.needs), default=0.0)

    @property
    def card(self) -> float:
        return max((need.card for need in self.needs), default=0.0)

    @property
    def peak(self) -> float:
        """Bytes of disk at the most: what the steps before keep, and what one needs in passing."""
        kept = most = 0.0
        for need in self.needs:
            most = max(most, kept + need.disk)
            kept += need.kept
        return most

    def table(self) -> str:
        """A line for each step, and for all."""
        rows = [(n.step, n.memory, n.card, n.disk, n.seconds(self.machine)) for n in self.needs]
        if len(rows) > 1:
            rows.append(("in all", self.memory, self.card, self.peak, self.seconds))
        free = {"memory": self.machine.memory, "the card": self.machine.card, "disk": self.disk}
        about = ", ".join(f"{_size(n)} of {what}" for what, n in free.items() if n is not None)
        alone = self.machine.card is None
        times = "times within a factor of 2" if alone else "times are those without the card"
        shown = [
            {"step": s, "memory": _size(m), "card": None if alone else _size(c), "disk": _size(d), "time": _time(t)}
            for s, m, c, d, t in rows
        ]
        said = f"free: {about}; {times}, on {self.machine.threads} threads, this machine being as busy as now"
        return f"{text_table(shown)}\n{said}"

    def lacks(self) -> str:
        """What cannot fit, with the numbers, or ""."""
        for need in self.needs:
            if NEEDED * need.memory > self.machine.memory:
                instead = self.instead.get(need.step, "take more memory")
                return (
                    f"{need.step} needs about {_size(need.memory)} of memory, {_size(self.machine.memory)} are free; "
                    f"{instead}"
                )
            if self.machine.card is not None and NEEDED * need.card > self.machine.card:
                return (
                    f"{need.step} needs about {_size(need.card)} of the card's memory, {_size(self.machine.card)} are "
                    "free; take --device cpu"
                )
        if self.peak > self.disk:
            return f"about {_size(self.peak)} of disk are needed, {_size(self.disk)} are free; make room"
        return ""

    def tell(self, stream: TextIO, *, yes: bool = False) -> None:
        """Print the table where the whole takes over a minute. Where it cannot fit a DynqError, with `yes` a line."""
        if self.seconds > LONG:
            stream.write(f"{self.table()}\n")
        if lacks := self.lacks():
            if not yes:
                raise DynqError(f"{lacks}, or --yes to go on all the same")
            stream.write(f"{lacks}; going on\n")
        stream.flush()


def of_run(checkpoint: Checkpoint, steps: Mapping[str, Mapping[str, Any]], folder: RunFolder) -> Reckoning:
    """Of a run: step -> its parameters, as `dynq.run.plan` has them in order. What is done already costs nothing."""
    first = steps["calibrate"]
    shape = Shape.of(checkpoint)
    machine = Machine.here(first["threads"], memory.place(checkpoint, first["device"]) if shape.known else "cpu")
    run = _Run(shape, checkpoint, steps, folder, machine)
    todo = _to_do(steps, folder)
    found = [run.of(step) for step in steps if step in todo]
    tuning = "take -p tune=0, or more memory"
    instead = {step: tuning for step, own in steps.items() if step.startswith("export.") and own["tune"]}
    return Reckoning(found, machine, free_disk(folder.path), {"calibrate": "take fewer --threads"} | instead)


def of_evaluation(
    checkpoint: Checkpoint,
    files: Sequence[Path],
    folder: RunFolder,
    *,
    text: str,
    n_ctx: int,
    n_chunks: int,
    with_mixes: bool,
    asked: Asked,
    threads: int | None = None,
    device: str = "cpu",
) -> Reckoning:
    """Of files beside their original, as `dynq.evaluate.files.against_original` takes them. Those that evaluation.json
    has, by their size, cost nothing; MMLU is left out, as long as its questions are not read."""
    machine, disk = Machine.here(threads or 0, memory.place(checkpoint, device)), free_disk(folder.path)
    measured = folder.read_json("evaluation.json") if (folder / "evaluation.json").exists() else {}
    known = {entry.get("file_bytes") for entry in measured.get("files", [])}
    sizes = [size for path in files if path.is_file() and (size := float(path.stat().st_size)) not in known]
    if not sizes or not checkpoint.architecture.known:
        return Reckoning([], machine, disk, {})
    shape = Shape.of(checkpoint)
    chunks = n_chunks * max(1, len(text_files(text)))
    found = []
    if not text_files(text) and not (folder / "text.json").exists():
        found.append(needs.sampled(shape, "text", n_chunks * n_ctx, n_ctx, machine))
    mixes = MIXES * len(sizes) if with_mixes else 0
    found.append(needs.evaluate(shape, "evaluate", sizes, mixes, chunks, n_ctx, machine, beside=False))
    if asked.greedy:
        answers = asked.greedy * ANSWER_TOKENS * (1 + len(sizes))
        found.append(needs.sampled(shape, "greedy answers", answers, 2 * ANSWER_TOKENS, machine, at_once=BATCH))
    if asked.where:
        passes = [0.0] * COST_GROUPS * len(sizes)  # forward passes of one file, a layer restored for each
        found.append(needs.evaluate(shape, "where", passes, 0, min(COST_CHUNKS, chunks), n_ctx, machine, beside=False))
    return Reckoning(found, machine, disk, {})


def of_applied(
    checkpoint: Checkpoint, recipe: Recipe, out: Path, *, level: str, threads: int | None = None
) -> Reckoning:
    """Of a model encoded by somebody's recipe, which may have been made for another width."""
    machine, shape = Machine.here(threads or 0), Shape.of(checkpoint)
    size = recipe.bpw / 8 * shape.n
    need = needs.export(shape, "apply", size, level, tune=0, measured=0, chunks=0, n_ctx=0, domains=0, machine=machine)
    return Reckoning([need], machine, free_disk(out.parent), {})


def whole(step: str, reckoning: Reckoning) -> Need:
    """A run as one need: the most memory, all disk that it leaves and needs in passing, all seconds."""
    kept = sum(need.kept for need in reckoning.needs)
    return Need(step, reckoning.memory, kept, reckoning.peak - kept, begun=reckoning.seconds, card=reckoning.card)


def free_disk(path: Path) -> float:
    """Bytes that are free where a folder is, or will be."""
    while not path.exists():
        path = path.parent
    return float(shutil.disk_usage(path).free)


def _to_do(steps: Mapping[str, Mapping[str, Any]], folder: RunFolder) -> set[str]:
    """The steps that are not done, with what depends on them. Contents are not compared: that may take minutes."""
    records = folder.state["steps"]
    todo: set[str] = set()
    for step, own in steps.items():
        record = records.get(step, {})
        recorded = record.get("parameters", {})
        same = all(recorded[key] == own[key] for key in recorded.keys() & own.keys())
        there = all((folder / name).exists() for name in record.get("outputs", {}))
        kind, _, target = step.partition(".")
        before = {"calibrate", "sensitivity", f"allocate.{target}"} if kind in ("allocate", "export") else todo
        if record.get("state") != "done" or not same or not there or todo & before:
            todo.add(step)
    return todo


@dataclass(frozen=True)
class _Run:
    shape: Shape
    checkpoint: Checkpoint
    steps: Mapping[str, Mapping[str, Any]]
    folder: RunFolder
    machine: Machine

    def of(self, step: str) -> Need:
        kind, own = step.partition(".")[0], self.steps[step]
        parts = {"calibrate": self._calibrate, "sensitivity": self._sensitivity, "allocate": self._allocate}
        parts |= {"export": self._export, "evaluate": self._evaluate}
        found = _sum([Need(step, 0.0, begun=needs.STARTED), *parts[kind](step, own)])
        return found._replace(memory=found.memory + needs.BESIDES) if kind in ("export", "evaluate") else found

    def _calibrate(self, step: str, own: Mapping[str, Any]) -> list[Need]:
        if not self.shape.known:
            return []
        found = self._text("calibrate", own["text"], own["n_chunks"], own["n_ctx"])
        found.append(needs.calibrate(self.shape, _measured(own), own["n_ctx"], own["keep"], self.machine))
        stacks = any(product.experts > 1 for product in self.shape.products)
        free, weight = self.machine.free, self.machine.calibrated
        if own["top_up"] and stacks and not own["imatrix"] and not self.shape.streamed(free, weight):
            more = own["top_up"] * own["n_ctx"], own["n_ctx"], self.machine
            found.append(needs.sampled(self.shape, step, *more, at_once=8, weight=weight))
        return found

    def _text(self, split: str, spec: str, n_chunks: int, n_ctx: int) -> list[Need]:
        made = self.folder.state["steps"].get(f"{split}-text", {})
        settings = {"n_ctx": n_ctx, "n_chunks": n_chunks}
        if text_files(spec) or (made.get("state") == "done" and settings.items() <= made["parameters"].items()):
            return []
        weight = self.machine.calibrated if split == "calibrate" else F32
        return [needs.sampled(self.shape, split, n_chunks * n_ctx, n_ctx, self.machine, weight=weight)]

    def _sensitivity(self, step: str, own: Mapping[str, Any]) -> list[Need]:
        first = self.steps["calibrate"]
        keep = first["keep"] if self.shape.known else 0
        swaps = own["n_swaps"] if self.shape.known else 0
        fmts = candidates(own["formats"], own["profile"])
        tokens = min(own["swap_chunks"], first["n_chunks"]) * first["n_ctx"]
        return [needs.sensitivity(self.shape, fmts, own["level"], keep, swaps, tokens, self.machine)]

    def _allocate(self, step: str, own: Mapping[str, Any]) -> list[Need]:
        if not own["search"]:
            return []
        from dynq.search import parse_seconds

        held = 2 * F32 * self.shape.n + self.shape.logits(self.steps["calibrate"]["n_ctx"])
        placed = self.machine.holds(held, held, 20.0 * self.shape.largest)
        return [Need(step, **placed, begun=parse_seconds(own["search"]))]

    def _export(self, step: str, own: Mapping[str, Any]) -> list[Need]:
        first = self.steps["calibrate"]
        known = self.shape.known
        level = own["encoding"] if known else own["encoding"].replace("feedback", "search")
        domains = len(text_files(first["text"])) or FAMILIES
        text = _measured(first), first["n_chunks"], first["n_ctx"], domains
        size, passes = self._bytes(own["target"]), passes_over(first["n_chunks"], own["tune"]) if known else 0
        made = needs.export(self.shape, step, size, level, passes, *text, self.machine, codes=own["tune_codes"])
        found = [made]
        if own["chat"] and known and not self.shape.streamed(self.machine.free):
            n_tokens = own["n_tokens"]
            found.append(needs.sampled(self.shape, step, 2 * 3 * n_tokens, 2 * n_tokens, self.machine, at_once=3))
        return found

    def _bytes(self, target: str) -> float:
        recipe = self.folder / f"{file_safe(target)}.recipe.json"
        if recipe.exists():
            return float(Recipe.load(recipe).tensor_bytes)
        return float(target_bytes(parse_target(target), self.checkpoint.tensors, self.checkpoint.metadata, True))

    def _evaluate(self, step: str, own: Mapping[str, Any]) -> list[Need]:
        """Each file beside two mixes and one format throughout; files of others beside two mixes each. What llama.cpp
        runs is not reckoned."""
        if not self.shape.known:
            return []
        found = self._text("evaluate", own["eval_text"], own["eval_chunks"], own["eval_n_ctx"])
        text = own["eval_chunks"], own["eval_n_ctx"], self.machine
        sizes = [self._bytes(target) for target in own["targets"]]
        found.append(needs.evaluate(self.shape, step, sizes, (MIXES + 1) * len(sizes), *text, beside=True))
        if own["files"]:
            sizes += [float(Path(file).expanduser().stat().st_size) for file in own["files"]]
            found.append(needs.evaluate(self.shape, step, sizes, MIXES * len(sizes), *text, beside=False))
        return found


def _measured(own: Mapping[str, Any]) -> int:
    """Chunks of the text that are calibrated on."""
    return int(min(own["n_measured"], own["n_chunks"]))


def _sum(parts: Sequence[Need]) -> Need:
    """Parts of one step, one after the other."""
    kept = sum(part.kept for part in parts)
    passing = max(part.passing for part in parts)
    sums = {name: sum(getattr(part, name) for part in parts) for name in ("read", "flops", "spent", "begun")}
    at_once = min(part.at_once for part in parts)
    memory, card = (max(getattr(part, name) for part in parts) for name in ("memory", "card"))
    return Need(parts[0].step, memory, kept, passing, **sums, at_once=at_once, card=card)


def _size(n: float) -> str:
    """A size in binary units: "1.4 GiB"."""
    for unit in ("B", "KiB", "MiB", "GiB"):
        if n < 999.5:
            return f"{n:.3g} {unit}"
        n /= 1024
    return f"{n:.3g} TiB"


def _time(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.0f} s"
    if seconds < 6000:
        return f"{seconds / 60:.0f} min"
    return f"{seconds / 3600:.1f} h"
