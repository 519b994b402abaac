"""Files that are there complete, or not at all; and whether there can be any."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TypeVar

Name = TypeVar("Name", bound="str | os.PathLike[str] | None")


def check_file(option: str, path: Name) -> Name:
    """Return the path of a file that is yet to be written, if there can be one.

    Example:
        >>> check_file("figure", "new/figure.png")
        'new/figure.png'
        >>> check_file("figure", ".")
        Traceback (most recent call last):
        ValueError: `figure` is the path of a file, and '.' is a folder: name a file in it.

    Args:
        option: what the user calls it.
        path: as it was given; None for no file.

    Raises:
        ValueError: if a folder has that name, or a file is in the place of one that the path leads through.
    """
    if path is None:
        return path
    if os.path.isdir(path):
        raise ValueError(f"`{option}` is the path of a file, and {str(path)!r} is a folder: name a file in it.")
    check_folder(option, Path(path).parent)
    return path


def check_folder(option: str, path: str | os.PathLike[str]) -> Path:
    """Return the path of a folder that files are yet to be written to, if there can be one.

    Example:
        >>> check_folder("output", "new/folder").name
        'folder'

    Args:
        option: what the user calls it.
        path: as it was given; the folder need not exist.

    Raises:
        ValueError: if a file is in its place, or in that of a folder around it.
    """
    path = Path(path)
    taken = next((part for part in (path, *path.parents) if part.exists() and not part.is_dir()), None)
    if taken is not None:
        raise ValueError(f"`{option}` leads through {str(taken)!r}, which is a file and no folder: name another place.")
    return path


@contextmanager
def replacing(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a name beside `path` to write to; the file gets its own name when the body is done, whatever other processes do.

    Several may write the same file at once, also from machines that share the folder: the last to be done stays. If the body
    fails, or the power does, a file that had the name before stays as it was. The folder is made where there is none.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     with replacing(Path(folder, "new", "file")) as aside:
        ...         _ = aside.write_text("text")
        ...     Path(folder, "new", "file").read_text()
        'text'

    Args:
        path: of the file.

    Yields:
        The name to write to, in the same folder.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    aside = path.with_name(f"{path.name}.{secrets.token_hex(4)}.part")
    try:
        yield aside
        with aside.open("rb") as file:
            os.fsync(file.fileno())
        os.replace(aside, path)
    except BaseException:
        aside.unlink(missing_ok=True)
        raise
