"""What can be chosen by name, with its options, as text: read from signatures and docstrings."""

from __future__ import annotations

import inspect
import re
import shutil
import textwrap
from collections.abc import Callable, Iterator, Mapping

import docstring_parser

from lightning_distopt.lookup import nearest

__all__ = ["listing", "options"]


def listing(plural: str, named: Mapping[str, type]) -> Callable[..., None]:
    """Make a command that prints what can be chosen by name, or the options of one.

    Example:
        >>> from fractions import Fraction
        >>> listing("numbers", {"fraction": Fraction})()
        fraction
            Fraction: This class implements rational numbers.

    Args:
        plural: what is listed, as a word.
        named: the classes by their names; several names of one class are listed together.

    Returns:
        A function that takes one of the names, or None for all of them, and raises a `ValueError` for another name.
    """

    def command(name: str | None = None, /) -> None:
        if name is None:
            for cls in dict.fromkeys(named.values()):
                print(", ".join(key for key in named if named[key] is cls))
                print(_wrapped(f"{cls.__name__}: {_summary(cls)}"))
            return
        if name not in named:
            raise ValueError(f"{name!r} is not among the {plural}{nearest(name, named)}: they are {', '.join(named)}.")
        print(f"{named[name].__name__}: {_summary(named[name])}")
        for parameter, text in options(named[name]):
            default = "" if parameter.default is parameter.empty else f"={parameter.default!r}"
            print(f"\n{parameter.name}{default}\n{_wrapped(text)}")

    command.__doc__ = f"List the {plural}, or the options of one.\n\nArgs:\n    name: One of them.\n"
    return command


def options(cls: type) -> Iterator[tuple[inspect.Parameter, str]]:
    """Give the documented options of a class and what its docstring says about each; inherited ones follow.

    Example:
        >>> class Scaled:
        ...     '''Multiplies.
        ...
        ...     Args:
        ...         factor: by how much.
        ...     '''
        ...
        ...     def __init__(self, factor=2.0): ...
        >>> [(str(parameter), text) for parameter, text in options(Scaled)]
        [('factor=2.0', 'by how much.')]

    Args:
        cls: a class with an `Args` section; it passes options that it takes as `**kwargs` on to its base, but those in
            `settled_options`, if it has such an attribute.
    """
    texts: dict[str, str] = {}
    inherited, settled = False, getattr(cls, "settled_options", ())
    for base in cls.__mro__:
        for entry in docstring_parser.parse(inspect.cleandoc(base.__doc__ or "")).params:
            for name in re.split(r",\s*", entry.arg_name):
                texts.setdefault(name, entry.description or "")
        if "__init__" not in vars(base):
            continue
        parameters = inspect.signature(base.__init__).parameters.values()  # type: ignore[misc]
        for parameter in parameters:
            # By the class, for its base.
            filled_in = inherited and (parameter.default is parameter.empty or parameter.name in settled)
            if parameter.name in texts and not filled_in:
                yield parameter, " ".join(texts[parameter.name].split())
        if all(parameter.kind != parameter.VAR_KEYWORD for parameter in parameters):
            return
        inherited = True


def _summary(cls: type) -> str:
    return " ".join((docstring_parser.parse(inspect.getdoc(cls) or "").short_description or "").split())


def _wrapped(text: str) -> str:
    return textwrap.fill(text, shutil.get_terminal_size().columns, initial_indent="    ", subsequent_indent="    ")
