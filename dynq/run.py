"""The strict papermill runner: notebooks 03 to 07 in order, inside one run folder.

papermill itself only warns of an unknown parameter and takes any type; here both are errors, found by
``inspect_notebook`` before any work starts. The kernel is this very interpreter, whatever kernels are installed.
"""

import ast
import errno
import json
import os
import shutil
import sys
import time
from collections.abc import Iterable, Mapping
from contextlib import nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, Any, NamedTuple, TextIO

from dynq import cluster
from dynq.allocate import allocate, candidates, parse_bytes, parse_target
from dynq.errors import DynqError
from dynq.folder import LOCKED, RunFolder, file_safe
from dynq.imatrix import read_imatrix
from dynq.progress import LineStream
from dynq.schedule import PASSES

if TYPE_CHECKING:
    from dynq.checkpoint import Checkpoint

NOTEBOOKS = ("03_calibrate", "04_sensitivity", "05_allocate", "06_export", "07_evaluate")
PER_TARGET = ("05_allocate", "06_export")
QUICK: dict[str, Any] = {"n_ctx": 256, "n_chunks": 16, "n_swaps": 0, "encoding": "search", "tune": 0, "chat": []}
QUICK |= {"eval_n_ctx": 256, "read": False}
"""Parameters of a first look; what they cost in quality and spare in time: LOG, "Quality"."""
THOROUGH: dict[str, Any] = {"n_chunks": 2560, "tune": -2}
"""Parameters that make the best file, for a graphics card: four times the text, read twice (LOG, "Quality")."""
_FULL = "{}: the disk is full; make room and run the same command again"
_QUIET = ("--HistoryManager.enabled=False", "--log-level=CRITICAL")
_LEAST = {"seed": 0, "threads": 0, "keep": 1, "n_ctx": 2, "n_chunks": 1, "n_measured": 1, "top_up": 0}
_LEAST |= {"n_swaps": 0, "swap_chunks": 1, "n_tokens": 1, "tune": -PASSES, "eval_n_ctx": 8, "eval_chunks": 1}
_TYPES: dict[str, tuple[type, ...]] = {"int": (int,), "float": (float, int), "bool": (bool,), "str": (str,)}
_TYPES |= {"list[str]": (list,), "dict[str, str]": (dict,)}


class RunFailed(Exception):
    """A notebook failed, and not by a mistake of the user."""


class Parameter(NamedTuple):
    """A parameter of a notebook: its annotation ("int") and its default."""

    kind: str
    default: Any


class Task(NamedTuple):
    """One notebook to run: its name, the step of the run folder that it makes, and all its parameters."""

    notebook: str
    step: str
    parameters: dict[str, Any]

    @property
    def output(self) -> str:
        """Name of the executed notebook: with several targets one file each."""
        target = self.parameters.get("target")
        return f"{self.notebook}.{file_safe(target)}.ipynb" if target else f"{self.notebook}.ipynb"


def notebook_folder() -> Path:
    """Where the notebooks are: in the package when installed from a wheel, else beside it in the repository."""
    package = Path(__file__).parent
    for folder in (package / "notebooks", package.parent / "notebooks"):
        if (folder / f"{NOTEBOOKS[0]}.ipynb").exists():
            return folder
    raise DynqError(f"{package}: the notebooks are missing; install dynq again")


def inspect(notebook: str) -> dict[str, Parameter]:
    """The parameters of a notebook by name, from its annotated parameters cell."""
    import papermill

    found = papermill.inspect_notebook(str(notebook_folder() / f"{notebook}.ipynb"))
    return {name: Parameter(p["inferred_type_name"], ast.literal_eval(p["default"])) for name, p in found.items()}


def parse_value(name: str, text: str, kind: str) -> Any:
    """The value of ``-p NAME=TEXT`` for a parameter annotated `kind`; DynqError where the text is not of that type.

    Lists and dictionaries are written as in Python or JSON.
    """
    if kind == "str":
        return text
    if kind == "bool" and text.lower() in ("true", "false", "yes", "no", "1", "0"):
        return text.lower() in ("true", "yes", "1")
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError):
        value = None
    return check_value(name, value, kind, text)


def check_value(name: str, value: Any, kind: str, shown: Any = None) -> Any:
    """`value`, or DynqError where it is not of the annotated type. shown: what the user wrote, for the message."""
    wanted = _TYPES.get(kind, (object,))
    inner: Iterable[Any] = value if kind == "list[str]" and isinstance(value, list) else ()
    if kind == "dict[str, str]" and isinstance(value, dict):
        inner = [*value, *value.values()]
    wrong = not isinstance(value, wanted) or (isinstance(value, bool) and kind != "bool")
    if wrong or not all(isinstance(item, str) for item in inner):
        raise DynqError(f"parameter {name} must be of type {kind}, not {value if shown is None else shown!r}")
    return value


