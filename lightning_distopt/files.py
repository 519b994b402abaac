"""Files that are there complete, or not at all."""

from __future__ import annotations

import os
import secrets
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path


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
