"""A dynamic file beside what it must beat: llama.cpp's mixes around its size, and one format for everything.

All of them are encoded with the same importance matrix and scored on the same text. The two mixes around a file are of
mixes.BASELINES; a target such as like:Q2_K brings in the mix it names as well, which the ratio takes no notice of. A
mix is never written to disk: its tensors are encoded and decoded in memory, which gives the weights that its file
would hold.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Protocol

import dynq
from dynq import export, formats, mixes, shards
from dynq.allocate import parse_target
from dynq.checkpoint import Checkpoint, TensorInfo, open_checkpoint
from dynq.encoding import encode
from dynq.evaluate import kld, precision
from dynq.folder import RunFolder, content_hash, file_safe
from dynq.imatrix import Importance
from dynq.recipe import Recipe
from dynq.torch_model import device_of, load_model

if TYPE_CHECKING:
    from distributed import Client

LOSSLESS = 1e-8  # nats: what float32 can tell from no divergence at all
UNIFORM = ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K", "Q8_0")


@dataclass(frozen=True)
class Contender:
    """Something to score.

    kind: "dynamic" (then `file` names a GGUF of the run folder), "mix" (one of mixes.BASELINES), "other mix" or
    "uniform".
    """

    label: str
    kind: str
    formats: dict[str, str]
    file: str = ""
    predicted_kld: float | None = None


def uniform(fmt: str, tensors: Mapping[str, TensorInfo]) -> dict[str, str]:
    """Every quantizable tensor in one format, or in llama.cpp's fallback where its rows do not divide; the rest F32."""
    return {name: formats.usable(fmt, info.row) if info.quantizable else info.kept for name, info in tensors.items()}


def stored_bytes(recipe: Mapping[str, str], tensors: Mapping[str, TensorInfo]) -> int:
    """Bytes of all tensor data, without padding."""
    return sum(formats.tensor_bytes(fmt, tensors[name].shape) for name, fmt in recipe.items())


def uniform_below(tensor_bytes: int, tensors: Mapping[str, TensorInfo]) -> str:
    """The largest of UNIFORM with at most `tensor_bytes`; the smallest of all where none is that small."""
    sizes = {fmt: stored_bytes(uniform(fmt, tensors), tensors) for fmt in UNIFORM}
    fitting = [fmt for fmt in UNIFORM if sizes[fmt] <= tensor_bytes]
    return max(fitting, key=sizes.__getitem__) if fitting else min(UNIFORM, key=sizes.__getitem__)


class Meter(Protocol):
    """What runs the original and the contenders."""

    about: list[Any]
    """What its scores depend on beside the model, the text and the contender."""

    def reference(self, path: Path) -> Any:
        """What contenders are measured against, kept in files that begin with `path` until all are scored."""

    def score(self, contender: Contender, file: Path | None, reference: Any) -> dict[str, Any]:
        """ "statistics" of a contender: of the file where there is one, else of what its formats would make."""


