"""Jobs: the steps of a run in a process of their own, found again in the folder, cancelled, and gone on with."""

import io
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time

import nbformat
import psutil
import pytest
from conftest import PARAMETERS, TARGET, same_products

from dynq import jobs
from dynq import run as runner
from dynq.errors import DynqError
from dynq.folder import RunFolder, content_hash
from dynq.jobs import Job


def until(condition, seconds=240):
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end, "waited in vain"
        time.sleep(0.05)
    return found


def record(folder, **change):
    """A job.json of this very process, as if it were a job."""
    process = psutil.Process()
    whole = {"state": "running", "pid": process.pid, "born": process.create_time(), "steps": ["calibrate", "evaluate"]}
    whole |= {"at": 1, "started": 100.0, "written": 160.0, "ended": None, "error": "", "bar": "", "part": None}
    folder.write_json("job.json", whole | change)


# --- what a folder says -----------------------------------------------------------------------------------------------


def test_folder_without_a_job(tmp_path):
    job = Job(RunFolder(tmp_path / "none"), "dynq-tiny")
    assert job.look() is None and job.log() == [] and not job.cancel() and job.wait() is None
    assert set(job.states().values()) == {"to do"}
    assert not (tmp_path / "none").exists()


def test_job_that_lives_and_one_that_is_gone(tmp_path):
    folder = RunFolder(tmp_path)
    record(folder)
    look = Job(folder).look()
    assert look.state == "running" and look.steps[look.at] == "evaluate" and look.seconds > 1e9
    for change in ({"born": 1.0}, {"pid": 2**22 + 1}):  # another process of that number; none
        record(folder, **change)
        look = Job(folder).look()
        assert look.state == "killed" and look.seconds == 60 and "start again" in look.error
        assert not Job(folder).cancel()
    record(folder, state="failed", ended=130.0, error="too short", born=1.0)
    look = Job(folder).look()
    assert (look.state, look.seconds, look.error) == ("failed", 30, "too short")


def test_job_that_has_written_its_end_runs_until_its_process_is_gone(tmp_path):
    record(RunFolder(tmp_path), state="done", ended=130.0)
    assert Job(RunFolder(tmp_path)).look().state == "running"


@pytest.mark.skipif(sys.platform != "linux", reason="how Linux ends a process of several threads")
def test_job_runs_until_its_last_thread_has_ended(tmp_path):
    """Its first thread is gone, and the system calls the process a zombie; but it has the lock still."""
    folder = RunFolder(tmp_path)
    ends = "import ctypes, threading, time; threading.Thread(target=time.sleep, args=(2,)).start(); "
    with folder.lock() as lock:
        command = [sys.executable, "-c", f"{ends}ctypes.CDLL(None).pthread_exit(None)"]
        process = subprocess.Popen(command, pass_fds=[lock.fileno()])
    born = psutil.Process(process.pid)
    record(folder, pid=born.pid, born=born.create_time())
    until(lambda: born.status() == psutil.STATUS_ZOMBIE, 30)
    assert Job(folder).look().state == "running"
    with pytest.raises(DynqError, match="works in this folder"), folder.lock():
        pass
    assert Job(folder).wait(30).state == "killed"
    with folder.lock():  # free at once
        pass
    process.wait()


def test_clock_that_goes_backwards(tmp_path, monkeypatch):
    folder = RunFolder(tmp_path)
    record(folder)
    monkeypatch.setattr(time, "time", lambda: 40.0)
    assert Job(folder).look().seconds == 0
    record(folder, state="done", ended=99.0, born=1.0)
    assert Job(folder).look().seconds == 0


def test_damaged_record_is_said(tmp_path):
    (tmp_path / "job.json").write_text("{")
    with pytest.raises(DynqError, match=r"job\.json: not readable"):
        Job(RunFolder(tmp_path)).look()


