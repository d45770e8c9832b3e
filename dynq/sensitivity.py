"""How far the model's output moves when one tensor is stored in one format: a table of tensors by formats.

To second order the KL divergence of a small weight error D is ``1/2 D^T F D`` with F the true Fisher information
(Kullback 1959, section 2.6). For a linear layer y = W x this becomes, from the samples of `dynq.fisher`,

    s(W, D) = factor / (2 T) * sum_s weight_s (g_s^T D x_s)^2

where T counts the tokens and ``factor``, one number per kind of tensor, adds what tokens of one sequence have in
common. The head needs no expansion: an error d = D h in the logits gives ``log sum_v p_v e^(d_v) - sum_v p_v d_v``
exactly. A tied embedding pays for both of its uses.
"""

from __future__ import annotations

import functools
import json
from collections import Counter
from collections.abc import Callable, Iterable
from concurrent.futures import Executor
from contextlib import nullcontext
from pathlib import Path
from threading import Lock
from typing import TYPE_CHECKING, Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import torch

from dynq import codec, formats
from dynq.architectures import Architecture
from dynq.checkpoint import Checkpoint
from dynq.cluster import held, tasks, whole
from dynq.devices import single
from dynq.encoding import importance_of, matrices, usable
from dynq.errors import DynqError
from dynq.evaluate import kld
from dynq.files import replacing
from dynq.fisher import Fisher, Samples
from dynq.imatrix import Importance
from dynq.recorder import HEAD
from dynq.threads import one_thread_each
from dynq.torch_model import check_in_memory, load_model, set_tensor

if TYPE_CHECKING:
    from distributed import Client

SCHEMA = pa.schema(
    [
        ("tensor", pa.string()),
        ("kind", pa.string()),
        ("format", pa.string()),
        ("bytes", pa.int64()),
        ("bpw", pa.float64()),
        ("predicted_kld", pa.float64()),  # nats per token, this tensor alone in this format
        ("predicted_error", pa.float64()),  # standard error of the estimate
        ("weighted_error", pa.float64()),
        ("measured_kld", pa.float64()),  # null where the swap was not measured
    ]
)
HEAD_ROWS = 32  # head samples that a thread takes at a time: bounds the logits that are in memory


def quadratic_form(projections: torch.Tensor, samples: Samples) -> tuple[float, float]:
    """``1/2 sum_s weight_s (g_s^T D x_s)^2`` and its standard error, both still to be divided by the tokens.

    projections: of the error D, as `Samples.projections` gives them.
    """
    terms = 0.5 * samples.weight * projections.square()
    return float(terms.sum()), float(terms.square().sum().sqrt())


def parameter_error(architecture: Architecture, name: str, error: np.ndarray, shape: tuple[int, ...]) -> torch.Tensor:
    """An error of a GGUF tensor as one of the parameter that it is a part of (of that shape): zero elsewhere.

    Views of experts do not reach over the first axis: the error of one, as a stack of one, has its place too.
    """
    whole = torch.zeros(shape)
    architecture.slot_of(name).scatter(whole, torch.from_numpy(error))
    return whole


def head_divergence(
    weight: torch.Tensor,
    error: torch.Tensor,
    samples: Samples,
    logits: Callable[[Any], Any] = lambda z: z,
    workers: Executor | None = None,
) -> tuple[float, float]:
    """The exact divergence summed over tokens when the head is ``weight + error``, and its standard error.

    weight, error: float32 ``[n_vocab, n_in]``; samples.x: float32 ``[n, n_in]``, what the head reads. logits: what the
    model does with the head's output: a scale, a soft cap. workers: threads that share the samples.
    """

    def of(x: torch.Tensor) -> torch.Tensor:
        # float64: in float32 the sum of 150,000 probabilities is off by 4e-5, more than a good format's divergence
        z = (x @ weight.T).double()
        d = logits(z + (x @ error.T).double()) - logits(z)
        log_p = torch.log_softmax(logits(z), dim=-1)
        return torch.logsumexp(log_p + d, dim=-1) - (log_p.exp() * d).sum(-1)

    parts = samples.x.split(HEAD_ROWS)
    weighted = samples.weight * torch.cat(list(workers.map(of, parts) if workers else map(of, parts)))
    return float(weighted.sum()), float(weighted.square().sum().sqrt())


