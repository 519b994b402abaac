"""What analyses return: numbers that can be saved, logged and drawn."""

from __future__ import annotations

import dataclasses
import json
import math
import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any, Generic, TypeVar

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
            path: `.npz` for exact arrays, `.json` for numbers that anything can read (JSON has none that are not finite, so
                these are texts: "NaN", "Infinity", "-Infinity"), `.png` for the picture.

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
                    np.savez(file, **{**arrays, _REST: np.array(json.dumps(_plain(rest)))})  # type: ignore[arg-type]
            elif path.suffix == ".json":
                aside.write_text(json.dumps(_plain(fields), indent=1))
            else:
                self.figure().savefig(aside, format="png", dpi=150)
        return path

    @classmethod
    def load(cls: type[Self], path: str | os.PathLike[str]) -> Self:
        """Read what `save` has written to an `.npz` or `.json` file; what has a default may be missing in older files.

        Raises:
            ValueError: if the file holds something else.
        """
        path = Path(path)
        types = {field.name: str(field.type) for field in dataclasses.fields(cls)}
        needed = {f.name for f in dataclasses.fields(cls) if f.default is f.default_factory is dataclasses.MISSING}
        if path.suffix == ".npz":
            with np.load(path, allow_pickle=False) as file:
                rest = _numeric(json.loads(str(file[_REST]))) if _REST in file.files else {}
                fields = {**{name: file[name] for name in file.files if name != _REST}, **rest}
        else:
            fields = _numeric(json.loads(path.read_text()))
        if not isinstance(fields, Mapping) or not needed <= set(fields) <= set(types):
            raise ValueError(f"{str(path)!r} is no file that {cls.__name__}.save has written.")
        return cls(**{k: np.array(v) if "ndarray" in types[k] and isinstance(v, list) else v for k, v in fields.items()})


One = TypeVar("One", bound=Result)


class Results(dict[str, One], Generic[One]):
    """Results by name, such as those on several data."""

    def numbers(self) -> dict[str, float]:
        """Return the numbers of all, as `<name>/<number>`; of one alone without its name."""
        several = len(self) > 1
        pairs = ((name, pair) for name, result in self.items() for pair in result.numbers().items())
        return {f"{name}/{key}" if several else key: value for name, (key, value) in pairs}

    def save(self, path: str | os.PathLike[str]) -> list[Path]:
        """Write each to a file of its own, see `Result.save`: `spectrum_<name>.npz`, or that of one alone to `spectrum.npz`."""
        path = Path(path)
        paths = [path.with_stem(f"{path.stem}_{name}") if len(self) > 1 else path for name in self]
        return [result.save(one) for result, one in zip(self.values(), paths, strict=True)]


_REST = "_rest"


_NOT_FINITE = {"NaN": math.nan, "Infinity": math.inf, "-Infinity": -math.inf}


def _plain(value: Any) -> Any:
    """Return a value as JSON has it."""
    if isinstance(value, np.ndarray | np.generic):
        value = value.tolist()
    if isinstance(value, dict):
        return {name: _plain(one) for name, one in value.items()}
    if isinstance(value, list | tuple):
        return [_plain(one) for one in value]
    if isinstance(value, float) and not math.isfinite(value):
        return json.dumps(value)  # the name that many read, as a text
    if value is None or isinstance(value, str | int | float):
        return value
    raise TypeError(f"{type(value).__name__} is nothing that a result can hold.")


def _numeric(value: Any) -> Any:
    """Return what `_plain` has made texts of as numbers again."""
    if isinstance(value, dict):
        return {name: _numeric(one) for name, one in value.items()}
    if isinstance(value, list):
        return [_numeric(one) for one in value]
    return _NOT_FINITE.get(value, value) if isinstance(value, str) else value
