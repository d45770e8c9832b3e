"""What could cost a run: full disks, folders that cannot be written, two runs, files that change or are damaged."""

import contextlib
import errno
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import tiny_models
from conftest import ARGUMENTS, dynq_command

from dynq import checkpoint as checkpoints
from dynq.calibrate import calibrate
from dynq.checkpoint import open_checkpoint
from dynq.errors import DynqError
from dynq.files import replacing
from dynq.fisher import Fisher
from dynq.folder import RunFolder
from dynq.layer_inputs import feed_back
from dynq.search_log import Log, read_log
from dynq.sensitivity import SCHEMA, read_table, sensitivity
from dynq.torch_model import load_model

TEXT = [[2 + i % 250 for i in range(24 * k, 24 * k + 24)] for k in range(3)]


@pytest.fixture
def small_disk(tmp_path):
    """A file system of 3 MB, which only root can make."""
    place = tmp_path / "disk"
    place.mkdir()
    made = shutil.which("mount") and subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=3M", "tmpfs", str(place)], capture_output=True
    )
    if not made or made.returncode:
        pytest.skip("no file system can be mounted here")
    yield place
    subprocess.run(["umount", "-l", str(place)], check=True)


@pytest.fixture(scope="module")
def calibrated(tmp_path_factory):
    """A tiny model and a folder with its samples."""
    folder = tmp_path_factory.mktemp("calibrated")
    checkpoint = open_checkpoint(tiny_models.make("llama", folder / "model"))
    run = folder / "run"
    run.mkdir()
    importance = calibrate(checkpoint, load_model(checkpoint), np.array(TEXT, np.int32), run, keep=6)
    return checkpoint, run, importance


def one_line(done, *words):
    assert done.returncode == 2, done.stderr
    last = done.stderr.splitlines()[-1]
    assert "Traceback" not in done.stderr and last.startswith("dynq: "), done.stderr
    assert all(word in last for word in words), last


# --- disks and folders ------------------------------------------------------------------------------------------------


def test_a_disk_that_fills_up_keeps_what_was_there_and_goes_on(small_disk):
    file, filler = small_disk / "file", small_disk / "filler"
    file.write_text("before")
    filler.write_bytes(bytes(2 << 20))
    with pytest.raises(DynqError, match="the disk is full; make room and run the same command again"):  # noqa: SIM117
        with replacing(file) as beside:
            beside.write_bytes(bytes(2 << 20))
    assert file.read_text() == "before" and {path.name for path in small_disk.iterdir()} == {"file", "filler"}
    filler.unlink()
    with replacing(file) as beside:
        beside.write_bytes(b"after")
    assert file.read_bytes() == b"after"


def test_calibration_on_a_full_disk_goes_on(small_disk, calibrated):
    checkpoint, whole, _ = calibrated
    run, filler, text = small_disk / "run", small_disk / "filler", np.array(TEXT, np.int32)
    run.mkdir()
    room = sum(path.stat().st_size for path in (whole / "fisher").iterdir()) // 2
    with filler.open("wb") as out, contextlib.suppress(OSError):
        out.truncate(0)
        while shutil.disk_usage(small_disk).free > room + (64 << 10):
            out.write(bytes(64 << 10))
            out.flush()
    with pytest.raises(DynqError, match=r"fisher/0000\d\.safetensors: the disk is full"):
        calibrate(checkpoint, load_model(checkpoint), text, run, keep=6, threads=1)
    made = sorted(path.name for path in (run / "fisher").iterdir())
    assert made and all((run / "fisher" / n).read_bytes() == (whole / "fisher" / n).read_bytes() for n in made)
    filler.unlink()
    calibrate(checkpoint, load_model(checkpoint), text, run, keep=6, threads=1)
    assert (run / "imatrix.gguf").read_bytes() == (whole / "imatrix.gguf").read_bytes()


def test_a_full_disk_is_one_line_of_the_command(small_disk):
    (small_disk / "filler").write_bytes(bytes(3 << 20))
    one_line(
        dynq_command(*ARGUMENTS, "--yes", "--out", small_disk / "run"), str(small_disk / "run"), "the disk is full"
    )
    with contextlib.suppress(OSError), (small_disk / "filler").open("r+b") as file:
        file.truncate((3 << 20) - (64 << 10))  # room to begin with, and not to end
    one_line(
        dynq_command(*ARGUMENTS, "--yes", "--out", small_disk / "run"), str(small_disk / "run"), "the disk is full"
    )


def test_a_folder_that_cannot_be_written_is_one_line(small_disk):
    subprocess.run(["mount", "-o", "remount,ro", str(small_disk)], check=True)
    one_line(
        dynq_command(*ARGUMENTS, "--yes", "--out", small_disk / "run"),
        f"{small_disk}/run: cannot be written to (Read-only file system); choose another folder",
    )