def sensitivity(
    checkpoint: Checkpoint,
    folder: Path,
    importance: Importance | None,
    candidates: Iterable[str],
    *,
    level: str = "plain",
    threads: int | None = None,
    device: str = "cpu",
    cluster: Client | None = None,
) -> pa.Table:
    """Fill ``sensitivity.parquet`` of a run folder that is calibrated; return the table (columns: `SCHEMA`).

    device: where the products with the samples are computed; cluster: whose workers take a tensor each. On a CPU each
    product is computed by one thread, so that the table is the same bytes whoever computes it.

    Tensors that are done stand in ``sensitivity.partial.jsonl``; an interrupted run goes on behind them. A format that
    the rows of a tensor do not divide into appears as llama.cpp's fallback for it, once.
    """
    candidates, device = tuple(candidates), single(device)
    fisher = Fisher(folder / "fisher")
    names = [name for name, info in checkpoint.tensors.items() if info.quantizable]
    factors = fisher.cross_token({n: checkpoint.tensors[n].kind for n in names if n != HEAD})
    partial = folder / "sensitivity.partial.jsonl"
    rows = _kept_rows(partial)
    done = {row["tensor"] for row in rows}
    with partial.open("w") as log:
        for row in rows:
            log.write(json.dumps(row) + "\n")
        todo = [name for name in names if name not in done]
        of_one = functools.partial(
            _tensor_rows, checkpoint, fisher, candidates, level, 1 if cluster else threads, device
        )
        items = (
            (n, factors.get(checkpoint.tensors[n].kind, 1.0), importance_of(checkpoint, n, importance)) for n in todo
        )
        for new in tasks(of_one, items, cluster, total=len(todo), desc="sensitivity", unit="tensor"):
            rows += new
            log.write("".join(json.dumps(row) + "\n" for row in new))
            log.flush()
    order = {name: i for i, name in enumerate(names)}
    rows.sort(key=lambda row: (order[row["tensor"]], row["bytes"], row["format"]))
    table = pa.Table.from_pylist([{k: row.get(k) for k in SCHEMA.names} for row in rows], schema=SCHEMA)
    write_table(table, folder)
    partial.unlink()
    return table


def _kept_rows(partial: Path) -> list[dict[str, Any]]:
    """The rows of tensors that are done, as an interrupted run left them; none of a file that somebody damaged."""
    if not partial.exists():
        return []
    try:
        lines = partial.read_text(encoding="utf-8").split("\n")
        rows = [json.loads(line) for line in lines[:-1]]  # what follows the last end of line was cut off
        count = Counter(row["tensor"] for row in rows)
        done = {row["tensor"] for row in rows if row["last"] and row["last"] == count[row["tensor"]]}
        return [{key: row[key] for key in (*SCHEMA.names[:-1], "last")} for row in rows if row["tensor"] in done]
    except (ValueError, KeyError, TypeError):
        return []


def write_table(table: pa.Table, folder: Path) -> None:
    """Write ``sensitivity.parquet`` of a run folder."""
    with replacing(folder / "sensitivity.parquet") as beside:
        pq.write_table(table, beside)


