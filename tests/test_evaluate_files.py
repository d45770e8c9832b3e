"""Files measured against their original: one table for good and bad ones, nothing computed twice."""

import json
import shutil
import struct
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from conftest import dynq_command
from markup import EVIL, Page, evil
from test_describe import recipe_for
from typer.testing import CliRunner

from dynq.checkpoint import open_checkpoint
from dynq.cli import app
from dynq.errors import DynqError
from dynq.evaluate import files, kld, mmlu, original, precision, tables, where
from dynq.evaluate.tasks import Asked
from dynq.export import export
from dynq.folder import RunFolder
from dynq.report import write_files_report
from dynq.torch_model import load_model

SETTINGS = {"n_ctx": 32, "n_chunks": 3}


@pytest.fixture(autouse=True)
def in_float32(monkeypatch) -> None:
    """The same figures on every processor."""
    monkeypatch.setattr(precision, "has_bfloat16", lambda: False)


@pytest.fixture(scope="module")
def made(tmp_path_factory) -> SimpleNamespace:
    """A tiny model, files of it, texts."""
    folder = tmp_path_factory.mktemp("evaluate")
    model = tiny_models.make("llama", folder / "llama")
    checkpoint = open_checkpoint(model)
    for fmt in ("Q8_0", "Q5_0", "Q4_0", "F32"):
        export(checkpoint, recipe_for(checkpoint, fmt), None, folder / f"{fmt}.gguf", threads=1)
    lazy = "the quick brown fox jumps over the lazy dog "
    (folder / "dogs.txt").write_text(lazy * 40)
    (folder / "numbers.txt").write_text(" ".join(str(i * i) for i in range(200)))
    for part, subject in ((part, subject) for part in ("dev", "test") for subject in ("lazy_dogs", "foxes")):
        (folder / "mmlu" / part).mkdir(parents=True, exist_ok=True)
        lines = (f"the {subject} {i},dog,fox,{i * i},brown,{'ABCD'[i % 4]}\n" for i in range(6 - (part == "dev")))
        (folder / "mmlu" / part / f"{subject}_{part}.csv").write_text("".join(lines))
    return SimpleNamespace(
        folder=folder,
        model=model,
        paths={fmt: folder / f"{fmt}.gguf" for fmt in ("Q8_0", "Q5_0", "Q4_0", "F32")},
        text=f"{folder / 'dogs.txt'},{folder / 'numbers.txt'}",
    )


def with_type(path: Path, to: Path, name: str, kind: int) -> Path:
    """A copy whose header gives another type for a matrix."""
    data = bytearray(path.read_bytes())
    at = data.index(struct.pack("<Q", len(name)) + name.encode()) + 8 + len(name) + 4 + 16
    data[at : at + 4] = struct.pack("<I", kind)
    to.write_bytes(data)
    return to


def other_model(folder: Path, **settings: int) -> Path:
    """A GGUF of a tiny model with other settings."""
    checkpoint = open_checkpoint(tiny_models.make("llama", folder, **settings))
    export(checkpoint, recipe_for(checkpoint, "Q8_0"), None, folder.with_suffix(".gguf"), threads=1)
    return folder.with_suffix(".gguf")


