"""The notebooks as a user meets them: by the command, live, cut off, and one by one with papermill."""

import ast
import json
import re
import shutil
import signal
import subprocess
import sys
import time
from html.parser import HTMLParser
from pathlib import Path

import nbformat
import papermill
import pytest
import yaml
from conftest import ARGUMENTS, PARAMETERS, TARGET, dynq_command, same_products
from markup import EVIL, Page, evil
from nbclient import NotebookClient
from test_describe import recipe_for

from dynq import run as runner
from dynq.checkpoint import open_checkpoint
from dynq.export import export
from dynq.folder import RunFolder, content_hash
from dynq.imatrix import read_imatrix
from dynq.recipe import Recipe
from dynq.report import write_report

NOTEBOOKS = Path(__file__).parents[2] / "notebooks"
NAMES = runner.NOTEBOOKS


def test_run_says_what_it_made(quick_run):
    folder, done = quick_run
    evaluation = json.loads((folder / "evaluation.json").read_text())
    size = (folder / "3.5bpw.gguf").stat().st_size
    assert f"{size:,} bytes" in done.stdout
    target = evaluation["targets"][0]
    own = next(e for e in evaluation["files"] if e["label"] == target["label"])
    assert f"{own['bpw']:.3f} bpw" in done.stdout and 3.49 < own["bpw"] <= 3.5
    assert f"{own['statistics']['Mean KLD']:.4f} ± " in done.stdout
    tuned = "kld" in json.loads((folder / "3.5bpw.export.json").read_text())["tuning"]
    assert f"(predicted {own['predicted_kld']:.4f}{', before tuning' if tuned else ''})" in done.stdout
    assert f"{target['kld_ratio']:.2f} of llama.cpp's mixes" in done.stdout
    assert target["below"] in done.stdout and target["above"] in done.stdout
    assert target["generated"]["text"] and "llama.cpp" in done.stdout
    assert f"report: {folder / 'report.html'}" in done.stdout
    for bar in ("sample text", "calibrate", "sensitivity", "measured swaps", "3.5bpw.gguf", "dynq 3.5bpw"):
        assert re.search(rf"^{bar}: 100%", done.stderr, re.M), bar
    assert "\r" not in done.stderr  # no terminal: whole lines only


def test_evaluation_compares_at_the_same_bytes(quick_run):
    evaluation = json.loads((quick_run[0] / "evaluation.json").read_text())
    by_label = {entry["label"]: entry for entry in evaluation["files"]}
    target = evaluation["targets"][0]
    own, below, above = (by_label[target[key]] for key in ("label", "below", "above"))
    assert below["tensor_bytes"] <= own["tensor_bytes"] <= above["tensor_bytes"]
    low, high = sorted(entry["statistics"]["Mean KLD"] for entry in (below, above))
    assert low <= target["mix_kld"] <= high and target["mix_kld"] <= below["statistics"]["Mean KLD"]
    assert target["kld_ratio"] == pytest.approx(own["statistics"]["Mean KLD"] / target["mix_kld"])
    assert by_label[target["uniform"]]["tensor_bytes"] <= own["tensor_bytes"]
    assert own["kind"] == "dynamic" and own["file_bytes"] > own["tensor_bytes"]
    assert Recipe.from_gguf(quick_run[0] / "3.5bpw.gguf").tensor_bytes == own["tensor_bytes"]


@pytest.mark.parametrize("name", NAMES)
def test_executed_notebook_reads_without_javascript(quick_run, name):
    path = (
        quick_run[0]
        / "notebooks"
        / runner.Task(name, "", {"target": TARGET} if name in runner.PER_TARGET else {}).output
    )
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", [])]
    pages = [output.data["text/html"] for output in outputs if "text/html" in output.get("data", {})]
    assert any("<table>" in page for page in pages)
    assert any("plotly" in page for page in pages)
    assert not any("application/vnd.jupyter.widget-view+json" in output.get("data", {}) for output in outputs)
    assert path.stat().st_size < 300_000
    text = "".join(output.get("text", "") for output in outputs)
    assert text.count("\r") <= 2, "redrawn bars are not kept"


class _Links(HTMLParser):
    def __init__(self):
        super().__init__()
        self.links, self.tables = [], 0

    def handle_starttag(self, tag, attrs):
        self.links += [value for key, value in attrs if key in ("src", "href")]
        self.tables += tag == "table"


def test_report_stands_alone(quick_run):
    report = quick_run[0] / "report.html"
    assert report.stat().st_size < 6_000_000
    parser = _Links()
    parser.feed(report.read_text())
    assert parser.links == []
    assert parser.tables >= 3