def test_states_are_those_of_the_plan(tmp_path):
    folder = RunFolder(tmp_path)
    (tmp_path / "mine-edited.recipe.json").write_text("{}")
    job = Job(folder, "dynq-tiny", ["3 bpw", "mine-edited"])
    assert list(job.states()) == [task.step for task in runner.plan("dynq-tiny", job.targets, folder)]
    with pytest.raises(KeyboardInterrupt), folder.step("sensitivity", parameters={}, outputs=[]):
        raise KeyboardInterrupt
    with folder.step("calibrate", parameters={"model": "dynq-tiny"}, outputs=[]):
        pass
    assert list(job.states().values())[:3] == ["done", "cut off", "to do"]
    assert list(Job(folder, steps=["export", "evaluate"]).states()) == ["export.3.5bpw", "evaluate"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"model": None}, "nothing is calibrated here"),
        ({"targets": ["big"]}, "'big' is not a size"),
        ({"targets": ["3bpw-edited"]}, r"3bpw-edited\.recipe\.json: not there yet; save"),
        ({"values": {"n_cxt": 4}}, "no notebook has a parameter 'n_cxt'"),
    ],
)
def test_mistakes_are_said_and_nothing_starts(tmp_path, arguments, message):
    folder = RunFolder(tmp_path / "run")
    with pytest.raises(DynqError, match=message):
        Job(folder, **{"model": "dynq-tiny"} | arguments).start()
    assert not folder.path.exists()
    with pytest.raises(DynqError, match="no step 'bake'"):
        Job(folder, "dynq-tiny", steps=["bake"])
    with pytest.raises(DynqError, match="brew is not among the steps calibrate"):
        Job(folder, "dynq-tiny").start("brew")


def test_bars_become_words_and_the_log_gets_lines(tmp_path):
    log, folder = io.StringIO(), RunFolder(tmp_path)
    watched = jobs._Watched(log, folder, ["calibrate"])
    watched.note()
    for text in (
        "03_calibrate\n",
        "\rwork:   0%|      | 0/8 [00:00<?, ?it/s]",
        "\rwork:  25%|██▌   | 2/8 [00:01<00:03,  2.0it/s]",
    ):
        watched.write(text)
    assert json.loads((tmp_path / "job.json").read_text())["bar"] == ""  # not more often than once a second
    watched._next = 0
    watched.write("\rwork:  50%|███   | 4/8 [00:02<00:02,  2.0it/s]")
    kept = json.loads((tmp_path / "job.json").read_text())
    assert (kept["bar"], kept["part"]) == ("work: 4/8 [00:02<00:02,  2.0it/s]", 0.5)
    watched.write("\n")
    assert log.getvalue() == "03_calibrate\nwork:  50%|███   | 4/8 [00:02<00:02,  2.0it/s]\n"


@pytest.mark.parametrize(
    ("cell", "state", "error"),
    [
        ("1", "done", ""),
        ("from dynq import DynqError\nraise DynqError('text too\\nshort')", "failed", "text too short"),
        ("1 / 0", "failed", "ZeroDivisionError"),
        ("raise KeyboardInterrupt", "failed", "KeyboardInterrupt"),
    ],
)
def test_end_of_a_job(tmp_path, monkeypatch, capsys, cell, state, error):
    notebook = nbformat.v4.new_notebook(
        cells=[nbformat.v4.new_code_cell("value: int = 1"), nbformat.v4.new_code_cell(cell)]
    )
    notebook.cells[0].metadata["tags"] = ["parameters"]
    notebook.metadata["kernelspec"] = {"name": "python3", "language": "python", "display_name": "Python 3"}
    nbformat.write(notebook, tmp_path / "nb.ipynb")
    monkeypatch.setattr(runner, "notebook_folder", lambda: tmp_path)
    folder = RunFolder(tmp_path / "run")
    jobs._work(folder, [runner.Task("nb", "nb", {"value": 2})], [])
    kept = json.loads((folder / "job.json").read_text())
    assert kept["state"] == state and error in kept["error"] and "\n" not in kept["error"]
    assert kept["ended"] >= kept["started"]
    assert (f"dynq: {kept['error']}" in capsys.readouterr().err) == (state == "failed")


