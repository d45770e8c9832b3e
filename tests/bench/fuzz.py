"""Feeds damaged files to every reader: python tests/bench/fuzz.py --inputs 100000 --seed 0

An input is a sound file with a few changes: bits, bytes and pieces of any file, values of JSON, numbers of headers. The
reader must take it or raise DynqError, in two seconds of computing, with no more than 500 MB, and write nothing outside
of the file's folder. Prints how often each outcome came for each reader; what is none of these is listed, kept in
--keep, and the exit status is 1. Linux.

An input is determined by the seed and its number: --first N --inputs 1 runs a single one again, in this process.
"""

from __future__ import annotations

import argparse
import base64
import contextlib
import json
import os
import random
import select
import shutil
import signal
import struct
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from sentencepiece import SentencePieceTrainer

sys.path.insert(0, str(Path(__file__).parents[1]))

import tiny_models
from costs import BYTES, SECONDS, Costs

from dynq import chat_template, sweep, tokenizer
from dynq import run as runner
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.evaluate import logits_file
from dynq.export import export
from dynq.folder import RunFolder
from dynq.imatrix import Importance, read_imatrix, write_imatrix
from dynq.recipe import Recipe
from dynq.text import load_text

HANG = 60.0  # seconds on the clock
_SMALL = {"num_hidden_layers": 1, "hidden_size": 64, "intermediate_size": 64, "num_attention_heads": 2}
_NUMBERS = [0, 1, 2, 3, 7, 255, 2**15, 2**16, 2**24, 2**31 - 1, 2**31, 2**32 - 1, 2**40, 2**60, 2**63, 2**64 - 1]
_VALUES: list[Any] = [
    None, True, False, -1, 0, 1, 3, 10**9, 2**60, 10**30, 0.5, -1e308, 1e999, float("nan"), "", "x", "../../x", "/x",
    "a\0b", "\ud800", "\u202e", "<img src=x>", [], [[]], {}, {"a": []}, [1, 2], ["x"] * 3, "9" * 5000, [0] * 5000,
]  # fmt: skip
_TEMPLATE = (
    "{% for m in messages %}<|{{ m['role'] }}|>{% if loop.first and m.content | length > 2 %}{{ bos_token }}{% endif %}"
    "{{ m['content'] | trim }}{% endfor %}{% if add_generation_prompt %}<|assistant|>{% endif %}"
)
_SWEEP = "models: [a, ./b/c]\ntargets: [3.5bpw, 'like:Q4_K_M']\nseeds: [0, 1]\nparameters: {n_chunks: 4, text: 'x'}\n"


@dataclass
class Reader:
    """folder: sound files; names: those that are changed, one at a time; read: what opens them."""

    folder: Path
    names: list[str]
    read: Callable[[Path], Any]


def _read_model(path: Path, allow_requantize: bool = True) -> Any:
    checkpoint = open_checkpoint(path, allow_requantize)
    for name in checkpoint.tensors:
        checkpoint.read(name)
    return checkpoint


def _read_run(path: Path) -> None:
    folder = RunFolder(path)
    step = folder.step("calibrate-text", parameters={"text": "", "n_ctx": 64}, outputs=["out.json"])
    with contextlib.redirect_stdout(None), step as todo:
        if todo:
            folder.write_json("out.json", {})


def _read_sweep(path: Path) -> None:
    asked = sweep.read_sweep(path)
    list(asked.runs())
    runner.plan(asked.models[0], asked.targets, RunFolder(path.parent / "-"), asked.parameters | {"seed": 0})


def _read_template(path: Path) -> None:
    text = path.read_bytes().decode("utf-8", "replace")
    messages = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]
    try:
        chat_template.render(text, messages, answer=True, values={"bos_token": "<s>"})
    except chat_template.TemplateError as error:
        raise DynqError(str(error)) from error


