"""The ``dynq`` command. Heavy modules are imported by what needs them, so that ``--help`` is quick."""

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import typer

import dynq
from dynq.cli_options import AsJson, Requantize, ResultsAsJson, Scheduler, Threads, Workers, Yes, json_text
from dynq.cli_recipe import recipe_app
from dynq.errors import DynqError

app = typer.Typer(
    help="The best GGUF file of a language model for a given size.",
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,
)

app.add_typer(recipe_app, name="recipe")

EXAMPLES = """
Examples:

  dynq run dynq-tiny --target 3.5bpw --quick --out runs/quick

  dynq run Qwen/Qwen3-0.6B --target 3.5bpw --target like:Q4_K_M --out runs/qwen

  dynq run ./my-model --target 8GB --text chats.jsonl --eval-text held-out.txt --out runs/mine

  dynq run model-f16.gguf --target 4bpw --pin "token_embd.weight=Q8_0" -p n_chunks=256 --out runs/pinned

  dynq run Qwen/Qwen3-0.6B --target 3bpw --search 10min -p n_chunks=256 --out runs/searched

  dynq run Qwen/Qwen3-0.6B --target 3bpw --thorough --device cuda --out runs/best

  dynq run s3://bucket/my-model --target 4bpw --out runs/copied   # copied once to ~/.cache/dynq, or $DYNQ_CACHE

The same command again goes on where a run was cut off; a step whose inputs have not changed is skipped.
"""


def _version(show: bool) -> None:
    if show:
        print(f"dynq {dynq.__version__}")
        raise typer.Exit


