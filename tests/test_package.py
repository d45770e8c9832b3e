"""What importing dynq does, and the wheel: built, installed elsewhere, and the main job run from it."""

import os
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest
from conftest import ARGUMENTS, same_products

ROOT = Path(__file__).parents[1]


@pytest.mark.parametrize(
    ("given", "spins"),
    [({}, "10000"), ({"GOMP_SPINCOUNT": "7"}, "7"), ({"OMP_WAIT_POLICY": "ACTIVE"}, "None")],
)
def test_waiting_threads_spin_briefly_unless_the_user_has_said_how(given, spins):
    said = {name: value for name, value in os.environ.items() if name not in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY")}
    code = "import os, dynq; print(os.environ.get('GOMP_SPINCOUNT'))"
    assert subprocess.check_output([sys.executable, "-c", code], env=said | given, text=True).strip() == spins


@pytest.fixture(scope="module")
def wheel(tmp_path_factory):
    out = tmp_path_factory.mktemp("dist")
    build = [sys.executable, "-m", "build", "--wheel", "--no-isolation", "--outdir", str(out), str(ROOT)]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (found,) = out.glob("*.whl")
    return found


def test_wheel_holds_what_is_needed(wheel):
    names = set(zipfile.ZipFile(wheel).namelist())
    for path in (
        "dynq/notebooks/03_calibrate.ipynb",
        "dynq/notebooks/07_evaluate.ipynb",
        "dynq/data/report.html.j2",
        "dynq/data/prompts.jsonl",
        "dynq_widgets/recipe_grid.js",
        "dynq_widgets/theme.css",
        "dynq/data/dynq-tiny/config.json",
        "dynq/data/dynq-tiny/model-00001-of-00003.safetensors",
    ):
        assert path in names
    assert not [name for name in names if name.startswith(("tests/", "docs/", "runs/"))]


def test_installed_wheel_does_the_main_job(wheel, quick_run, tmp_path):
    venv = tmp_path / "venv"
    subprocess.run([sys.executable, "-m", "venv", "--without-pip", str(venv)], check=True)
    python = venv / "bin" / "python"
    (target,) = venv.glob("lib/python*/site-packages")
    install = [sys.executable, "-m", "pip", "--python", str(python), "install", "--no-deps", "--no-index", str(wheel)]
    subprocess.run(install, check=True, capture_output=True)
    # The dependencies of this environment, behind the venv's own packages and without this one's editable dynq: a
    # path file inside a folder that a path file adds is not read.
    (target / "zz_dependencies.pth").write_text("\n".join(site.getsitepackages()) + "\n")
    elsewhere = tmp_path / "elsewhere"
    elsewhere.mkdir()
    where = "import dynq; from dynq.run import notebook_folder; print(dynq.__file__, notebook_folder())"
    done = subprocess.run([python, "-c", where], cwd=elsewhere, capture_output=True, text=True, check=True)
    assert done.stdout.count(str(venv)) == 2

    command = [venv / "bin" / "dynq", *ARGUMENTS, "--out", "made here"]
    done = subprocess.run(command, cwd=elsewhere, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert same_products(quick_run[0], elsewhere / "made here") == []
