"""What the layers of a model read, and its tensors encoded by that: errors fed back, see `dynq.feedback`.

Rows of a tensor are coupled too (`dynq.coupling`) where it has at most `WIDE`, or as many as columns: of others the
gradients would take more memory and time than the inputs, and are less correlated (LOG.md).

Each expert of a stack is a layer of its own, with what is sent to it. A domain may hardly reach an expert, so an expert
has all of them in one, which also takes a fraction of the memory. Gates and up projections of all experts read the
same stream: one that too few tokens reached has the inputs of all, which keeps three quarters of the gain (LOG.md).
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from dataclasses import replace
from functools import partial, reduce
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from dynq import codec, feedback, memory, output_gradients
from dynq.checkpoint import Checkpoint, TensorInfo
from dynq.cluster import tasks
from dynq.devices import free
from dynq.encoding import Stream, importance_of, matrices, quantized
from dynq.errors import DynqError
from dynq.files import replacing
from dynq.imatrix import Importance
from dynq.kernels import scales
from dynq.kernels.on_card import usable
from dynq.layerwise import reader
from dynq.progress import progress
from dynq.recorder import HEAD, Recorder
from dynq.threads import each, in_order, one_thread_each

if TYPE_CHECKING:
    import pyarrow
    from distributed import Client

ASIDE = 4  # of so many chunks of a domain one is kept aside: it decides how far the others are trusted
BUDGET = 8 << 30  # bytes of Hessians in memory; the text is read once more for each time that this is filled
WIDE = 2048  # rows that are coupled also where columns are less
_ROWS = 1024  # of a Hessian that a thread sums up at once; the bytes depend on it
_SUMMED, _WORKED = 4, 8  # bytes of an entry: as it is summed up, and as `feedback.encode` works on it


def feed_back(
    checkpoint: Checkpoint,
    chosen: Mapping[str, str],
    importance: Importance | None,
    model: Any,
    tokens: np.ndarray,
    domains: Sequence[str],
    parts: Path,
    *,
    aims: bool = False,
    threads: int | None = None,
    desc: str = "encode",
    cluster: Client | None = None,
) -> Stream:
    """By `feedback.encode`, on what the layers of the original read; by `search` what no layer multiplies by, and a
    stack of experts whose Hessians are larger than `BUDGET`.

    model: the original in transformers; tokens int32 ``[n_chunks, n_ctx]``, the calibration text; domains: of each
    chunk. `kept_aside` of them judge, see `feedback.encode`.
    parts: a folder that keeps what is encoded, so that a run that was cut off goes on; `reports` and `aim` read it.
    aims: whether it keeps what each weight alone would best be too, 2 bytes each.
    Encoders run on the model's card where numba.cuda can compile for it. A bunch of tensors whose Hessians fill
    `BUDGET` is encoded together, by the workers of a cluster if there is one: the Hessians are collected here all the
    same, and read from a file there.
    """
    parts.mkdir(exist_ok=True)
    n_domains = len(set(domains))
    read_by = {} if reader(model) else products(checkpoint, model)
    why = dict.fromkeys(
        chosen, "the model does not fit into memory" if reader(model) else "no layer of its own multiplies by it"
    )
    fed = set()
    for name in read_by.keys() & chosen.keys():
        size = _size(checkpoint, name, n_domains)
        if scales.grid(chosen[name]) is None:
            why[name] = f"{chosen[name]} has no feedback"
        elif checkpoint.tensors[name].stacked and size > BUDGET:
            why[name] = f"what its experts read would take {size / 2**30:.1f} GiB"
        else:
            fed.add(name)
    sizes = {name: _size(checkpoint, name, n_domains) if name in fed else 0 for name in chosen}
    device = usable(str(getattr(model, "device", "cpu")))
    guard = n_domains > 1  # with a single text that is what the model is for
    if cluster:
        encode = partial(tasks, partial(_encoded, checkpoint, guard, aims, 1, "cpu"), cluster=cluster, unit="tensor")
    else:
        most = max((_working(checkpoint, name, n_domains) for name in fed), default=1)
        cores = threads or codec.cores()
        at_once = max(1, min(cores, memory.available() // (2 * most))) if device == "cpu" else 1
        encode = partial(
            in_order, partial(_encoded, checkpoint, guard, aims, max(1, cores // at_once), device), count=at_once
        )
    bar = progress(total=len(chosen), desc=desc, unit="tensor")
    try:
        for bunch in _bunches(chosen, sizes):
            made = {name: _part(parts, name) for name in bunch}
            missing = [n for n, part in made.items() if not _holds(part, chosen[n], aims)]
            reading = [name for name in missing if name in fed]
            read: dict[str, Any] = collect(model, checkpoint, reading, tokens, domains, threads=threads)
            rows = {n: _rows(checkpoint, n, read_by[n]) for n in reading if _is_coupled(checkpoint, n)}
            for name, gradients in output_gradients.collect(model, checkpoint, rows, tokens, threads=threads).items():
                read[name] = [one._replace(gradients=own) for one, own in zip(read[name], gradients, strict=True)]
            order = {n: checkpoint.architecture.slot_of(n).columns(*read_by[n]) for n in reading}
            if cluster:
                read = _written(read, parts / "hessians")
            means = ((name, importance_of(checkpoint, name, importance)) for name in missing)
            todo = (_Todo(n, chosen[n], mean, read.get(n) or why[n], order.get(n)) for n, mean in means)
            # within the limit of each encoder, which would restore another's while that one works
            with threadpool_limits(limits=1, user_api="blas"), closing(encode(items=todo)) as results:
                for name in bunch:
                    if name in missing:
                        encoded, told = next(results)
                        with replacing(made[name]) as beside:
                            save_file(encoded, beside, {"told": json.dumps(told)})
                    with safe_open(made[name], framework="np") as file:
                        yield name, chosen[name], file.get_tensor("data")
                    bar.update(1)
            read.clear()  # before the next are collected
    finally:
        bar.close()
        shutil.rmtree(parts / "hessians", ignore_errors=True)


class Read(NamedTuple):
    """What a matrix read, and what it gave out: Hessians to fit, and those that judge; gradients: of its outputs, see
    `feedback.encode`."""

    fit: list[feedback.Hessian]
    aside: list[feedback.Hessian]
    gradients: tuple[np.ndarray, np.ndarray] | None = None


class _Todo(NamedTuple):
    """A tensor to encode. read: by its matrices, or the files that it is in, or why there is nothing; order: which
    input each column multiplies."""

    name: str
    format: str
    mean: np.ndarray | None
    read: list[Read] | tuple[Path, Path | None] | str
    order: np.ndarray | None


def _size(checkpoint: Checkpoint, name: str, domains: int) -> int:
    """Bytes of what is collected for a tensor, and of one that is not stacked what encoding makes of it."""
    info = checkpoint.tensors[name]
    squares = info.row**2 * _kept_apart(info, domains) + (info.shape[-2] ** 2 if _is_coupled(checkpoint, name) else 0)
    return 2 * info.n_matrices * squares * (_SUMMED if info.stacked else _SUMMED + _WORKED)


def _working(checkpoint: Checkpoint, name: str, domains: int) -> int:
    """Bytes that encoding a tensor takes at the most, beside what is collected."""
    info = checkpoint.tensors[name]
    rows, row = info.shape[-2:]
    square = (16 * _kept_apart(info, domains) + 60) * row**2 + (60 * rows**2 if _is_coupled(checkpoint, name) else 0)
    return square + 33 * rows * row + (4 * info.n_weights if info.stacked else 0)


def _kept_apart(info: TensorInfo, domains: int) -> int:
    """How many domains the inputs of a tensor's matrices are summed up by."""
    return 1 if info.stacked else domains


