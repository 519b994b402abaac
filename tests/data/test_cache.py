"""The cache folder."""

from __future__ import annotations

from pathlib import Path

import pytest

from lightning_distopt.data.cache import cache_folder


def test_default_cache_follows_xdg(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert cache_folder() == tmp_path / "lightning_distopt"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert cache_folder() == tmp_path / ".cache" / "lightning_distopt"
    assert cache_folder("~/here") == tmp_path / "here"
