"""Whole or not there."""

import errno

import pytest

from dynq.errors import DynqError
from dynq.files import replacing


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
