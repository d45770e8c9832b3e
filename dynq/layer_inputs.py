"""What the layers of a model read, and its tensors encoded by that: errors fed back, see `dynq.feedback`.

Rows of a tensor are coupled too (`dynq.coupling`) where it has at most `WIDE`, or as many as columns: of others the
gradients would take more memory and time than the inputs, and are less correlated (LOG.md).
"""

from __future__ import annotations

import json
import shutil
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import closing
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple

import numpy as np
import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from threadpoolctl import threadpool_limits

from dynq import codec, feedback, memory, output_gradients
from dynq.checkpoint import Checkpoint
from dynq.cluster import tasks
from dynq.devices import free
from dynq.encoding import Stream, importance_of, quantized
from dynq.errors import DynqError
from dynq.files import replacing
from dynq.imatrix import Importance
from dynq.kernels import scales
from dynq.kernels.on_card import usable
from dynq.layerwise import reader
from dynq.progress import progress
from dynq.threads import each, in_order, one_thread_each

if TYPE_CHECKING:
    import pyarrow
    from distributed import Client

ASIDE = 4  # of so many chunks of a domain one is kept aside: it decides how far the others are trusted
BUDGET = 8 << 30  # bytes of Hessians in memory; the text is read once more for each time that this is filled
WIDE = 2048  # rows that are coupled also where columns are less
_ROWS = 1024  # of a Hessian that a thread sums up at once; the bytes depend on it
_BYTES = 4 + 8  # of an entry: as it is summed up, and as `feedback.encode` works on it


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
    """By `feedback.encode`, on what the layers of the original read; by `search` what no layer multiplies by.

    model: the original in transformers; tokens int32 ``[n_chunks, n_ctx]``, the calibration text; domains: of each
    chunk. `kept_aside` of them judge, see `feedback.encode`.
    parts: a folder that keeps what is encoded, so that a run that was cut off goes on; `reports` and `aim` read it.
    aims: whether it keeps what each weight alone would best be too, 2 bytes each.
    Encoders run on the model's card where numba.cuda can compile for it. A bunch of tensors whose Hessians fill
    `BUDGET` is encoded together, by the workers of a cluster if there is one: the Hessians are collected here all the
    same, and read from a file there.
    """
    parts.mkdir(exist_ok=True)
    modules = {} if reader(model) else _modules(checkpoint, model)
    unread = "the model does not fit into memory" if reader(model) else "looked up, or not quantized"
    fed = {name for name in chosen if name in modules and scales.grid(chosen[name]) is not None}
    sizes = {name: _size(checkpoint, name, len(set(domains))) if name in fed else 0 for name in chosen}
    device = usable(str(getattr(model, "device", "cpu")))
    guard = len(set(domains)) > 1  # with a single text that is what the model is for
    if cluster:
        encode = partial(tasks, partial(_encoded, checkpoint, guard, aims, 1, "cpu"), cluster=cluster, unit="tensor")
    else:
        most = max((_working(checkpoint, name, len(set(domains))) for name in fed), default=1)
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
            reading = {name: modules[name] for name in missing if name in fed}
            inputs = collect(model, reading, tokens, domains, threads=threads) if reading else {}
            layers = {
                n: (layer, _rows(checkpoint, n, layer)) for n, layer in reading.items() if _is_coupled(checkpoint, n)
            }
            gradients = output_gradients.collect(model, layers, tokens, threads=threads)
            read: dict[str, Any] = {name: Read(*both, gradients.get(name)) for name, both in inputs.items()}
            if cluster:
                read = _written(read, parts / "hessians")
            why = {name: f"{chosen[name]} has no feedback" if name in modules else unread for name in missing}
            means = ((name, importance_of(checkpoint, name, importance)) for name in missing)
            todo = (_Todo(name, chosen[name], mean, read.get(name) or why[name]) for name, mean in means)
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
    finally:
        bar.close()
        shutil.rmtree(parts / "hessians", ignore_errors=True)


class Read(NamedTuple):
    """What a tensor's layer read and gave out: Hessians to fit, and those that judge; gradients: of its outputs, see
    `feedback.encode`."""

    fit: list[feedback.Hessian]
    aside: list[feedback.Hessian]
    gradients: tuple[np.ndarray, np.ndarray] | None