class Torch:
    """Decodes a file, or encodes and decodes in memory, and runs it in torch. tokens: int32 ``[n_chunks, n_ctx]``.

    With a cluster its workers run the original and the contenders, and model is not looked at; a mix becomes a file
    for them to read, until it is scored.
    """

    def __init__(
        self,
        checkpoint: Checkpoint,
        model: Any,
        importance: Importance | None,
        tokens: Any,
        threads: int | None = None,
        cluster: Client | None = None,
    ):
        self.about: list[Any] = [precision.SHARE]
        self._checkpoint, self._model, self._tokens = checkpoint, model, tokens
        self._importance, self._threads, self._cluster = importance, threads, cluster
        self._beside = Path()

    def reference(self, path: Path) -> kld.Reference:
        self._beside = path
        if self._cluster:
            return precision.reference_by_workers(self._cluster, self._checkpoint, self._tokens, path)
        return kld.make_reference(self._model, self._tokens, path, desc="original")

    def score(self, contender: Contender, file: Path | None, reference: Any) -> dict[str, Any]:
        if self._cluster:
            scores, arithmetic = self._by_workers(self._cluster, contender, file, reference)
        else:
            device = device_of(self._model)
            if file:
                quantized = load_model(open_checkpoint(file, allow_requantize=True), device=device)
            else:
                read = export.simulate(self._checkpoint, contender.formats, self._importance, threads=self._threads)
                quantized = load_model(self._checkpoint, read=read, device=device)
            scores, arithmetic = precision.measure(quantized, reference, desc=contender.label)
        return {"statistics": kld.statistics(scores)} | asdict(arithmetic)

    def _by_workers(
        self, cluster: Client, contender: Contender, file: Path | None, reference: kld.Reference
    ) -> tuple[kld.TokenScores, precision.Arithmetic]:
        if file:
            made = open_checkpoint(file, allow_requantize=True)
            return precision.measure_by_workers(cluster, made, made, reference, desc=contender.label)
        mix = self._beside.with_name(f"{file_safe(contender.label)}.gguf")
        return mix_by_workers(
            cluster, self._checkpoint, contender.formats, self._importance, reference, mix, contender.label
        )


def mix_by_workers(
    cluster: Client,
    checkpoint: Checkpoint,
    chosen: dict[str, str],
    importance: Importance | None,
    reference: kld.Base,
    path: Path,
    label: str,
) -> tuple[kld.TokenScores, precision.Arithmetic]:
    """`precision.measure` of the checkpoint with tensors in the chosen formats. They are encoded once, into a file at
    `path` that all workers read and that goes when they have."""
    try:
        source = partial(encode, checkpoint, importance=importance, desc=path.name, cluster=cluster)
        export.export(checkpoint, Recipe(chosen, label, 0, 0.0, None), importance, path, source=source)
        weights = open_checkpoint(path, allow_requantize=True)
        return precision.measure_by_workers(cluster, checkpoint, weights, reference, desc=label)
    finally:
        path.unlink(missing_ok=True)


class Unmeasured:
    """Runs nothing: where neither torch nor llama.cpp can. Contenders have sizes and no statistics."""

    def __init__(self) -> None:
        self.about: list[Any] = ["not measured"]

    def reference(self, path: Path) -> None:
        return None

    def score(self, contender: Contender, file: Path | None, reference: Any) -> dict[str, Any]:
        return {"statistics": None}


def compare(
    checkpoint: Checkpoint,
    meter: Meter,
    folder: RunFolder,
    targets: Iterable[str],
    text: Mapping[str, Any],
    *,
    has_importance: bool = True,
) -> dict[str, Any]:
    """Score the files of all targets, their neighbouring mixes and the uniform ones; what ``evaluation.json`` holds.

    text: description, hash, chunks and n_ctx of the evaluation text. has_importance: whether there is an importance
    matrix, on which the mixes depend. Each score is kept in ``scores/`` under the hash of all that it depends on, so
    that an interrupted evaluation, or one with a target more, does not score anything twice.
    """
    recipes = {target: Recipe.load(folder / f"{file_safe(target)}.recipe.json") for target in targets}
    tensors, metadata = checkpoint.tensors, checkpoint.metadata
    contenders: dict[str, Contender] = {}
    verdicts: list[dict[str, Any]] = []
    for target, recipe in recipes.items():
        exported = folder.read_json(f"{file_safe(target)}.export.json")
        around = mixes.neighbours(recipe.tensor_bytes, tensors, metadata, has_importance)
        same = uniform_below(recipe.tensor_bytes, tensors)
        file = exported["files"][0]  # of the shards, where it is split
        own = Contender(f"dynq {target}", "dynamic", recipe.formats, file, exported["predicted_kld"])
        beside = [Contender(name, "mix", mixes.mix(name, tensors, metadata, has_importance)) for name in around[:2]]
        like = parse_target(recipe.target).like  # an edited recipe's file has a name that is no target
        if like and like not in around[:2]:
            kind = "mix" if like in mixes.BASELINES else "other mix"
            beside.append(Contender(like, kind, mixes.mix(like, tensors, metadata, has_importance)))
        beside.append(Contender(f"uniform {same}", "uniform", uniform(same, tensors)))
        contenders |= {c.label: c for c in [own, *beside]}
        verdicts.append(
            {
                "target": target,
                "label": own.label,
                "file": file,
                "below": around.below,
                "above": around.above,
                "inside": around.inside,
                "like": like or None,
                "uniform": beside[-1].label,
            }
        )

    scored = _score(checkpoint, meter, folder, contenders, text)
    for verdict in verdicts:
        verdict |= against_mixes(*(scored[verdict[key]] for key in ("label", "below", "above")))
        verdict["generated"] = folder.read_json(f"{file_safe(verdict['target'])}.export.json")["generated"]
    return {
        "model": {
            "name": checkpoint.name,
            "fingerprint": checkpoint.fingerprint,
            "n_weights": checkpoint.n_weights,
            "requantized": checkpoint.requantized,
            "notes": checkpoint.notes,
        },
        "text": dict(text),
        "mixes_with_importance": has_importance,
        "files": sorted(scored.values(), key=lambda entry: (entry["tensor_bytes"], entry["label"])),
        "targets": verdicts,
    }


