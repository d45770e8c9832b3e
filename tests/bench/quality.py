"""Quality at equal bytes: what `dynq run` makes beside llama.cpp's mixes, and beside published recipes.

    python tests/bench/quality.py dynq-tiny --quick
    python tests/bench/quality.py dynq-tiny --text sampled,languages,chats.jsonl,code.txt,wiki.txt --skip 100
    python tests/bench/quality.py dynq-tiny --profile cpu-arm --text ...
    python tests/bench/quality.py dynq-tiny --recipes tests/bench/recipes/*.json --text ...
    python tests/bench/quality.py MODEL --search 2min -p n_chunks=64

Ours is a normal `dynq run` with targets such as like:Q4_K_M, in OUT/run; options that are not known here go to it as
they are. The mixes are made by llama.cpp's own quantizer (libllama, from the extra `bench`) out of the original in
its own 16 bits, with the run's imatrix; without the extra by the same rules and our encoders at level `plain`. The
first line says which. A recipe is a table of recipes/ (see published.py), a recipe file or any GGUF: encoded in the
same way, and dynq gets as many bytes as that file has.

Both sides are scored on the same text, which calibration has not read, each file of --text a domain; "sampled" is the
run's own evaluation text, "languages" the package's prompts of its evaluation split that are not in English. --skip
leaves out the start of each file, where that served to choose a constant; the two words have all of theirs (the sampled
text is another for each seed and number of chunks). KLD in nats; top-1 is how often the most likely token is the
original's; bytes are those of the tensors. Seconds are of allocation and export for ours (calibration and sensitivity,
which all targets share, stand below), of the quantizer alone for the mix; they are of the call that made the file.

The last table has the KLDs that are predicted, by the table of sensitivities and with the gains of feedback, beside
those measured on the chunks of calibration text that are kept aside: of `plain`, and of feedback before tuning.

Everything is kept in OUT: a second call makes and scores what is new or has changed.
"""

import argparse
import importlib.metadata
import importlib.util
import json
import re
import subprocess
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

sys.path.insert(0, str(Path(__file__).parents[1]))
import llama_quantize
import published
from passages import passages, write_languages

from dynq import export, mixes
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate.compare import stored_bytes
from dynq.evaluate.files import against_original, set_threads
from dynq.evaluate.kept import digest
from dynq.evaluate.original import Text, labels
from dynq.files import replacing
from dynq.folder import RunFolder, content_hash, file_safe
from dynq.imatrix import read_imatrix
from dynq.recipe import Recipe
from dynq.tables import text_table
from dynq.text import check_held_out, text_files
from dynq.torch_model import load_tokenizer


class Goal(NamedTuple):
    """The largest ratio of the KLDs, ours / the mix's: on the whole text, and on any domain of it."""

    whole: float
    domain: float


GOALS = {
    **dict.fromkeys(("Q2_K", "IQ2_M", "IQ3_XXS", "Q3_K_S", "Q3_K_M"), Goal(0.30, 0.6)),
    **dict.fromkeys(("IQ4_XS", "Q4_K_S", "Q4_K_M"), Goal(0.45, 0.7)),
    "Q5_K_M": Goal(0.6, 0.8),
}
QUICK = ("Q2_K", "Q3_K_M", "Q4_K_M")
ARM = ("Q4_0", "IQ4_NL")  # no goal of their own
CHUNKS, QUICK_CHUNKS = 8, 4  # of each domain
STATISTICS = {"KLD": "Mean KLD", "99.9 %": "99.9% KLD", "top-1 %": "Same top p"}


@dataclass(frozen=True)
class Pair:
    """Two files of a size. goal: None where there is none; target: what dynq was asked for."""

    name: str
    target: str
    theirs: Path
    goal: Goal | None = None

    @property
    def limit(self) -> str:
        """What of the rival's is not to be exceeded: a mix is as large as its tensors, of a file all bytes count."""
        return "tensor_bytes" if self.target.startswith("like:") else "file_bytes"

    def ours(self, run: RunFolder) -> Path:
        return run / f"{file_safe(self.target)}.gguf"


