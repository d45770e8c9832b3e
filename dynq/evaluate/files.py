"""Any GGUF files beside each other, whoever made them: each against the original, on the same text.

A file is decoded tensor by tensor and run in torch, so what is measured is what its weights lost; llama.cpp, which
also quantizes activations, adds a little: on demand the file runs there as well. The original's log-probabilities are
computed once and kept in the folder, and so is every score, under the hash of all that it depends on: a second call
with one file more measures one file.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from dynq import export, gguf_header, libllama, mixes, recipe, shards, tokenizer
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import compare, kld, logits_file, precision, tables, tasks
from dynq.evaluate.kept import Kept
from dynq.evaluate.original import Original, Text
from dynq.folder import RunFolder, content_hash, file_safe
from dynq.imatrix import Importance, read_imatrix
from dynq.tables import text_table
from dynq.text import labels
from dynq.torch_model import load_model

if TYPE_CHECKING:
    from distributed import Client

LEAST_CONTEXT = 16  # tokens in a chunk: fewer score too few positions for an error of the mean
NOTHING_MORE = tasks.Asked()
SHOWN = 5  # worst tokens and costliest layers that are printed


@dataclass(frozen=True)
class Entrant:
    """A GGUF file to measure, as its header tells. error: why it cannot be measured, or ""."""

    label: str
    path: Path
    error: str = ""
    tensor_bytes: int = 0
    n_weights: int = 0


def against_original(
    reference: str | Path | Checkpoint,
    files: Sequence[Path],
    folder: RunFolder,
    *,
    text: str | Text = "",
    n_ctx: int = 512,
    n_chunks: int = 16,
    seed: int = 0,
    with_mixes: bool = False,
    imatrix: Path | None = None,
    write_logits: Path | None = None,
    asked: tasks.Asked = NOTHING_MORE,
    allow_requantize: bool = False,
    threads: int | None = None,
    device: str = "cpu",
    cluster: Client | None = None,
) -> dict[str, Any]:
    """Measure GGUF files against their original; returns what ``evaluation.json`` holds.

    reference: the original, opened or as `open_checkpoint` takes it. text: as `dynq.text.load_text` takes it, each file
    a domain of its own with n_chunks chunks of n_ctx tokens; or one that is there already. with_mixes: llama.cpp's
    mixes around each file's size are encoded as well, with the importance matrix if there is one. write_logits: where
    to write the original's logits for llama-perplexity. asked: what else to measure of each file. device: where the
    models run. cluster: whose workers share the chunks of the text; what else is asked is measured here.

    A file that cannot be measured stands in "failed" with its reason. DynqError for what concerns all of them.
    """
    _check_context(n_ctx, n_chunks)
    paths = _existing(files)
    importance = read_imatrix(imatrix) if imatrix else None
    library = libllama.find() if asked.engine else None
    checkpoint = reference if isinstance(reference, Checkpoint) else open_checkpoint(reference, allow_requantize)
    questions = _questions(asked, checkpoint)
    with folder.lock():
        original = Original(checkpoint, folder, device, cluster)
        read = original.text(text, n_ctx=n_ctx, n_chunks=n_chunks, seed=seed) if isinstance(text, str) else text
        if write_logits is not None:
            _write_logits(write_logits, original, read.tokens)
        entrants = [_entrant(label, path, checkpoint) for label, path in paths]

        def load(checkpoint: Checkpoint, read: Callable[[str], Any] | None = None) -> Any:
            original.release()
            return load_model(checkpoint, read=read, device=device)

        kept = Kept(folder)
        what = checkpoint.fingerprint, read.sha256, read.domains
        bench = _Bench(
            kept,
            tasks.Divergence(*what),
            lambda _: original.reference(read),
            load,
            questions
            + ([tasks.Where(asked.where, checkpoint, read)] if asked.where else [])
            + ([tasks.InEngine(library, *what)] if library else []),
            {} if all(entrant.error for entrant in entrants) else _of_original(questions, kept, original),
            cluster,
        )
        entries = _measured(entrants, bench)
        if with_mixes:
            source = content_hash(imatrix) if imatrix else ""
            entries += _mixes(entries, checkpoint, importance, source, bench, threads)
        about = {
            "model": {
                "name": checkpoint.name,
                "fingerprint": checkpoint.fingerprint,
                "n_weights": checkpoint.n_weights,
                "requantized": checkpoint.requantized,
            },
            "text": {"description": read.description, "sha256": read.sha256, "domains": read.domains}
            | {"chunks": len(read.tokens), "n_ctx": int(read.tokens.shape[1])},
            "mixes_with_importance": importance is not None if with_mixes else None,
            "asked": {task.name: task.describe(bench.of_original.get(task.name)) for task in bench.asked},
        }
        return about | _ranked(entries)


def against_logits(
    logits: Path,
    files: Sequence[Path],
    folder: RunFolder,
    *,
    in_engine: bool = False,
    device: str = "cpu",
    cluster: Client | None = None,
) -> dict[str, Any]:
    """Measure GGUF files against a logits file of llama-perplexity: its tokens, its chunks, its 16 nats.

    in_engine: run the files in llama.cpp as well; cluster: as in `against_original`. Returns what ``evaluation.json``
    holds; errors as in `against_original`.
    """
    paths = _existing(files)
    library = libllama.find() if in_engine else None
    base = logits_file.read(logits)
    n_chunks, n_ctx = base.tokens.shape
    digest = content_hash(logits)
    what = digest, digest, {logits.name: n_chunks}
    with folder.lock():
        entrants = [_entrant(label, path, None) for label, path in paths]
        bench = _Bench(
            Kept(folder),
            tasks.Divergence(*what),
            lambda file: base.starting_with(tokenizer.added_bos(file.metadata)),
            partial(load_model, device=device),
            [tasks.InEngine(library, *what)] if library else [],
            cluster=cluster,
        )
        entries = _measured(entrants, bench)
        about = {
            "model": {"name": logits.name, "fingerprint": digest, "n_weights": None, "requantized": False},
            "text": {
                "description": f"{logits.name}, logits of llama-perplexity: {n_chunks} chunks of {n_ctx} tokens",
                "sha256": digest,
                "domains": {logits.name: n_chunks},
                "chunks": n_chunks,
                "n_ctx": n_ctx,
            },
            "mixes_with_importance": None,
            "asked": {task.name: task.describe(None) for task in bench.asked},
        }
        return about | _ranked(entries)


def _questions(asked: tasks.Asked, original: Checkpoint) -> list[tasks.Task]:
    """The tasks that need no text. DynqError for questions that cannot be read."""
    found: list[tasks.Task] = []
    if asked.mmlu:
        found.append(tasks.Mmlu(asked.mmlu, asked.mmlu_limit, original))
    if asked.greedy:
        found.append(tasks.Greedy(asked.greedy, original))
    return found


def _check_context(n_ctx: int, n_chunks: int) -> None:
    if n_ctx < LEAST_CONTEXT or n_chunks < 1:
        raise DynqError(f"{n_chunks} chunks of {n_ctx} tokens: at least 1 of {LEAST_CONTEXT} is needed")


def _existing(files: Sequence[Path]) -> list[tuple[str, Path]]:
    """(label, path) of every file, each once. DynqError for one that is not there: a slip, not a bad file."""
    for path in files:
        if not path.exists():
            raise DynqError(f"{path}: no such file")
        if path.is_dir():
            raise DynqError(f"{path}: a folder, not a GGUF file")
    # of the shards of one file any stands for all
    paths = list({shards.unsplit(path.resolve()): path for path in files}.values())
    return list(zip(labels(paths), paths, strict=True))


def _entrant(label: str, path: Path, original: Checkpoint | None) -> Entrant:
    """What the header tells, and whether the file can be of the same model as the original."""
    try:
        metadata, tensors = recipe.read_headers(path)
        if original is not None:
            _check_same(metadata, tensors, original)
    except DynqError as error:
        return Entrant(label, path, _one_line(error, path))
    shapes = {name: shape for name, (_, shape) in tensors.items()}
    return Entrant(
        label,
        path,
        tensor_bytes=sum(gguf_header.stored_bytes(fmt, shape) for fmt, shape in tensors.values()),
        n_weights=sum(int(np.prod(shape, dtype=np.int64)) for shape in shapes.values()),
    )


def _check_same(metadata: Mapping[str, Any], tensors: Mapping[str, Any], original: Checkpoint) -> None:
    """DynqError where the architecture, the vocabulary or the shape of a tensor differs."""
    architecture = metadata.get("general.architecture")
    if architecture != original.architecture.name:
        raise DynqError(f"of the architecture {architecture}, the original is {original.architecture.name}")
    embedding = "token_embd.weight"
    for name in sorted(tensors, key=lambda name: name != embedding):  # the vocabulary first
        shape = tensors[name][1]
        if name in original.tensors and original.tensors[name].shape != shape:
            meant = original.tensors[name].shape
            if name == embedding and shape[1:] == meant[1:]:
                raise DynqError(f"has {shape[0]:,} tokens in its vocabulary, the original {meant[0]:,}: another model")
            raise DynqError(f"{name} has shape {list(shape)}, in the original {list(meant)}: another model")


def _one_line(error: Exception, path: Path) -> str:
    said = " ".join(str(error).split()) or type(error).__name__
    said = said.removeprefix(f"{path}: ")
    return said if isinstance(error, DynqError) else f"cannot be read ({type(error).__name__}: {said})"


@dataclass(frozen=True)
class _Bench:
    """What all files are measured with.

    asked: what is measured of files beside the divergence; of_original: task name -> what the original answered.
    base: gives what a file is measured against; load: gives a model, of other weights than the checkpoint's if there
    are any. identity: what tells a subject's weights from others'.
    """

    kept: Kept
    divergence: tasks.Divergence
    base: Callable[[Checkpoint], kld.Base]
    load: Callable[..., Any]
    asked: Sequence[tasks.Task] = ()
    of_original: Mapping[str, Any] = field(default_factory=dict)
    cluster: Client | None = None

    def reads_text(self, identity: Any) -> bool:
        """Whether something is still to be measured that needs `base`."""
        reading = [task for task in (self.divergence, *self.asked) if task.reads_text]
        return not all(self.kept.has([task.about, identity]) for task in reading)

    def ask(self, task: tasks.Task, subject: tasks.Subject, identity: Any) -> Any:
        original = self.of_original.get(task.name)
        return self.kept.get([task.about, identity], lambda: task.measure(subject, original))


def _of_original(asked: Iterable[tasks.Task], kept: Kept, original: Original) -> dict[str, Any]:
    """Task name -> what the original answers."""
    subject = tasks.Subject("original", original.checkpoint, lambda: original.model)

    def answered(task: tasks.Task) -> Any:
        return kept.get([task.about, ["original"]], lambda: task.ask_original(subject))

    return {task.name: answered(task) for task in asked if task.asks_original}


def _measured(entrants: Iterable[Entrant], bench: _Bench) -> list[dict[str, Any]]:
    """An entry for each file: measured, or with "error". What failed of a measured one stands in "not_measured"."""
    entries = []
    for entrant in entrants:
        entry = {"label": entrant.label, "kind": "file"}
        entries.append(entry | ({"error": entrant.error} if entrant.error else _measured_file(entrant, bench)))
    return entries


def _measured_file(entrant: Entrant, bench: _Bench) -> dict[str, Any]:
    try:
        file = open_checkpoint(entrant.path, allow_requantize=True)
    except DynqError as error:
        return {"error": _one_line(error, entrant.path)}
    cluster, measure = bench.cluster, None
    if cluster:
        measure = partial(precision.measure_by_workers, cluster, file, file, desc=entrant.label)
    subject = tasks.Subject(entrant.label, file, lambda: bench.load(file), lambda: bench.base(file), measure)
    identity = ["file", ",".join(map(content_hash, file.files))]
    if bench.reads_text(identity):
        _ = subject.base  # outside of the try: no room for it on the disk is no fault of this file's
    try:
        found = bench.ask(bench.divergence, subject, identity)
    except Exception as error:  # a damaged file may raise anything from gguf, NumPy or torch
        return {"error": _one_line(error, entrant.path)}
    size = entrant.tensor_bytes
    entry: dict[str, Any] = {"file_bytes": shards.total_bytes(file.path), "sha256": identity[1], "tensor_bytes": size}
    entry |= {"bpw": 8 * size / entrant.n_weights, **found}
    for task in bench.asked:
        try:
            entry[task.name] = bench.ask(task, subject, identity)
        except Exception as error:
            entry.setdefault("not_measured", {})[task.name] = _one_line(error, entrant.path)
    return entry


def _mixes(
    entries: Sequence[dict[str, Any]],
    checkpoint: Checkpoint,
    importance: Importance | None,
    source: str,
    bench: _Bench,
    threads: int | None,
) -> list[dict[str, Any]]:
    """Entries of the mixes around the measured files, whose own entries get "mix_kld" and "kld_ratio"."""
    has_importance = importance is not None
    tensors, metadata = checkpoint.tensors, checkpoint.metadata
    measured = [entry for entry in entries if "statistics" in entry]
    around = [mixes.neighbours(entry["tensor_bytes"], tensors, metadata, has_importance) for entry in measured]
    made = {}
    for label in dict.fromkeys(name for pair in around for name in pair[:2]):
        chosen = mixes.mix(label, tensors, metadata, has_importance)

        def load(chosen: dict[str, str] = chosen) -> Any:
            return bench.load(checkpoint, export.simulate(checkpoint, chosen, importance, threads=threads))

        def by_workers(base: kld.Base, chosen: dict[str, str] = chosen, label: str = label) -> Any:
            assert bench.cluster
            path = bench.kept.folder / f"{file_safe(label)}.gguf"
            return compare.mix_by_workers(bench.cluster, checkpoint, chosen, importance, base, path, label)

        measure = by_workers if bench.cluster else None
        subject = tasks.Subject(label, checkpoint, load, lambda: bench.base(checkpoint), measure)
        found = bench.ask(bench.divergence, subject, ["mix", chosen, source])
        size = compare.stored_bytes(chosen, tensors)
        bpw = 8 * size / checkpoint.n_weights
        made[label] = {"label": label, "kind": "mix", "file_bytes": None, "tensor_bytes": size, "bpw": bpw, **found}
    for entry, pair in zip(measured, around, strict=True):
        entry |= compare.against_mixes(entry, made[pair.below], made[pair.above]) | {"inside": pair.inside}
    return list(made.values())


def _ranked(entries: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """ "files" by size, each with "dominated_by" (the label of a file that is no larger and no worse), and "failed"."""
    measured = [entry for entry in entries if "statistics" in entry]
    files = [entry for entry in measured if entry["kind"] == "file"]
    for entry in files:
        entry["dominated_by"] = next((other["label"] for other in files if _dominates(other, entry)), None)
    return {
        "files": sorted(measured, key=lambda entry: (entry["tensor_bytes"], entry["label"])),
        "failed": [{"label": e["label"], "error": e["error"]} for e in entries if "error" in e],
    }


def _dominates(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    first, second = ((entry["tensor_bytes"], entry["statistics"]["Mean KLD"]) for entry in (a, b))
    return first != second and first[0] <= second[0] and first[1] <= second[1]


def _write_logits(path: Path, original: Original, tokens: np.ndarray) -> None:
    n_vocab = original.checkpoint.tensors["token_embd.weight"].shape[0]
    log_probs = kld.log_probabilities(original.model, tokens, tokens.shape[1] // 2, desc="logits")
    logits_file.write(path, tokens, n_vocab, log_probs)
    original.release()


def set_threads(threads: int | None) -> None:
    """Threads of torch; None leaves its own choice."""
    if threads:
        torch.set_num_threads(threads)


def summary(evaluation: Mapping[str, Any], folder: RunFolder) -> str:
    """What the command prints: the table, by domain, every statistic as wide as the terminal is."""
    text = evaluation["text"]
    parts = [f"{evaluation['model']['name']}: {text['description']}", text_table(tables.rows(evaluation))]
    if domains := tables.domain_rows(evaluation):
        parts.append(text_table(domains))
    if answers := tables.answer_rows(evaluation):
        parts.append(text_table(answers))
    for entry in evaluation["files"]:
        if "where" in entry:
            parts += _hurts(entry)
    if statistics := tables.statistic_rows(evaluation):
        width, labels = shutil.get_terminal_size((120, 40)).columns, list(statistics[0])[1:]
        first = max(len(row["statistic"]) for row in statistics)
        while labels:
            count, used = 0, first
            for label in labels:
                used += 2 + max(len(label), *(len(row[label]) for row in statistics))
                count += used <= width
            own, labels = labels[: max(1, count)], labels[max(1, count) :]
            parts.append(text_table([{key: row[key] for key in ("statistic", *own)} for row in statistics]))
    pictures = ", ".join(name for name in ("frontier.svg", "layers.svg") if (folder / name).exists())
    parts.append(f"{folder.path}: evaluation.json, report.html, {pictures}".rstrip(", "))
    return "\n\n".join(parts)


def _hurts(entry: Mapping[str, Any]) -> list[str]:
    """The first few of a file's worst tokens and costliest layers; the report has all."""
    worst = [
        {"KLD": token["kld"], "before": "…" + " ".join(token["before"].split())[-32:]}
        | {who: _likeliest(token, who) for who in ("original", "file")}
        for token in entry["where"]["tokens"][:SHOWN]
    ]
    parts = [f"{entry['label']}: where it diverges most\n{text_table(worst)}"]
    if layers := tables.layer_rows(entry["where"])[:SHOWN]:
        parts.append(f"{tables.layers_title(entry)}\n{text_table(layers)}")
    return parts


def _likeliest(token: Mapping[str, Any], who: str) -> str:
    guess = token[f"{who}_top"][0]
    return f"{json.dumps(guess['text'], ensure_ascii=False)} {100 * guess[who]:.1f} %"
