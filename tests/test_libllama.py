"""llama.cpp's own run of a file beside torch's: they agree, and what goes wrong there leaves torch's numbers alone."""

import importlib.util
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import tiny_models
from test_describe import recipe_for
from typer.testing import CliRunner

from dynq import libllama, text
from dynq.checkpoint import Checkpoint, open_checkpoint
from dynq.cli import app
from dynq.errors import DynqError
from dynq.evaluate import files, kld, tables, tasks
from dynq.export import export
from dynq.folder import RunFolder
from dynq.report import write_files_report

INSTALLED = [package for package in libllama.PACKAGES if importlib.util.find_spec(package)]
if not INSTALLED:
    pytest.skip("no libllama is installed (extra `engine` or `bench`)", allow_module_level=True)

IN_ENGINE = tasks.Asked(engine=True)
CLOSE, APART = 0.05, 0.05  # relative difference, where KLD is above so many nats


@pytest.fixture(params=INSTALLED)
def package(request, monkeypatch) -> str:
    """The only package with a libllama."""
    monkeypatch.setattr(libllama, "PACKAGES", {request.param: libllama.PACKAGES[request.param]})
    return request.param


@pytest.fixture(scope="module")
def small(tmp_path_factory) -> SimpleNamespace:
    """A random model, a file of it that is good, and one that only llama.cpp refuses."""
    folder = tmp_path_factory.mktemp("engine")
    checkpoint = open_checkpoint(tiny_models.make("llama", folder / "llama"))
    short = {
        key: checkpoint.metadata[key][:-3]
        for key in ("tokenizer.ggml.tokens", "tokenizer.ggml.token_type", "tokenizer.ggml.scores")
        if key in checkpoint.metadata
    }
    other = Checkpoint(
        checkpoint.name,
        checkpoint.path,
        checkpoint.architecture,
        checkpoint.metadata | short,
        checkpoint.tensors,
        checkpoint.read,
        [],
    )
    other.config = checkpoint.config
    for name, source in (("good", checkpoint), ("short", other)):
        export(source, recipe_for(source, "Q8_0"), None, folder / f"{name}.gguf", threads=1)
    (folder / "dogs.txt").write_text("the quick brown fox jumps over the lazy dog " * 40)
    settings = {"text": str(folder / "dogs.txt"), "n_ctx": 32, "n_chunks": 3}
    return SimpleNamespace(
        model=folder / "llama", good=folder / "good.gguf", short=folder / "short.gguf", text=settings
    )


@pytest.fixture(scope="module")
def trained(tmp_path_factory) -> SimpleNamespace:
    """The embedded model in four formats, and what users ask."""
    folder = tmp_path_factory.mktemp("trained")
    checkpoint = open_checkpoint("dynq-tiny")
    paths = [folder / f"{fmt}.gguf" for fmt in ("Q2_K", "Q4_0", "Q4_1", "Q8_0")]
    for path in paths:
        export(checkpoint, recipe_for(checkpoint, path.stem), None, path, threads=1)
    (folder / "asked.txt").write_text("\n\n".join(m[-1]["content"] for m in text.prompts("evaluate")))
    return SimpleNamespace(paths=paths, text=str(folder / "asked.txt"))


def test_engine_and_torch_agree(package, trained, tmp_path):
    settings = {"text": trained.text, "n_ctx": 128, "n_chunks": 4, "asked": IN_ENGINE}
    found = files.against_original("dynq-tiny", trained.paths, RunFolder(tmp_path / "out"), **settings)
    assert package.replace("llama_cpp", "llama-cpp-python") in found["asked"]["engine"]["library"]
    both = {
        entry["label"]: (entry["statistics"]["Mean KLD"], entry["engine"]["statistics"]["Mean KLD"])
        for entry in found["files"]
    }
    apart = {label: pair for label, pair in both.items() if pair[0] > APART}
    assert list(apart) == ["Q2_K.gguf", "Q4_0.gguf", "Q4_1.gguf"], both
    for torchs, engines in apart.values():
        assert engines == pytest.approx(torchs, rel=CLOSE)
    # activations of 8 bits cost as much as weights of 8 bits: without that it would not be llama.cpp's arithmetic
    torchs, engines = both["Q8_0.gguf"]
    assert 1.2 * torchs < engines < APART


def test_columns_of_their_own(small, tmp_path, monkeypatch):
    folder = RunFolder(tmp_path / "out")
    plain = files.against_original(small.model, [small.good], folder, **small.text)
    monkeypatch.setattr(files, "load_model", None)  # torch's numbers are there: only llama.cpp runs
    found = files.against_original(small.model, [small.good], folder, asked=IN_ENGINE, **small.text)
    (entry,) = found["files"]
    assert plain["files"] == [{key: value for key, value in entry.items() if key != "engine"}]
    assert entry["engine"].keys() == {"statistics", "domains"}
    (row,) = tables.rows(found)
    assert row["llama.cpp KLD"] == entry["engine"]["statistics"]["Mean KLD"] != row["Mean KLD"]
    assert "llama.cpp KLD" not in tables.rows(plain)[0]
    assert list(tables.statistic_rows(found)[0]) == ["statistic", "good.gguf", "good.gguf, llama.cpp"]

    monkeypatch.setattr(libllama, "Llama", None)
    assert files.against_original(small.model, [small.good], folder, asked=IN_ENGINE, **small.text) == found
    write_files_report(folder, found)
    page = (folder / "report.html").read_text()
    assert "llama.cpp KLD" in page and found["asked"]["engine"]["library"] in page