def _is_coupled(checkpoint: Checkpoint, name: str) -> bool:
    rows, row = checkpoint.tensors[name].shape[-2:]
    return rows <= max(row, WIDE)


def _rows(checkpoint: Checkpoint, name: str, product: Product) -> np.ndarray:
    """Which output of its product each row of a matrix is, int64 [rows]."""
    axis = len(product.shape) - (1 if product.flipped else 2)
    outputs = np.arange(product.shape[axis]).reshape([-1 if i == axis else 1 for i in range(len(product.shape))])
    gathered = checkpoint.architecture.slot_of(name).gather(np.broadcast_to(outputs, product.shape))
    return np.array(gathered.reshape(-1, *gathered.shape[-2:])[0, :, 0])


def _encoded(
    checkpoint: Checkpoint, guard: bool, aims: bool, threads: int | None, device: str, todo: _Todo
) -> tuple[dict[str, np.ndarray], dict[str, Any]]:
    """What is kept of a tensor, its bytes and perhaps `best`, and what `reports` tells of it."""
    told: dict[str, Any] = {"tensor": todo.name, "format": todo.format}
    read = todo.read
    if isinstance(read, str):
        data = quantized(checkpoint, todo.name, todo.format, todo.mean, "search", threads)
        told |= {"level": "search", "shrinkage": None, "ratios": [], "reason": read, "coupled": 1.0}
        return {"data": data}, told
    info = checkpoint.tensors[todo.name]
    made, tokens = list[feedback.Encoded](), list[int]()
    best = np.empty((info.n_matrices, *info.shape[-2:]), np.float16) if aims else None
    each_read = read if isinstance(read, list) else _read(*read)
    few = [feedback.too_few(own.fit, own.aside, info.row) != "" for own in each_read]
    together = _of_all(each_read) if any(few) and info.stacked and "down" not in info.kind else None
    for (weights, mean), own, starved in zip(matrices(checkpoint, todo.name, todo.mean), each_read, few, strict=True):
        fit, aside, _ = together if together and starved else own
        if todo.order is not None and (np.diff(todo.order) != 1).any():
            fit, aside = ([h.ordered(todo.order) for h in some] for some in (fit, aside))
        settings: dict[str, Any] = {"gradients": own.gradients, "guard": guard and not info.stacked}
        one = feedback.encode(weights, todo.format, fit, aside, mean, threads=threads, device=device, **settings)
        if best is not None:
            best[len(made)] = weights if one.best is None else one.best
        made.append(replace(one, best=None))
        tokens.append(sum(h.tokens for h in [*own.fit, *own.aside]))
    kept = {"data": np.stack([one.data for one in made]) if info.stacked else made[0].data}
    if best is not None and any(one.level == "feedback" for one in made):
        kept["best"] = best.reshape(-1, info.row)
    return kept, told | (_told_of_stack(made, tokens) if info.stacked else _told_of(made[0]))