def test_no_right_to_write_is_said(tmp_path, monkeypatch):
    def refused(*_, **__):
        raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))

    monkeypatch.setattr(Path, "mkdir", refused)
    with (
        pytest.raises(DynqError, match=r"run: cannot be written to \(Permission denied\)"),
        RunFolder(tmp_path / "run").lock(),
    ):
        pass


def test_a_second_run_says_who_works_there(tmp_path):
    code = (
        "import sys, time\nfrom dynq.folder import RunFolder\nwith RunFolder(sys.argv[1]).lock():\n print(flush=True)\n"
    )
    holder = subprocess.Popen(
        [sys.executable, "-c", f"{code} time.sleep(99)", str(tmp_path)], stdout=subprocess.PIPE, text=True
    )
    try:
        holder.stdout.readline()
        one_line(dynq_command(*ARGUMENTS, "--out", tmp_path), f"process {holder.pid} works in this folder")
        assert not (tmp_path / "run.json").exists()
    finally:
        holder.kill()
        holder.communicate()


# --- a model that changes ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("change", ["longer", "other bytes", "replaced", "gone", "older"])
def test_a_shard_that_changes_is_named(tmp_path, change):
    checkpoint = open_checkpoint(tiny_models.make("llama", tmp_path / "model"))
    name = next(n for n, info in checkpoint.tensors.items() if info.quantizable)
    checkpoint.read(name)
    shard = tmp_path / "model" / "model.safetensors"
    data, before = shard.read_bytes(), shard.stat()
    if change == "longer":
        shard.write_bytes(data + b"x")
    elif change == "other bytes":
        shard.write_bytes(data[:-4] + bytes(4))
    elif change == "replaced":
        (tmp_path / "new").write_bytes(data)
        os.utime(tmp_path / "new", ns=(before.st_atime_ns, before.st_mtime_ns))
        (tmp_path / "new").replace(shard)
    elif change == "gone":
        shard.unlink()
    else:  # a clock that goes backwards: another time is another file, whichever is the later
        os.utime(shard, ns=(0, 0))
    for work in (lambda: checkpoint.read(name), lambda: checkpoint.fingerprint, checkpoint.check_unchanged):
        with pytest.raises((DynqError, FileNotFoundError), match=r"model\.safetensors") as caught:
            work()
        assert change == "gone" or "has changed while it was worked on" in str(caught.value)


def test_hashed_contents_decide_between_steps(tmp_path):
    model = tiny_models.make("llama", tmp_path / "model")
    folder, first = RunFolder(tmp_path / "run"), open_checkpoint(model)
    parameters = {"model": str(model), "allow_requantize": False}
    with folder.step("calibrate", parameters=parameters, inputs={"model": first.fingerprint}, outputs=[]):
        pass
    assert folder.checkpoint().fingerprint == first.fingerprint
    shard = model / "model.safetensors"
    before, data = shard.stat(), shard.read_bytes()
    os.utime(shard, ns=(0, 0))
    assert folder.checkpoint().fingerprint == first.fingerprint  # a copy has other times
    shard.write_bytes(data[:-4] + bytes(4))
    os.utime(shard, ns=(before.st_atime_ns, before.st_mtime_ns))
    with pytest.raises(DynqError, match=r"has changed since .* was calibrated"):
        folder.checkpoint()


def test_stamps_are_of_every_file(tmp_path):
    assert checkpoints._stamp(tmp_path / "none") == ()


# --- files of the folder, damaged by hand -----------------------------------------------------------------------------


