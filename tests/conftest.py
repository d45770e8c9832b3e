"""One quick run of the whole job, which several tests look at."""

import fcntl
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

# threads that wait should sleep, not spin: several test processes share the cores (read when torch is first imported)
os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")

TARGET = "3.5bpw"
PARAMETERS = {
    "n_chunks": 4,
    "n_ctx": 64,
    "keep": 64,
    "formats": ["Q2_K", "Q3_K", "Q4_K"],
    "n_swaps": 2,
    "swap_chunks": 1,
    "n_tokens": 12,
    "eval_n_ctx": 64,
    "eval_chunks": 1,
    "threads": 2,
}
ARGUMENTS = ["run", "dynq-tiny", "--target", TARGET, *(x for k, v in PARAMETERS.items() for x in ("-p", f"{k}={v}"))]
PRODUCTS = (
    "run.json",
    "calibrate-text.json",
    "imatrix.gguf",
    "fisher",
    "sensitivity.parquet",
    "3.5bpw.recipe.json",
    "3.5bpw.tensor-types.txt",
    "3.5bpw.gguf",
    "3.5bpw.export.json",
    "evaluate-text.json",
    "evaluation.json",
    "report.html",
    "model-card.md",
)


def dynq_command(*arguments, cwd=None, python=sys.executable, **environment):
    """Run the `dynq` command in a process of its own."""
    return subprocess.run(
        [python, "-m", "dynq.cli", *map(str, arguments)],
        cwd=cwd,
        env={**os.environ, **environment},
        capture_output=True,
        text=True,
    )


@pytest.fixture(scope="session")
def quick_run(tmp_path_factory) -> tuple[Path, subprocess.CompletedProcess]:
    """The run folder of a quick run on the embedded model, and what the command said.

    Of several test processes one makes it, and each has a copy.
    """
    pytest.importorskip("xllamacpp")
    base, folder = tmp_path_factory.getbasetemp(), tmp_path_factory.mktemp("quick") / "run"
    made = (base.parent if os.environ.get("PYTEST_XDIST_WORKER") else base) / "quick run" / "run"
    made.parent.mkdir(exist_ok=True)
    with (made.parent / "lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        said = made.parent / "said.json"
        if not said.exists():
            done = dynq_command(*ARGUMENTS, "--out", made)
            said.write_text(json.dumps([done.returncode, done.stdout, done.stderr]))
    code, *texts = json.loads(said.read_text())
    assert code == 0, texts[1]
    shutil.copytree(made, folder)
    return folder, subprocess.CompletedProcess([], code, *(text.replace(str(made), str(folder)) for text in texts))


def same_products(a: Path, b: Path) -> list[str]:
    """The products in which two run folders differ."""
    from dynq.folder import content_hash

    return [name for name in PRODUCTS if content_hash(a / name) != content_hash(b / name)]