def _of_all(read: Sequence[Read]) -> Read:
    """What all experts of a stack have read together."""

    def total(parts: list[feedback.Hessian]) -> list[feedback.Hessian]:
        matrices = [h.matrix for h in parts]
        return [feedback.Hessian(reduce(np.add, matrices), sum(h.tokens for h in parts))] if parts else []

    return Read(total([h for own in read for h in own.fit]), total([h for own in read for h in own.aside]))


def _told_of(one: feedback.Encoded) -> dict[str, Any]:
    return {name: getattr(one, name) for name in ("level", "shrinkage", "ratios", "reason", "coupled")}


def _told_of_stack(made: Sequence[feedback.Encoded], tokens: Sequence[int]) -> dict[str, Any]:
    """The same of a stack: means over its experts by the tokens that they read, of shrinkage over those that are fed
    back; the reason of the first that is not."""
    left = [one for one in made if one.level != "feedback"]
    judged = [(float(np.mean(np.log(one.ratios))), n) for one, n in zip(made, tokens, strict=True) if one.ratios and n]
    logs, weights = np.array(judged).reshape(-1, 2).T
    shrinkage = [one.shrinkage for one in made if one.shrinkage is not None]
    return {
        "level": "feedback" if len(left) < len(made) else made[0].level,
        "shrinkage": float(np.mean(shrinkage)) if shrinkage else None,
        "ratios": [float(np.exp(np.average(logs, weights=weights)))] if judged else [],
        "reason": f"{len(left)} of {len(made)} experts: {left[0].reason}" if left else "",
        "coupled": float(np.average([one.coupled for one in made], weights=np.maximum(tokens, 1))),
    }