class _Todo(NamedTuple):
    """A tensor to encode. read: by its layer, or the files that it is in, or why there is nothing."""

    name: str
    format: str
    mean: np.ndarray | None
    read: Read | tuple[Path, Path | None] | str


def _size(checkpoint: Checkpoint, name: str, domains: int) -> int:
    """Bytes of what is collected for a tensor."""
    info = checkpoint.tensors[name]
    return 2 * _BYTES * (domains * info.row**2 + (info.shape[0] ** 2 if _is_coupled(checkpoint, name) else 0))


def _working(checkpoint: Checkpoint, name: str, domains: int) -> int:
    """Bytes that encoding a tensor takes at the most, beside what is collected."""
    rows, row = checkpoint.tensors[name].shape
    return (16 * domains + 60) * row**2 + (60 * rows**2 if _is_coupled(checkpoint, name) else 0) + 33 * rows * row


def _is_coupled(checkpoint: Checkpoint, name: str) -> bool:
    rows, row = checkpoint.tensors[name].shape
    return rows <= max(row, WIDE)


def _rows(checkpoint: Checkpoint, name: str, layer: torch.nn.Linear) -> np.ndarray:
    """Which output of its layer each row of a tensor is, int64 [rows]."""
    outputs = np.broadcast_to(np.arange(layer.out_features)[:, None], tuple(layer.weight.shape))
    return np.array(checkpoint.architecture.slot_of(name).gather(outputs)[:, 0])


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
    fit, aside, gradients = read if isinstance(read, Read) else _read(*read)
    order = checkpoint.architecture.slot_of(todo.name).cols
    if order is not None:
        fit, aside = ([h.ordered(order) for h in some] for some in (fit, aside))
    settings: dict[str, Any] = {"gradients": gradients, "guard": guard, "threads": threads, "device": device}
    made = feedback.encode(checkpoint.read(todo.name), todo.format, fit, aside, todo.mean, **settings)
    told |= {"level": made.level, "shrinkage": made.shrinkage, "ratios": made.ratios, "reason": made.reason}
    best = {"best": made.best.astype(np.float16)} if aims and made.best is not None else {}
    return {"data": made.data} | best, told | {"coupled": made.coupled}


def _written(read: Mapping[str, Read], folder: Path) -> dict[str, tuple[Path, Path | None]]:
    """Name -> files with its inputs and its gradients, for workers to read; layers that read the same have one file."""
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir()
    files: dict[int, Path] = {}
    found = {}
    for name, (fit, aside, gradients) in read.items():
        same = [*fit, *aside][0].matrix.ctypes.data
        if same not in files:
            files[same] = folder / f"{len(files)}.safetensors"
            parts = {f"fit.{i:05d}": h for i, h in enumerate(fit)} | {f"aside.{i:05d}": h for i, h in enumerate(aside)}
            tokens = json.dumps({part: h.tokens for part, h in parts.items()})
            save_file({part: h.matrix for part, h in parts.items()}, files[same], {"tokens": tokens})
        own = None
        if gradients is not None:
            own = folder / f"{name}.safetensors"
            save_file(dict(zip(("fit", "aside"), gradients, strict=True)), own)
        found[name] = files[same], own
    return found


