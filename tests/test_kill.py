"""Kill -9 in each notebook of a run: it goes on, and ends with the bytes of a run that nobody disturbed.

`tests/bench/kill.py` kills each of them many times.
"""

import random
import shutil

import kills
import pytest
from conftest import same_products

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