def _tensor_rows(
    checkpoint: Checkpoint,
    fisher: Fisher,
    candidates: tuple[str, ...],
    level: str,
    threads: int | None,
    device: str,
    item: tuple[str, float, np.ndarray | None],
) -> list[dict[str, Any]]:
    """item: the tensor's name, the factor of its kind, its importance. Of experts one matrix at a time is in memory."""
    name, factor, mean = item
    info = checkpoint.tensors[name]
    architecture = checkpoint.architecture
    fmts = usable(candidates, info.row, mean)
    if not fmts:
        raise DynqError(f"{name}: {', '.join(candidates)} all need importance, which it has none of; add Q2_K or IQ3_S")
    samples = fisher.samples(name, device)
    shape = fisher.shapes[fisher.unit[name]]
    is_head = name == HEAD or (checkpoint.tied and name == "token_embd.weight")
    head_samples = fisher.samples(HEAD, device) if is_head else None
    projected = {fmt: torch.zeros(len(samples.x), dtype=torch.float64, device=device) for fmt in fmts}
    squares, head = dict.fromkeys(fmts, 0.0), dict.fromkeys(fmts, (0.0, 0.0))

    def add(weight: np.ndarray, own: np.ndarray | None, expert: int | None, workers: Executor | None) -> None:
        for fmt in fmts:
            data = codec.quantize(weight, fmt, own, level=level, threads=threads)
            decoded = codec.dequantize(data, fmt, threads=threads)
            squares[fmt] += codec.weighted_error(weight, decoded, own)
            error = decoded - weight
            if expert is None:
                moved = parameter_error(architecture, name, error, shape).to(device)
            else:
                moved = parameter_error(architecture, name, error[None], (1, *shape[1:]))[0].to(device)
            if name != HEAD:
                projected[fmt] += samples.projections(moved, workers, only=expert)
            if head_samples is not None:
                original = torch.from_numpy(weight).to(device)
                head[fmt] = head_divergence(original, moved, head_samples, architecture.logits, workers)

    with one_thread_each(threads) if device == "cpu" else nullcontext() as workers:
        if samples.expert is None:
            add(checkpoint.read(name), mean, None, workers)
        else:
            for i, (weight, own) in enumerate(matrices(checkpoint, name, mean)):
                add(weight, own, i, workers)
    rows = []
    for fmt in fmts:
        value, deviation = quadratic_form(projected[fmt], samples) if name != HEAD else (0.0, 0.0)
        size = formats.tensor_bytes(fmt, info.shape)
        rows.append(
            {
                "tensor": name,
                "kind": info.kind,
                "format": fmt,
                "bytes": size,
                "bpw": 8 * size / info.n_weights,
                "predicted_kld": (factor * value + head[fmt][0]) / fisher.tokens,
                "predicted_error": float(np.hypot(factor * deviation, head[fmt][1])) / fisher.tokens,
                "weighted_error": squares[fmt],
                "last": 0,
            }
        )
    rows[-1]["last"] = len(rows)
    return rows


# --- the ground truth, for a few --------------------------------------------------------------------------------------


def sample_swaps(table: pa.Table, n: int, seed: int = 0, among: Iterable[str] = ("Q2_K", "Q3_K", "Q4_K")) -> list[int]:
    """Row numbers of n swaps to measure: kinds of tensor and formats take turns, the layer is drawn."""
    among = [f for f in among if f in set(table["format"].to_pylist())] or sorted(set(table["format"].to_pylist()))
    groups: dict[tuple[str, str], list[int]] = {}
    for i, (kind, fmt) in enumerate(zip(table["kind"].to_pylist(), table["format"].to_pylist(), strict=True)):
        if fmt in among:
            groups.setdefault((fmt, kind), []).append(i)
    rng = np.random.default_rng(seed)
    lists = [list(rng.permutation(rows)) for _, rows in sorted(groups.items())]
    rng.shuffle(lists)
    picked: list[int] = []
    while len(picked) < n and any(lists):
        for rows in lists:
            if rows and len(picked) < n:
                picked.append(int(rows.pop()))
    return sorted(picked)


