"""The command: help, mistakes in one line, exit codes. The whole run is in tests/notebooks."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from conftest import ARGUMENTS, dynq_command
from typer.testing import CliRunner

from dynq import run as runner
from dynq.cli import app
from dynq.errors import DynqError
from dynq.formats import FORMATS

RUN = ("run", "dynq-tiny", "--target", "3bpw")


def test_help_has_examples():
    done = dynq_command("run", "--help", COLUMNS="100")
    assert done.returncode == 0
    assert "dynq run dynq-tiny --target 3.5bpw --quick --out runs/quick" in done.stdout
    assert "--search 10min" in done.stdout
    for option in (
        "--text",
        "--eval-text",
        "--imatrix",
        "--profile",
        "--pin",
        "--search",
        "--seed",
        "--threads",
        "--quick",
        "--thorough",
        "--force",
        "--yes",
        "--json",
    ):
        assert option in done.stdout


def test_presets_change_what_they_say_and_give_way_to_what_is_asked_for(tmp_path, monkeypatch):
    seen = []

    def execute(tasks, folder, **settings):
        seen.append({name: value for task in tasks for name, value in task.parameters.items()})
        raise DynqError("enough")

    monkeypatch.setattr(runner, "execute", execute)
    command = ["run", "dynq-tiny", "--target", "3bpw", "--yes", "--out", str(tmp_path / "run")]
    for more in ((), ("--quick", "-p", "n_chunks=5"), ("--thorough", "-p", "tune=3")):
        assert isinstance(CliRunner().invoke(app, [*command, *more]).exception, DynqError)
    whole, *presets = seen
    for preset, made, own in zip((runner.QUICK, runner.THOROUGH), presets, ({"n_chunks": 5}, {"tune": 3}), strict=True):
        assert {name for name in whole if whole[name] != made[name]} == set(preset)
        assert made | preset | own == made
    assert whole["encoding"] == "feedback" and runner.THOROUGH["n_chunks"] > whole["n_chunks"]
    both = CliRunner().invoke(app, [*command, "--quick", "--thorough"]).exception
    assert isinstance(both, DynqError) and str(both).startswith("--quick and --thorough: ") and len(seen) == 3


def test_formats():
    done = dynq_command("formats", "--json")
    assert done.returncode == 0
    rows = {row["format"]: row for row in json.loads(done.stdout)}
    assert list(rows) == list(FORMATS)
    assert rows["Q4_K"]["bpw"] == 4.5 and rows["Q4_K"]["fallback"] == "Q5_0"
    assert rows["IQ2_XS"]["needs_importance"] and not rows["IQ3_S"]["needs_importance"]
    assert all(row["hardware"] for row in rows.values())
    heading, *table = dynq_command("formats").stdout.splitlines()
    assert [line.split()[0] for line in table] == list(FORMATS)
    assert "CPU" in rows["IQ2_XS"]["hardware"] and rows["IQ2_XS"]["hardware"] in table[list(FORMATS).index("IQ2_XS")]
    assert max(map(len, [heading, *table])) <= 120


def test_version():
    from dynq import __version__

    assert dynq_command("--version").stdout == f"dynq {__version__}\n"


@pytest.mark.parametrize(
    ("arguments", "words"),
    [
        ((*RUN, "-p", "n_cxt=1"), "no notebook has a parameter 'n_cxt'"),
        ((*RUN, "-p", "n_ctx=many"), "n_ctx must be of type int, not 'many'"),
        ((*RUN, "-p", "n_ctx"), "NAME=VALUE"),
        ((*RUN, "--target", "huge"), "target 'huge' is not a size"),
        ((*RUN, "--pin", "token_embd.weight"), "write TENSORS=FORMAT"),
        ((*RUN, "--text", "missing.txt"), "missing.txt: no such file"),
        ((*RUN, "--imatrix", "missing.gguf"), "missing.gguf: no such file"),
    ],
)
def test_mistakes_are_one_line_before_any_work(tmp_path, arguments, words):
    done = dynq_command(*arguments, "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.startswith("dynq: ") and words in done.stderr
    assert done.stderr.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_model_that_is_none(tmp_path):
    (tmp_path / "empty").mkdir()
    done = dynq_command("run", tmp_path / "empty", "--target", "3bpw", "--out", tmp_path / "run")
    assert done.returncode == 2
    assert done.stderr.splitlines()[-1].startswith("dynq: ") and "config.json" in done.stderr
    assert "Traceback" not in done.stderr


def test_out_is_a_file(tmp_path):
    (tmp_path / "run").write_text("")
    done = dynq_command(*RUN, "--out", tmp_path / "run")
    assert done.returncode == 2 and "a file, not a folder" in done.stderr


def test_interrupt(tmp_path):
    command = [sys.executable, "-m", "dynq.cli", *ARGUMENTS, "--out", str(tmp_path / "run")]
    # a shell starts what is sent to the background with SIGINT ignored, and children inherit that
    heard = (
        {"preexec_fn": lambda: signal.signal(signal.SIGINT, signal.default_int_handler)} if os.name == "posix" else {}
    )
    process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **heard)
    for _ in range(600):
        if (tmp_path / "run" / "run.json").exists():
            break
        time.sleep(0.1)
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=60)
    assert process.returncode == 130
    assert out == "" and "Traceback" not in err
    assert err.splitlines()[-1] == "dynq: interrupted; the same command goes on from here"


def test_importing_the_command_is_light():
    code = (
        "import sys, dynq.cli; print([m for m in ('torch', 'numba', 'transformers', 'papermill') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.stdout.strip() == "[]"