def readers(root: Path) -> dict[str, Reader]:
    """Sound files of every kind below a folder, and what reads them."""
    model = tiny_models.make("llama", root / "model", shard="60KB", **_SMALL)
    (model / "README.md").write_text("---\nlicense: mit\nlanguage: [en]\ntags:\n- a\n---\n# A model\n")
    (model / "generation_config.json").write_text('{"temperature": 0.7}')
    (model / "chat_template.jinja").write_text(_TEMPLATE)
    (model / "added_tokens.json").write_text('{"<x>": 330}')
    checkpoint = open_checkpoint(model)
    formats = {name: "Q8_0" if info.quantizable else "F32" for name, info in checkpoint.tensors.items()}
    recipe = Recipe(formats, "3bpw", 1000, 3.0, 0.1, {"text": "x"})
    (root / "gguf").mkdir()
    export(checkpoint, recipe, None, root / "gguf" / "m.gguf", threads=1)
    (root / "split").mkdir()
    export(checkpoint, recipe, None, root / "split" / "m.gguf", threads=1, shard_bytes=30_000)
    split = sorted(path.name for path in (root / "split").iterdir())

    files = root / "files"
    files.mkdir()
    recipe.save(files / "r.recipe.json")
    sums = {f"blk.0.{kind}.weight": np.ones((n, 32), np.float32) for kind, n in (("attn_q", 1), ("ffn_up_exps", 4))}
    write_imatrix(
        files / "i.gguf", Importance(sums, {k: np.full(len(v), 5, np.float32) for k, v in sums.items()}, ["t"])
    )
    legacy = struct.pack("<i", 2)
    for name in (b"blk.0.attn_q.weight", b"output.weight"):
        legacy += struct.pack("<i", len(name)) + name + struct.pack("<ii8f", 3, 8, *range(8))
    (files / "i.dat").write_bytes(legacy + struct.pack("<ii", 5, 3) + b"abc")
    tokens = np.arange(16, dtype=np.int32).reshape(2, 8)
    logits_file.write(files / "l.logits", tokens, 20, [torch.randn(3, 20).log_softmax(-1) for _ in range(2)])
    line = json.dumps({"messages": [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "there"}]})
    (files / "t.jsonl").write_text((line + "\n") * 8)
    (files / "t.jinja").write_text(_TEMPLATE)
    (files / "sweep.yml").write_text(_SWEEP)
    _read_sweep(files / "sweep.yml")  # what it imports is there before any input is timed
    built = tokenizer.from_gguf(checkpoint.metadata)
    run = RunFolder(root / "run")
    _read_run(run.path)

    def in_folder(path: Path) -> Any:
        return _read_model(path.parent)

    def in_gguf(path: Path) -> Any:
        return tokenizer.from_gguf(_read_model(path).metadata)

    def with_text(path: Path) -> Any:
        return load_text(str(path), built, n_ctx=4, n_chunks=2, seed=0)

    shards = [path.name for path in model.glob("*.safetensors")]
    small = [p.name for p in model.iterdir() if p.suffix in (".json", ".md", ".jinja")]
    found = {
        "gguf": Reader(root / "gguf", ["m.gguf"], in_gguf),
        "gguf header": Reader(root / "gguf", ["m.gguf"], Recipe.from_gguf),
        "split gguf": Reader(root / "split", split, lambda path: in_gguf(path.parent / split[0])),
        "safetensors": Reader(model, shards, in_folder),
        "model folder": Reader(model, small, in_folder),
        "tokenizer.json": Reader(model, ["tokenizer.json"], in_folder),
        "imatrix": Reader(files, ["i.gguf"], read_imatrix),
        "imatrix.dat": Reader(files, ["i.dat"], read_imatrix),
        "recipe": Reader(files, ["r.recipe.json"], Recipe.load),
        "logits": Reader(files, ["l.logits"], logits_file.read),
        "run.json": Reader(run.path, ["run.json"], lambda path: _read_run(path.parent)),
        "chats": Reader(files, ["t.jsonl"], with_text),
        "sweep": Reader(files, ["sweep.yml"], _read_sweep),
        "template": Reader(files, ["t.jinja"], _read_template),
    }
    for name, extra in _tokenizers(root).items():
        found[name] = Reader(extra, [name], lambda path: tokenizer.from_directory(path.parent, tiny_models.VOCAB))
    return found