def damage(file: Path, how: str) -> None:
    data = file.read_bytes()
    file.write_bytes({"empty": b"", "cut off": data[: len(data) // 2], "other": b"{}\n" * 40}[how])


HOW = pytest.mark.parametrize("how", ["empty", "cut off", "other"])


@HOW
def test_samples(calibrated, tmp_path, how):
    checkpoint, run, importance = calibrated
    folder = shutil.copytree(run, tmp_path / "run")
    damage(folder / "fisher" / "00001.safetensors", how)
    with pytest.raises(
        DynqError, match=r"00001\.safetensors: damaged.*delete it, calibration \(notebook 03\)"
    ) as caught:
        sensitivity(checkpoint, folder, importance, ["Q4_0"], threads=1)
    assert "\n" not in str(caught.value)
    (folder / "fisher" / "00001.safetensors").unlink()
    calibrate(checkpoint, load_model(checkpoint), np.array(TEXT, np.int32), folder, keep=6)
    assert (folder / "fisher" / "00001.safetensors").read_bytes() == (run / "fisher/00001.safetensors").read_bytes()


def test_samples_that_are_others(calibrated, tmp_path):
    from safetensors.numpy import save_file

    _, run, _ = calibrated
    folder = shutil.copytree(run / "fisher", tmp_path / "fisher")
    for about in ({}, {"about": "{}"}, {"about": "[1]"}):
        save_file({}, folder / "00001.safetensors", about)
        with pytest.raises(DynqError, match="or no Fisher samples"):
            Fisher(folder)


@HOW
def test_table(tmp_path, how):
    pq.write_table(pa.Table.from_pylist([], schema=SCHEMA), tmp_path / "sensitivity.parquet")
    assert read_table(tmp_path).num_rows == 0
    damage(tmp_path / "sensitivity.parquet", how)
    with pytest.raises(DynqError, match=r"sensitivity\.parquet: damaged .*delete it, the sensitivity step") as caught:
        read_table(tmp_path)
    assert "\n" not in str(caught.value)
    pq.write_table(pa.table({"a": [1]}), tmp_path / "sensitivity.parquet")
    with pytest.raises(DynqError, match="not a table of sensitivities"):
        read_table(tmp_path)


@pytest.mark.parametrize("how", ["cut off", "garbage", "other keys", "rows missing"])
def test_partial_table_is_made_anew(calibrated, tmp_path, how, monkeypatch):
    checkpoint, run, importance = calibrated
    folder = shutil.copytree(run, tmp_path / "run")
    partial, whole = folder / "sensitivity.partial.jsonl", []

    def cut(table, _):
        whole.append(table)
        raise KeyboardInterrupt

    with monkeypatch.context() as patch, pytest.raises(KeyboardInterrupt):
        patch.setattr("dynq.sensitivity.write_table", cut)
        sensitivity(checkpoint, folder, importance, ["Q4_0", "Q8_0"], threads=1)
    lines = partial.read_text().splitlines(keepends=True)
    damaged = {
        "cut off": "".join(lines)[:-30],
        "garbage": "".join(lines[:3]) + "\0{\n" + "".join(lines[3:]),
        "other keys": "".join(lines[:3]) + json.dumps({"tensor": "x", "last": 1}) + "\n",
        "rows missing": "".join(lines[1:]),
    }[how]
    partial.write_text(damaged)
    assert sensitivity(checkpoint, folder, importance, ["Q4_0", "Q8_0"], threads=1).equals(whole[0])


@pytest.mark.parametrize(
    "line", ["{", "[]", "7", '{"tried": 1}', '{"search": "a"}', '{"start": true, "seconds": 1}', ""]
)
def test_search_log(tmp_path, line):
    path = tmp_path / "t.search.jsonl"
    path.write_text(f'{{"search": "abc", "seconds": 1.5}}\n{line}\n')
    for read in (read_log, lambda path: Log(path, "abc")):
        with pytest.raises(DynqError, match=r"t\.search\.jsonl: line 2 is damaged; delete the file"):
            read(path)
    path.write_text('{"search": "abc", "seconds": 1.5}\n{"cut o')
    assert read_log(path) == []


@HOW
def test_encoded_tensors_are_made_anew(calibrated, tmp_path, how):
    checkpoint, _, importance = calibrated
    chosen = dict.fromkeys([n for n, info in checkpoint.tensors.items() if info.quantizable][:3], "Q4_0")

    def made():
        text = np.array(TEXT, np.int32)
        stream = feed_back(checkpoint, chosen, importance, load_model(checkpoint), text, ["a"] * 3, tmp_path / "parts")
        return {name: data.tobytes() for name, _, data in stream}

    first = made()
    damage(next((tmp_path / "parts").iterdir()), how)
    assert made() == first


def test_what_a_step_reads_must_be_what_another_has_made(tmp_path):
    folder = RunFolder(tmp_path)
    with folder.step("first", parameters={}, outputs=["table"]):
        (tmp_path / "table").write_text("as made")

    def second():
        with folder.step("second", parameters={}, outputs=[], files=["table"]):
            pass

    second()
    (tmp_path / "table").write_text("by hand")
    with pytest.raises(DynqError, match=r"table: not what first has made, .*; make that step anew"):
        second()
    with folder.step("first", parameters={}, outputs=["table"]) as todo:
        assert todo
        (tmp_path / "table").write_text("as made again")
    second()


def test_run_json_says_where_it_was_made(tmp_path):
    import torch

    folder, before = RunFolder(tmp_path), torch.get_num_threads()
    torch.set_num_threads(3)
    try:
        with folder.step("s", parameters={"seed": 7}, outputs=[]):
            pass
    finally:
        torch.set_num_threads(before)
    state = json.loads((tmp_path / "run.json").read_text())
    assert state["steps"]["s"]["machine"]["threads"] == 3 and state["steps"]["s"]["machine"]["processor"]
    assert state["versions"]["torch"] == torch.__version__.partition("+")[0] or state["versions"]["torch"]
    assert state["steps"]["s"]["parameters"] == {"seed": 7}
