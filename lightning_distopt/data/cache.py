"""The folder for files that are made once and read ever after."""

from __future__ import annotations

import os
from pathlib import Path

__all__ = ["cache_folder"]


def cache_folder(cache_dir: str | os.PathLike[str] | None = None) -> Path:
    """Return the folder of cached files: `cache_dir`, or `lightning_distopt` in `$XDG_CACHE_HOME`, or in `~/.cache`.

    Example:
        >>> cache_folder("here").name
        'here'
    """
    if cache_dir is None:
        base = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
        cache_dir = Path(base) / "lightning_distopt"
    return Path(cache_dir).expanduser()