def bad_files(made: SimpleNamespace, tmp_path: Path) -> dict[Path, str]:
    """Files that cannot be measured, and a word of the reason."""
    whole = made.paths["Q8_0"].read_bytes()
    cut, text, header = (tmp_path / name for name in ("cut.gguf", "text.gguf", "header.gguf"))
    cut.write_bytes(whole[: len(whole) * 2 // 3])
    header.write_bytes(whole[:100])
    text.write_text("no GGUF at all")
    vocabulary = other_model(tmp_path / "vocabulary", vocab_size=400)
    shape = other_model(tmp_path / "shape", intermediate_size=192)
    return {
        cut: "truncated",
        header: "cut off",
        text: "not a GGUF",
        vocabulary: "has 400 tokens in its vocabulary, the original 384",
        shape: "blk.0.ffn_gate.weight has shape [192, 128], in the original [160, 128]",
        with_type(made.paths["Q8_0"], tmp_path / "i8.gguf", "blk.0.attn_q.weight", 24): "type I8, for which",
        with_type(made.paths["Q8_0"], tmp_path / "new.gguf", "blk.0.attn_q.weight", 99): "type 99, newer",
    }


def test_bad_files_stand_in_the_table_and_the_others_are_measured(made, tmp_path):
    bad = bad_files(made, tmp_path)
    paths = [made.paths["Q4_0"], *bad, made.paths["Q8_0"]]
    found = files.against_original(made.model, paths, RunFolder(tmp_path / "out"), text=made.text, **SETTINGS)
    assert [entry["label"] for entry in found["files"]] == ["Q4_0.gguf", "Q8_0.gguf"]
    reasons = {failed["label"]: failed["error"] for failed in found["failed"]}
    assert list(reasons) == [path.name for path in bad]
    for path, words in bad.items():
        assert words in reasons[path.name] and "\n" not in reasons[path.name]
        assert str(path) not in reasons[path.name]  # the table names the file already
    assert [row["file"] for row in tables.rows(found)][2:] == [path.name for path in bad]


def test_statistics_are_those_of_kld_whole_and_by_domain(made, tmp_path):
    folder = RunFolder(tmp_path / "out")
    found = files.against_original(made.model, [made.paths["Q4_0"]], folder, text=made.text, **SETTINGS)
    tokens = np.array(folder.read_json("text.json")["tokens"], np.int32)
    assert found["text"]["domains"] == {"dogs.txt": 3, "numbers.txt": 3} and tokens.shape == (6, 32)
    reference = kld.make_reference(load_model(open_checkpoint(made.model)), tokens, tmp_path / "ref", desc="")
    quantized = load_model(open_checkpoint(made.paths["Q4_0"], allow_requantize=True))
    (entry,) = found["files"]
    assert entry["statistics"] == pytest.approx(kld.statistics(kld.measure(quantized, reference, desc="")))
    first = kld.statistics(kld.measure(quantized, reference, chunks=3, desc=""))
    assert entry["domains"]["dogs.txt"] == pytest.approx(first)
    domains = [entry["domains"][name]["Mean KLD"] for name in ("dogs.txt", "numbers.txt")]
    assert np.mean(domains) == pytest.approx(entry["statistics"]["Mean KLD"])
    assert [row["domain"] for row in tables.domain_rows(found)] == ["whole", "dogs.txt", "numbers.txt"]
    assert entry["bpw"] == pytest.approx(8 * entry["tensor_bytes"] / open_checkpoint(made.model).n_weights)


def test_bfloat16_is_told(made, tmp_path, monkeypatch):
    monkeypatch.setattr(precision, "has_bfloat16", lambda: True)
    monkeypatch.setattr(precision, "SHARE", 0.1)  # this model is sensitive
    paths, folder = [made.paths["Q4_0"], made.paths["F32"]], RunFolder(tmp_path / "out")
    found = files.against_original(made.model, paths, folder, text=made.text, **SETTINGS)
    coarse, fine = found["files"]
    assert coarse["dtype"] == "bfloat16" and 0 < coarse["floor"] < 0.1 * coarse["statistics"]["Mean KLD"]
    assert fine["dtype"] == "float32" and abs(fine["statistics"]["Mean KLD"]) < 1e-6
    notes = [row["note"] for row in tables.rows(found)]
    assert notes == [f"computed in bfloat16: floor {coarse['floor']:.2g}", None]
    assert files.against_original(made.model, paths, folder, text=made.text, **SETTINGS) == found  # from what is kept


def test_nothing_is_computed_twice(made, tmp_path, monkeypatch):
    calls = []

    def counted(name):
        original = getattr(kld, name)
        monkeypatch.setattr(kld, name, lambda *args, **more: (calls.append(name), original(*args, **more))[1])

    counted("make_reference")
    counted("measure")
    folder = RunFolder(tmp_path / "out")
    run = lambda *names, text=made.text: files.against_original(  # noqa: E731
        made.model, [made.paths[name] for name in names], folder, text=text, **SETTINGS
    )
    first = run("Q4_0")
    assert calls == ["make_reference", "measure"]
    renamed = shutil.copy(made.paths["Q4_0"], tmp_path / "renamed.gguf")
    again = files.against_original(made.model, [made.paths["Q8_0"], renamed], folder, text=made.text, **SETTINGS)
    assert calls == ["make_reference", "measure", "measure"]
    statistics = {entry["label"]: entry["statistics"] for entry in again["files"]}
    assert statistics["renamed.gguf"] == first["files"][0]["statistics"]
    monkeypatch.setattr(files, "load_model", None)  # everything is there: no model is loaded
    assert run("Q4_0") == first
    monkeypatch.undo()
    run("Q4_0", text=str(made.folder / "dogs.txt"))  # another text: the large file is replaced
    assert len(list(folder.path.glob("reference-*.u16"))) == 1


def test_the_original_in_full_precision_does_not_diverge(made, tmp_path):
    paths = [made.paths["F32"], made.paths["Q8_0"], made.paths["Q8_0"]]
    found = files.against_original(made.model, paths, RunFolder(tmp_path / "out"), text=made.text, **SETTINGS)
    assert len(found["files"]) == 2  # a file given twice counts once
    small, full = found["files"]
    assert abs(full["statistics"]["Mean KLD"]) < 1e-6 < small["statistics"]["Mean KLD"]
    assert full["statistics"]["Same top p"] == 1


def test_mixes_are_the_line_and_worse_files_are_marked(made, tmp_path):
    folder = RunFolder(tmp_path / "out")
    paths = [made.paths[name] for name in ("Q8_0", "Q4_0")]
    found = files.against_original(made.model, paths, folder, text=made.text, with_mixes=True, **SETTINGS)
    lines = {entry["label"]: entry for entry in found["files"] if entry["kind"] == "mix"}
    own = {entry["label"]: entry for entry in found["files"] if entry["kind"] == "file"}
    assert lines and found["mixes_with_importance"] is False
    entry = own["Q4_0.gguf"]
    assert entry["kld_ratio"] == pytest.approx(entry["statistics"]["Mean KLD"] / entry["mix_kld"])
    assert "/ mixes" in tables.rows(found)[0]
    write_files_report(folder, found)
    page, picture = ((folder / name).read_text() for name in ("report.html", "frontier.svg"))
    assert "Q4_0.gguf" in page and "numbers.txt" in page and "99.9% KLD" in page and picture in page
    assert "llama.cpp&#x27;s mixes" in picture


ASKED = {"mmlu_limit": 4, "greedy": 3, "where": 2}


def asked(made: SimpleNamespace) -> Asked:
    return Asked(str(made.folder / "mmlu"), **ASKED)


def test_what_else_is_asked_is_measured_once_and_shown(made, tmp_path, monkeypatch):
    folder, bad = RunFolder(tmp_path / "out"), tmp_path / "bad.gguf"
    bad.write_text("no GGUF at all")
    paths = [made.paths["F32"], bad, made.paths["Q4_0"]]

    def run():
        return files.against_original(made.model, paths, folder, text=made.text, asked=asked(made), **SETTINGS)

    found = run()
    small, full = found["files"]
    assert [failed["label"] for failed in found["failed"]] == ["bad.gguf"]

    # the original in another coat answers as it does, and no layer of it costs anything
    score = found["asked"]["mmlu"]["original"]
    assert (score["n"], list(score["subjects"])) == (8, ["foxes", "lazy_dogs"])
    assert full["mmlu"]["accuracy"] == score["accuracy"] and full["mmlu"]["changed"] == 0
    assert full["greedy"]["share"] == 1 and full["where"]["layers"]["rows"] == []
    assert small["greedy"]["n"] == found["asked"]["greedy"]["prompts"] == 3
    assert small["mmlu"]["efficiency"] == mmlu.efficiency(small["mmlu"]["accuracy"], small["file_bytes"])

    worst = small["where"]["tokens"]
    assert worst[0]["kld"] == pytest.approx(small["statistics"]["Maximum KLD"]) and len(worst) == 2
    assert all(token["domain"] == ("dogs.txt", "numbers.txt")[token["chunk"] // 3] for token in worst)
    assert [len(worst[0][top]) for top in ("original_top", "file_top")] == [5, 5]
    layers = small["where"]["layers"]
    assert {"blk.0", "blk.1", "blk.2", "token_embd.weight"} <= {row["name"] for row in layers["rows"]}
    assert layers["chunks"] == 3 and layers["rows"] == sorted(layers["rows"], key=lambda row: -row["saved"])

    for module in (files, original):
        monkeypatch.setattr(module, "load_model", None)
    monkeypatch.setattr(mmlu, "prepare", None)
    assert run() == found  # everything is there: no model is loaded, no prompt tokenized

    first, *rows = tables.answer_rows(found)
    assert first["file"] == "original" and [row["file"] for row in rows] == ["Q4_0.gguf", "F32.gguf"]
    assert rows[1]["same greedy, %"] == 100 and rows[1]["changed"] == 0 and first["changed"] is None
    write_files_report(folder, found)
    shown, page = files.summary(found, folder), (folder / "report.html").read_text()
    for words in ("(MMLU-25)/GB", "same greedy, %", "bad.gguf", "blk.0"):
        assert words in shown and words in page
    picture = (folder / "layers.svg").read_text()
    assert "lazy dogs" in page and "its worst tokens" in page and picture in page and "token_embd" in picture
    assert str(made.folder) not in page
    strange = evil(found, {"kind", "dtype", "rows"})
    for holder in (strange["text"], *strange["files"]):  # names that are keys
        holder["domains"] = {name + EVIL: value for name, value in holder["domains"].items()}
    write_files_report(folder, strange)
    for name in ("report.html", "frontier.svg", "layers.svg"):
        shown_page = Page((folder / name).read_text())
        assert "img" not in shown_page.tags and shown_page.handlers == [] and EVIL in shown_page.text
    write_files_report(folder, found | {"asked": {}, "files": [], "failed": []})
    assert not (folder / "layers.svg").exists()


def test_what_cannot_be_asked_of_a_file_is_said(made, tmp_path, monkeypatch):
    def refuse(*_, **__):
        raise ValueError("no such\nlayer")

    monkeypatch.setattr(where, "cost_of_tensors", refuse)
    folder = RunFolder(tmp_path / "out")
    settings = {"text": made.text, "asked": Asked(where=1), **SETTINGS}
    found = files.against_original(made.model, [made.paths["Q4_0"]], folder, **settings)
    (entry,) = found["files"]
    reason = "cannot be read (ValueError: no such layer)"
    assert entry["not_measured"] == {"where": reason} and "where" not in entry and "statistics" in entry
    assert tables.rows(found)[0]["note"] == f"no where: {reason}" and tables.answer_rows(found) == []
    write_files_report(folder, found)
    assert reason in (folder / "report.html").read_text()


def entry_of(label, size, divergence, kind="file"):
    return {"label": label, "kind": kind, "tensor_bytes": size, "statistics": {"Mean KLD": divergence}}


def test_dominated_files():
    entries = [entry_of("a", 5, 0.3), entry_of("b", 6, 0.4), entry_of("c", 6, 0.2), entry_of("d", 6, 0.2)]
    entries += [entry_of("Q2_K", 1, 0.01, "mix"), {"label": "e", "kind": "file", "error": "no"}]
    ranked = files._ranked(entries)
    marks = {entry["label"]: entry.get("dominated_by") for entry in ranked["files"]}
    assert marks == {"Q2_K": None, "a": None, "b": "a", "c": None, "d": None}
    assert ranked["failed"] == [{"label": "e", "error": "no"}]


def test_logits_file_there_and_back(made, tmp_path):
    logits = tmp_path / "base.logits"
    paths = [made.paths["Q4_0"]]
    direct = files.against_original(
        made.model, paths, RunFolder(tmp_path / "a"), text=made.text, write_logits=logits, **SETTINGS
    )
    other = other_model(tmp_path / "other", vocab_size=400)
    by_file = files.against_logits(logits, [*paths, other], RunFolder(tmp_path / "b"))
    a, b = (found["files"][0]["statistics"] for found in (direct, by_file))
    for name in ("Mean KLD", "Mean PPL(Q)", "Same top p", "RMS Δp"):
        assert b[name] == pytest.approx(a[name], rel=2e-3)
    assert b["Mean PPL(base)"] < a["Mean PPL(base)"]  # the clip at 16 nats flatters this random original
    assert [entry["label"] for entry in by_file["failed"]] == ["other.gguf"]
    assert "400 tokens in its vocabulary, the reference 384" in by_file["failed"][0]["error"]
    assert by_file["text"]["chunks"] == 6 and by_file["text"]["n_ctx"] == 32


def test_mistakes_are_one_line(made, tmp_path, monkeypatch):
    def refused(words, *paths, **settings):
        with pytest.raises(DynqError, match=words):
            files.against_original(
                made.model,
                paths or (made.paths["Q8_0"],),
                RunFolder(tmp_path / "out"),
                **{"text": made.text, **SETTINGS, **settings},
            )

    (tmp_path / "short.txt").write_text("the quick brown fox")
    refused("short.txt: .* fewer than one chunk of 32", text=f"{tmp_path / 'short.txt'},{made.text}")
    refused("none.txt: no such file", text=str(tmp_path / "none.txt"))
    refused("none.gguf: no such file", tmp_path / "none.gguf")
    refused("a folder", tmp_path)
    refused("at least 1 of 16", n_ctx=8)
    refused(
        "no folder with dev/ and test/", asked=Asked(str(tmp_path)), text=str(tmp_path / "none.txt")
    )  # first of all
    monkeypatch.setattr(kld.shutil, "disk_usage", lambda path: SimpleNamespace(free=10))
    refused("GiB are free")


def test_command(made, tmp_path):
    out, text = tmp_path / "out", ("--text", made.text, "-c", "32", "--chunks", "3")

    def run(*arguments):
        return CliRunner().invoke(app, ["evaluate", str(made.model), *map(str, arguments), *text, "--out", str(out)])

    done = run(made.paths["Q4_0"], "--json")
    assert done.exit_code == 0
    assert json.loads(done.stdout) == json.loads((out / "evaluation.json").read_text())
    assert (out / "report.html").exists() and (out / "frontier.svg").exists()
    shown = run(made.paths["Q4_0"]).stdout
    assert all(words in shown for words in ("Q4_0.gguf", "numbers.txt", "RMS Δp", "Cor(ln(PPL(Q)), ln(PPL(base)))"))
    done = run(made.paths["Q4_0"], "--mmlu", made.folder / "mmlu", "--mmlu-limit", "1", "--greedy", "1", "--where", "1")
    assert all(words in done.stdout for words in ("MMLU 95 %", "same greedy, %", "diverges most", "layers.svg"))
    (tmp_path / "text.gguf").write_text("none")
    done = run(tmp_path / "text.gguf", "--mmlu", made.folder / "mmlu")
    assert done.exit_code == 2 and "not a GGUF" in done.stdout  # nothing could be measured


def test_command_refuses_before_any_work(made, tmp_path):
    run = tmp_path / "run"
    run.mkdir()
    (run / "run.json").write_text("{}")
    for arguments, words in (
        ((made.model, made.paths["Q8_0"], "--out", run), "the folder of a run"),
        ((made.model, "--out", tmp_path / "out"), "no file to measure"),
        ((made.model, made.paths["Q8_0"], "--engine", "onnx", "--out", tmp_path / "out"), "torch and llama.cpp"),
        ((made.paths["Q8_0"], "--logits", "x", "--mixes", "--out", tmp_path / "out"), "--logits brings its own text"),
        (
            (made.paths["Q8_0"], "--logits", "x", "--greedy", "1", "--out", tmp_path / "out"),
            "--mmlu, --greedy, --where",
        ),
        ((made.model, made.paths["Q8_0"], "--mmlu-limit", "1", "--out", tmp_path / "out"), "add --mmlu"),
    ):
        done = dynq_command("evaluate", *arguments)
        assert done.returncode == 2 and done.stdout == "" and words in done.stderr and done.stderr.count("\n") == 1
