"""Sweeps: what a file asks for, runs that fail beside runs that do not, and going on."""

import json
import re
import shutil

import pytest
from conftest import PARAMETERS, TARGET, dynq_command

from dynq import run as runner
from dynq import sweep
from dynq.errors import DynqError
from dynq.folder import RunFolder
from dynq.report import write_sweep_report


@pytest.fixture
def read(tmp_path):
    def write(text):
        (tmp_path / "sweep.yml").write_text(text)
        return sweep.read_sweep(tmp_path / "sweep.yml")

    return write


def test_file_is_read(read):
    asked = read("models: [a, ./b/c]\ntargets: [3.5bpw, 'like:Q4_K_M']\nseeds: [0, 1]\nparameters: {n_chunks: 4}\n")
    assert asked == sweep.Sweep(["a", "./b/c"], ["3.5bpw", "like:Q4_K_M"], [0, 1], {"n_chunks": 4})
    assert [name for _, _, name in asked.runs()] == ["a-seed0", "a-seed1", "c-seed0", "c-seed1"]
    asked = read("models: [a]\ntargets: [3bpw]\n")
    assert asked.seeds == [0] and list(asked.runs()) == [("a", 0, "a")]


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("models: [", "not readable as YAML"),
        ("models: &a [x]\ntargets: *a", "has aliases"),
        ("just words", "needs models"),
        ("targets: [3bpw]", r"models must be a list of names, each once, not \[\]"),
        ("models: a\ntargets: [3bpw]", "models must be a list of names"),
        ("models: [a]\ntargets: [3.5]", r"targets must be a list of sizes.*3\.5"),
        ("models: [a, a]\ntargets: [3bpw]", "each once"),
        ("models: [a]\ntargets: [3bpw]\nseeds: [yes]", "seeds must be a list of whole numbers"),
        ("models: [a]\ntargets: [3bpw]\nseed: 1", "'seed' is unknown; there are models, targets, seeds, parameters"),
        ("models: [a]\ntargets: [3bpw]\nparameters: [1]", "parameters must be a mapping"),
        ("models: [a]\ntargets: [3bpw]\nparameters: {seed: 1}", r"write seeds: \[1\]"),
    ],
)
def test_mistakes_in_the_file_are_named(read, text, message):
    with pytest.raises(DynqError, match=message):
        read(text)


def test_missing_file_and_models_of_one_name(tmp_path):
    with pytest.raises(DynqError, match=r"sweep\.yml: no such file"):
        sweep.read_sweep(tmp_path / "sweep.yml")
    with pytest.raises(DynqError, match="two models are called tiny"):
        list(sweep.Sweep(["a/tiny", "b/Tiny"], ["3bpw"], [0], {}).runs())
    with pytest.raises(DynqError, match=r"the model '\.\./\.\.' gives its runs no name"):  # else beside the sweep
        list(sweep.Sweep(["../.."], ["3bpw"], [0], {}).runs())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"parameters": {"n_cxt": 4}}, "no notebook has a parameter 'n_cxt'"),
        ({"parameters": {"n_ctx": "4"}}, "n_ctx must be of type int"),
        ({"targets": ["big"]}, "'big' is not a size"),
        ({"seeds": [-1]}, "seed must be at least 0"),
    ],
)
def test_what_no_run_could_do_is_refused_before_any(tmp_path, change, message):
    asked = sweep.Sweep(["dynq-tiny"], ["3bpw"], [0], {})._replace(**change)
    with pytest.raises(DynqError, match=message):
        sweep.run_sweep(asked, RunFolder(tmp_path / "sweep"))
    assert not (tmp_path / "sweep").exists()


def evaluation(targets, kld):
    """As notebook 07 writes it, as far as a summary reads it."""
    made, files = [], []
    for i, target in enumerate(targets):
        statistics = {"Mean KLD": kld / (i + 1), "Mean KLD ±": 0.001, "Same top p": 0.9}
        files.append(
            {
                "label": f"dynq {target}",
                "file_bytes": 100 + i,
                "tensor_bytes": 90,
                "bpw": 3.0 + i,
                "statistics": statistics,
            }
        )
        made.append(
            {
                "target": target,
                "label": f"dynq {target}",
                "file": f"{target}.gguf",
                "mix_kld": kld,
                "kld_ratio": 1 / (i + 1),
                "inside": True,
            }
        )
    return {"files": files, "targets": made}


