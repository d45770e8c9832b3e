"""Many runs from one file: models x targets x seeds, a run folder for each model and seed, one page about all.

A run that fails stops no other. The same command again goes on: a run whose model, texts and parameters are the same
is skipped as a whole, so what it made besides its results (the GGUF files) may be moved away.
"""

import contextlib
import itertools
import json
import sys
from collections import Counter
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple, TextIO

import dynq
from dynq import reckon
from dynq import run as runner
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.figures_sweep import sweep_rows
from dynq.files import parse_yaml, read_bytes
from dynq.folder import RunFolder, content_hash, file_safe
from dynq.tables import text_table
from dynq.text import text_files

_LONGEST = 1 << 20  # bytes of a sweep file


class Sweep(NamedTuple):
    """What a sweep file asks for. parameters: of the notebooks, for all runs; "seed" is none of them."""

    models: list[str]
    targets: list[str]
    seeds: list[int]
    parameters: dict[str, Any]

    def runs(self) -> Iterator[tuple[str, int, str]]:
        """Model, seed and the name of the run's folder. DynqError where two would have one, or one has none."""
        names = [file_safe(Path(model).name) for model in self.models]
        if nameless := [model for model, name in zip(self.models, names, strict=True) if not name.strip(".")]:
            raise DynqError(f"the model {nameless[0]!r} gives its runs no name; write the directory's own name")
        if twice := [name for name, n in Counter(map(str.lower, names)).items() if n > 1]:
            raise DynqError(f"two models are called {twice[0]}; rename a directory, or sweep them one by one")
        for (model, name), seed in itertools.product(zip(self.models, names, strict=True), self.seeds):
            yield model, seed, f"{name}-seed{seed}" if len(self.seeds) > 1 else name


def read_sweep(path: Path) -> Sweep:
    """A sweep file: YAML with models, targets and, if wanted, seeds and parameters. DynqError names what is wrong."""
    if not path.exists():
        raise DynqError(f"{path}: no such file")
    try:
        given = parse_yaml(read_bytes(path, _LONGEST).decode("utf-8"), f"{path}: it")
    except UnicodeDecodeError as error:
        raise DynqError(f"{path}: not a text ({error})") from None
    if not isinstance(given, dict):
        raise DynqError(f"{path}: needs models: [...] and targets: [...]")
    if unknown := [key for key in given if key not in Sweep._fields]:
        raise DynqError(f"{path}: {unknown[0]!r} is unknown; there are {', '.join(Sweep._fields)}")
    for name, kind, word in (("models", str, "names"), ("targets", str, "sizes"), ("seeds", int, "whole numbers")):
        values = given.setdefault(name, [0] if name == "seeds" else [])
        right = isinstance(values, list) and values and all(type(value) is kind for value in values)
        if not right or len(set(values)) < len(values):
            raise DynqError(f"{path}: {name} must be a list of {word}, each once, not {values!r}")
    parameters = given.get("parameters") or {}
    if not isinstance(parameters, dict):
        raise DynqError(f"{path}: parameters must be a mapping of names to values, not {parameters!r}")
    if "seed" in parameters:
        raise DynqError(f"{path}: write seeds: [{parameters['seed']}], not a parameter seed")
    return Sweep(given["models"], given["targets"], given["seeds"], parameters)


def reckoned(sweep: Sweep, folder: RunFolder) -> reckon.Reckoning:
    """What the runs need that are not done, a line each. Those whose model or parameters are refused are left out."""
    found: list[reckon.Reckoning] = []
    lines = []
    for model, seed, name in sweep.runs():
        own, values = RunFolder(folder / name, force=folder.force), _values(sweep, seed)
        try:
            tasks = runner.plan(model, sweep.targets, own, values)
            found.append(reckon.of_run(runner.opened(tasks), {t.step: t.parameters for t in tasks}, own))
        except (DynqError, OSError):
            continue  # named when its turn comes
        if found[-1].needs:
            lines.append(reckon.whole(name, found[-1]))
    machine = found[0].machine if found else reckon.Machine.here()
    return reckon.Reckoning(lines, machine, reckon.free_disk(folder.path), {})