def _tokenizers(root: Path) -> dict[str, Path]:
    """Folders with tokenizers of the other kinds."""
    mistral, spm = root / "mistral", root / "spm"
    mistral.mkdir()
    spm.mkdir()
    SentencePieceTrainer.Train(
        sentence_iterator=iter(["the quick brown fox jumps over the lazy dog", "a fox is no dog"] * 9), num_threads=1,
        model_prefix=str(spm / "tokenizer"), model_type="bpe", vocab_size=300, byte_fallback=True, minloglevel=2,
    )  # fmt: skip
    vocab = [{"rank": i, "token_bytes": base64.b64encode(bytes([i])).decode(), "token_str": ""} for i in range(256)]
    pattern = tiny_models.PRE_TOKENIZERS["tekken"][0]
    config = {"pattern": pattern, "default_vocab_size": 266, "default_num_special_tokens": 10}
    special = [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"}]
    (mistral / "tekken.json").write_text(json.dumps({"config": config, "vocab": vocab, "special_tokens": special}))
    return {"tekken.json": mistral, "tokenizer.model": spm}


# --- changes ----------------------------------------------------------------------------------------------------------


def change(data: bytes, name: str, rng: random.Random) -> bytes:
    """The file with one to four changes."""
    for _ in range(rng.choice((1, 1, 2, 4))):
        if name.endswith(".json") and rng.random() < 0.6:
            data = _change_json(data, rng)
        elif name.endswith(".safetensors") and rng.random() < 0.6:
            length = int.from_bytes(data[:8], "little")
            if length <= len(data):
                header = _change_json(data[8 : 8 + length], rng)
                data = len(header).to_bytes(8, "little") + header + data[8 + length :]
        else:
            data = _change_bytes(data, rng)
    return data


def _change_bytes(data: bytes, rng: random.Random) -> bytes:
    # most of what can go wrong is near the beginning, where headers are
    at = rng.randrange(len(data) + 1) if rng.random() < 0.5 else min(int(rng.expovariate(1 / 400)), len(data))
    size = rng.choice((1, 4, 8, 16, 100))
    kind = rng.randrange(7)
    if kind == 0 and data:
        at = min(at, len(data) - 1)
        return data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :]
    if kind == 1:
        return data[:at] + rng.randbytes(size) + data[at + size :]
    if kind == 2:
        width = rng.choice((4, 8))
        return data[:at] + (rng.choice(_NUMBERS) % 256**width).to_bytes(width, "little") + data[at + width :]
    if kind == 3:
        return data[:at]
    if kind == 4:
        return data[:at] + data[at + size :]
    if kind == 5:
        return data[:at] + data[max(0, at - size) : at] * rng.choice((1, 2, 50)) + data[at:]
    return (
        data[:at]
        + rng.choice((b"\0", b"\xff" * 8, b"[" * 3000, b"{{", b"{%", b'"', b"\n", b"\xed\xa0\x80"))
        + data[at:]
    )


def _change_json(data: bytes, rng: random.Random) -> bytes:
    try:
        whole = json.loads(data)
    except (ValueError, RecursionError):
        return _change_bytes(data, rng)
    holders = [whole]
    for holder in holders:  # grows while it is walked
        children = holder.values() if isinstance(holder, dict) else holder if isinstance(holder, list) else ()
        holders += [child for child in children if isinstance(child, dict | list) and child]
        if len(holders) > 5000:
            break
    # the higher, the likelier: a tokenizer's merges would drown all else
    holder = holders[min(int(rng.expovariate(0.2)), len(holders) - 1)]
    if isinstance(holder, dict) and holder:
        key = rng.choice(list(holder))
        kind = rng.randrange(4)
        if kind == 0:
            del holder[key]
        elif kind == 1:
            holder[str(rng.choice(_VALUES))] = holder[key]
        else:
            holder[key] = rng.choice(_VALUES)
    elif isinstance(holder, list) and holder:
        at = rng.randrange(len(holder))
        if rng.random() < 0.5:
            holder[at] = rng.choice(_VALUES)
        else:
            holder.insert(at, holder[rng.randrange(len(holder))])
    text = json.dumps(whole)
    if rng.random() < 0.05:
        text = text.replace("{", '{"model_type": 1, "model": 2, "x": {}, "x": 3, ', 1)
    return text.encode()


# --- running ----------------------------------------------------------------------------------------------------------