def test_domains_are_told_apart(small, tmp_path):
    numbers = tmp_path / "numbers.txt"
    numbers.write_text(" ".join(str(i * i) for i in range(200)))
    settings = small.text | {"text": f"{small.text['text']},{numbers}"}
    folder = RunFolder(tmp_path / "out")
    found = files.against_original(small.model, [small.good], folder, asked=IN_ENGINE, **settings)
    (entry,) = found["files"]
    shown = {row["domain"]: row["llama.cpp KLD"] for row in tables.domain_rows(found)}
    assert list(shown) == ["whole", "dogs.txt", "numbers.txt"]
    assert shown["whole"] == pytest.approx((shown["dogs.txt"] + shown["numbers.txt"]) / 2)
    assert shown["numbers.txt"] == entry["engine"]["domains"]["numbers.txt"]["Mean KLD"] != shown["dogs.txt"]


def test_what_llama_cpp_refuses_is_said_and_torch_stays(package, small, tmp_path):
    folder, paths = RunFolder(tmp_path / "out"), [small.short, small.good]
    found = files.against_original(small.model, paths, folder, asked=IN_ENGINE, **small.text)
    good, short = sorted(found["files"], key=lambda entry: entry["label"])
    assert "engine" in good and "engine" not in short
    assert short["statistics"] == good["statistics"]
    reason = short["not_measured"]["engine"]
    assert reason.startswith("llama.cpp does not open this file (") and "wrong shape" in reason
    notes = {row["file"]: row["note"] for row in tables.rows(found)}
    assert reason in notes["short.gguf"] and notes["good.gguf"] is None


def test_against_a_logits_file(small, tmp_path):
    logits = tmp_path / "base.logits"
    folder = RunFolder(tmp_path / "a")
    direct = files.against_original(
        small.model, [small.good], folder, asked=IN_ENGINE, write_logits=logits, **small.text
    )
    by_file = files.against_logits(logits, [small.good], RunFolder(tmp_path / "b"), in_engine=True)
    a, b = (found["files"][0]["engine"]["statistics"] for found in (direct, by_file))
    assert b["Mean PPL(Q)"] == pytest.approx(a["Mean PPL(Q)"]) and b["Same top p"] == a["Same top p"]
    assert tables.rows(by_file)[0]["llama.cpp KLD"] == b["Mean KLD"]


def test_each_chunk_is_a_text_of_its_own(package, small):
    rng = np.random.default_rng(0)
    a, b = rng.integers(3, 300, (2, 32)).astype(np.int32)
    with libllama.Llama(libllama.find(), small.good, n_ctx=32, threads=1) as model:
        first = model.logits(a, 16)
        model.logits(b, 0)
        assert np.array_equal(model.logits(a, 16), first)
        # a row's place: what follows a token does not change it, what stands before does
        changed = np.concatenate([a[:20], b[20:]])
        assert np.allclose(model.logits(changed, 16)[:4], first[:4], atol=1e-3)
        assert not np.allclose(model.logits(changed, 16)[4:], first[4:], atol=0.1)
        assert first.shape == (15, tiny_models.VOCAB) and first.dtype == np.float32


def test_another_vocabulary_is_refused(package, small):
    reference = kld.Reference(np.zeros((1, 32), np.int32), 16, np.zeros((1, 15, 50), np.uint16))
    checkpoint = open_checkpoint(small.good, allow_requantize=True)
    subject = tasks.Subject("good", checkpoint, lambda: None, lambda: reference)
    task = tasks.InEngine(libllama.find(), "", "", {"": 1})
    with pytest.raises(DynqError, match="384 tokens, the reference has 50"):
        task.measure(subject, None)


def test_a_library_of_another_layout_is_refused(small):
    library = libllama.find()

    class Other:
        """Its context has a size that nobody asked for."""

        def __getattr__(self, name):
            return (lambda context: 4096) if name == "llama_n_ctx" else getattr(library.lib, name)

    with pytest.raises(DynqError, match=r"other 1\.0: its llama.cpp takes other parameters"):
        libllama.Llama(libllama.Library("other 1.0", Other()), small.good, n_ctx=32, threads=1)


def test_a_missing_library_is_one_line_before_any_work(small, tmp_path, monkeypatch):
    monkeypatch.setattr(libllama.importlib.util, "find_spec", lambda name: None)
    for run in (
        lambda folder: files.against_original(small.model, [small.good], folder, asked=IN_ENGINE, **small.text),
        lambda folder: files.against_logits(Path(__file__), [small.good], folder, in_engine=True),
    ):
        with pytest.raises(DynqError, match=r'not installed .* pip install "dynq\[engine\]"') as caught:
            run(RunFolder(tmp_path / "out"))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()


def test_a_broken_library_says_why(tmp_path, monkeypatch):
    (tmp_path / "libllama.so").write_text("no library")
    monkeypatch.setattr(libllama, "_files", lambda package: [tmp_path / "libllama.so"])
    with pytest.raises(DynqError, match=r"not installed .*libllama.so: ") as caught:
        libllama.find()
    assert "\n" not in str(caught.value)


def test_command(small, tmp_path):
    out, (where, n_ctx, n_chunks) = tmp_path / "out", small.text.values()
    arguments = [small.model, small.good, "--text", where, "-c", n_ctx, "--chunks", n_chunks, "--out", out]
    done = CliRunner().invoke(app, ["evaluate", *map(str, arguments), "--engine", "llama.cpp"])
    assert done.exit_code == 0 and "llama.cpp KLD" in done.stdout and "good.gguf, llama.cpp" in done.stdout