class Bench:
    """One model in one folder: `run`, `evaluation`, the rivals' files, and times.json, the seconds that each took."""

    def __init__(self, checkpoint: Checkpoint, model: str, out: Path, passed: Sequence[str], threads: int):
        self.checkpoint, self.model, self.passed, self.threads = checkpoint, model, passed, threads
        self.folder, self.run = RunFolder(out), RunFolder(out / "run")
        self.with_llama = importlib.util.find_spec("llama_cpp") is not None
        self.encoder = "dynq's encoders, level plain"
        if self.with_llama:
            self.encoder = f"llama.cpp's quantizer (llama-cpp-python {importlib.metadata.version('llama-cpp-python')})"
        self.seconds: dict[str, float] = {}
        if (self.folder / "times.json").exists():
            self.seconds = self.folder.read_json("times.json")

    def keep(self, **seconds: float) -> None:
        self.seconds |= seconds
        self.folder.write_json("times.json", self.seconds)

    def make(self, targets: Sequence[str], chunks: int) -> None:
        """`dynq run` with these targets, in a process of its own. DynqError where it fails, after its own message."""
        command = [sys.executable, "-m", "dynq.cli", "run", self.model, "--out", str(self.run.path), "--force"]
        command += [word for target in targets for word in ("--target", target)]
        command += ["-p", f"eval_chunks={chunks}", "--threads", str(self.threads), *self.passed]
        products = {"shared": self.run / "sensitivity.parquet"}
        products |= {target: self.run / f"{file_safe(target)}.gguf" for target in targets}
        before = {name: _made(path) for name, path in products.items()}
        took: dict[str, int] = {}
        heading = ""
        with subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, text=True) as process:
            assert process.stderr is not None
            for line in process.stderr:
                sys.stderr.write(line)
                if found := re.fullmatch(r"  (\d+) s\n", line):
                    took[heading] = int(found[1])
                elif re.fullmatch(r"\d\d_[a-z]+(\.\S+)?\n", line):
                    heading = line.strip()
        if process.returncode:
            raise DynqError("dynq run has failed, see above")
        for name, path in products.items():
            if _made(path) != before[name]:
                suffix = "" if name == "shared" else f".{file_safe(name)}"
                own = ("03_calibrate", "04_sensitivity") if name == "shared" else ("05_allocate", "06_export")
                self.keep(**{name: sum(took[step + suffix] for step in own)})

    def rival(self, name: str, mix: str, wanted: Recipe) -> Path:
        """The file of a mix (or of a recipe, with any `mix` for what it says nothing of), made where it is not there.

        DynqError where llama.cpp decides otherwise than `wanted`, or gives up.
        """
        imatrix = self.run / "imatrix.gguf"
        about = [self.checkpoint.fingerprint, content_hash(imatrix), self.encoder]
        folder = self.folder / f"rivals-{digest(about)}"
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / f"{name}.{digest([wanted.formats])}.gguf"
        if path.exists():
            return path
        importance, started = read_imatrix(imatrix), time.monotonic()
        if self.with_llama:
            means = {tensor: importance.mean(tensor) for tensor in importance.sums}
            given = {tensor: mean for tensor, mean in means.items() if mean is not None}
            source = self._original(folder / "original.gguf")
            # a mix is left to llama.cpp's own rules: that `wanted` is what they give is checked below
            overrides = "" if wanted.target == f"like:{mix}" else wanted.to_tensor_types()
            started = time.monotonic()
            with replacing(path) as beside:
                succeeded, said = llama_quantize.quantize(source, beside, mix, given, overrides, self.threads)
                if not succeeded:
                    raise DynqError(f"{name}: llama.cpp's quantizer gives up: {said[-300:]}")
                found = Recipe.from_gguf(beside).formats
                if wrong := [tensor for tensor, fmt in wanted.formats.items() if found[tensor] != fmt]:
                    raise DynqError(
                        f"{name}: llama.cpp writes {wrong[0]} as {found[wrong[0]]}, not {wanted.formats[wrong[0]]}"
                    )
        else:
            export.export(self.checkpoint, wanted, importance, path, imatrix_file=imatrix.name, threads=self.threads)
        self.keep(**{path.name: time.monotonic() - started})
        return path

    def _original(self, path: Path) -> Path:
        """The original as a GGUF of its own 16 or 32 bits."""
        if not path.exists():
            tensors = self.checkpoint.tensors
            stored = {name: "F32" if info.dtype == "F64" else info.dtype for name, info in tensors.items()}
            export.export(self.checkpoint, Recipe(stored, "original", 0, 0.0, None), None, path, threads=self.threads)
        return path

    def mix(self, name: str) -> Pair:
        chosen = mixes.mix(name, self.checkpoint.tensors, self.checkpoint.metadata, True)
        size = stored_bytes(chosen, self.checkpoint.tensors)
        recipe = Recipe(chosen, f"like:{name}", size, 8 * size / self.checkpoint.n_weights, None)
        return Pair(name, f"like:{name}", self.rival(f"mix-{name}", name, recipe), GOALS.get(name))

    def recipe(self, path: Path) -> Pair:
        theirs = self.rival(f"recipe-{path.stem}", "Q4_K_M", published.read(path, self.checkpoint))
        return Pair(path.stem, f"{theirs.stat().st_size}B", theirs)

    def text(self, spec: str, chunks: int, skip: int) -> Text:
        """The domains of `spec`, so many chunks of each behind the first `skip`, of the run's context length."""
        sampled = self.run.read_json("evaluate-text.json")
        own = np.array(sampled["tokens"], np.int32)
        words = [word.strip() for word in spec.split(",")]
        files = text_files(",".join(word for word in words if word not in ("sampled", "languages")))
        check_held_out(self.run.state["steps"]["calibrate-text"]["parameters"]["text"], ",".join(map(str, files)))
        parts = {"sampled": own[:chunks]} if "sampled" in words else {}
        tokenizer = load_tokenizer(self.checkpoint)
        if "languages" in words:
            file = write_languages(self.folder / "languages.jsonl")
            parts["languages"] = passages(file, tokenizer, n_ctx=own.shape[1], chunks=chunks, skip=0)
        for label, file in zip(labels(files), files, strict=True):
            parts[label] = passages(file, tokenizer, n_ctx=own.shape[1], chunks=chunks, skip=skip)
        tokens = np.concatenate(list(parts.values()))
        sizes = {label: len(part) for label, part in parts.items()}
        return Text(f"{', '.join(parts)}: {len(tokens)} chunks", digest([tokens.tolist()]), tokens, sizes)

    def scores(self, pairs: Sequence[Pair], text: Text) -> dict[str, dict[str, Any]]:
        """File name -> its entry of `against_original`."""
        files = [path for pair in pairs for path in (pair.theirs, pair.ours(self.run))]
        found = against_original(
            self.checkpoint, files, RunFolder(self.folder / "evaluation"), text=text, threads=self.threads
        )
        if found["failed"]:
            raise DynqError("; ".join(f"{entry['label']}: {entry['error']}" for entry in found["failed"]))
        return {entry["label"]: entry for entry in found["files"]}