def one(number: int, seed: int, found: dict[str, Reader], work: Path, keep: Path | None) -> tuple[str, str, str]:
    """Reader, outcome and details of one input, which is written in `work`, and kept where it must not be so."""
    rng = random.Random(f"{seed}/{number}")
    kind = rng.choice(list(found))
    reader = found[kind]
    name = rng.choice(reader.names)
    folder = work / reader.folder.name
    if not folder.exists():
        shutil.copytree(reader.folder, folder)
    path = folder / name
    sound = (reader.folder / name).read_bytes()
    path.write_bytes(change(sound, name, rng))
    costs = Costs()
    try:
        with costs:
            reader.read(path)
        outcome, details = "taken", ""
    except DynqError as error:
        outcome, details = "refused", str(error)
        if "\n" in details or not details.isprintable():
            outcome = "message"
    except BaseException as error:
        if isinstance(error, KeyboardInterrupt | SystemExit):
            raise
        outcome = type(error).__name__
        frame = traceback.extract_tb(error.__traceback__)[-1]
        details = f"{error} ({frame.filename}:{frame.lineno})"
    if costs.seconds > SECONDS:
        outcome, details = "slow", f"{costs.seconds:.1f} s, {outcome} {details}"
    if costs.bytes > BYTES:
        outcome, details = "large", f"{costs.bytes >> 20} MiB, {outcome} {details}"
    if elsewhere := costs.outside(work):
        outcome, details = "wrote", f"{elsewhere}, {outcome} {details}"
    if keep is not None and outcome not in ("taken", "refused"):
        shutil.copytree(folder, keep / str(number), dirs_exist_ok=True)
    shutil.rmtree(folder) if reader.folder.name == "run" else path.write_bytes(sound)
    return kind, outcome, details


def _piece(numbers: range, *how: Any) -> tuple[int, int]:
    """A child that runs some inputs: its process id, and the pipe on which it tells of each."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        return child, read
    try:
        os.close(read)
        chat_template._child = None  # the parent's
        with os.fdopen(write, "w") as told:
            for number in numbers:
                told.write(json.dumps(one(number, *how)) + "\n")
                told.flush()
        chat_template._end()
    finally:
        os._exit(0)


def run(first: int, inputs: int, seed: int, found: dict[str, Reader], keep: Path | None = None) -> tuple[Counter, list]:
    """(outcomes {(reader, outcome): times}, [number, reader, outcome, details] of what must not be)."""
    counts: Counter = Counter()
    bad: list[tuple[int, str, str, str]] = []
    number, last = first, first + inputs
    while number < last:
        work = Path(tempfile.mkdtemp(prefix="fuzz-", dir="/dev/shm" if Path("/dev/shm").is_dir() else None))
        piece = range(number, min(number + 500, last))
        child, pipe = _piece(piece, seed, found, work, keep)
        with os.fdopen(pipe, "rb", buffering=0) as told:
            buffer, ended = b"", False
            while not ended:
                ready = select.select([told], [], [], HANG)[0]
                data = told.read(1 << 16) if ready else b""
                buffer += data
                while b"\n" in buffer:
                    line, _, buffer = buffer.partition(b"\n")
                    kind, outcome, details = json.loads(line)
                    counts[kind, outcome] += 1
                    if outcome not in ("taken", "refused"):
                        bad.append((number, kind, outcome, details))
                    number += 1
                ended = not data
        os.kill(child, signal.SIGKILL)
        status = os.waitpid(child, 0)[1]
        if number < piece.stop:
            kind = random.Random(f"{seed}/{number}").choice(list(found))
            outcome = "crash" if ready else "hang"
            counts[kind, outcome] += 1
            bad.append((number, kind, outcome, f"status {status}"))
            if keep:
                shutil.copytree(work, keep / str(number), dirs_exist_ok=True)
            number += 1
        shutil.rmtree(work, ignore_errors=True)
    return counts, bad


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--inputs", type=int, default=100_000)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path)
    args = parser.parse_args()
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as root:
        found = readers(Path(root))
        if args.inputs == 1:
            print(*one(args.first, args.seed, found, Path(tempfile.mkdtemp()), args.keep), sep="\n")
            return 0
        start = time.time()
        counts, bad = run(args.first, args.inputs, args.seed, found, args.keep)
    outcomes = sorted({outcome for _, outcome in counts})
    print(f"{args.inputs} inputs from {args.first}, seed {args.seed}, {time.time() - start:.0f} s")
    print("reader", *outcomes, sep="\t")
    for kind in found:
        print(kind, *(counts[kind, outcome] for outcome in outcomes), sep="\t")
    for line in bad[:50]:
        print(*line, sep=" | ")
    return 1 if bad else 0


if __name__ == "__main__":
    sys.exit(main())