def _written(read: Mapping[str, list[Read]], folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Name -> files with its inputs and its gradients, for workers to read; layers that read the same have one file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files: dict[int, Path] = {}
    found = {}
    for name, all_ in read.items():
        same = [*all_[0].fit, *all_[0].aside][0].matrix.ctypes.data
        if same not in files:
            files[same] = folder / f"{len(files)}.safetensors"
            parts = {
                f"{e:05d}.{kind}.{i:05d}": h
                for e, own in enumerate(all_)
                for kind, some in (("fit", own.fit), ("aside", own.aside))
                for i, h in enumerate(some)
            }
            tokens = json.dumps({part: h.tokens for part, h in parts.items()})
            save_file({part: h.matrix for part, h in parts.items()}, files[same], {"tokens": tokens})
        gradients = {
            f"{e:05d}.{kind}": g
            for e, own in enumerate(all_)
            for kind, g in zip(("fit", "aside"), own.gradients or (), strict=False)
        }
        if gradients:
            save_file(gradients, folder / f"{name}.safetensors")
        found[name] = files[same], folder / f"{name}.safetensors" if gradients else None
    return found


def _read(inputs: Path, outputs: Path | None) -> list[Read]:
    """What was written of a tensor."""
    with safe_open(inputs, framework="np") as kept:
        tokens = json.loads(kept.metadata()["tokens"])
        found = {name: feedback.Hessian(kept.get_tensor(name), tokens[name]) for name in sorted(tokens)}
    gradients: dict[str, np.ndarray] = {}
    if outputs is not None:
        with safe_open(outputs, framework="np") as given:
            gradients = {name: given.get_tensor(name) for name in given.keys()}  # noqa: SIM118
    read = []
    for e in dict.fromkeys(name.partition(".")[0] for name in found):
        fit, aside = ([h for name, h in found.items() if name.startswith(f"{e}.{kind}.")] for kind in ("fit", "aside"))
        read.append(Read(fit, aside, (gradients[f"{e}.fit"], gradients[f"{e}.aside"]) if gradients else None))
    return read


def _part(parts: Path, name: str) -> Path:
    return parts / f"{name}.safetensors"


def _holds(part: Path, fmt: str, aims: bool) -> bool:
    """Whether a part is there, whole, and as asked for."""
    try:
        told, best = _told(part)
        wanted = aims and told["level"] == "feedback"
        return bool(told["format"] == fmt and "coupled" in told and best == wanted)
    except (OSError, SafetensorError, ValueError, LookupError, TypeError):
        return False  # it is made anew


def _told(part: Path) -> tuple[dict[str, Any], bool]:
    """What is told of a tensor, and whether `best` is kept beside its bytes."""
    with safe_open(part, framework="np") as file:
        return json.loads(file.metadata()["told"]), "best" in file.keys()  # noqa: SIM118


def aim(parts: Path, name: str) -> np.ndarray | None:
    """What each weight of a tensor alone would best be, see `feedback.best`: float32 [rows, n]; None where `feed_back`
    has not kept that."""
    if not _part(parts, name).exists():
        return None
    with safe_open(_part(parts, name), framework="np") as file:
        return file.get_tensor("best").astype(np.float32) if "best" in file.keys() else None  # noqa: SIM118


def reports(parts: Path, names: Sequence[str]) -> list[dict[str, Any]]:
    """What `feed_back` tells of each tensor: tensor, format, level, shrinkage, reason, ratios (the squared output error
    on the chunks kept aside over plain encoding's, domain after domain; of a stack one, the mean of its experts by
    their tokens), gain, their geometric mean (1 of none), and coupled, see `feedback.Encoded`."""
    found = []
    for name in names:
        told, _ = _told(_part(parts, name))
        found.append(told | {"gain": float(np.exp(np.mean(np.log(told["ratios"])))) if told["ratios"] else 1.0})
    return found


def expected_kld(table: pyarrow.Table, told: Sequence[Mapping[str, Any]]) -> float:
    """What a sensitivity table of plain encodings predicts once errors are fed back: the sum over tensors of predicted
    KLD times the mean ratio of output errors, which is the ratio of the quadratic forms where tokens weigh alike, times
    what coupling brought.

    table: of level `plain`. told: as `reports` gives it, of formats that the table has; other tensors count as without
    loss.
    """
    plain = {(row["tensor"], row["format"]): row["predicted_kld"] for row in table.to_pylist()}
    return sum(plain.get((entry["tensor"], entry["format"]), 0.0) * entry["gain"] * entry["coupled"] for entry in told)


class Product(NamedTuple):
    """The parameter that a tensor is in: its shape, [experts, rows, n] of a stack; flipped: [experts, n, rows]."""

    shape: tuple[int, ...]
    flipped: bool


def products(checkpoint: Checkpoint, model: Any) -> dict[str, Product]:
    """GGUF name -> what multiplies by it, of tensors that are rows of a linear layer or of a stack of experts."""
    named = dict(model.named_modules())
    found = {}
    for name, info in checkpoint.tensors.items():
        slot = checkpoint.architecture.slot_of(name)
        if not info.quantizable:
            continue
        if slot.linear and isinstance(layer := named.get(slot.parameter.removesuffix(".weight")), torch.nn.Linear):
            found[name] = Product(tuple(layer.weight.shape), False)
        elif "_exps" in info.kind:
            shape = tuple(model.get_parameter(slot.parameter).shape)
            flipped = slot.columns(shape, False) is None
            if len(shape) == 3 and slot.columns(shape, flipped) is not None:
                found[name] = Product(shape, flipped)
    return found


def _bunches(names: Mapping[str, str], sizes: Mapping[str, int]) -> Iterator[list[str]]:
    """Names in order, in runs whose sizes stay within the budget."""
    bunch: list[str] = []
    filled = 0
    for name in names:
        if bunch and filled + sizes[name] > BUDGET:
            yield bunch
            bunch, filled = [], 0
        bunch.append(name)
        filled += sizes[name]
    if bunch:
        yield bunch


def collect(
    model: Any,
    checkpoint: Checkpoint,
    names: Sequence[str],
    tokens: np.ndarray,
    domains: Sequence[str],
    *,
    threads: int | None = None,
) -> dict[str, list[Read]]:
    """Name -> for each matrix (one, or those of a stack of experts) Hessians of its inputs, of every domain, of a stack
    of all together: those to fit, and those of the chunks kept aside.

    names: some of `products`; those that read the same input share their Hessians. tokens int32 [n_chunks, n_ctx].
    threads: chunks that are read at once on a CPU, by default as many as torch has threads. Sums run over chunks in
    their order, so the bytes do not depend on it.
    """
    if not names:
        return {}
    # the head is spared where its inputs are not wanted
    spared = {} if HEAD in names else {"logits_to_keep": 1}
    at_once = (threads or torch.get_num_threads()) if model.device.type == "cpu" else 1
    aside = kept_aside(domains).tolist()
    on_card = _on_card(model, checkpoint, names, len(set(domains)))
    sums: dict[tuple[str, int, str, bool], torch.Tensor] = {}
    counts: dict[tuple[str, int, str, bool], int] = {}
    read: dict[int, dict[str, tuple[torch.Tensor, torch.Tensor | None]]] = {}
    shared: dict[str, str] = {}

    @torch.no_grad()
    def forward(i: int) -> None:
        recorder = Recorder(model, checkpoint, names)
        ids = torch.from_numpy(tokens[i : i + 1].astype(np.int64)).to(model.device)
        with recorder:
            model(input_ids=ids, use_cache=False, **spared)
        first: dict[int, str] = {}
        of_unit = {unit: first.setdefault(recorder.shares(unit), unit) for unit in recorder.used}
        shared.update({name: of_unit[unit] for name, unit in recorder.tensors.items() if unit in of_unit})
        uses = {unit: recorder.use(unit) for unit in first.values()}
        read[i] = {unit: (use.x.float(), use.expert) for unit, use in uses.items()}

    def key(unit: str, e: int, i: int) -> tuple[str, int, str, bool]:
        return unit, e, "" if checkpoint.tensors[unit].stacked else domains[i], aside[i]

    def add(chunks: range, parts: Sequence[tuple[str, int, slice]], k: int) -> None:
        """Some rows of a matrix's Hessians."""
        unit, e, rows = parts[k]
        for i in chunks:
            if unit in read[i]:
                x, expert = read[i][unit]
                x = x if expert is None else x[expert == e]
                total = sums[key(unit, e, i)]
                if len(x):
                    total[rows] += (x[:, rows].T @ x).to(total.device)
                if rows.start == 0:
                    counts[key(unit, e, i)] = counts.get(key(unit, e, i), 0) + len(x)

    with progress(total=len(tokens), desc="layer inputs", unit="chunk") as bar, one_thread_each(at_once) as workers:
        for start in range(0, len(tokens), at_once):
            chunks = range(start, min(start + at_once, len(tokens)))
            each(workers, forward, chunks, bar)
            parts = []
            for unit, (x, _) in {unit: use for i in chunks for unit, use in read[i].items()}.items():
                n, place = x.shape[1], x.device if on_card else "cpu"
                for e in range(checkpoint.tensors[unit].n_matrices):
                    for own in {key(unit, e, i) for i in chunks} - sums.keys():
                        sums[own] = torch.zeros(n, n, device=place)
                    parts += [(unit, e, slice(at, at + _ROWS)) for at in range(0, n, _ROWS)]
            each(workers, partial(add, chunks, parts), range(len(parts)))
            read.clear()
    missing = [name for name in names if name not in shared]
    if missing:
        raise DynqError(f"{missing[0]}: the model multiplies nothing by it")

    def of(unit: str, e: int, aside: bool) -> list[feedback.Hessian]:
        own = [(unit, e, domain, aside) for domain in dict.fromkeys(["", *domains])]
        return [feedback.Hessian(sums[k].cpu().numpy(), counts.get(k, 0)) for k in own if k in sums]

    made = {
        unit: [Read(of(unit, e, False), of(unit, e, True)) for e in range(checkpoint.tensors[unit].n_matrices)]
        for unit in dict.fromkeys(shared.values())
    }
    return {name: made[shared[name]] for name in names}


def _on_card(model: Any, checkpoint: Checkpoint, names: Sequence[str], domains: int) -> bool:
    """Whether sums are kept where layers are computed: on a card, if they take no more than half of what is free."""
    infos = [checkpoint.tensors[name] for name in names]
    most = sum(2 * _kept_apart(info, domains) * 4 * info.n_matrices * info.row**2 for info in infos)
    cards = {model.get_parameter(checkpoint.architecture.parameter(name)).device for name in names}
    return all(card.type == "cuda" and 2 * most < free(card) for card in cards)


def kept_aside(domains: Sequence[str], most: int | None = None) -> np.ndarray:
    """bool ``[n_chunks]``: whether a chunk is one of those that judge: the last of every `ASIDE` of its domain, or the
    last of two or three; of a domain no more than `most`."""
    labels = np.array(domains)
    aside = np.zeros(len(labels), bool)
    for domain in dict.fromkeys(domains):
        own = np.flatnonzero(labels == domain)
        judges = own[ASIDE - 1 :: ASIDE] if len(own) >= ASIDE or len(own) == 1 else own[-1:]
        aside[judges[:most]] = True
    return aside
