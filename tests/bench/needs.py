"""What `dynq run` is reckoned to need beside what it takes: memory, disk and processor time of each step.

    python tests/bench/needs.py dynq-tiny
    python tests/bench/needs.py --random 1024x3 -p tune=1 -p n_swaps=4 -p chat=[]

Figures are reckoned / taken. Time is that of the processor with one thread, so that a busy machine does not count;
memory is what the step's process holds itself (RssAnon of Linux) above the step that only allocates; disk is the most
that the run folder grew while the step ran.
"""

import argparse
import contextlib
import os
import subprocess
import sys
import tempfile
import threading
from dataclasses import replace
from pathlib import Path

import psutil
from device import random_model

from dynq import reckon
from dynq import run as runner
from dynq.checkpoint import open_checkpoint
from dynq.folder import RunFolder

TARGET = "3.5bpw"


def own_bytes(process: psutil.Process) -> int:
    """Bytes that a process holds itself."""
    lines = Path(f"/proc/{process.pid}/status").read_text().splitlines()
    return 1024 * next((int(line.split()[1]) for line in lines if line.startswith("RssAnon")), 0)


def used(folder: Path) -> int:
    sizes = 0
    for path in folder.rglob("*"):
        with contextlib.suppress(FileNotFoundError):  # what is written beside its place is renamed
            sizes += path.stat().st_size if path.is_file() else 0
    return sizes


class Watch:
    """Memory, disk and processor time of each step of a run, from its headings on the standard error."""

    def __init__(self, process: subprocess.Popen, folder: Path):
        self.taken: dict[str, dict[str, float]] = {}
        self._process, self._folder, self._step = process, folder, ""
        self._seen: dict[int, float] = {}
        reader = threading.Thread(target=self._read, daemon=True)
        reader.start()
        while process.poll() is None:
            self._look()
            try:
                process.wait(0.05)
            except subprocess.TimeoutExpired:
                continue
        reader.join()

    def _read(self) -> None:
        names = {notebook: notebook.partition("_")[2] for notebook in runner.NOTEBOOKS}
        for line in self._process.stderr:
            name = next((step for notebook, step in names.items() if line.startswith(notebook)), None)
            if name:
                self.taken[name] = {"memory": 0.0, "disk": 0.0, "time": 0.0, "start": used(self._folder)}
                self._step = name

    def _look(self) -> None:
        if not self._step:
            return
        step = self.taken[self._step]
        step["disk"] = max(step["disk"], used(self._folder) - step["start"])
        memory = 0
        for child in psutil.Process(self._process.pid).children(recursive=True):
            try:
                memory += own_bytes(child)
                times = child.cpu_times()
                spent, self._seen[child.pid] = sum(times[:2]) - self._seen.get(child.pid, 0.0), sum(times[:2])
                step["time"] += spent
            except (psutil.NoSuchProcess, FileNotFoundError):
                continue
        step["memory"] = max(step["memory"], memory)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model", nargs="?", default="dynq-tiny")
    parser.add_argument("--random", help="a random llama instead, WIDTHxLAYERS")
    parser.add_argument("-p", action="append", default=[], help="NAME=VALUE, as for `dynq run`")
    parser.add_argument("--flops", type=float, help="of an idle core; measured without, which wants an idle machine")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(prefix="dynq-needs-") as place:
        folder = RunFolder(Path(place) / "run")
        model = given.model
        if given.random:
            width, layers = map(int, given.random.split("x"))
            model = str(random_model(Path(place) / "model", width, layers))
        texts = dict(item.split("=", 1) for item in given.p) | {"threads": "1"}
        steps = {t.step: t.parameters for t in runner.plan(model, [TARGET], folder, texts=texts)}
        reckoned = reckon.of_run(open_checkpoint(model), steps, folder)
        idle_core = replace(reckoned.machine, flops=given.flops or reckoned.machine.flops)
        command = [
            sys.executable,
            "-m",
            "dynq.cli",
            "run",
            model,
            "--target",
            TARGET,
            "--out",
            str(folder.path),
            "--yes",
        ]
        command += [part for name, value in texts.items() for part in ("-p", f"{name}={value}")]
        process = subprocess.Popen(
            command,
            stdout=subprocess.DEVNULL,
            stderr=subprocess.PIPE,
            text=True,
            env=os.environ | {"OMP_NUM_THREADS": "1"},
        )
        taken = Watch(process, folder.path).taken
        if process.returncode:
            sys.exit(f"the run failed ({process.returncode})")
    idle = taken["allocate"]["memory"]
    print(f"{'step':<12} {'memory, MiB':>24} {'disk, MiB':>24} {'time, s':>22}")
    for need in reckoned.needs:
        own = taken[need.step.partition(".")[0]]
        pairs = [(need.memory / 2**20, (own["memory"] - idle) / 2**20), (need.disk / 2**20, own["disk"] / 2**20)]
        pairs.append((need.seconds(idle_core), own["time"]))
        shown = [f"{a:8.1f} / {b:8.1f} = {a / b if b > 1 else float('nan'):4.2f}" for a, b in pairs]
        print(f"{need.step.partition('.')[0]:<12} {'  '.join(shown)}")


if __name__ == "__main__":
    main()