def run_sweep(sweep: Sweep, folder: RunFolder, *, stream: TextIO | None = None) -> dict[str, Any]:
    """Do all runs, each as `dynq run` does it, and give what ``sweep.json`` holds.

    DynqError, before any work, where the file asks for what no model could have. A mistake in one run stands in
    "failed", and so does a target that its model cannot reach; the others go on.
    """
    stream = stream or sys.stderr
    runs = list(sweep.runs())
    # a path where nothing is: what is refused here is refused for every model
    runner.plan(sweep.models[0], sweep.targets, RunFolder(folder / "-"), _values(sweep, sweep.seeds[0]))
    result: dict[str, Any] = {"dynq": dynq.__version__, "sweep": sweep._asdict(), "runs": [], "failed": []}
    for i, (model, seed, name) in enumerate(runs, 1):
        stream.write(f"{name} ({i} of {len(runs)})\n")
        stream.flush()
        about = {"model": model, "seed": seed, "folder": name}

        def failed(targets: list[str], error: Exception, about: Mapping[str, Any] = about) -> None:
            said = " ".join(str(error).split())
            stream.write(f"  failed: {said}\n")
            kind = "defect" if isinstance(error, runner.RunFailed) else "mistake"
            result["failed"] += [{**about, "target": target, "error": said, "kind": kind} for target in targets]

        within = []
        for target in sweep.targets:
            try:
                own = RunFolder(folder / name, force=folder.force)
                runner.check_sizes(runner.plan(model, [target], own, _values(sweep, seed)))
                within.append(target)
            except (DynqError, OSError) as error:
                failed([target], error)
        if not within:
            continue
        try:
            evaluation = _run(sweep, model, seed, within, folder, name, stream)
            result["runs"].append({**about, "files": _measured(evaluation)})
        except (DynqError, OSError, runner.RunFailed) as error:
            failed(within, error)
    return result


def _values(sweep: Sweep, seed: int) -> dict[str, Any]:
    return sweep.parameters | {"seed": seed}


def _run(
    sweep: Sweep, model: str, seed: int, targets: list[str], folder: RunFolder, name: str, stream: TextIO
) -> dict[str, Any]:
    """One run, or what is left of it, as a step of the sweep's own folder; returns its evaluation."""
    values = _values(sweep, seed)
    checkpoint = open_checkpoint(model, bool(values.get("allow_requantize", False)))
    inputs = {"model": checkpoint.fingerprint, "asked": json.dumps([model, targets, values], sort_keys=True)}
    specs = [values.get(key) or "" for key in ("text", "eval_text", "imatrix")]
    for path in [*itertools.chain(*map(text_files, specs)), *map(Path, values.get("files", ()))]:
        inputs[str(path)] = content_hash(path)
    outputs = [f"{name}/evaluation.json", f"{name}/report.html"]
    # what a step says is for who watches; the standard output is for the result
    step = folder.step(f"run.{name}", parameters={}, inputs=inputs, outputs=outputs)
    with contextlib.redirect_stdout(stream), step as todo:
        if todo:
            own = RunFolder(folder / name, force=folder.force)
            runner.execute(runner.plan(model, targets, own, values), own, stream=stream)
    evaluation: dict[str, Any] = folder.read_json(f"{name}/evaluation.json")
    return evaluation


def _measured(evaluation: Mapping[str, Any]) -> list[dict[str, Any]]:
    """What the summary needs of a run's evaluation, an entry for each target."""
    by_label = {entry["label"]: entry for entry in evaluation["files"]}
    found = []
    for target in evaluation["targets"]:
        own = by_label[target["label"]]
        found.append(
            {
                "target": target["target"],
                "file": target["file"],
                "file_bytes": own["file_bytes"],
                "tensor_bytes": own["tensor_bytes"],
                "bpw": own["bpw"],
                "kld": own["statistics"]["Mean KLD"],
                "kld_error": own["statistics"]["Mean KLD ±"],
                "same_top": own["statistics"]["Same top p"],
                "mix_kld": target["mix_kld"],
                "kld_ratio": target["kld_ratio"],
                "inside": target["inside"],
            }
        )
    return found


def summary(result: Mapping[str, Any], folder: RunFolder) -> str:
    """What a sweep ends by saying: the table, and every run that failed."""
    made = sweep_rows(result)
    lines = [text_table(made), ""] if made else []
    lines += [f"failed: {f['folder']}, {f['target']}: {f['error']}" for f in result["failed"]]
    return "\n".join([*lines, f"summary: {folder / 'sweep.html'}"])
