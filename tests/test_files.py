"""Whole or not there."""

import errno
import hashlib
from contextlib import nullcontext
from types import SimpleNamespace

import pytest

from dynq import folder
from dynq.errors import DynqError
from dynq.files import replacing, sha256


def test_takes_the_place_of_the_old_file(tmp_path):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with replacing(path) as beside:
        beside.write_text("new")
        assert path.read_text() == "old"
    assert path.read_text() == "new" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


@pytest.mark.parametrize("error", [ValueError("x"), KeyboardInterrupt()])
def test_after_a_failure_the_old_file_stands(tmp_path, error):
    path = tmp_path / "a.txt"
    path.write_text("old")
    with pytest.raises(type(error)), replacing(path) as beside:
        beside.write_text("half")
        raise error
    assert path.read_text() == "old" and [p.name for p in tmp_path.iterdir()] == ["a.txt"]


def test_a_full_disk_is_one_line(tmp_path):
    full = OSError(errno.ENOSPC, "No space left on device")
    with pytest.raises(DynqError, match=r"a\.txt: the disk is full; make room"), replacing(tmp_path / "a.txt"):
        raise full
    with pytest.raises(DynqError, match=r"the file needs 1,000 bytes"), replacing(tmp_path / "a.txt", 1000) as beside:
        beside.write_text("half")
        raise full
    assert not list(tmp_path.iterdir())


def test_a_missing_folder_is_one_line(tmp_path):
    with pytest.raises(DynqError, match="does not exist; make it first"), replacing(tmp_path / "no" / "a.txt"):
        pass


def test_the_hash_of_a_large_file_shows_a_bar(tmp_path, monkeypatch):
    data = bytes(range(256)) * 16
    (tmp_path / "a.gguf").write_bytes(data)
    seen = []
    monkeypatch.setattr("dynq.files._STEP", 1000)
    assert sha256(tmp_path / "a.gguf", seen.append) == hashlib.sha256(data).hexdigest()
    assert sum(seen) == len(data) and len(seen) == 5
    bars = []
    monkeypatch.setattr(
        folder, "progress", lambda **given: bars.append(given) or nullcontext(SimpleNamespace(update=bars.append))
    )
    assert folder.content_hash(tmp_path / "a.gguf") == hashlib.sha256(data).hexdigest() and bars == []
    monkeypatch.setattr(folder, "_LARGE", len(data))
    assert folder.content_hash(tmp_path / "a.gguf") == hashlib.sha256(data).hexdigest()
    assert bars[0]["total"] == sum(bars[1:]) == len(data) and "a.gguf" in bars[0]["desc"]