def _made(path: Path) -> int | None:
    return path.stat().st_mtime_ns if path.exists() else None


def ratios(ours: Mapping[str, float], theirs: Mapping[str, float]) -> dict[str, float]:
    """Ours / theirs, below 1 where ours is better: KLD, its 99.9 % quantile, tokens whose most likely one changes."""
    changed = [1 - side["Same top p"] for side in (ours, theirs)]
    return {
        "KLD": ours["Mean KLD"] / theirs["Mean KLD"],
        "99.9 %": ours["99.9% KLD"] / theirs["99.9% KLD"],
        "top-1": changed[0] / changed[1] if changed[1] else float(changed[0] > 0),
    }


def result(
    pair: Pair, theirs: Mapping[str, Any], ours: Mapping[str, Any], seconds: Mapping[str, float]
) -> dict[str, Any]:
    """What is said of a pair: the figures of both sides, ratios, the worst domain and whether the goals are met.

    theirs, ours: entries of `against_original`. A recipe (no mix) is beaten where all three ratios are below 1.
    DynqError where ours has more bytes.
    """
    if ours[pair.limit] > theirs[pair.limit]:
        raise DynqError(f"{pair.name}: {ours[pair.limit]:,} bytes, {theirs[pair.limit]:,} are allowed")
    sides = {"theirs": (theirs, pair.theirs.name), "ours": (ours, pair.target)}
    kept = ("file_bytes", "tensor_bytes", "statistics", "domains")
    domains = {name: ratios(own, theirs["domains"][name]) for name, own in ours["domains"].items()}
    worst = max(domains, key=lambda name: domains[name]["KLD"])
    whole = ratios(ours["statistics"], theirs["statistics"])
    return {
        "name": pair.name,
        "ratios": whole,
        "domain_ratios": domains,
        "worst_domain": worst,
        "goal": pair.goal and pair.goal._asdict(),
        "met": pair.goal and whole["KLD"] <= pair.goal.whole,
        "met_in_domains": pair.goal and domains[worst]["KLD"] <= pair.goal.domain,
        "better": all(ratio < 1 for ratio in whole.values()),
        **{
            side: {key: entry[key] for key in kept} | {"seconds": seconds.get(name)}
            for side, (entry, name) in sides.items()
        },
    }