@pytest.mark.parametrize("first", ["calibrate", "export.3bpw"])  # as the panels of notebooks 03 and 05 have it
def test_what_does_not_fit_is_refused_until_somebody_says_yes(first, tmp_path, monkeypatch):
    folder, done = RunFolder(tmp_path), []
    plan = runner.plan("dynq-tiny", ["3bpw"], folder)
    tasks = plan[[task.step for task in plan].index(first) :]
    monkeypatch.setenv("DYNQ_MEMORY", "100MB")
    monkeypatch.setattr(runner, "execute_each", lambda tasks, *_, **__: done.extend(tasks))
    jobs._work(folder, tasks, plan)
    kept = json.loads((folder / "job.json").read_text())
    assert kept["state"] == "refused" and done == []
    assert re.fullmatch(rf"{first} needs about .* of memory, .* are free; .*, or go on all the same", kept["error"])
    jobs._work(folder, tasks, plan, yes=True)
    assert json.loads((folder / "job.json").read_text())["state"] == "done" and done == tasks


# --- real jobs --------------------------------------------------------------------------------------------------------


def test_job_outlives_who_started_it_and_is_alone(quick_run, tmp_path):
    folder = RunFolder(tmp_path / "run")
    shutil.copytree(quick_run[0], folder.path)
    code = "import sys; from dynq.jobs import *; Job(RunFolder(sys.argv[1]), None, ['3bpw']).start('allocate.3bpw')"
    subprocess.run([sys.executable, "-c", code, str(folder.path)], check=True, timeout=120)
    job = Job(folder, targets=["3bpw"])
    look = job.look()
    assert look.state == "running" and look.steps == ["calibrate", "sensitivity", "allocate.3bpw"]
    with pytest.raises(DynqError, match=r"^[^\n]*: process \d+ works in this folder; [^\n]*$"):
        job.start()
    assert job.look().steps == look.steps, "the job's own record stays"
    look = job.wait(240)
    assert (look.state, look.error, look.at) == ("done", "", 2), job.log()
    assert job.states()["allocate.3bpw"] == "done" and (folder / "3bpw.recipe.json").exists()
    assert "05_allocate.3bpw" in job.log()
    assert same_products(quick_run[0], folder.path) == ["run.json"], "what was done is kept as it was made"


def test_too_small_a_target_fails_in_one_line(tmp_path):
    job = Job(RunFolder(tmp_path / "run"), "dynq-tiny", ["1bpw"])
    job.start()
    look = job.wait(120)
    assert look.state == "failed" and "the smallest possible is" in look.error
    assert job.log(1) == [f"dynq: {look.error}"]


def test_cancelled_job_goes_on(quick_run, tmp_path):
    folder = RunFolder(tmp_path / "run")
    job = Job(folder, "dynq-tiny", [TARGET], values=PARAMETERS)
    before = signal.signal(signal.SIGINT, signal.SIG_IGN)  # as a notebook's kernel has it between two cells
    try:
        job.start("sensitivity")
    finally:
        signal.signal(signal.SIGINT, before)
    partial = folder / "sensitivity.partial.jsonl"
    until(lambda: job.look().state != "running" or (partial.exists() and partial.read_text().count("\n") > 10))
    assert job.look().state == "running", job.log()
    assert job.cancel()
    look = job.wait(60)
    assert (look.state, look.steps[look.at]) == ("cancelled", "sensitivity") and "go on" in look.error
    assert job.states()["calibrate"] == "done" and job.states()["sensitivity"] == "cut off"
    assert not job.cancel()
    until(lambda: not kernels_in(folder), 30)
    kept = len({json.loads(line)["tensor"] for line in partial.read_text().splitlines() if line.endswith("}")})

    # the model and all that counts are as the folder was made; threads are not kept, and change the last digits
    again = Job(RunFolder(folder.path), targets=[TARGET], values={"threads": PARAMETERS["threads"]})
    again.start("sensitivity")
    look = again.wait(240)
    assert look.state == "done", again.log()
    rest = int(re.search(r"^sensitivity: 100%.* (\d+)/\1 ", "\n".join(again.log(100)), re.M)[1])
    assert 0 < rest <= 85 - kept + 1
    for name in ("calibrate-text.json", "imatrix.gguf", "fisher", "sensitivity.parquet"):
        assert content_hash(folder / name) == content_hash(quick_run[0] / name), name


def kernels_in(folder):
    """Kernels that still work inside the folder's lock."""
    found = []
    for process in psutil.process_iter():
        try:
            if process.pid != os.getpid() and process.environ().get("DYNQ_LOCKED") == str(folder.path):
                found += [process] if process.status() != psutil.STATUS_ZOMBIE else []
        except psutil.Error:
            continue
    return found
