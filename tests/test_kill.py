"""Kill -9 in each notebook of a run: it goes on, and ends with the bytes of a run that nobody disturbed.

`tests/bench/kill.py` kills whole runs, at thirty moments.
"""

import random
import time

import kills
import pytest
from conftest import same_products

from dynq.run import NOTEBOOKS

MOST = 2.0  # seconds from a step's start to its kill


def test_each_notebook_is_killed_once(quick_run, tmp_path):
    whole, _ = quick_run
    folder, moments = tmp_path / "run", random.Random(8)
    hits = 0
    for notebook in NOTEBOOKS:
        before = kills.steps(folder)
        process = kills.start(folder, notebook)
        while process.poll() is None and kills.steps(folder) == before:  # starting Python takes longer than the work
            time.sleep(0.02)
        time.sleep(moments.uniform(0, MOST))
        hits += kills.kill(process)
        assert kills.looks_finished(folder, whole) == [], notebook
        assert kills.finish(folder, notebook) == ""
        assert kills.looks_finished(folder, whole) == [], notebook
    assert same_products(whole, folder) == []
    assert hits >= 3


@pytest.mark.parametrize("damage", ["cut off", "other bytes", "gone"])
def test_what_only_looks_finished_is_found(quick_run, tmp_path, damage):
    import shutil

    whole, _ = quick_run
    folder = shutil.copytree(whole, tmp_path / "run")
    assert kills.looks_finished(folder, whole) == []
    file = folder / "imatrix.gguf"
    data = file.read_bytes()
    file.unlink()
    if damage != "gone":
        file.write_bytes(data[:-9] if damage == "cut off" else data[:-1] + bytes([data[-1] ^ 1]))
    assert any("imatrix.gguf" in line for line in kills.looks_finished(folder, whole))