def table(results: Sequence[Mapping[str, Any]], who: str) -> str:
    """One row for each pair. who: whose the other side is."""
    rows = []
    for found in results:
        worst = found["domain_ratios"][found["worst_domain"]]["KLD"]
        goal = found["goal"] or {}
        figures = _figures(found["theirs"]["statistics"], found["ours"]["statistics"], found["ratios"], who)
        rows.append(
            {who: found["name"]}
            | {f"bytes: {who}": found["theirs"]["tensor_bytes"], "bytes: dynq": found["ours"]["tensor_bytes"]}
            | figures
            | {"goal": _goal(goal.get("whole"), found["met"])}
            | {"worst domain": found["worst_domain"], "ratio there": round(worst, 3)}
            | {"goal there": _goal(goal.get("domain"), found["met_in_domains"])}
            | {"all below 1": "yes" if found["better"] else "no"}
            | {f"s: {who}": _tenths(found["theirs"]["seconds"]), "s: dynq": _tenths(found["ours"]["seconds"])}
        )
    return text_table(rows)


def domain_table(results: Sequence[Mapping[str, Any]], who: str) -> str:
    """One row for each pair and domain."""
    rows = [
        {who: found["name"], "domain": name}
        | _figures(found["theirs"]["domains"][name], found["ours"]["domains"][name], own, who)
        for found in results
        for name, own in found["domain_ratios"].items()
    ]
    return text_table(rows)


def predictions(run: RunFolder, targets: Sequence[str]) -> list[dict[str, Any]]:
    """One row for each target: predicted and measured KLD and their ratio, before tuning; None of what was not made."""
    rows = []
    for target in targets:
        told = run.read_json(f"{file_safe(target)}.export.json")
        measured = {found["stage"]: found["kld"] for found in told.get("stages", [])}  # not of older versions
        predicted = {"plain": Recipe.load(run / f"{file_safe(target)}.recipe.json").predicted_kld}
        predicted["feedback"] = told["predicted_kld"]
        row: dict[str, Any] = {"target": target}
        for stage, value in predicted.items():
            real = measured.get(stage)
            row |= {f"{stage}: predicted": value if real else None, f"{stage}: measured": real}
            row[f"{stage}: ratio"] = round(value / real, 3) if value and real else None
        rows.append(row)
    return rows


def _figures(
    theirs: Mapping[str, float], ours: Mapping[str, float], own: Mapping[str, float], who: str
) -> dict[str, float]:
    cells: dict[str, float] = {}
    for title, key in STATISTICS.items():
        scale = 100 if title.endswith("top-1 %") else 1
        cells |= {f"{title}: {who}": scale * theirs[key], f"{title}: dynq": scale * ours[key]}
        cells[f"{title.removesuffix(' %')} ratio"] = round(own[title.replace("top-1 %", "top-1")], 3)
    return cells


