"""One quick run of the whole job, which several tests look at."""

import os
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
    """The run folder of a quick run on the embedded model, and what the command said."""
    pytest.importorskip("xllamacpp")
    folder = tmp_path_factory.mktemp("quick") / "run"
    done = dynq_command(*ARGUMENTS, "--out", folder)
    assert done.returncode == 0, done.stderr
    return folder, done


def same_products(a: Path, b: Path) -> list[str]:
    """The products in which two run folders differ."""
    from dynq.folder import content_hash

    return [name for name in PRODUCTS if content_hash(a / name) != content_hash(b / name)]