def measure_swaps(
    checkpoint: Checkpoint,
    model: Any,
    folder: Path,
    table: pa.Table,
    rows: Iterable[int],
    reference: kld.Reference,
    importance: Importance | None,
    *,
    level: str = "plain",
    threads: int | None = None,
    cluster: Client | None = None,
) -> pa.Table:
    """Store one tensor in one format, run the model, measure: fills ``measured_kld`` of the given rows and saves.

    reference: log-probabilities of the same model, best on the calibration text with ``first=0``, since the
    prediction speaks of all its positions. The model is put back as it was after each swap. cluster: whose workers
    swap, each in a model of its own, where it fits into their memory. On a CPU each chunk is computed by one thread,
    several side by side.
    """
    cluster = cluster if cluster and whole(cluster, checkpoint) else None
    measured = table["measured_kld"].to_pylist()
    todo = [i for i in rows if measured[i] is None]
    names, fmts = table["tensor"].to_pylist(), table["format"].to_pylist()
    swap = functools.partial(_swap, checkpoint, reference, level, *((None, 1) if cluster else (model, threads)))
    items = ((names[i], fmts[i], importance_of(checkpoint, names[i], importance)) for i in todo)
    divergences = tasks(swap, items, cluster, total=len(todo), desc="measured swaps", unit="swap")
    for i, divergence in zip(todo, divergences, strict=True):
        measured[i] = divergence
        table = table.set_column(
            SCHEMA.get_field_index("measured_kld"), "measured_kld", pa.array(measured, pa.float64())
        )
        write_table(table, folder)
    return table


_swapping = Lock()


def _swap(
    checkpoint: Checkpoint,
    reference: kld.Reference,
    level: str,
    model: Any,
    threads: int | None,
    item: tuple[str, str, np.ndarray | None],
) -> float:
    """model: None on a worker, which has its own. item: the tensor's name, format and importance."""
    name, fmt, mean = item
    weight = checkpoint.read(name)
    data = codec.quantize(weight, fmt, mean, level=level, threads=threads)
    decoded = codec.dequantize(data, fmt, threads=threads)
    with _swapping:
        if model is None:
            model = held(("swaps", checkpoint), lambda: load_model(checkpoint))
            check_in_memory(model, "a measured swap")
        try:
            set_tensor(model, checkpoint, name, decoded)
            return _divergence(model, reference, threads)
        finally:
            set_tensor(model, checkpoint, name, weight)


def _divergence(model: Any, reference: kld.Reference, threads: int | None) -> float:
    def of(chunk: int) -> np.ndarray:
        return kld.measure(model, reference, skip=chunk, chunks=chunk + 1, desc="").kld

    with one_thread_each(threads if model.device.type == "cpu" else 1) as workers:
        return float(np.concatenate(list(workers.map(of, range(len(reference.tokens))))).mean())


def agreement(table: pa.Table) -> dict[str, Any]:
    """How well prediction and measurement agree, where both are known.

    Returns ``rank`` (format -> Spearman's rank correlation across tensors, None under four), ``ratio`` (kind -> median
    of predicted / measured) and ``n``. Ranks are compared within one format: pooled over formats any error would do.
    """
    from scipy.stats import spearmanr

    rows = [row for row in table.to_pylist() if row["measured_kld"] is not None]
    by_format: dict[str, list[dict]] = {}
    by_kind: dict[str, list[float]] = {}
    for row in rows:
        by_format.setdefault(row["format"], []).append(row)
        by_kind.setdefault(row["kind"], []).append(row["predicted_kld"] / max(row["measured_kld"], 1e-12))
    rank: dict[str, float | None] = {}
    for fmt, group in sorted(by_format.items()):
        pairs = [[r["predicted_kld"] for r in group], [r["measured_kld"] for r in group]]
        rank[fmt] = float(spearmanr(*pairs).statistic) if len(group) >= 4 else None
    return {"n": len(rows), "rank": rank, "ratio": {k: float(np.median(v)) for k, v in sorted(by_kind.items())}}


def read_table(folder: Path) -> pa.Table:
    """The table of a run folder; DynqError where there is none, or it is damaged."""
    path = folder / "sensitivity.parquet"
    if not path.exists():
        raise DynqError(f"{path}: not there yet; run the sensitivity step first (notebook 04)")
    try:
        table = pq.read_table(path)
    except (OSError, pa.ArrowException) as error:
        reason = (str(error).splitlines() or ["unreadable"])[0]
        raise DynqError(
            f"{path}: damaged ({reason}); delete it, the sensitivity step (notebook 04) makes it anew"
        ) from error
    if not table.schema.equals(SCHEMA):
        raise DynqError(
            f"{path}: not a table of sensitivities; delete it, the sensitivity step (notebook 04) makes it anew"
        )
    return table
