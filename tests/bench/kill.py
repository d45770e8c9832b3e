"""Kill -9 at random moments of a short run: does every restart end with the bytes of an undisturbed one?

    python tests/bench/kill.py /tmp/kills --first 0 --last 4 --seed 0

The run is that of the tests' `quick_run`: all five notebooks on dynq-tiny, few tokens and formats. At each moment the
command and all its children are killed; then nothing in the folder may look finished that is not
(`kills.looks_finished`), and the same command again must end with the same products. The moment of a kill follows from
the seed and its number, so that a bench can be run in pieces: the undisturbed run and the results stay in the folder.
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


def undisturbed(folder: Path, more: list[str]) -> tuple[Path, float]:
    """A run that nobody disturbs, and its seconds; made once."""
    whole, kept = folder / "whole", folder / "seconds.json"
    if not kept.exists():
        shutil.rmtree(whole, ignore_errors=True)
        begun = time.monotonic()
        if said := kills.finish(whole, more=more):
            sys.exit(said)
        kept.write_text(json.dumps(time.monotonic() - begun))
    return whole, json.loads(kept.read_text())


def one(number: int, seed: int, folder: Path, whole: Path, length: float, more: list[str]) -> dict:
    """Kill a run once and let it go on; what was wrong."""
    run, after = folder / f"run{number}", random.Random(f"{seed} {number}").uniform(0, length)
    shutil.rmtree(run, ignore_errors=True)
    hit = kills.killed(run, after, more)
    wrong = kills.looks_finished(run, whole)
    recorded = kills.steps(run)
    where = next((name for name, step in recorded.items() if step["state"] != "done"), "between steps")
    said = kills.finish(run, more=more)
    wrong += [said] if said else same_products(whole, run)
    shutil.rmtree(run)
    return {
        "number": number,
        "seed": seed,
        "hit": hit,
        "after": after,
        "done": len(recorded),
        "in": where,
        "wrong": wrong,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path, help="keeps the undisturbed run and the results")
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=29)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=2)
    given = parser.parse_args()
    more = ["-p", f"threads={given.threads}"]
    given.folder.mkdir(exist_ok=True)
    whole, length = undisturbed(given.folder, more)
    print(f"an undisturbed run: {length:.0f} s, {len(PRODUCTS)} products", flush=True)
    for number in range(given.first, given.last + 1):
        kept = given.folder / f"kill{number}.json"
        if not kept.exists():
            kept.write_text(json.dumps(one(number, given.seed, given.folder, whole, length, more)))
        found = json.loads(kept.read_text())
        state = "killed" if found["hit"] else "over"
        print(
            f"{number}: {state} at {found['after']:.1f} s ({found['in']}): {found['wrong'] or 'the same'}", flush=True
        )
    every = [json.loads(path.read_text()) for path in given.folder.glob("kill*.json")]
    bad = [found for found in every if found["wrong"]]
    hits = sum(found["hit"] for found in every)
    print(
        f"{len(every)} kills so far, {hits} of a run that was not over: {len(every) - len(bad)} end with the same bytes"
    )
    return int(bool(bad))


if __name__ == "__main__":
    sys.exit(main())