def plan(
    model: str,
    targets: Iterable[str],
    folder: RunFolder,
    values: Mapping[str, Any] | None = None,
    texts: Mapping[str, str] | None = None,
    *,
    as_made: bool = False,
) -> list[Task]:
    """Every notebook of a run with its parameters, all checked; nothing is run and nothing written.

    targets: sizes, or names of recipes in the folder that were edited by hand: these are exported and evaluated.
    values: parameter name -> value; texts: the same as the command line gives them (``-p``), still to be parsed. A
    parameter goes to every notebook that has one of that name. as_made: what is not given is as the folder was made,
    and the default only where it was not. DynqError: a target that is no size or stands there twice, an unknown or
    ill-typed parameter, a parameter other than the folder was made with.
    """
    targets = [target.strip() for target in targets]
    for target in targets:
        if not is_edited(target, folder):
            parse_target(target)
    if not targets:
        raise DynqError('no target; give at least one, such as --target 3.5bpw, --target 8GB or --target "like:Q4_K_M"')
    names = [file_safe(target).lower() for target in targets]
    for name, target in zip(names, targets, strict=True):
        if names.count(name) > 1:
            raise DynqError(f"target {target} stands there twice")
    known = {notebook: inspect(notebook) for notebook in NOTEBOOKS}
    kinds = {name: parameter.kind for found in known.values() for name, parameter in found.items()}
    given = {**(values or {}), **(texts or {})}
    for name in given:
        if name not in kinds:
            raise DynqError(f"no notebook has a parameter {name!r}; there are {', '.join(sorted(kinds))}")
    if own := sorted({"run", "model", "target", "targets", "force"} & given.keys()):
        raise DynqError(f"parameter {own[0]!r} is set by the command itself, not with -p")
    given = {name: check_value(name, value, kinds[name]) for name, value in (values or {}).items()}
    given |= {name: parse_value(name, text, kinds[name]) for name, text in (texts or {}).items()}
    for name, least in _LEAST.items():
        if given.get(name, least) < least:
            raise DynqError(f"parameter {name} must be at least {least}, not {given[name]}")
    given |= {"run": str(folder.path), "model": model, "targets": targets, "force": folder.force}

    made = folder.state["steps"] if as_made else {}
    tasks = []
    for notebook in NOTEBOOKS:
        step = notebook.partition("_")[2]
        chosen = {step: given}
        if notebook in PER_TARGET:
            chosen = {f"{step}.{file_safe(target)}": given | {"target": target} for target in targets}
        for name, values in chosen.items():
            if step == "allocate" and is_edited(values["target"], folder):
                continue  # its recipe is there
            values = {**made.get(name, {}).get("parameters", {}), **values}
            filled = {key: values.get(key, parameter.default) for key, parameter in known[notebook].items()}
            tasks.append(Task(notebook, name, filled))
    for task in tasks:
        folder.check(task.step, task.parameters)
    return tasks


def is_edited(target: str, folder: RunFolder) -> bool:
    """Whether a target is no size but the name of a recipe in the folder, such as "3.5bpw-edited"."""
    try:
        parse_target(target)
    except DynqError:
        return (folder / f"{file_safe(target)}.recipe.json").is_file()
    return False


def opened(tasks: Iterable[Task]) -> "Checkpoint":
    """The model of a plan."""
    from dynq.checkpoint import open_checkpoint

    own = next(task.parameters for task in tasks if task.step == "calibrate")
    return open_checkpoint(own["model"], own["allow_requantize"])


