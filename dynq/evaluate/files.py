"""Any GGUF files beside each other, whoever made them: each against the original, on the same text.

A file is decoded tensor by tensor and run in torch, so what is measured is what its weights lost; llama.cpp, which
also quantizes activations, adds a little. The original's log-probabilities are computed once and kept in the folder,
and so is every score, under the hash of all that it depends on: a second call with one file more measures one file.
"""

import hashlib
import json
import shutil
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np
import torch

import dynq
from dynq import export, mixes, recipe, tokenizer
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import compare, kld, logits_file, tables
from dynq.folder import RunFolder, content_hash
from dynq.imatrix import Importance, read_imatrix
from dynq.tables import text_table
from dynq.text import load_text, text_files
from dynq.torch_model import load_model, load_tokenizer

LEAST_CONTEXT = 16  # tokens in a chunk: fewer score too few positions for an error of the mean


@dataclass(frozen=True)
class Text:
    """What is read: tokens int32 ``[n_chunks, n_ctx]``, domain after domain, and how many chunks each domain has."""

    description: str
    sha256: str
    tokens: np.ndarray
    domains: dict[str, int]


@dataclass(frozen=True)
class Entrant:
    """A GGUF file to measure, as its header tells. error: why it cannot be measured, or ""."""

    label: str
    path: Path
    error: str = ""
    tensor_bytes: int = 0
    n_weights: int = 0


class Original:
    """The original model: its text and its log-probabilities, made when they are first needed."""

    def __init__(self, checkpoint: Checkpoint, folder: RunFolder):
        self.checkpoint = checkpoint
        self.folder = folder

    @cached_property
    def model(self) -> Any:
        return load_model(self.checkpoint)

    def text(self, spec: str, *, n_ctx: int, n_chunks: int, seed: int) -> Text:
        """Chunks of each text file, kept as ``text.json``. DynqError where one does not fill a single chunk."""
        files = text_files(spec)
        if missing := [path for path in files if not path.is_file()]:
            raise DynqError(f"{missing[0]}: no such file (--text)")
        about = [self.checkpoint.fingerprint, n_ctx, n_chunks, seed, *((p.name, content_hash(p)) for p in files)]
        key = _hash(about)
        if (self.folder / "text.json").exists():
            kept = self.folder.read_json("text.json")
            if kept["key"] == key:
                return Text(kept["description"], kept["sha256"], np.array(kept["tokens"], np.int32), kept["domains"])
        tokens_of = load_tokenizer(self.checkpoint)
        names = dict(zip(files, _labels(files), strict=True)) if files else {"": "sampled"}
        parts = {
            name: load_text(
                str(file),
                tokens_of,
                n_ctx=n_ctx,
                n_chunks=n_chunks,
                seed=seed,
                model=None if files else self.model,
                split="evaluate",
            )
            for file, name in names.items()
        }
        tokens = np.concatenate([part.tokens for part in parts.values()])
        text = Text(
            "; ".join(part.description for part in parts.values()),
            hashlib.sha256(repr(tokens.shape).encode() + tokens.astype("<i4").tobytes()).hexdigest(),
            tokens,
            {name: len(part.tokens) for name, part in parts.items()},
        )
        self.folder.write_json(
            "text.json",
            {
                "key": key,
                "description": text.description,
                "sha256": text.sha256,
                "domains": text.domains,
                "tokens": tokens.tolist(),
            },
        )
        return text

    def reference(self, text: Text) -> kld.Reference:
        """The original's log-probabilities on the text; those of another text or model give way to them."""
        name = f"reference-{_hash([self.checkpoint.fingerprint, text.sha256])}"
        path = self.folder / name
        if path.with_suffix(".json").exists() and path.with_suffix(".u16").exists():
            return kld.open_reference(path)
        for old in self.folder.path.glob("reference-*"):
            old.unlink()  # vocabulary x tokens x 2 bytes: by far the largest files here
        made = kld.make_reference(self.model, text.tokens, path, desc="original")
        self.release()
        return made

    def release(self) -> None:
        """Give the model's memory back, before another one is loaded."""
        self.__dict__.pop("model", None)