@app.callback()
def _options(
    version: Annotated[
        bool, typer.Option("--version", callback=_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


@app.command(epilog=EXAMPLES)
def run(
    model: Annotated[
        str,
        typer.Argument(
            help="A Hugging Face directory or hub id, a GGUF in F32, F16 or BF16, a URL of either, or dynq-tiny."
        ),
    ],
    target: Annotated[
        list[str], typer.Option(help="A size: 3.5bpw, 8GB, 2.5GiB, 6346016B, like:Q4_K_M. May be given several times.")
    ],
    out: Annotated[Path, typer.Option(help="The run folder.")],
    text: Annotated[
        str | None, typer.Option(help="Calibration text: .txt or chats .jsonl, commas between. Default: sampled.")
    ] = None,
    eval_text: Annotated[str | None, typer.Option(help="Evaluation text, the same way. Default: sampled.")] = None,
    imatrix: Annotated[Path | None, typer.Option(help="Encode with this importance matrix instead of our own.")] = None,
    profile: Annotated[str | None, typer.Option(help="Formats to choose from: all, k-quants, cpu-arm.")] = None,
    pin: Annotated[
        list[str] | None, typer.Option(help="TENSORS=FORMAT with * and ?, or >=FORMAT, <=FORMAT. Several allowed.")
    ] = None,
    search: Annotated[
        str | None, typer.Option(help="Time to look for a better recipe on measured KLD: 10min, 90s. Default: none.")
    ] = None,
    max_shard_size: Annotated[
        str | None, typer.Option(help="Split a larger file into shards of at most 5GB, 500MB, ... Default: one file.")
    ] = None,
    seed: Annotated[int | None, typer.Option(help="Of all sampling.")] = None,
    device: Annotated[
        str | None,
        typer.Option(help="Where the model is computed: cpu, cuda, cuda:1, or auto: one card or all. Default: cpu."),
    ] = None,
    threads: Threads = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    parameter: Annotated[
        list[str] | None, typer.Option("-p", help="NAME=VALUE, any parameter of the notebooks. Several allowed.")
    ] = None,
    quick: Annotated[
        bool, typer.Option("--quick", help="A first look: less text, no error feedback, no tuning. -p still counts.")
    ] = False,
    thorough: Annotated[
        bool, typer.Option("--thorough", help="The best file: four times the text, read twice. Best on a card.")
    ] = False,
    force: Annotated[
        bool, typer.Option("--force", help="Take a folder made with other parameters; make anew what they change.")
    ] = False,
    allow_requantize: Requantize = False,
    yes: Yes = False,
    as_json: ResultsAsJson = False,
) -> None:
    """Make a GGUF of each target size, and prove it: calibrate, measure, allocate, export, evaluate."""
    from dynq import run as runner
    from dynq.allocate import parse_pins
    from dynq.cluster import joined
    from dynq.folder import RunFolder

    given: dict[str, Any] = {
        "text": _absolute(text),
        "eval_text": _absolute(eval_text),
        "imatrix": _absolute(str(imatrix)) if imatrix else None,
        "profile": profile,
        "pins": parse_pins(pin) if pin else None,
        "search": search,
        "max_shard_size": max_shard_size,
        "seed": seed,
        "device": device,
        "threads": threads,
        "scheduler": scheduler,
        "allow_requantize": allow_requantize or None,
    }
    _check_one(scheduler, workers, device)
    with joined(scheduler, None):
        pass  # it answers: found out before any work
    folder = RunFolder(out, force=force)
    if folder.path.exists() and not folder.path.is_dir():
        raise DynqError(f"{out}: a file, not a folder; choose another --out")
    texts = dict(_split(item) for item in parameter or [])
    if quick and thorough:
        raise DynqError("--quick and --thorough: a first look or the best file; choose one")
    preset = runner.QUICK if quick else runner.THOROUGH if thorough else {}
    values = preset | {name: value for name, value in given.items() if value is not None}
    tasks = runner.plan(_model(model), target, folder, values, texts)
    from dynq import reckon  # imports torch

    for note in runner.check_sizes(tasks, checkpoint := runner.opened(tasks)):
        print(f"dynq: {note}", file=sys.stderr)
    reckon.of_run(checkpoint, {task.step: task.parameters for task in tasks}, folder).tell(sys.stderr, yes=yes)
    try:
        with _interruptible():
            evaluation = runner.execute(tasks, folder, workers=workers or 0)
    except runner.RunFailed as error:
        print(f"dynq: {error}", file=sys.stderr)
        raise typer.Exit(1) from None
    if as_json:
        print(json_text({"run": str(folder.path), **evaluation}))
    else:
        print(runner.summary(evaluation, folder))


SWEEP_EXAMPLE = """
An example of FILE:

  models: [dynq-tiny, ./my-model, Qwen/Qwen3-0.6B]

  targets: [3.5bpw, "like:Q4_K_M"]

  seeds: [0, 1]                         # default: [0]

  parameters: {n_chunks: 256, tune: 3} # as after -p of `dynq run`

The same command again goes on where it was cut off, and does again what failed.
"""


@app.command(epilog=SWEEP_EXAMPLE)
def sweep(
    file: Annotated[Path, typer.Argument(help="A YAML file with models, targets, seeds and parameters.")],
    out: Annotated[Path, typer.Option(help="The folder of the run folders and their summary.")],
    force: Annotated[
        bool, typer.Option("--force", help="Take folders made with other parameters; make anew what they change.")
    ] = False,
    yes: Yes = False,
    as_json: ResultsAsJson = False,
) -> None:
    """Make GGUFs of many models, targets and seeds, as `dynq run` does, with one summary of all."""
    from dynq import sweep as sweeping
    from dynq.folder import RunFolder
    from dynq.report import write_sweep_report

    asked = sweeping.read_sweep(file)
    paths = {
        name: _absolute(asked.parameters[name]) for name in ("text", "eval_text", "imatrix") if name in asked.parameters
    }
    asked = asked._replace(models=[_model(model) for model in asked.models], parameters=asked.parameters | paths)
    folder = RunFolder(out, force=force)
    if folder.path.exists() and not folder.path.is_dir():
        raise DynqError(f"{out}: a file, not a folder; choose another --out")
    if any(not step.startswith("run.") for step in folder.state["steps"]):
        raise DynqError(f"{out}: the folder of a single run; choose another --out")
    sweeping.reckoned(asked, folder).tell(sys.stderr, yes=yes)
    with _interruptible():
        result = sweeping.run_sweep(asked, folder)
    folder.write_json("sweep.json", result)
    write_sweep_report(folder, result)
    print(json_text(result) if as_json else sweeping.summary(result, folder))
    if result["failed"]:
        print(f"dynq: {len(result['failed'])} of the sweep's files failed", file=sys.stderr)
        raise typer.Exit(1 if any(failed["kind"] == "defect" for failed in result["failed"]) else 2)


@app.command()
def formats(as_json: AsJson = False) -> None:
    """List the formats that dynq encodes.

    The fallback is what llama.cpp takes for rows that do not divide into blocks. Everywhere: llama.cpp's CPU, CUDA,
    Metal and Vulkan backends.
    """
    from dynq.formats import FORMATS

    rows = [
        {
            "format": f.name,
            "bpw": f.bpw,
            "block": f.block,
            "block_bytes": f.block_bytes,
            "needs_importance": f.needs_importance,
            "fallback": f.fallback,
            "hardware": f.hardware,
        }
        for f in FORMATS.values()
    ]
    if as_json:
        print(json_text(rows))
        return
    print(f"{'format':<8}{'bpw':>8}{'block':>7}{'bytes':>7}  {'importance':<12}{'fallback':<10}fast in llama.cpp on")
    for f in FORMATS.values():
        importance, fallback = "needed" if f.needs_importance else "", f.fallback or ""
        print(f"{f.name:<8}{f.bpw:>8.4g}{f.block:>7}{f.block_bytes:>7}  {importance:<12}{fallback:<10}{f.hardware}")


EVALUATE_EXAMPLES = """
Examples:

  dynq evaluate Qwen/Qwen3-0.6B mine.gguf theirs.gguf --text wiki.txt,code.txt,chats.jsonl --out compared

  dynq evaluate model-f16.gguf *.gguf --text wiki.txt --mixes --imatrix imatrix.gguf --out compared

  dynq evaluate Qwen/Qwen3-0.6B mine.gguf --mmlu cais/mmlu --mmlu-limit 20 --greedy 50 --where 20 --out compared

  dynq evaluate model-f16.gguf mine.gguf --text wiki.txt --engine llama.cpp --out compared

  dynq evaluate --logits base.logits mine.gguf theirs.gguf --out compared

The original's log-probabilities and every result are kept in the folder: a second call measures only what is new.
"""


@app.command(epilog=EVALUATE_EXAMPLES)
def evaluate(
    files: Annotated[
        list[str],
        typer.Argument(
            metavar="REFERENCE FILE...",
            help="The original, as `dynq run` takes its MODEL, then GGUF files. With --logits files only.",
        ),
    ],
    out: Annotated[Path, typer.Option(help="The folder of the results.")],
    text: Annotated[
        str | None,
        typer.Option(help="Text files, .txt or chats .jsonl, commas between, each a domain. Default: sampled."),
    ] = None,
    ctx_size: Annotated[int, typer.Option("--ctx-size", "-c", help="Tokens in a chunk; half are scored.")] = 512,
    chunks: Annotated[int, typer.Option(help="Chunks of each text file, at most.")] = 16,
    mixes: Annotated[bool, typer.Option("--mixes", help="Measure llama.cpp's mixes of the files' sizes too.")] = False,
    imatrix: Annotated[Path | None, typer.Option(help="Importance matrix that the mixes are encoded with.")] = None,
    mmlu: Annotated[
        str | None, typer.Option(help="Ask MMLU's questions: a folder with dev/ and test/, or cais/mmlu of the hub.")
    ] = None,
    mmlu_limit: Annotated[int | None, typer.Option(min=1, help="The first so many questions of each subject.")] = None,
    greedy: Annotated[
        int, typer.Option(min=0, help="Answer so many held-out prompts greedily: do the answers stay the same?")
    ] = 0,
    where: Annotated[
        int, typer.Option(min=0, help="Show so many of the worst tokens, and which layers cost most.")
    ] = 0,
    engine: Annotated[
        str, typer.Option(help="torch, or llama.cpp: run the files there as well, in columns of their own.")
    ] = "torch",
    logits: Annotated[
        Path | None, typer.Option(help="A file of llama-perplexity's (--kl-divergence-base) as the original.")
    ] = None,
    write_logits: Annotated[Path | None, typer.Option(help="Write the original's logits in that format.")] = None,
    seed: Annotated[int, typer.Option(help="Of text that is sampled.")] = 0,
    device: Annotated[
        str, typer.Option(help="Where the models are computed: cpu, cuda, cuda:1, or auto: one card or all.")
    ] = "cpu",
    threads: Threads = None,
    scheduler: Scheduler = None,
    workers: Workers = None,
    allow_requantize: Annotated[
        bool, typer.Option("--allow-requantize", help="Take an original that is already quantized.")
    ] = False,
    yes: Yes = False,
    as_json: ResultsAsJson = False,
) -> None:
    """Measure GGUF files, whoever made them, against their original as llama-perplexity does: KL divergence first."""
    from dynq.folder import RunFolder

    folder = RunFolder(out)
    if folder.path.exists() and not folder.path.is_dir():
        raise DynqError(f"{out}: a file, not a folder; choose another --out")
    if (folder / "run.json").exists():
        raise DynqError(f"{out}: the folder of a run, whose own evaluation would be lost; choose another --out")
    if logits is not None and (text or mixes or imatrix or write_logits or mmlu or greedy or where):
        raise DynqError(
            "--logits brings its own text and no weights: leave out --text, --mixes, --imatrix, --write-logits, "
            "--mmlu, --greedy, --where"
        )
    if imatrix is not None and not mixes:
        raise DynqError("--imatrix is for the mixes; add --mixes")
    if mmlu_limit is not None and not mmlu:
        raise DynqError("--mmlu-limit is for MMLU; add --mmlu")
    if engine not in ("torch", "llama.cpp"):
        raise DynqError(f"--engine {engine}: there are torch and llama.cpp")
    in_engine = engine == "llama.cpp"
    paths = [Path(name).expanduser() for name in (files if logits else files[1:])]
    if not paths:
        raise DynqError("no file to measure; give the original and then one or more GGUF files")

    from dynq import reckon
    from dynq.checkpoint import open_checkpoint
    from dynq.cluster import joined
    from dynq.devices import check_device
    from dynq.evaluate import files as measure
    from dynq.evaluate.tasks import Asked
    from dynq.report import write_files_report

    measure.set_threads(threads)
    asked = Asked(mmlu or "", mmlu_limit, greedy, where, in_engine)
    check_device(device)
    _check_one(scheduler, workers, device)
    with _interruptible(), joined(scheduler, workers) as cluster:
        if logits is not None:
            evaluation = measure.against_logits(
                logits.expanduser(), paths, folder, in_engine=in_engine, device=device, cluster=cluster
            )
        else:
            original = open_checkpoint(files[0], allow_requantize)
            settings: dict[str, Any] = {"text": text or "", "n_ctx": ctx_size, "n_chunks": chunks, "threads": threads}
            reckoned = reckon.of_evaluation(
                original, paths, folder, with_mixes=mixes, asked=asked, device=device, **settings
            )
            reckoned.tell(sys.stderr, yes=yes)
            evaluation = measure.against_original(
                original,
                paths,
                folder,
                seed=seed,
                with_mixes=mixes,
                imatrix=imatrix,
                write_logits=write_logits,
                asked=asked,
                **settings,
                device=device,
                cluster=cluster,
            )
    folder.write_json("evaluation.json", evaluation)
    write_files_report(folder, evaluation)
    print(json_text(evaluation) if as_json else measure.summary(evaluation, folder))
    if not any(entry["kind"] == "file" for entry in evaluation["files"]):
        raise typer.Exit(2)


@contextmanager
def _interruptible() -> Iterator[None]:
    try:
        yield
    except KeyboardInterrupt:
        print("dynq: interrupted; the same command goes on from here", file=sys.stderr)
        raise typer.Exit(130) from None


def _check_one(scheduler: str | None, workers: int | None, device: str | None) -> None:
    if scheduler and workers:
        raise DynqError("--scheduler joins a running cluster, --workers starts one: give one of them")
    if (scheduler or workers) and device not in (None, "cpu"):
        raise DynqError(f"--device {device}: the workers of a cluster compute on processors; leave out one of the two")


def _model(text: str) -> str:
    """A model that is a path here as an absolute path: the notebooks may run elsewhere. Anything else as it is."""
    path = Path(text).expanduser()
    return str(path.resolve()) if text != "dynq-tiny" and path.exists() else text


def _absolute(paths: str | None) -> str | None:
    """Comma-separated paths, each absolute; "sampled" and "" mean no path."""
    if paths in (None, "", "sampled"):
        return paths
    found = [Path(path.strip()).expanduser().resolve() for path in str(paths).split(",")]
    for path in found:
        if not path.exists():
            raise DynqError(f"{path}: no such file")
    return ",".join(map(str, found))


def _split(item: str) -> tuple[str, str]:
    name, equals, value = item.partition("=")
    if not equals or not name.strip():
        raise DynqError(f"-p {item}: write -p NAME=VALUE")
    return name.strip(), value


def main() -> None:
    """Entry point. Exit status 0; 2 for a user's mistake, said in one line; 130 for Ctrl-C; 1 for a defect of dynq."""
    try:
        app()
    except DynqError as error:
        print(f"dynq: {' '.join(str(error).split())}", file=sys.stderr)
        sys.exit(2)
    except OSError as error:  # a folder that may not be written, a full disk
        print(f"dynq: {error.filename or 'a file'}: {error.strerror or error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