def check_sizes(tasks: Iterable[Task], checkpoint: "Checkpoint | None" = None) -> list[str]:
    """DynqError, before any work, where the model or a file is missing, a target too small or a pin fits no tensor.

    The targets are allocated once with a table in which nothing costs anything: only the shapes count. Returns what the
    user should know of how the model is treated. checkpoint: the model, where it is `opened` already.
    """
    from pyarrow import Table

    from dynq import codec, formats
    from dynq.export import header_bytes
    from dynq.text import check_held_out

    tasks = list(tasks)
    steps = {task.step: task.parameters for task in tasks}
    if devices := {own["device"] for own in steps.values()} - {"cpu"}:
        from dynq.devices import check_device  # imports torch

        for device in sorted(devices):
            check_device(device)
    codec.check_level(steps["sensitivity"]["level"])
    for step, own in steps.items():
        if step.startswith("export."):
            codec.check_level(own["encoding"], more=("feedback",))
            parse_bytes(own["max_shard_size"])
    check_held_out(steps["calibrate"]["text"], steps["evaluate"]["eval_text"])
    for file in steps["evaluate"]["files"]:
        if not Path(file).expanduser().is_file():
            raise DynqError(f"{file}: no such file (files)")
    checkpoint = checkpoint or opened(tasks)
    # what is only looked up has no inputs, hence no importance
    bare = {"per_layer_token_embd.weight", *(["token_embd.weight"] if "output.weight" in checkpoint.tensors else [])}
    if not checkpoint.architecture.known:
        bare |= _without_importance(checkpoint, steps)
    names = candidates(steps["sensitivity"]["formats"], steps["sensitivity"]["profile"])
    rows = [
        {"tensor": name, "format": formats.usable(candidate, info.row), "predicted_kld": 0.0}
        for name, info in checkpoint.tensors.items()
        if info.quantizable
        for candidate in names
        if not (formats.get(candidate).needs_importance and name in bare)
    ]
    for step, own in steps.items():
        if step.startswith("allocate."):
            if own["search"]:
                from dynq.search import check_chunks, parse_seconds  # imports torch

                parse_seconds(own["search"])
                check_chunks(steps["calibrate"]["n_chunks"])
            allocate(
                Table.from_pylist(rows),
                checkpoint.tensors,
                own["target"],
                metadata=checkpoint.metadata,
                header_bytes=header_bytes(checkpoint),
                pins=own["pins"],
                profile=own["profile"],
                has_importance=not bare - {"token_embd.weight"},
            )
    notes = list(checkpoint.notes)
    if not checkpoint.architecture.known and not steps["calibrate"]["imatrix"]:
        notes.append(
            "no importance matrix: all inputs of a tensor count alike, and formats that need one are left out; "
            "llama-imatrix makes one, --imatrix takes it"
        )
    return notes


def _without_importance(checkpoint: "Checkpoint", steps: Mapping[str, Mapping[str, Any]]) -> set[str]:
    """The tensors without importance of a model that dynq cannot run. DynqError where it is asked to run it."""
    where = f"{checkpoint.path}: dynq cannot run the architecture {checkpoint.architecture.name!r}"
    if steps["calibrate"]["text"]:
        raise DynqError(f"{where}, so there is nothing to calibrate; leave out --text, and give an --imatrix")
    if any(own["search"] for step, own in steps.items() if step.startswith("allocate.")):
        raise DynqError(f"{where}, which --search would have to; leave it out")
    file = steps["calibrate"]["imatrix"]
    if not file:
        return {name for name, info in checkpoint.tensors.items() if info.quantizable}
    return set(read_imatrix(file).check_model(checkpoint.tensors, file))


def execute(
    tasks: Iterable[Task], folder: RunFolder, *, stream: TextIO | None = None, workers: int = 0
) -> dict[str, Any]:
    """Run the notebooks of a plan into ``notebooks/`` of the run folder; returns what evaluation.json holds.

    stream: where headings and progress bars go, by default the standard error; workers: processes of a cluster that is
    started on this machine and shares the work. DynqError raised in a notebook comes out as itself.
    """
    execute_each(tasks, folder, stream=stream, workers=workers)
    result: dict[str, Any] = folder.read_json("evaluation.json")
    return result


def execute_each(tasks: Iterable[Task], folder: RunFolder, *, stream: TextIO | None = None, workers: int = 0) -> None:
    """Run any notebooks into ``notebooks/`` of the run folder, as `execute` does."""
    stream = stream or sys.stderr
    bars = stream if stream.isatty() else LineStream(stream)
    with folder.lock(), cluster.started(workers) if workers else nullcontext() as address:
        for task in tasks:
            if address and "scheduler" in task.parameters:
                task = task._replace(parameters=task.parameters | {"scheduler": address})
            started = time.monotonic()
            stream.write(f"{task.output.removesuffix('.ipynb')}\n")
            stream.flush()
            _execute(task, folder, bars)
            stream.write(f"  {time.monotonic() - started:.0f} s\n")


def _execute(task: Task, folder: RunFolder, bars: Any) -> None:
    import papermill
    from nbclient.exceptions import DeadKernelError

    executed = folder / "notebooks" / task.output
    executed.parent.mkdir(parents=True, exist_ok=True)
    beside = executed.with_suffix(".partial.ipynb")  # papermill writes while it runs, and wants this ending
    try:
        papermill.execute_notebook(
            str(notebook_folder() / f"{task.notebook}.ipynb"),
            str(beside),
            task.parameters,
            progress_bar=False,
            stderr_file=bars,
            kernel_manager_class=_kernel_manager(folder),
            coalesce_streams=True,
            shutdown_kernel="immediate",
        )
    except OSError as error:  # of the executed notebook itself
        if error.errno != errno.ENOSPC:
            raise
        raise DynqError(_FULL.format(folder.path)) from None
    except papermill.PapermillExecutionError as error:
        beside.replace(executed)
        if error.ename == "DynqError":
            raise DynqError(error.evalue) from None
        if "No space left on device" in error.evalue:
            raise DynqError(_FULL.format(folder.path)) from None
        if error.ename == "MemoryError":
            raise DynqError(
                f"{task.output}: out of memory; take fewer threads, a smaller n_ctx, or more memory"
            ) from None
        raise RunFailed(
            f"{task.output}: {error.ename}: {_first_line(error.evalue)} (a defect; the trace is in {executed})"
        ) from None
    except DeadKernelError:
        raise RunFailed(
            f"{task.output}: its process was killed, by the system if memory ran out; run the same command to go on"
        ) from None
    beside.replace(executed)