def test_model_card_is_ready_for_the_hub(quick_run):
    folder, _ = quick_run
    _, front, card = (folder / "model-card.md").read_text().split("---\n", 2)
    assert {"gguf", "quantized"} <= set(yaml.safe_load(front)["tags"]) and "language" not in front
    assert "| 3.5bpw.gguf |" in card and "None" not in card and str(folder) not in card
    target = json.loads((folder / "evaluation.json").read_text())["targets"][0]
    (tag,) = set(re.findall(r"llama-cli -hf USER/REPO:(\S+)", card))
    assert tag in (target["below"], target["above"]) and f"| dynq-tiny-3.5bpw-{tag}.gguf | {tag} |" in card
    for words in (f"ollama run hf.co/USER/REPO:{tag}", "FROM ./3.5bpw.gguf", "lms import 3.5bpw.gguf", "| ffn_down | 12 |"):
        assert words in card
    assert json.loads((folder / "calibrate-text.json").read_text())["sha256"] in card
    assert "\n\n\n" not in card


def test_report_and_card_take_nothing_of_a_model_as_markup(quick_run, tmp_path):
    folder = RunFolder(shutil.copytree(quick_run[0], tmp_path / "run"))
    own_names = {"kind", "label", "target", "file", "below", "above", "like", "uniform", "statistics", "sha256", "fingerprint"}
    for name in ("evaluation.json", "calibrate-text.json", "3.5bpw.export.json"):
        folder.write_json(name, evil(folder.read_json(name), own_names))
    write_report(folder, open_checkpoint("dynq-tiny"))
    page = Page((folder / "report.html").read_text())
    assert "img" not in page.tags and page.handlers == []
    assert page.text.count(EVIL) >= 5  # the model's name, two texts, what was asked and what was answered
    card = (folder / "model-card.md").read_text()
    assert "<img" not in card and card.count("&#60;img src=x onerror=alert(1)&#62;") >= 3


def test_live_notebooks_make_the_same_files(quick_run, tmp_path):
    """Opened in Jupyter (started in their own folder, usual display) and run top to bottom."""
    for name in NAMES:
        notebook = papermill.iorw.load_notebook_node(str(NOTEBOOKS / f"{name}.ipynb"))
        own = {k: v for k, v in PARAMETERS.items() if k in runner.inspect(name)}
        notebook = papermill.parameterize.parameterize_notebook(notebook, own | {"run": str(tmp_path / "live")})
        NotebookClient(notebook, resources={"metadata": {"path": str(NOTEBOOKS)}}, timeout=600).execute()
    assert same_products(quick_run[0], tmp_path / "live") == []


def test_quantized_source_and_foreign_imatrix(quick_run, tmp_path):
    source, imatrix = quick_run[0] / "3.5bpw.gguf", quick_run[0] / "imatrix.gguf"
    arguments = ["run", source, "--target", "3bpw", "--imatrix", imatrix, *ARGUMENTS[4:], "--out", tmp_path / "run"]
    done = dynq_command(*arguments)
    assert done.returncode == 2 and "--allow-requantize" in done.stderr
    done = dynq_command(*arguments, "--allow-requantize")
    assert done.returncode == 0, done.stderr
    assert "The source was quantized already" in done.stdout
    report = (tmp_path / "run" / "report.html").read_text()
    assert "The source was quantized already" in report and "importance matrix: not dynq's own" in report
    assert content_hash(imatrix) in report
    assert read_imatrix(tmp_path / "run" / "imatrix.gguf").sums.keys() == read_imatrix(imatrix).sums.keys()


def test_killed_run_goes_on(quick_run, tmp_path):
    folder = tmp_path / "run"
    command = [sys.executable, "-m", "dynq.cli", *ARGUMENTS, "--out", str(folder)]
    process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    partial = folder / "sensitivity.partial.jsonl"
    _wait(lambda: process.poll() is not None or (partial.exists() and partial.read_text().count("\n") > 20))
    assert process.poll() is None, "the run was over before it could be killed"
    process.send_signal(signal.SIGKILL)
    process.wait()
    _wait(lambda: not _writes(partial))
    assert json.loads((folder / "run.json").read_text())["steps"]["sensitivity"]["state"] == "started"
    kept = len({json.loads(line)["tensor"] for line in partial.read_text().splitlines() if line.endswith("}")})

    done = dynq_command(*ARGUMENTS, "--out", folder)
    assert done.returncode == 0, done.stderr
    rest = int(re.search(r"^sensitivity: 100%.* (\d+)/\1 ", done.stderr, re.M)[1])
    assert 0 < rest <= 85 - kept + 1
    assert "calibrate: nothing it depends on has changed" in (folder / "notebooks" / "03_calibrate.ipynb").read_text()
    assert same_products(quick_run[0], folder) == []


def _wait(condition, seconds=300):
    end = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)