def against_mixes(
    entry: Mapping[str, Any], below: Mapping[str, Any], above: Mapping[str, Any]
) -> dict[str, float | None]:
    """ "mix_kld", what the mixes around an entry reach at its bytes, and "kld_ratio" of its own KLD to that.

    None each where nothing was measured.
    """
    if entry["statistics"] is None:
        return {"mix_kld": None, "kld_ratio": None}
    mix_kld = mixes.interpolate_kld(entry["tensor_bytes"], _point(below), _point(above))
    return {"mix_kld": mix_kld, "kld_ratio": entry["statistics"]["Mean KLD"] / mix_kld}


def _point(entry: Mapping[str, Any]) -> tuple[float, float]:
    # a mix that loses nothing (F16 of 16-bit weights) measures rounding noise of either sign
    return entry["tensor_bytes"], max(entry["statistics"]["Mean KLD"], LOSSLESS)


def _score(
    checkpoint: Checkpoint,
    meter: Meter,
    folder: RunFolder,
    contenders: Mapping[str, Contender],
    text: Mapping[str, Any],
) -> dict[str, dict[str, Any]]:
    """Label -> entry of evaluation.json."""
    imatrix = folder / "imatrix.gguf"
    paths: dict[str, Path] = {}
    for label, contender in contenders.items():
        files = shards.of(folder / contender.file) if contender.file else [imatrix] if imatrix.exists() else []
        source = ",".join(map(content_hash, files))
        about = [dynq.__version__, checkpoint.fingerprint, text["sha256"], contender.formats, source, *meter.about]
        key = hashlib.sha256(json.dumps(about, sort_keys=True).encode()).hexdigest()[:16]
        paths[label] = Path("scores") / f"{file_safe(label)}.{key}.json"

    if missing := [label for label, path in paths.items() if not (folder / str(path)).exists()]:
        (folder / "scores").mkdir(exist_ok=True)
        reference = meter.reference(folder / "scores" / "reference")
        for label in missing:
            contender = contenders[label]
            file = folder / contender.file if contender.file else None
            folder.write_json(str(paths[label]), meter.score(contender, file, reference))
        for kept in ("reference.u16", "reference.json"):  # vocabulary x tokens x 2 bytes: the largest file of the run
            (folder / "scores" / kept).unlink(missing_ok=True)

    entries: dict[str, dict[str, Any]] = {}
    for label, contender in contenders.items():
        size = stored_bytes(contender.formats, checkpoint.tensors)
        entries[label] = {
            "label": label,
            "kind": contender.kind,
            "tensor_bytes": size,
            "file_bytes": shards.total_bytes(folder / contender.file) if contender.file else None,
            "bpw": 8 * size / checkpoint.n_weights,
            "predicted_kld": contender.predicted_kld,
        } | folder.read_json(str(paths[label]))
    return entries
