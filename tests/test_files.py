"""Files that appear complete or not at all."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from lightning_distopt.files import replacing


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
