"""Runs that are killed: start one, kill it with all its children, look at what it left.

    python tests/kills.py FOLDER NOTEBOOK

runs one notebook of the tests' `quick_run` in a folder.
"""

import random
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import psutil
import pyarrow.parquet as pq
from conftest import PARAMETERS, TARGET

from dynq import run as runner
from dynq.errors import DynqError
from dynq.folder import RunFolder, content_hash

# what a run works with and clears away: it never has the name of a result
_WORK = (".partial", ".parts/", "notebooks/", "scores/reference", "swaps.", "lock", "run.json")


def start(folder: Path, notebook: str) -> psutil.Popen:
    command = [sys.executable, __file__, str(folder), notebook]
    return psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def finish(folder: Path, notebook: str) -> str:
    """Run a notebook to its end; the last line of what it said where it failed, or ""."""
    process = start(folder, notebook)
    _, said = process.communicate()
    return (said.decode().splitlines() or ["failed"])[-1] if process.returncode else ""


def killed(folder: Path, notebook: str, seconds: float) -> bool:
    """Start a notebook and kill it so long after its work has begun; whether it was still running."""
    begun, process = time.time_ns(), start(folder, notebook)
    state = folder / "run.json"
    while process.poll() is None and not (state.exists() and state.stat().st_mtime_ns >= begun):
        time.sleep(0.02)  # until it records a step; to start Python takes longer than most of the work
    time.sleep(seconds)
    return kill(process)


def kill(process: psutil.Popen) -> bool:
    """Kill -9 a run and its children; whether it was still running."""
    try:
        family = [process, *process.children(recursive=True)]
    except psutil.NoSuchProcess:
        family = []
    running = process.poll() is None
    for one in family:
        with suppress(psutil.NoSuchProcess):  # a child that has just ended
            one.kill()
    process.wait()
    psutil.wait_procs(family)
    if process.stderr:
        process.stderr.close()
    return running


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


def kill_and_finish(
    folder: Path, whole: Path, notebook: str, moments: random.Random, times: int, most: float
) -> Iterator[dict[str, Any]]:
    """Kill a notebook so many times, at most so many seconds after its work has begun; then let it come to its end.

    Gives what was found after each: where it was, and what looks finished and is not.
    """
    for _ in range(times):
        after = moments.uniform(0, most)
        hit = killed(folder, notebook, after)
        where = next((name for name, step in steps(folder).items() if step["state"] != "done"), "between steps")
        yield {"hit": hit, "after": after, "in": where, "wrong": looks_finished(folder, whole)}
    said = finish(folder, notebook)
    yield {"hit": False, "after": 0.0, "in": "at the end", "wrong": [said] if said else looks_finished(folder, whole)}


def _one(folder: RunFolder, notebook: str) -> None:
    tasks = runner.plan("dynq-tiny", [TARGET], folder, PARAMETERS)
    runner.execute_each([task for task in tasks if task.notebook == notebook], folder)


if __name__ == "__main__":
    _one(RunFolder(sys.argv[1]), sys.argv[2])