def _goal(limit: float | None, met: bool | None) -> str | None:
    return None if limit is None else f"{limit} {'met' if met else 'missed'}"


def _tenths(seconds: float | None) -> float | None:
    return None if seconds is None else round(seconds, 1)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model", help="as `dynq run` takes it; comes first")
    parser.add_argument(
        "--quick", action="store_true", help=f"`dynq run --quick`, {', '.join(QUICK)}, {QUICK_CHUNKS} chunks a domain"
    )
    parser.add_argument(
        "--text", default="sampled", help="domains, commas between: .txt, chats .jsonl, sampled, languages"
    )
    parser.add_argument("--skip", type=int, default=0, help="chunks that are left out at the start of each file")
    parser.add_argument("--chunks", type=int, help=f"of each domain, {CHUNKS} by default")
    parser.add_argument("--profile", default="all", help=f"cpu-arm: rows against {' and '.join(ARM)}")
    parser.add_argument("--sizes", help="mixes, commas between, instead of the usual rows; - for none")
    parser.add_argument("--recipes", nargs="+", type=Path, default=[], metavar="FILE", help="published recipes, GGUFs")
    parser.add_argument("--out", type=Path, help="the folder to keep things in, runs/quality-MODEL-PROFILE by default")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--json", action="store_true", help="print JSON and nothing else")
    args, passed = parser.parse_known_args()

    usual = ARM if args.profile == "cpu-arm" else QUICK if args.quick else tuple(GOALS)
    names = usual if args.sizes is None else [name for name in args.sizes.split(",") if name != "-"]
    chunks = args.chunks or (QUICK_CHUNKS if args.quick else CHUNKS)
    set_threads(args.threads)
    checkpoint = open_checkpoint(args.model)
    out = args.out or Path("runs") / f"quality-{file_safe(Path(args.model).name)}-{args.profile}"
    quick = ["--quick"] if args.quick else []
    bench = Bench(checkpoint, args.model, out, ["--profile", args.profile, *quick, *passed], args.threads)

    # a recipe's target is known only with its file, which needs the run's imatrix
    bench.make([f"like:{name}" for name in names] or ["like:Q4_K_M"], chunks)
    pairs = [bench.mix(name) for name in names]
    recipes = [bench.recipe(path) for path in args.recipes]
    if recipes:
        bench.make(sorted({pair.target for pair in recipes}), chunks)
    text = bench.text(args.text, chunks, args.skip)
    scores = bench.scores([*pairs, *recipes], text)
    found = [
        [result(p, scores[p.theirs.name], scores[p.ours(bench.run).name], bench.seconds) for p in group]
        for group in (pairs, recipes)
    ]
    predicted = predictions(bench.run, [pair.target for pair in [*pairs, *recipes]])
    about = {
        "model": checkpoint.name,
        "profile": args.profile,
        "passed": passed,
        "encoder": bench.encoder,
        "text": text.domains,
        "shared_seconds": bench.seconds.get("shared"),
    }
    if args.json:
        told = about | {"sizes": found[0], "recipes": found[1], "predictions": predicted}
        print(json.dumps(told, indent=1, ensure_ascii=False))
        return
    print(f"{checkpoint.name}, profile {args.profile}: mixes and recipes by {bench.encoder}")
    print(
        f"text: {', '.join(f'{name} {count}' for name, count in text.domains.items())} chunks of {text.tokens.shape[1]}"
    )
    for results, who in zip(found, ("mix", "recipe"), strict=True):
        if results:
            print("", table(results, who), "", domain_table(results, who), sep="\n")
    if any(row["plain: measured"] for row in predicted):
        print("", text_table(predicted), sep="\n")
    if shared := bench.seconds.get("shared"):
        print(f"\ncalibration and sensitivity, for all targets: {shared:.0f} s; threads: {args.threads}")


if __name__ == "__main__":
    try:
        main()
    except DynqError as error:
        sys.exit(f"quality: {error}")
