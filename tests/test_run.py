"""The run folder and the strict runner, on notebooks of a few lines."""

import json
import os
import signal
import subprocess
import sys

import nbformat
import pytest

from dynq import run as runner
from dynq.errors import DynqError
from dynq.folder import RunFolder, content_hash, file_safe, sign

# --- the folder -------------------------------------------------------------------------------------------------------


def make(folder, value="made", *, parameters=None, inputs=None, outputs=("out.txt",), parts=(), fail=False):
    """A step that writes `value`; returns whether it was to be done."""
    with folder.step(
        "step", parameters=parameters or {"n": 1}, inputs=inputs or {"model": "abc"}, outputs=outputs, parts=parts
    ) as todo:
        if todo:
            (folder / "out.txt").write_text(value)
        if fail:
            raise KeyboardInterrupt
    return todo


def test_step_is_made_once(tmp_path):
    folder = RunFolder(tmp_path)
    assert make(folder)
    assert not make(folder, "again")
    assert (folder / "out.txt").read_text() == "made"


@pytest.mark.parametrize("damage", ["changed", "missing", "input", "cut off"])
def test_step_is_made_again(tmp_path, damage):
    folder = RunFolder(tmp_path)
    if damage == "cut off":
        with pytest.raises(KeyboardInterrupt):
            make(folder, fail=True)
    else:
        make(folder)
    if damage == "changed":
        (folder / "out.txt").write_text("by hand")
    elif damage == "missing":
        (folder / "out.txt").unlink()
    assert make(folder, "new", inputs={"model": "other"} if damage == "input" else None)
    assert (folder / "out.txt").read_text() == "new"


def test_outputs_of_before_that_are_none_now_go(tmp_path):
    folder = RunFolder(tmp_path, force=True)
    for names in (["a-1", "a-2"], ["a"]):
        with folder.step("split", parameters={"cut": len(names)}, outputs=names) as todo:
            assert todo
            for name in names:
                (tmp_path / name).write_text(name)
    assert {path.name for path in tmp_path.iterdir()} == {"a", "run.json", "lock"}