def _kernel_manager(folder: RunFolder) -> type:
    """A kernel manager class whose kernel is this interpreter, in batch display, inside the folder's lock."""
    from jupyter_client.kernelspec import KernelSpec
    from jupyter_client.manager import AsyncKernelManager

    environment = {
        "DYNQ_DISPLAY": "static",
        "COLUMNS": str(shutil.get_terminal_size((100, 24)).columns),
        # threads that wait by spinning slow a busy machine down many times over; GNU's heed GOMP_SPINCOUNT (`dynq`)
        "OMP_WAIT_POLICY": os.environ.get("OMP_WAIT_POLICY", "PASSIVE"),
        # tqdm.auto, which transformers imports, misses ipywidgets aloud; dynq's own bars need none
        "PYTHONWARNINGS": ",".join(filter(None, ["ignore:IProgress not found", os.environ.get("PYTHONWARNINGS")])),
        LOCKED: str(folder.path),
    }
    spec = KernelSpec(
        argv=[sys.executable, "-m", "ipykernel_launcher", "-f", "{connection_file}", *_QUIET],
        display_name="dynq",
        language="python",
        env=environment,
    )

    class ThisInterpreter(AsyncKernelManager):
        @property
        def kernel_spec(self) -> KernelSpec:
            return spec

    return ThisInterpreter


def summary(evaluation: Mapping[str, Any], folder: RunFolder) -> str:
    """What a run ends by saying, from evaluation.json: one paragraph for each target."""
    by_label = {entry["label"]: entry for entry in evaluation["files"]}
    lines = []
    for target in evaluation["targets"]:
        own = by_label[target["label"]]
        lines += [
            "",
            f"{folder / target['file']}",
            f"  size         {own['file_bytes'] / 2**30:.3f} GiB ({own['file_bytes']:,} bytes), {own['bpw']:.3f} bpw",
        ]
        if own["statistics"] is None:
            lines.append(f"  KLD          {evaluation['text']['description']} (estimated {own['predicted_kld']:.4f})")
            continue
        kld, error = own["statistics"]["Mean KLD"], own["statistics"]["Mean KLD ±"]
        tuning = folder.read_json(f"{file_safe(target['target'])}.export.json")["tuning"]
        before = ", before tuning" if "kld" in tuning else ""
        lines.append(f"  KLD          {kld:.4f} ± {error:.4f} nats (predicted {own['predicted_kld']:.4f}{before})")
        labels = [target.get(key) for key in ("below", "above", "like", "uniform")]
        rivals = [by_label[label] for label in dict.fromkeys(labels) if label]
        where = "at the same bytes" if target["inside"] else "(none is of that size: the nearest)"
        lines += [
            f"  KLD ratio    {target['kld_ratio']:.2f} of llama.cpp's mixes {where}: {target['mix_kld']:.4f}",
            f"               {_rival(own)}",
            *(f"               {_rival(rival)}" for rival in rivals),
            f"  same top-1   {100 * own['statistics']['Same top p']:.1f} %",
        ]
        if target["generated"]:
            lines.append(f"  llama.cpp    opened it and says: {_one_line(target['generated']['text'])}")
        else:
            lines.append("  llama.cpp    not asked: xllamacpp is not installed (pip install 'dynq[engine]')")
    lines += [line for note in evaluation["model"]["notes"] for line in ("", f"  {note[:1].upper()}{note[1:]}.")]
    if evaluation["model"]["requantized"]:
        lines += ["", "  The source was quantized already: KLD is against that file, not against the original model."]
    return "\n".join([*lines[1:], "", f"report: {folder / 'report.html'}"])


def _rival(entry: Mapping[str, Any]) -> str:
    kld, same = entry["statistics"]["Mean KLD"], 100 * entry["statistics"]["Same top p"]
    return f"{entry['label']:<16} {entry['tensor_bytes']:>15,} bytes of tensors, KLD {kld:.4f}, same top-1 {same:.1f} %"


def _first_line(text: str) -> str:
    return (text.strip().splitlines() or [""])[0]


def _one_line(text: str, width: int = 160) -> str:
    plain = json.dumps(" ".join(text.split()), ensure_ascii=False)
    return plain if len(plain) <= width else plain[: width - 2] + '…"'