def _read(inputs: Path, outputs: Path | None) -> Read:
    with safe_open(inputs, framework="np") as kept:
        tokens = json.loads(kept.metadata()["tokens"])
        found = {name: feedback.Hessian(kept.get_tensor(name), tokens[name]) for name in sorted(tokens)}
    fit, aside = ([h for name, h in found.items() if name.startswith(kind)] for kind in ("fit.", "aside."))
    if outputs is None:
        return Read(fit, aside, None)
    with safe_open(outputs, framework="np") as kept:
        return Read(fit, aside, (kept.get_tensor("fit"), kept.get_tensor("aside")))


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
    on the chunks kept aside over plain encoding's, domain after domain), gain, their geometric mean (1 of none), and
    coupled, see `feedback.Encoded`."""
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


def _modules(checkpoint: Checkpoint, model: Any) -> dict[str, torch.nn.Linear]:
    """GGUF name -> the linear layer that multiplies by it and by nothing else's weights."""
    named = dict(model.named_modules())
    found = {}
    for name, info in checkpoint.tensors.items():
        slot = checkpoint.architecture.slot_of(name)
        module = named.get(slot.parameter.removesuffix(".weight"))
        if info.quantizable and slot.linear and isinstance(module, torch.nn.Linear):
            found[name] = module
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
    modules: Mapping[str, torch.nn.Linear],
    tokens: np.ndarray,
    domains: Sequence[str],
    *,
    threads: int | None = None,
) -> dict[str, tuple[list[feedback.Hessian], list[feedback.Hessian]]]:
    """Name -> Hessians of a layer's inputs, of every domain: those to fit, and those of the chunks kept aside.

    modules: name -> linear layer; layers that read the same input share their Hessians. tokens int32 [n_chunks, n_ctx].
    threads: chunks that are read at once on a CPU, by default as many as torch has threads. Sums run over chunks in
    their order, so the bytes do not depend on it.
    """
    local = threading.local()  # a chunk has a thread of its own

    def hook(name: str) -> Any:
        def keep(module: Any, args: tuple) -> None:
            local.inputs[name] = args[0].detach().reshape(-1, args[0].shape[-1])

        return keep

    handles = [module.register_forward_pre_hook(hook(name)) for name, module in modules.items()]
    # the head is spared where its inputs are not wanted
    spared = {} if model.get_output_embeddings() in modules.values() else {"logits_to_keep": 1}
    at_once = (threads or torch.get_num_threads()) if model.device.type == "cpu" else 1
    keys = list(zip(domains, kept_aside(domains).tolist(), strict=True))
    on_card = _on_card(modules, len(set(domains)))
    sums: dict[tuple[str, str, bool], torch.Tensor] = {}
    read: dict[int, dict[str, torch.Tensor]] = {}
    shared: dict[str, str] = {}

    @torch.no_grad()
    def forward(i: int) -> None:
        local.inputs = {}
        ids = torch.from_numpy(tokens[i : i + 1].astype(np.int64)).to(model.device)
        model(input_ids=ids, use_cache=False, **spared)
        first: dict[int, str] = {}
        shared.update({name: first.setdefault(x.data_ptr(), name) for name, x in local.inputs.items()})
        read[i] = {name: local.inputs[name].float() for name in first.values()}
        del local.inputs

    def add(chunks: range, parts: Sequence[tuple[str, slice]], k: int) -> None:
        """Some rows of a layer's Hessians."""
        name, rows = parts[k]
        for i in chunks:
            x = read[i][name]
            sums[name, *keys[i]][rows] += (x[:, rows].T @ x).to(sums[name, *keys[i]].device)

    try:
        with (
            progress(total=len(tokens), desc="layer inputs", unit="chunk") as bar,
            one_thread_each(at_once) as workers,
        ):
            for start in range(0, len(tokens), at_once):
                chunks = range(start, min(start + at_once, len(tokens)))
                each(workers, forward, chunks, bar)
                widths = {name: x.shape[1] for name, x in read[start].items()}
                for name, n in widths.items():
                    place = read[start][name].device if on_card else "cpu"
                    for i in chunks:
                        sums.setdefault((name, *keys[i]), torch.zeros(n, n, device=place))
                parts = [(name, slice(at, at + _ROWS)) for name, n in widths.items() for at in range(0, n, _ROWS)]
                each(workers, partial(add, chunks, parts), range(len(parts)))
                read.clear()
    finally:
        for handle in handles:
            handle.remove()
    missing = [name for name in modules if name not in shared]
    if missing:
        raise DynqError(f"{missing[0]}: the model does not call this layer")

    def of(name: str, aside: bool) -> list[feedback.Hessian]:
        own = [(domain, aside) for domain in dict.fromkeys(domains) if (domain, aside) in keys]
        return [
            feedback.Hessian(sums[shared[name], *key].cpu().numpy(), keys.count(key) * tokens.shape[1]) for key in own
        ]

    return {name: (of(name, False), of(name, True)) for name in modules}


def _on_card(modules: Mapping[str, torch.nn.Linear], domains: int) -> bool:
    """Whether sums are kept where layers are computed: on a card, if they take no more than half of what is free."""
    most = sum(2 * domains * 4 * module.in_features**2 for module in modules.values())
    cards = {module.weight.device for module in modules.values()}
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
