"""The folder for files that are made once and read ever after."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

__all__ = ["cache_folder", "write_atomically"]


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


def write_atomically(content: bytes, path: Path) -> None:
    """Write a file that appears under its name complete or not at all, whatever other processes do.

    Example:
        >>> folder = tempfile.TemporaryDirectory()
        >>> write_atomically(b"text", Path(folder.name) / "new" / "file")
        >>> (Path(folder.name) / "new" / "file").read_text()
        'text'
        >>> folder.cleanup()
    """
    path.parent.mkdir(parents=True, exist_ok=True)
    descriptor, temporary = tempfile.mkstemp(dir=path.parent, prefix=path.stem, suffix=".tmp")
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        os.replace(temporary, path)
    except BaseException:
        Path(temporary).unlink(missing_ok=True)
        raise
