"""Kill -9 at random moments of a short run: does every restart end with the bytes of an undisturbed one?

    python tests/bench/kill.py FOLDER --times 6 --seed 0
    python tests/bench/kill.py FOLDER --notebook 03_calibrate

The run is that of the tests' `quick_run`: all five notebooks on dynq-tiny, few tokens and formats. Each notebook is
killed with all its children so many times, at moments that follow from the seed, and started again; then nothing in the
folder may look finished that is not (`kills.looks_finished`), and it must end with the products of the undisturbed run.
Both runs and the results stay in the folder, so that notebooks can be benched one after another.
"""

import argparse
import json
import random
import shutil
import sys
import time
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))
import kills
from conftest import PRODUCTS, same_products

from dynq.run import NOTEBOOKS


def undisturbed(folder: Path) -> Path:
    """A run that nobody disturbs; made once."""
    whole, done = folder / "whole", folder / "whole.done"
    if not done.exists():
        begun = time.monotonic()
        for notebook in NOTEBOOKS:
            if said := kills.finish(whole, notebook):
                sys.exit(said)
        done.touch()
        print(f"an undisturbed run: {time.monotonic() - begun:.0f} s", flush=True)
    return whole


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--notebook", choices=NOTEBOOKS, help="only this one; those before it are done")
    parser.add_argument("--times", type=int, default=6, help="kills of each notebook")
    parser.add_argument("--most", type=float, default=5.0, help="seconds from its first step to a kill")
    parser.add_argument("--seed", type=int, default=0)
    given = parser.parse_args()
    given.folder.mkdir(exist_ok=True)
    whole, run, bad = undisturbed(given.folder), given.folder / "run", 0
    for notebook in [given.notebook] if given.notebook else NOTEBOOKS:
        if notebook == NOTEBOOKS[0]:
            shutil.rmtree(run, ignore_errors=True)
        moments = random.Random(f"{given.seed} {notebook}")
        for found in kills.kill_and_finish(run, whole, notebook, moments, given.times, given.most):
            print(notebook, json.dumps(found), flush=True)
            bad += bool(found["wrong"])
    if given.notebook in (None, NOTEBOOKS[-1]):
        different = same_products(whole, run)
        print(f"{len(PRODUCTS) - len(different)} of {len(PRODUCTS)} products are the same; others: {different}")
        bad += bool(different)
    return int(bad > 0)


if __name__ == "__main__":
    sys.exit(main())
