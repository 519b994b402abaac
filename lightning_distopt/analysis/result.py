"""What analyses return: numbers that can be saved, logged and drawn."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, TypeVar

import numpy as np

from lightning_distopt.files import replacing

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Self = TypeVar("Self", bound="Result")


@dataclasses.dataclass
class Result:
    """Base of what an analysis returns: a dataclass of arrays, numbers, texts and dictionaries of them.

    Example:
        >>> import tempfile
        >>> from dataclasses import dataclass
        >>> @dataclass
        ... class Curve(Result):
        ...     loss: np.ndarray
        ...     name: str = ""
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     path = Curve(np.array([1.0, 0.5]), "left to right").save(f"{folder}/curve.npz")
        ...     Curve.load(path)
        Curve(loss=array([1. , 0.5]), name='left to right')
    """

    def numbers(self) -> dict[str, float]:
        """Return what goes into a logger, by short names."""
        raise NotImplementedError(f"{type(self).__name__} has no numbers to log.")

    def figure(self) -> Figure:
        """Return the picture, as a figure of matplotlib."""
        raise NotImplementedError(f"{type(self).__name__} has no picture.")

    def save(self, path: str | os.PathLike[str]) -> Path:
        """Write it to a file; one of that name stays whole until the new one is.

        Args:
            path: `.npz` for exact arrays, `.json` for numbers that anything can read, `.png` for the picture.

        Returns:
            The path.

        Raises:
            ValueError: for another kind of file.
            ModuleNotFoundError: for a picture without matplotlib.
        """
        path = Path(path)
        fields = {field.name: getattr(self, field.name) for field in dataclasses.fields(self)}
        arrays = {name: value for name, value in fields.items() if isinstance(value, np.ndarray)}
        rest = {name: value for name, value in fields.items() if name not in arrays}
        if path.suffix not in (".npz", ".json", ".png"):
            raise ValueError(f"Results are written to .npz, .json or .png files; got {str(path)!r}.")
        with replacing(path) as aside:
            if path.suffix == ".npz":
                with aside.open("wb") as file:
                    np.savez(file, **{**arrays, _REST: np.array(json.dumps(rest, default=_plain))})  # type: ignore[arg-type]
            elif path.suffix == ".json":
                aside.write_text(json.dumps(fields, default=_plain, indent=1))
            else:
                self.figure().savefig(aside, format="png", dpi=150)
        return path

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Read what `save` has written to an `.npz` or `.json` file.

        Raises:
            ValueError: if the file holds something else.
        """
        path = Path(path)
        names = {field.name for field in dataclasses.fields(cls)}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                rest = json.loads(str(file[_REST])) if _REST in file.files else {}
                fields = {**{name: file[name] for name in file.files if name != _REST}, **rest}
        else:
            fields = json.loads(path.read_text())
            arrays = [field.name for field in dataclasses.fields(cls) if "ndarray" in str(field.type)]
            fields = {k: np.array(v) if k in arrays and v is not None else v for k, v in fields.items()}
        if not isinstance(fields, Mapping) or set(fields) != names:
            raise ValueError(f"{str(path)!r} is no file that {cls.__name__}.save has written.")
        return cls(**fields)


_REST = "_rest"


def _plain(value: Any) -> Any:
    if isinstance(value, np.ndarray):
        return value.tolist()
    if isinstance(value, np.generic):
        return value.item()
    raise TypeError(f"{type(value).__name__} is nothing that a result can hold.")