def against_original(
    reference: str | Path,
    files: Sequence[Path],
    folder: RunFolder,
    *,
    text: str = "",
    n_ctx: int = 512,
    n_chunks: int = 16,
    seed: int = 0,
    with_mixes: bool = False,
    imatrix: Path | None = None,
    write_logits: Path | None = None,
    allow_requantize: bool = False,
    threads: int | None = None,
) -> dict[str, Any]:
    """Measure GGUF files against their original; returns what ``evaluation.json`` holds.

    reference: what `open_checkpoint` takes. text: as `dynq.text.load_text` takes it; each file is a domain of its own
    with n_chunks chunks of n_ctx tokens. with_mixes: llama.cpp's mixes around each file's size are encoded as well,
    with the importance matrix if there is one. write_logits: where to write the original's logits for llama-perplexity.

    A file that cannot be measured stands in "failed" with its reason. DynqError for what concerns all of them.
    """
    _check_context(n_ctx, n_chunks)
    paths = _existing(files)
    importance = read_imatrix(imatrix) if imatrix else None
    checkpoint = open_checkpoint(reference, allow_requantize)
    with folder.lock():
        original = Original(checkpoint, folder)
        read = original.text(text, n_ctx=n_ctx, n_chunks=n_chunks, seed=seed)
        if write_logits is not None:
            _write_logits(write_logits, original, read.tokens)
        entrants = [_entrant(label, path, checkpoint) for label, path in paths]
        scores = _Scores(folder, _hash([checkpoint.fingerprint, read.sha256, read.domains]), read.domains)
        entries = _measured(entrants, scores, lambda: original.reference(read))
        if with_mixes:
            source = content_hash(imatrix) if imatrix else ""
            entries += _mixes(entries, original, importance, source, scores, read, threads)
        about = {
            "model": {
                "name": checkpoint.name,
                "fingerprint": checkpoint.fingerprint,
                "n_weights": checkpoint.n_weights,
                "requantized": checkpoint.requantized,
            },
            "text": {"description": read.description, "sha256": read.sha256, "domains": read.domains}
            | {"chunks": len(read.tokens), "n_ctx": n_ctx},
            "mixes_with_importance": importance is not None if with_mixes else None,
        }
        return about | _ranked(entries)


def against_logits(logits: Path, files: Sequence[Path], folder: RunFolder) -> dict[str, Any]:
    """Measure GGUF files against a logits file of llama-perplexity: its tokens, its chunks, its 16 nats.

    Returns what ``evaluation.json`` holds; errors as in `against_original`.
    """
    paths = _existing(files)
    base = logits_file.read(logits)
    n_chunks, n_ctx = base.tokens.shape
    digest = content_hash(logits)
    with folder.lock():
        entrants = [_entrant(label, path, None) for label, path in paths]
        scores = _Scores(folder, _hash([digest]), {logits.name: n_chunks})
        entries = _measured(entrants, scores, lambda: base)
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
        }
        return about | _ranked(entries)


def _check_context(n_ctx: int, n_chunks: int) -> None:
    if n_ctx < LEAST_CONTEXT or n_chunks < 1:
        raise DynqError(f"{n_chunks} chunks of {n_ctx} tokens: at least 1 of {LEAST_CONTEXT} is needed")


def _existing(files: Sequence[Path]) -> list[tuple[str, Path]]:
    """(label, path) of every file, each once. DynqError for one that is not there: a slip, not a bad file."""
    paths = list({path.resolve(): path for path in files}.values())
    for path in paths:
        if not path.exists():
            raise DynqError(f"{path}: no such file")
        if path.is_dir():
            raise DynqError(f"{path}: a folder, not a GGUF file")
    return list(zip(_labels(paths), paths, strict=True))


def _labels(paths: Sequence[Path]) -> list[str]:
    """The names of files, with their folders where two have the same."""
    seen = Counter(path.name for path in paths)
    return [path.name if seen[path.name] == 1 else str(path) for path in paths]


