"""Runs that are killed: start one, kill it with all its children, look at what it left.

    python tests/kills.py FOLDER NOTEBOOK

runs one notebook of the tests' `quick_run` in a folder.
"""

import subprocess
import sys
import time
from collections.abc import Sequence
from pathlib import Path

import psutil
import pyarrow.parquet as pq
from conftest import ARGUMENTS, PARAMETERS, TARGET

from dynq import run as runner
from dynq.errors import DynqError
from dynq.folder import RunFolder, content_hash

# what a run works with and clears away: it never has the name of a result
_WORK = (".partial", ".parts/", "notebooks/", "scores/reference", "swaps.", "lock", "run.json")


def start(folder: Path, notebook: str = "", more: Sequence[str] = ()) -> psutil.Popen:
    """The whole run by the command, with more arguments, or one of its notebooks alone."""
    whole = ["-m", "dynq.cli", *ARGUMENTS, *more, "--out", str(folder)]
    command = [__file__, str(folder), notebook] if notebook else whole
    return psutil.Popen([sys.executable, *command], stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path, notebook: str = "", more: Sequence[str] = ()) -> str:
    """Run to the end; the last line of what it said where it failed, or ""."""
    process = start(folder, notebook, more)
    _, said = process.communicate()
    return (said.decode().splitlines() or ["failed"])[-1] if process.returncode else ""


def kill(process: psutil.Popen) -> bool:
    """Kill -9 a run and its children; whether it was still running."""
    family = [process, *process.children(recursive=True)] if process.is_running() else []
    running = process.poll() is None
    for one in family:
        one.kill()
    process.wait()
    psutil.wait_procs(family)
    process.stderr.close()
    return running


def killed(folder: Path, seconds: float, more: Sequence[str] = ()) -> bool:
    """Start a run and kill it after so long; whether it was still running."""
    process = start(folder, more=more)
    time.sleep(seconds)
    return kill(process)


def steps(folder: Path) -> dict[str, dict]:
    """What run.json records. DynqError where it is not readable."""
    return RunFolder(folder).state["steps"]


def looks_finished(folder: Path, whole: Path) -> list[str]:
    """What has the name of a result, or is recorded as done, and is not what the undisturbed run made."""
    try:
        recorded = steps(folder)
    except DynqError as error:
        return [str(error)]
    wrong = []
    for name, step in recorded.items():
        if step["state"] == "done":
            for file, made in step["outputs"].items():
                if not (folder / file).exists() or content_hash(folder / file) != made:
                    wrong.append(f"{name} is done, {file} is not what it made")
    measuring = recorded.get("sensitivity", {}).get("state") == "started"
    for path in sorted(path for path in folder.rglob("*") if path.is_file()):
        name = path.relative_to(folder).as_posix()
        if any(part in name for part in _WORK):
            continue
        if not (whole / name).exists():
            wrong.append(f"{name}: an undisturbed run has no such file")
        elif name == "sensitivity.parquet" and measuring:  # all predictions, and what was measured so far
            tables = [pq.read_table(folder / name).drop_columns(["measured_kld"]) for folder in (folder, whole)]
            wrong += [] if tables[0].equals(tables[1]) else [f"{name} is not the whole table"]
        elif path.read_bytes() != (whole / name).read_bytes():
            wrong.append(f"{name} is not the whole file")
    return wrong


def _one(folder: RunFolder, notebook: str) -> None:
    tasks = runner.plan("dynq-tiny", [TARGET], folder, PARAMETERS)
    runner.execute_each([task for task in tasks if task.notebook == notebook], folder)


if __name__ == "__main__":
    _one(RunFolder(sys.argv[1]), sys.argv[2])
