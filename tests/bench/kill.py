"""Kill -9 at random moments of a short run: does every restart end with the bytes of an undisturbed one?

    python tests/bench/kill.py --kills 30 --seed 0

The run is that of the tests' `quick_run`: all five notebooks on dynq-tiny, few tokens and formats. At each moment the
command and all its children are killed; then no file of the folder may look finished that is not: a GGUF under its
own name must be the whole one, run.json must be readable, and a step that it calls done must have its files. The same
command again must end with the same products.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import psutil

sys.path.insert(0, str(Path(__file__).parents[1]))
from conftest import ARGUMENTS, PRODUCTS, same_products

from dynq.folder import content_hash


def start(folder: Path) -> psutil.Popen:
    command = [sys.executable, "-m", "dynq.cli", *ARGUMENTS, "--out", str(folder)]
    return psutil.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)


def killed(folder: Path, seconds: float) -> bool:
    """Start a run and kill it and its children after so long; whether it was still running."""
    process = start(folder)
    try:
        process.wait(seconds)
        return False
    except psutil.TimeoutExpired:
        for one in [process, *process.children(recursive=True)]:
            one.kill()
        process.wait()
        return True


def looks_finished(folder: Path, whole: Path) -> list[str]:
    """What claims to be done and is not."""
    wrong = [
        f"{path.name} is not the whole file" for path in folder.glob("*.gguf") if not _same(path, whole / path.name)
    ]
    state = folder / "run.json"
    if state.exists():
        for name, step in json.loads(state.read_text())["steps"].items():
            if step["state"] == "done":
                wrong += [f"{name}: {file}" for file, h in step["outputs"].items() if content_hash(folder / file) != h]
    return wrong


def _same(one: Path, other: Path) -> bool:
    return one.read_bytes() == other.read_bytes()


def undisturbed(folder: Path) -> tuple[Path, float]:
    """A run's folder and its seconds; made until two agree: several threads may differ by themselves."""
    made: list[Path] = []
    while True:
        made.append(folder / f"whole{len(made)}")
        begun = time.monotonic()
        process = start(made[-1])
        _, said = process.communicate()
        if process.returncode:
            sys.exit(said.decode())
        if any(not same_products(one, made[-1]) for one in made[:-1]):
            return made[-1], time.monotonic() - begun
        if len(made) > 1:
            print(f"undisturbed runs differ: {', '.join(same_products(made[0], made[-1]))}", flush=True)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=30)
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    moments = random.Random(given.seed)
    bad = 0
    with tempfile.TemporaryDirectory(prefix="dynq-kill-") as text:
        whole, length = undisturbed(Path(text))
        print(f"an undisturbed run: {length:.0f} s, {len(PRODUCTS)} products", flush=True)
        for number in range(given.kills):
            folder, after = Path(text) / f"{number}", moments.uniform(0, length)
            hit = killed(folder, after)
            wrong = looks_finished(folder, whole) if folder.exists() else []
            steps = json.loads((folder / "run.json").read_text())["steps"] if (folder / "run.json").exists() else {}
            again = start(folder)
            _, said = again.communicate()
            wrong += [said.decode().splitlines()[-1]] if again.returncode else same_products(whole, folder)
            where = next((name for name, step in steps.items() if step["state"] != "done"), "between steps")
            print(
                f"{number}: {'killed' if hit else 'over'} at {after:.1f} s ({where}): {wrong or 'the same'}", flush=True
            )
            bad += bool(wrong)
    print(f"{given.kills - bad} of {given.kills} restarts end with the same bytes")
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