def test_one_failure_stops_no_other_and_the_rest_goes_on(tmp_path, monkeypatch):
    """What runs do is pretended: seed 1 has a defect, seed 2 a mistake, and 1bpw is too small for every seed."""
    asked = sweep.Sweep(["dynq-tiny", str(tmp_path / "gone")], ["3bpw", "1bpw", "5bpw"], [0, 1, 2, 3], {})
    folder, ran = RunFolder(tmp_path / "sweep"), []

    def execute(tasks, own, stream=None):
        seed = tasks[0].parameters["seed"]
        ran.append((own.path.name, tasks[-1].parameters["targets"]))
        if errors and seed in errors:
            raise errors[seed]
        own.write_json("evaluation.json", evaluation(tasks[-1].parameters["targets"], 0.1 * (seed + 1)))
        (own / "report.html").write_text("report")

    monkeypatch.setattr(runner, "execute", execute)
    errors = {1: runner.RunFailed("a defect"), 2: DynqError("a mistake")}
    result = sweep.run_sweep(asked, folder)
    assert ran == [(f"dynq-tiny-seed{seed}", ["3bpw", "5bpw"]) for seed in range(4)]
    assert [run["folder"] for run in result["runs"]] == ["dynq-tiny-seed0", "dynq-tiny-seed3"]
    told = {(f["folder"], f["target"]): (f["kind"], f["error"]) for f in result["failed"]}
    assert told["dynq-tiny-seed1", "5bpw"] == ("defect", "a defect")
    assert told["dynq-tiny-seed2", "3bpw"] == ("mistake", "a mistake")
    assert all("smallest possible" in told[f"dynq-tiny-seed{seed}", "1bpw"][1] for seed in range(4))
    assert all("gone" in told[f"gone-seed{seed}", target][1] for seed in range(4) for target in asked.targets)
    assert len(told) == len(result["failed"]) == 4 + 2 * 2 + 4 * 3
    said = sweep.summary(result, folder)
    assert "failed: dynq-tiny-seed1, 5bpw: a defect" in said and str(folder / "sweep.html") in said

    ran.clear()
    errors = {}
    again = sweep.run_sweep(asked, folder)
    assert [name for name, _ in ran] == ["dynq-tiny-seed1", "dynq-tiny-seed2"], "what was done is kept"
    assert len(again["runs"]) == 4 and again["runs"][0] == result["runs"][0]
    ran.clear()
    sweep.run_sweep(asked._replace(targets=["3bpw"], seeds=[0, 3]), folder)
    assert ran == [("dynq-tiny-seed0", ["3bpw"]), ("dynq-tiny-seed3", ["3bpw"])], "other targets are another run"

    write_sweep_report(folder, again)
    page = (folder / "sweep.html").read_text()
    assert page.count('class="plotly-graph-div"') == 1 and "a mistake" not in page and "smallest possible" in page
    for name in ("dynq-tiny-seed0", "dynq-tiny-seed3"):
        assert f'<a href="{name}/report.html">' in page
    write_sweep_report(folder, again | {"runs": []})
    assert "plotly-graph-div" not in (folder / "sweep.html").read_text().split("</script>")[-1]


def test_other_text_is_another_run(tmp_path, monkeypatch):
    text, ran = tmp_path / "mine.txt", []
    text.write_text("one")

    def execute(tasks, own, stream=None):
        ran.append(own.path.name)
        own.write_json("evaluation.json", evaluation(["3bpw"], 0.1))
        (own / "report.html").write_text("report")

    monkeypatch.setattr(runner, "execute", execute)
    asked = sweep.Sweep(["dynq-tiny"], ["3bpw"], [0], {"text": str(text)})
    for content, times in (("one", 1), ("one", 1), ("two", 2)):
        text.write_text(content)
        sweep.run_sweep(asked, RunFolder(tmp_path / "sweep"))
        assert len(ran) == times


def test_command(quick_run, tmp_path):
    """A real run within a sweep is the run that `dynq run` makes; a target that cannot be had is named at the end."""
    parameters = json.dumps(PARAMETERS)
    (tmp_path / "sweep.yml").write_text(f"models: [dynq-tiny]\ntargets: [{TARGET}, 1bpw]\nparameters: {parameters}\n")
    out = tmp_path / "out"
    shutil.copytree(quick_run[0], out / "dynq-tiny")  # as if the sweep had been cut off at the end of its run
    done = dynq_command("sweep", tmp_path / "sweep.yml", "--out", out)
    assert done.returncode == 2, done.stderr
    assert re.search(rf"^dynq-tiny +{TARGET} +0 .* dynq-tiny/{TARGET}\.gguf$", done.stdout, re.M)
    assert "failed: dynq-tiny, 1bpw: target 1bpw" in done.stdout and "Traceback" not in done.stderr
    assert done.stderr.splitlines()[-1] == "dynq: 1 of the sweep's files failed"
    result = json.loads((out / "sweep.json").read_text())
    own = json.loads((quick_run[0] / "evaluation.json").read_text())
    (made,) = result["runs"][0]["files"]
    assert made["kld_ratio"] == own["targets"][0]["kld_ratio"]

    again = dynq_command("sweep", tmp_path / "sweep.yml", "--out", out, "--json")
    assert json.loads(again.stdout) == result and "03_calibrate" not in again.stderr
    done = dynq_command("sweep", tmp_path / "sweep.yml", "--out", out / "dynq-tiny")
    assert done.returncode == 2 and "the folder of a single run" in done.stderr