def _writes(path, pause=1.5):
    before = path.stat().st_size
    time.sleep(pause)
    return path.stat().st_size != before


def test_perplexity_does_not_tell_the_pair_apart(quick_run):
    """What notebook 07 says of its worked example holds in the numbers that it shows."""
    notebook = nbformat.read(quick_run[0] / "notebooks" / "07_evaluate.ipynb", 4)
    last = [cell for cell in notebook.cells if cell.cell_type == "code"][-1]
    (page,) = [output.data["text/html"] for output in last.outputs if "data" in output]
    rows = [re.findall(r"<t[dh][^>]*>(.*?)</t[dh]>", row) for row in re.findall(r"<tr>(.*?)</tr>", page)]
    q5, q4 = (dict(zip(rows[0], row, strict=True)) for row in rows[1:])
    value = lambda row, name: float(row[name].removesuffix(" of 16"))  # noqa: E731
    for row in (q5, q4):
        assert abs(value(row, "PPL(Q)/PPL(base)") - 1) < 0.5 * value(row, "±")
    assert value(q4, "gains, nats") > 1.5 * value(q5, "gains, nats")
    assert value(q4, "losses, nats") < 1.5 * value(q5, "losses, nats") < 0
    assert value(q4, "KLD, nats") > 3 * value(q5, "KLD, nats")
    for name in ("same top-1, %", "same greedy answers"):
        assert value(q4, name) < 0.9 * value(q5, name)


def test_second_target_and_a_foreign_file_reuse_what_is_there(quick_run, tmp_path):
    folder, foreign = tmp_path / "run", tmp_path / "theirs.gguf"
    shutil.copytree(quick_run[0], folder)
    original = open_checkpoint("dynq-tiny")
    export(original, recipe_for(original, "Q4_0"), None, foreign, threads=1)
    before = (folder / "sensitivity.parquet").stat().st_mtime_ns
    done = dynq_command(
        *(*ARGUMENTS, "--target", "like:Q2_K", "-p", f"files=['{foreign}']", "--out", folder, "--json")
    )
    assert done.returncode == 0, done.stderr
    evaluation = json.loads(done.stdout)
    assert [target["target"] for target in evaluation["targets"]] == [TARGET, "like:Q2_K"]
    assert (folder / "sensitivity.parquet").stat().st_mtime_ns == before
    before_07 = done.stderr.partition("07_evaluate")[0]  # which measures 3.5bpw.gguf beside the foreign one
    assert not re.search(r"^3.5bpw.gguf: 100%", before_07, re.M)
    assert not re.search(r"^(calibrate|sensitivity|dynq 3.5bpw): 100%", done.stderr, re.M)
    for name in ("05_allocate.like-Q2_K.ipynb", "06_export.like-Q2_K.ipynb", "05_allocate.3.5bpw.ipynb"):
        assert (folder / "notebooks" / name).exists()
    like = next(e for e in evaluation["files"] if e["label"] == "dynq like:Q2_K")
    mix = next(e for e in evaluation["files"] if e["label"] == "Q2_K")
    assert like["tensor_bytes"] <= mix["tensor_bytes"] and mix["kind"] == "other mix"
    assert evaluation["targets"][1]["like"] == "Q2_K" not in [evaluation["targets"][1][k] for k in ("below", "above")]

    compared = json.loads((folder / "compared" / "evaluation.json").read_text())
    assert compared["text"]["sha256"] == json.loads((folder / "evaluate-text.json").read_text())["sha256"]
    entries = {entry["label"]: entry for entry in compared["files"]}
    assert {"3.5bpw.gguf", "like-Q2_K.gguf", "theirs.gguf"} <= entries.keys() and compared["failed"] == []
    own = next(e for e in evaluation["files"] if e["label"] == "dynq 3.5bpw")
    for name, number in own["statistics"].items():  # both ways of 07 measure the same
        assert entries["3.5bpw.gguf"]["statistics"][name] == pytest.approx(number, rel=1e-4, abs=1e-6)
    assert entries["3.5bpw.gguf"]["kld_ratio"] == pytest.approx(evaluation["targets"][0]["kld_ratio"], rel=1e-4)
    assert "theirs.gguf" in (folder / "compared" / "report.html").read_text()
    shown = (folder / "notebooks" / "07_evaluate.ipynb").read_text()
    assert "theirs.gguf" in shown and "RMS Δp" in shown