def _hash(about: Any) -> str:
    return hashlib.sha256(json.dumps([dynq.__version__, about], sort_keys=True).encode()).hexdigest()[:16]


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
        tensor_bytes=sum(recipe.stored_bytes(fmt, shape) for fmt, shape in tensors.values()),
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
class _Scores:
    """Statistics, whole and by domain, kept in ``scores/`` under the hash of what they depend on."""

    folder: RunFolder
    base: str  # hash of the original and the text
    domains: dict[str, int]

    def name(self, about: Any) -> str:
        return f"scores/{_hash([self.base, about])}.json"

    def find(self, about: Any) -> dict[str, Any] | None:
        name = self.name(about)
        found: dict[str, Any] | None = self.folder.read_json(name) if (self.folder / name).exists() else None
        return found

    def make(self, about: Any, model: Any, base: kld.Base, label: str) -> dict[str, Any]:
        scores = kld.measure(model, base, desc=label)
        if not all(np.isfinite(column).all() for column in (scores.kld, scores.nll)):
            raise DynqError("its answers are not finite numbers somewhere in the text: the file is damaged")
        made = {"statistics": kld.statistics(scores), "domains": self._by_domain(scores)}
        self.folder.write_json(self.name(about), made)
        return made

    def _by_domain(self, scores: kld.TokenScores) -> dict[str, dict[str, float]]:
        scored, at, found = len(scores.kld) // sum(self.domains.values()), 0, {}
        for name, chunks in self.domains.items():
            own = slice(at, at + chunks * scored)
            columns = {column: getattr(scores, column)[own] for column in scores.__dataclass_fields__}
            found[name] = kld.statistics(kld.TokenScores(**columns))
            at = own.stop
        return found


def _measured(entrants: Iterable[Entrant], scores: _Scores, base: Any) -> list[dict[str, Any]]:
    """An entry for each file: scored, or with "error". base: gives the reference, called if it is needed."""
    entries = []
    for entrant in entrants:
        entry: dict[str, Any] = {"label": entrant.label, "kind": "file", "file_bytes": entrant.path.stat().st_size}
        entries.append(entry)
        if entrant.error:
            entry["error"] = entrant.error
            continue
        try:
            file = open_checkpoint(entrant.path, allow_requantize=True)
        except DynqError as error:
            entry["error"] = _one_line(error, entrant.path)
            continue
        digest = content_hash(entrant.path)
        about = ["file", digest]
        made = scores.find(about)
        if made is None:
            reference = base()
            if isinstance(reference, logits_file.LogitsFile):
                reference = reference.starting_with(tokenizer.added_bos(file.metadata))
            try:
                made = scores.make(about, load_model(file), reference, entrant.label)
            except Exception as error:  # a damaged file may raise anything from gguf, NumPy or torch
                entry["error"] = _one_line(error, entrant.path)
                continue
        size = entrant.tensor_bytes
        entry |= {"sha256": digest, "tensor_bytes": size, "bpw": 8 * size / entrant.n_weights, **made}
    return entries


def _mixes(
    entries: Sequence[dict[str, Any]],
    original: Original,
    importance: Importance | None,
    source: str,
    scores: _Scores,
    text: Text,
    threads: int | None,
) -> list[dict[str, Any]]:
    """Entries of the mixes around the measured files, whose own entries get "mix_kld" and "kld_ratio"."""
    checkpoint, has_importance = original.checkpoint, importance is not None
    tensors, metadata = checkpoint.tensors, checkpoint.metadata
    measured = [entry for entry in entries if "statistics" in entry]
    around = [mixes.neighbours(entry["tensor_bytes"], tensors, metadata, has_importance) for entry in measured]
    made: dict[str, dict[str, Any]] = {}
    for label in dict.fromkeys(name for pair in around for name in pair[:2]):
        chosen = mixes.mix(label, tensors, metadata, has_importance)
        about = ["mix", chosen, source]
        found = scores.find(about)
        if found is None:
            reference = original.reference(text)
            weights = export.simulate(checkpoint, chosen, importance, threads=threads)
            found = scores.make(about, load_model(checkpoint, weights), reference, label)
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
    parts.append(f"{folder.path}: evaluation.json, report.html, frontier.svg")
    return "\n\n".join(parts)
