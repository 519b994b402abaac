"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_distopt.figures import write_file
from lightning_distopt.files import check_file, check_folder, replacing


def test_several_write_one_file(tmp_path: Path) -> None:
    """Also where they have the same number, as processes on several machines and threads do."""
    with replacing(tmp_path / "file") as first, replacing(tmp_path / "file") as second:
        first.write_bytes(b"first")
        second.write_bytes(b"second")
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"first"  # the last to be done


@pytest.mark.parametrize("fails", ["body", "rename"])
def test_a_file_that_can_not_be_written_leaves_the_old_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, fails: str) -> None:
    def fail(*_: object) -> None:
        raise OSError("disk full")

    with replacing(tmp_path / "file") as aside:
        aside.write_bytes(b"old")
    if fails == "rename":
        monkeypatch.setattr(os, "replace", fail)
    with pytest.raises(OSError, match="disk full"), replacing(tmp_path / "file") as aside:
        aside.write_bytes(b"new")
        if fails == "body":
            fail()
    assert [path.name for path in tmp_path.iterdir()] == ["file"]
    assert (tmp_path / "file").read_bytes() == b"old"


def test_what_can_be_no_file_is_refused(tmp_path: Path) -> None:
    (tmp_path / "file").touch()
    assert check_file("path", None) is None
    assert check_file("path", tmp_path / "file") == tmp_path / "file"
    assert check_folder("output", tmp_path / "new" / "folder") == tmp_path / "new" / "folder"
    with pytest.raises(ValueError, match=r"`path` is the path of a file, and '.*' is a folder: name a file in it"):
        check_file("path", tmp_path)
    with pytest.raises(ValueError, match=r"`path` leads through '.*file', which is a file and no folder"):
        check_file("path", tmp_path / "file" / "a" / "b")
    with pytest.raises(ValueError, match=r"`output` leads through '.*file', which is a file and no folder"):
        check_folder("output", tmp_path / "file")
    with pytest.raises(ValueError, match="`output` is the path of a file"):
        write_file(tmp_path, lambda path: path.touch())
