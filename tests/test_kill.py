"""Kill -9 in each notebook of a run: it goes on, and ends with the bytes of a run that nobody disturbed. So does a run
whose work a cluster shares and loses a worker.

`tests/bench/kill.py` kills each of them many times.
"""

import random
import shutil
import subprocess
import sys
import time

import kills
import psutil
import pytest
from conftest import ARGUMENTS, same_products

from dynq.run import NOTEBOOKS

MOST = 2.0  # seconds from a step's start to its kill


def test_each_notebook_is_killed_once(quick_run, tmp_path):
    whole, _ = quick_run
    folder, moments, hits = tmp_path / "run", random.Random(8), 0
    for notebook in NOTEBOOKS:
        for found in kills.kill_and_finish(folder, whole, notebook, moments, 1, MOST):
            assert found["wrong"] == [], (notebook, found)
            hits += found["hit"]
    assert same_products(whole, folder) == []
    assert hits >= 3


def test_a_run_with_workers_loses_one_in_the_middle(quick_run, tmp_path):
    """The command with two workers, one of which is killed while sensitivities are measured: all products are those of
    the command without a cluster."""
    pytest.importorskip("distributed")
    whole, _ = quick_run
    folder, said = tmp_path / "run", tmp_path / "said"
    command = [sys.executable, "-m", "dynq.cli", *ARGUMENTS, "--workers", "2", "--out", str(folder)]
    with said.open("w") as stream:
        process = psutil.Popen(command, stdout=stream, stderr=subprocess.STDOUT)

    def workers() -> list[psutil.Process]:
        return [child for child in process.children() if "--multiprocessing-fork" in child.cmdline()]

    def measuring() -> bool:
        return kills.steps(folder).get("sensitivity", {}).get("state") == "started"

    try:
        while process.poll() is None and not ((folder / "run.json").exists() and measuring()):
            time.sleep(0.02)
        assert process.poll() is None, said.read_text()
        time.sleep(0.5)  # tasks have begun
        before = workers()
        before[0].kill()
        assert len(before) == 2 and measuring()
        assert process.wait(300) == 0, said.read_text()
    finally:
        kills.kill(process)
    assert same_products(whole, folder) == []


@pytest.mark.parametrize("damage", ["cut off", "other bytes", "gone"])
def test_what_only_looks_finished_is_found(quick_run, tmp_path, damage):
    whole, _ = quick_run
    folder = shutil.copytree(whole, tmp_path / "run")
    assert kills.looks_finished(folder, whole) == []
    file = folder / "imatrix.gguf"
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(data[:-9] if damage == "cut off" else data[:-1] + bytes([data[-1] ^ 1]))
    assert any("imatrix.gguf" in line for line in kills.looks_finished(folder, whole))
