"""`lightning-distopt new`: a project that trains at once, for a user's own model and data to be put into."""

from __future__ import annotations

import os
import shlex
import shutil
from pathlib import Path

__all__ = ["new"]

_TEMPLATES = Path(__file__).parent / "templates" / "project"


def new(folder: str) -> None:
    """Write a project that trains at once: a module, data, configurations, a script and a README.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as place:
        ...     new(f"{place}/my_project")
        Written: README.md, config.yaml, datamodule.py, local_sgd.yaml, model.py, train.py
        Try it: cd .../my_project && python train.py fit --config config.yaml

    Args:
        folder: Where to write it; of any name. It is made, or is empty.

    Raises:
        ValueError: If there is something in the folder, or it can't be written.
    """
    target = Path(os.path.abspath(folder))
    if target.is_file() or (target.is_dir() and any(target.iterdir())):
        raise ValueError(f"{folder} exists and is not an empty folder: give another name.")
    files = {path.name: path.read_text() for path in sorted(_TEMPLATES.iterdir()) if path.is_file()}
    files["README.md"] = files["README.md"].replace("{{project}}", target.name)
    try:
        _write(files, target)
    except OSError as error:
        raise ValueError(f"{folder} can't be written ({error.strerror}): give another folder.") from error
    print(f"Written: {', '.join(files)}")
    print(f"Try it: cd {shlex.quote(folder)} && python train.py fit --config config.yaml")


def _write(files: dict[str, str], target: Path) -> None:
    """Write files into a folder that is empty or not there: all of them or none."""
    aside = target.with_name(f"{target.name}.{os.getpid()}.part")
    empty = target.is_dir()  # a folder that somebody may be in, so it is not replaced
    try:
        aside.mkdir(parents=True)
        for name, text in files.items():
            (aside / name).write_text(text)
        if not empty:
            os.replace(aside, target)
            return
        for name in files:
            os.replace(aside / name, target / name)
        aside.rmdir()
    except BaseException:
        shutil.rmtree(aside, ignore_errors=True)
        if empty:
            for name in files:
                (target / name).unlink(missing_ok=True)
        raise