def test_version_of_dynq_counts(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    make(folder)
    monkeypatch.setattr("dynq.__version__", "99")
    assert make(folder)


def test_files_that_a_step_reads_count(tmp_path):
    folder = RunFolder(tmp_path)

    def step():
        with folder.step("s", parameters={}, outputs=[], files=["in.txt"]) as todo:
            return todo

    with pytest.raises(DynqError, match=r"in\.txt: not there yet"):
        step()
    (folder / "in.txt").write_text("1")
    assert step() and not step()
    (folder / "in.txt").write_text("2")
    assert step()


def test_other_parameters_are_refused_with_both_values(tmp_path):
    make(RunFolder(tmp_path), parameters={"n": 1, "text": ""})
    with pytest.raises(DynqError, match=r"n=1, now it is 2.*--force"):
        make(RunFolder(tmp_path), parameters={"n": 2, "text": ""})
    assert make(RunFolder(tmp_path, force=True), parameters={"n": 2, "text": ""})
    assert not make(RunFolder(tmp_path, force=True), parameters={"n": 2, "text": ""})


@pytest.mark.parametrize(("inputs", "kept"), [({"model": "abc"}, True), ({"model": "other"}, False)])
def test_parts_are_kept_only_for_the_same_inputs(tmp_path, inputs, kept):
    folder = RunFolder(tmp_path)
    (folder / "parts").mkdir()
    (folder / "log.partial").write_text("of nobody knows what")
    with pytest.raises(KeyboardInterrupt):
        make(folder, parts=["parts", "log.partial"], fail=True)
    assert not (folder / "parts").exists() and not (folder / "log.partial").exists()
    (folder / "parts").mkdir()
    with folder.step(
        "step", parameters={"n": 1}, inputs=inputs, outputs=["out.txt"], parts=["parts", "log.partial"]
    ) as todo:
        assert todo
        assert (folder / "parts").exists() is kept


def test_same_run_gives_the_same_bytes(tmp_path):
    for name in ("a", "b"):
        folder = RunFolder(tmp_path / name)
        steps = ("x", "y") if name == "a" else ("y", "x")
        for step in steps:
            with folder.step(step, parameters={"n": 1}, outputs=[]):
                pass
    assert content_hash(tmp_path / "a") == content_hash(tmp_path / "b")


def test_two_runs_at_once_are_refused_and_a_dead_one_is_not_waited_for(tmp_path):
    code = """
import sys, time
from dynq.folder import RunFolder
with RunFolder(sys.argv[1]).lock():
    print('in', flush=True)
    time.sleep(60)
"""
    process = subprocess.Popen([sys.executable, "-c", code, str(tmp_path)], stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "in\n"
    with pytest.raises(DynqError, match=str(process.pid)):
        make(RunFolder(tmp_path))
    process.send_signal(signal.SIGKILL)
    process.wait()
    process.stdout.close()
    assert make(RunFolder(tmp_path))


def test_a_child_inherits_the_lock(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.lock() as file:
        code = "import sys; print('in', flush=True); sys.stdin.read()"
        child = subprocess.Popen(
            [sys.executable, "-c", code], stdin=subprocess.PIPE, stdout=subprocess.PIPE, pass_fds=[file.fileno()]
        )
        child.stdout.readline()
        sign(file, child.pid)
    with pytest.raises(DynqError, match=f"process {child.pid} works in this folder"), folder.lock():
        pass
    child.communicate()
    assert make(folder)


def test_damaged_state_is_said(tmp_path):
    (tmp_path / "run.json").write_text("{")
    with pytest.raises(DynqError, match=r"run\.json: not readable"):
        make(RunFolder(tmp_path))


def test_relative_folder_from_the_notebooks(tmp_path, monkeypatch):
    for name in ("notebooks", "dynq"):
        (tmp_path / name).mkdir()
    monkeypatch.chdir(tmp_path)
    above = RunFolder("runs/x").path
    monkeypatch.chdir(tmp_path / "notebooks")
    assert RunFolder("runs/x").path == above == tmp_path / "runs" / "x"


def test_hash_of_a_folder_knows_names_and_contents(tmp_path):
    (tmp_path / "f").mkdir()
    (tmp_path / "f" / "a").write_text("1")
    first = content_hash(tmp_path / "f")
    (tmp_path / "f" / "a").rename(tmp_path / "f" / "b")
    assert content_hash(tmp_path / "f") != first


@pytest.mark.parametrize(("target", "safe"), [("like:Q4_K_M", "like-Q4_K_M"), ("3.5 bpw", "3.5bpw"), ("8GB", "8GB")])
def test_file_safe(target, safe):
    assert file_safe(target) == safe


# --- the plan ---------------------------------------------------------------------------------------------------------


def test_plan_gives_each_notebook_its_own(tmp_path):
    folder = RunFolder(tmp_path)
    tasks = runner.plan("dynq-tiny", ["3bpw", "like:Q4_K_M"], folder, {"seed": 3}, {"n_ctx": "128"})
    assert [task.output for task in tasks] == [
        "03_calibrate.ipynb",
        "04_sensitivity.ipynb",
        "05_allocate.3bpw.ipynb",
        "05_allocate.like-Q4_K_M.ipynb",
        "06_export.3bpw.ipynb",
        "06_export.like-Q4_K_M.ipynb",
        "07_evaluate.ipynb",
    ]
    assert tasks[0].parameters["n_ctx"] == 128 and tasks[0].parameters["model"] == "dynq-tiny"
    assert [task.parameters.get("seed") for task in tasks] == [3, 3, None, None, None, None, 3]
    assert tasks[3].parameters["target"] == "like:Q4_K_M"
    assert tasks[6].parameters["targets"] == ["3bpw", "like:Q4_K_M"]
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize(
    ("texts", "message"),
    [
        ({"n_cxt": "128"}, "no notebook has a parameter 'n_cxt'.*n_ctx"),
        ({"n_ctx": "many"}, "n_ctx must be of type int, not 'many'"),
        ({"n_ctx": "12.5"}, "n_ctx must be of type int"),
        ({"n_ctx": "True"}, "n_ctx must be of type int"),
        ({"formats": "Q4_K"}, r"formats must be of type list\[str\]"),
        ({"formats": "[4]"}, r"formats must be of type list\[str\]"),
        ({"pins": "['a']"}, r"pins must be of type dict\[str, str\]"),
        ({"run": "elsewhere"}, "'run' is set by the command itself"),
    ],
)
def test_plan_refuses_parameters_by_name(tmp_path, texts, message):
    with pytest.raises(DynqError, match=message):
        runner.plan("dynq-tiny", ["3bpw"], RunFolder(tmp_path), texts=texts)


@pytest.mark.parametrize(
    ("targets", "message"), [([], "no target"), (["3bpw", "big"], "'big' is not a size"), (["8GB", "8gb"], "twice")]
)
def test_plan_refuses_targets(tmp_path, targets, message):
    with pytest.raises(DynqError, match=message):
        runner.plan("dynq-tiny", targets, RunFolder(tmp_path))


@pytest.mark.parametrize(
    ("text", "kind", "value"),
    [
        ("128", "int", 128),
        ("-1", "int", -1),
        ("0.5", "float", 0.5),
        ("2", "float", 2),
        ("yes", "bool", True),
        ("False", "bool", False),
        ("12", "str", "12"),
        ("['a', 'b']", "list[str]", ["a", "b"]),
        ('{"a*": ">=Q4_K"}', "dict[str, str]", {"a*": ">=Q4_K"}),
    ],
)
def test_parse_value(text, kind, value):
    parsed = runner.parse_value("x", text, kind)
    assert parsed == value and type(parsed) is type(value)


def test_plan_refuses_a_folder_made_otherwise(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.step("calibrate", parameters={"n_ctx": 512, "model": "dynq-tiny"}, outputs=[]):
        pass
    with pytest.raises(DynqError, match="calibrate was made with n_ctx=512, now it is 128"):
        runner.plan("dynq-tiny", ["3bpw"], folder, texts={"n_ctx": "128"})
    with pytest.raises(DynqError, match="model='dynq-tiny', now it is 'other'"):
        runner.plan("other", ["3bpw"], folder)
    runner.plan("other", ["3bpw"], RunFolder(tmp_path, force=True))


def test_plan_of_an_edited_recipe(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(DynqError, match="'mine' is not a size"):
        runner.plan("dynq-tiny", ["3bpw", "mine"], folder)
    (tmp_path / "mine.recipe.json").write_text("{}")
    (tmp_path / "3bpw.recipe.json").write_text("{}")
    tasks = runner.plan("dynq-tiny", ["3bpw", "mine"], folder)
    steps = ["calibrate", "sensitivity", "allocate.3bpw", "export.3bpw", "export.mine", "evaluate"]
    assert [task.step for task in tasks] == steps
    assert tasks[-1].parameters["targets"] == ["3bpw", "mine"] and tasks[-2].parameters["target"] == "mine"


def test_plan_as_the_folder_was_made(tmp_path):
    folder = RunFolder(tmp_path)
    for step, parameters in {"calibrate": {"n_ctx": 64}, "export.3bpw": {"tune": 0}, "evaluate": {"seed": 7}}.items():
        with folder.step(step, parameters=parameters, outputs=[]):
            pass
    with pytest.raises(DynqError, match="n_ctx=64, now it is 512"):
        runner.plan("dynq-tiny", ["3bpw"], folder)
    tasks = runner.plan("dynq-tiny", ["3bpw", "4bpw"], folder, as_made=True)
    made = {task.step: task.parameters for task in tasks}
    assert made["calibrate"]["n_ctx"] == 64 and made["calibrate"]["n_chunks"] == 640
    assert (made["export.3bpw"]["tune"], made["export.4bpw"]["tune"]) == (0, -1)
    assert (made["calibrate"]["seed"], made["evaluate"]["seed"]) == (0, 7)
    assert made["export.3bpw"]["target"] == "3bpw" and made["evaluate"]["targets"] == ["3bpw", "4bpw"]
    with pytest.raises(DynqError, match="n_ctx=64, now it is 128"):
        runner.plan("dynq-tiny", ["3bpw"], folder, {"n_ctx": 128}, as_made=True)


# --- the execution ----------------------------------------------------------------------------------------------------


@pytest.fixture
def execute(tmp_path, monkeypatch):
    """Run one notebook made of the given cells; returns the executed notebook's path."""
    monkeypatch.setattr(runner, "notebook_folder", lambda: tmp_path / "notebooks")
    (tmp_path / "notebooks").mkdir()
    folder = RunFolder(tmp_path / "run")

    def run(*cells):
        notebook = nbformat.v4.new_notebook(cells=[nbformat.v4.new_code_cell(cell) for cell in cells])
        notebook.cells[0].metadata["tags"] = ["parameters"]
        notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
        nbformat.write(notebook, tmp_path / "notebooks" / "nb.ipynb")
        folder.write_json("evaluation.json", {"files": []})
        runner.execute([runner.Task("nb", "nb", {"value": 2})], folder)
        return folder / "notebooks" / "nb.ipynb"

    return run


def test_kernel_is_this_interpreter_in_batch_display(execute):
    path = execute("value: int = 1", "import os, sys\nprint(sys.executable, os.environ['DYNQ_DISPLAY'], value)")
    assert f"{sys.executable} static 2" in nbformat.read(path, 4).cells[-1].outputs[0].text


def test_kernel_works_inside_the_lock(execute, tmp_path):
    execute(
        "value: int = 1",
        "from dynq.folder import RunFolder",
        f"with RunFolder({str(tmp_path / 'run')!r}).step('s', parameters={{}}, outputs=[]): pass",
    )
    assert "s" in json.loads((tmp_path / "run" / "run.json").read_text())["steps"]


def test_mistake_comes_out_as_itself(execute, tmp_path):
    with pytest.raises(DynqError, match=r"^text too short$"):
        execute("value: int = 1", "from dynq import DynqError\nraise DynqError('text too short')")
    assert "text too short" in (tmp_path / "run" / "notebooks" / "nb.ipynb").read_text()


def test_full_disk_is_said(execute):
    with pytest.raises(DynqError, match="the disk is full"):
        execute("value: int = 1", "import errno, os\nraise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))")


def test_defect_is_told_from_a_mistake(execute):
    with pytest.raises(runner.RunFailed, match=r"ZeroDivisionError.*defect"):
        execute("value: int = 1", "1 / 0")


def test_killed_kernel_is_said(execute):
    with pytest.raises(runner.RunFailed, match="was killed"):
        execute("value: int = 1", "import os, signal\nos.kill(os.getpid(), signal.SIGKILL)")


def test_bars_are_seen_while_the_notebook_runs(execute, capsys):
    execute(
        "value: int = 1",
        "from dynq.progress import progress\nfor _ in progress(range(3), desc='work'): pass\nprint('x')",
    )
    assert "work: 100%" in capsys.readouterr().err


def test_no_process_stays_behind(execute):
    path = execute("value: int = 1", "import os\nprint(os.getpid())")
    pid = int(nbformat.read(path, 4).cells[-1].outputs[0].text)
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


@pytest.mark.parametrize(("name", "value"), [("seed", "-1"), ("n_chunks", "0"), ("keep", "0"), ("eval_n_ctx", "2")])
def test_plan_refuses_numbers_out_of_range(tmp_path, name, value):
    with pytest.raises(DynqError, match=f"{name} must be at least .*, not {value}"):
        runner.plan("dynq-tiny", ["3bpw"], RunFolder(tmp_path), texts={name: value})


def test_a_mistake_is_not_held_against_other_parameters(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(DynqError, match="too short"), folder.step("s", parameters={"n": 1}, outputs=[], parts=["part"]):
        raise DynqError("too short")
    with folder.step("s", parameters={"n": 2}, outputs=[], parts=["part"]) as todo:
        assert todo


def test_what_was_done_before_a_mistake_is_kept(tmp_path):
    folder = RunFolder(tmp_path)
    with pytest.raises(DynqError, match="full"), folder.step("s", parameters={"n": 1}, outputs=[], parts=["part"]):
        (tmp_path / "part").write_text("hours of work")
        raise DynqError("the disk is full")
    with pytest.raises(DynqError, match="was made with n=1, now it is 2"):
        folder.check("s", {"n": 2})
    with folder.step("s", parameters={"n": 1}, outputs=[], parts=["part"]):
        assert (tmp_path / "part").exists()


@pytest.mark.parametrize(
    ("target", "values", "message"),
    [
        ("1bpw", {}, "the smallest possible is 1.5"),
        ("1MB", {}, "the smallest possible is .* MB"),
        ("3.5bpw", {"pins": {"blk.*.nothing": "Q4_K"}}, "matches no tensor"),
        ("3.5bpw", {"profile": "no-such"}, "no profile 'no-such'"),
        ("3.5bpw", {"search": "10"}, "search '10' is no time; write it as .*10min"),
        ("3.5bpw", {"search": "1min", "n_chunks": 4}, "at least 6 chunks of calibration text, not 4"),
        ("3.5bpw", {"formats": ["Q9_K"]}, "Q9_K"),
        ("3.5bpw", {"files": ["theirs.gguf"]}, "theirs.gguf: no such file"),
    ],
)
def test_what_cannot_be_made_is_refused_before_any_work(tmp_path, target, values, message):
    tasks = runner.plan("dynq-tiny", [target], RunFolder(tmp_path / "run"), values)
    with pytest.raises(DynqError, match=message):
        runner.check_sizes(tasks)
    assert not (tmp_path / "run").exists()


def test_what_can_be_made_passes(tmp_path):
    targets = ["5bpw", "9MB", "like:Q4_K_M"]
    runner.check_sizes(runner.plan("dynq-tiny", targets, RunFolder(tmp_path / "run"), {"profile": "cpu-arm"}))