def test_other_parameters_are_refused(quick_run):
    folder, _ = quick_run
    before = (folder / "run.json").read_bytes()
    for extra, words in (
        (["--seed", "1"], ("seed=0", "1")),
        (["-p", "n_ctx=65"], ("n_ctx=64", "65")),
        (["--pin", "token_embd.weight=Q4_K"], ("pins={}", "Q4_K")),
    ):
        done = dynq_command(*ARGUMENTS, *extra, "--out", folder)
        assert done.returncode == 2
        assert all(word in done.stderr for word in (*words, "--force"))
        assert done.stderr.count("\n") == 1 and done.stdout == ""
    assert (folder / "run.json").read_bytes() == before


def test_one_notebook_by_papermill(quick_run, tmp_path):
    """papermill on its own, as its documentation shows: a new recipe from the table that is there."""
    folder = tmp_path / "run"
    shutil.copytree(quick_run[0], folder)
    done = subprocess.run(
        [
            *(sys.executable, "-m", "papermill", "-k", "python3", str(NOTEBOOKS / "05_allocate.ipynb"), "out.ipynb"),
            *("-p", "run", str(folder), "-p", "target", "3bpw", "-y", "pins: {'blk.0.*': '>=Q4_K'}"),
        ],
        cwd=tmp_path,
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    recipe = Recipe.load(folder / "3bpw.recipe.json")
    assert recipe.bpw <= 3
    assert {recipe.formats[f"blk.0.{kind}.weight"] for kind in ("attn_q", "ffn_up")} == {"Q4_K"}


def test_search_in_a_notebook(quick_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(quick_run[0], folder)
    text = json.loads((folder / "calibrate-text.json").read_text())
    text["tokens"] *= 2  # a search needs six chunks
    (folder / "calibrate-text.json").write_text(json.dumps(text))
    state = json.loads((folder / "run.json").read_text())
    state["steps"]["calibrate-text"]["outputs"]["calibrate-text.json"] = content_hash(folder / "calibrate-text.json")
    (folder / "run.json").write_text(json.dumps(state))
    papermill.execute_notebook(
        str(NOTEBOOKS / "05_allocate.ipynb"),
        str(tmp_path / "out.ipynb"),
        {"run": str(folder), "target": "3bpw", "search": "1s", "threads": 1},
        kernel_name="python3",
        progress_bar=False,
    )
    recipe = Recipe.load(folder / "3bpw.recipe.json")
    told = recipe.provenance["search"]
    assert recipe.bpw <= 3 and told["kld_held_out"][1] <= told["kld_held_out"][0]
    state = json.loads((folder / "run.json").read_text())["steps"]["allocate.3bpw"]
    assert state["parameters"]["search"] == "1s"
    assert (folder / "3bpw.search.jsonl").exists() and "3bpw.search.jsonl" not in state["outputs"]  # it has times
    last = [cell for cell in nbformat.read(tmp_path / "out.ipynb", 4).cells if cell.cell_type == "code"][-1]
    page = last.outputs[-1].data["text/html"]
    assert "KLD held out" in page and "start" in page


def test_mistake_in_a_notebook_is_one_line(quick_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(quick_run[0], folder)
    arguments = [a if a != TARGET else "1bpw" for a in ARGUMENTS]
    done = dynq_command(*arguments, "--out", folder)
    assert done.returncode == 2
    last = done.stderr.splitlines()[-1]
    assert last.startswith("dynq: target 1bpw") and "smallest possible" in last
    assert "Traceback" not in done.stderr


def test_changed_model_is_noticed(quick_run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(quick_run[0], folder)
    state = json.loads((folder / "run.json").read_text())
    state["steps"]["calibrate"]["inputs"]["model"] = "0" * 64
    (folder / "run.json").write_text(json.dumps(state))
    with pytest.raises(Exception, match="has changed since"):
        from dynq.folder import RunFolder

        RunFolder(folder).checkpoint()


@pytest.mark.parametrize("path", sorted(NOTEBOOKS.glob("*.ipynb")), ids=lambda path: path.stem)
def test_notebook_is_thin_and_clean(path):
    notebook = nbformat.read(path, 4)
    nbformat.validate(notebook)
    code = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(cell.outputs == [] and cell.execution_count is None for cell in code), "outputs must be stripped"
    assert notebook.cells[0].cell_type == "markdown" and notebook.cells[0].source.startswith(f"# {path.stem[:2]} ")
    (parameters,) = [cell for cell in code if "parameters" in cell.metadata.get("tags", [])]
    for node in ast.parse(parameters.source).body:
        assert isinstance(node, ast.AnnAssign), "every parameter is annotated"
        ast.literal_eval(node.value)
    names = [node.target.id for node in ast.parse(parameters.source).body]
    assert list(runner.inspect(path.stem)) == names, "papermill sees every parameter"
    assert not any(
        isinstance(node, (ast.FunctionDef, ast.ClassDef)) for cell in code for node in ast.walk(ast.parse(cell.source))
    )
    assert sum(len(cell.source.splitlines()) for cell in code) < 100
