"""What the package exports is described: by an example, which pytest runs, by its arguments, and by what it raises."""

from __future__ import annotations

import ast
import importlib
import inspect
import pkgutil
import re
import textwrap
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any, get_origin

import lightning_distopt

REFUSE_NOTHING = {
    "lightning_distopt.SoftFilterPruning": "has no option that could be wrong",
    "lightning_distopt.topologies.Lazy": "hands on what another topology has been asked for already",
}
"""Classes whose bases refuse arguments that they never hand on."""


def public() -> dict[str, Callable[..., Any]]:
    """Return the classes and functions that the package and those below it export, each once; no types, such as `Vector`."""
    below = pkgutil.walk_packages(lightning_distopt.__path__, "lightning_distopt.")
    packages = ["lightning_distopt", *(module.name for module in below if module.ispkg and "._" not in module.name)]
    names = [(package, name) for package in packages for name in getattr(importlib.import_module(package), "__all__", ())]
    found = {f"{package}.{name}": getattr(importlib.import_module(package), name) for package, name in reversed(names)}
    once = {id(one): name for name, one in found.items() if callable(one) and get_origin(one) is None}
    return {name: found[name] for name in once.values()}


def lacks(one: Callable[..., Any], refuses: bool = True) -> list[str]:
    """Return what there is not in a docstring."""
    docstring = inspect.cleandoc(one.__doc__ or "")
    entries = section(docstring, "Args") or section(docstring, "Attributes")
    described = re.findall(r"\w+", " ".join(re.findall(r"^    ((?:[\w*]+,\s+)*[\w*]+):", entries, re.MULTILINE)))
    lacking = [] if ">>> " in section(docstring, "Example") else ["an `Example:`"]
    lacking += [f"`{name}` in `Args:`" for name in arguments(one) if name not in described]
    if refuses and any(map(can_raise, called(one))) and not section(docstring, "Raises"):
        lacking.append("`Raises:`")
    return lacking


def section(docstring: str, title: str) -> str:
    """Return the lines below a title, or nothing."""
    found = re.search(rf"^{title}:\n((?: {{4}}.*\n?|\n)+)", docstring, re.MULTILINE)
    return found[1] if found else ""


def called(one: Callable[..., Any]) -> list[Callable[..., Any]]:
    """Return a function, or of a class all constructors but those of other packages; a protocol has none."""
    if not isinstance(one, type):
        return [one]
    if getattr(one, "_is_protocol", False):
        return []
    own = [base for base in one.__mro__ if base.__module__.partition(".")[0] == one.__module__.partition(".")[0]]
    return [vars(base)[name] for base in own for name in ("__new__", "__init__", "__post_init__") if name in vars(base)]


def arguments(one: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments, but for those of other packages' constructors."""
    return list(inspect.signature(one).parameters) if called(one) else []


def can_raise(function: Callable[..., Any]) -> bool:
    """Return whether a function raises errors itself, or has others check its arguments."""
    try:
        tree = ast.parse(textwrap.dedent(inspect.getsource(function)))
    except (OSError, TypeError):  # made by `dataclass` or `NamedTuple`, which only assign
        return False
    calls = [ast.unparse(node.func).rpartition(".")[2] for node in ast.walk(tree) if isinstance(node, ast.Call)]
    return any(isinstance(node, ast.Raise) for node in ast.walk(tree)) or any(re.match("_?check(ed)?_", name) for name in calls)


def test_every_public_name_has_an_example_its_arguments_and_what_it_raises() -> None:
    found = public()
    assert len(found) > 200
    assert REFUSE_NOTHING.keys() <= found.keys()
    lacking = {name: lacks(one, refuses=name not in REFUSE_NOTHING) for name, one in found.items()}
    wrong = [f"{name} lacks {', '.join(what)}" for name, what in lacking.items() if what]
    assert not wrong, "\n".join(wrong)


def test_what_a_docstring_lacks_is_found() -> None:
    class Whole:
        """A number.

        Example:
            >>> Whole(1)

        Args:
            value,
                least: of it.
            **options: others.

        Raises:
            ValueError: if there is none.
        """

        def __init__(self, value: int, least: int = 0, **options: Any) -> None:
            if value < least:
                raise ValueError(value)

    class Inherits(Whole):
        """Another one, of which nothing is said."""

    @dataclass
    class Point:
        """A point.

        Example: somewhere else.

        Attributes:
            x: to the right.
        """

        x: float
        y: float

    def check_whole(value: int) -> None:
        """Refuse a number.

        Example:
            >>> check_whole(1)
        """
        lightning_distopt.options.check_whole("value", value)

    class Failed(RuntimeError):
        """An error."""

    assert lacks(Whole) == []
    assert lacks(Inherits) == ["an `Example:`", "`value` in `Args:`", "`least` in `Args:`", "`options` in `Args:`", "`Raises:`"]
    assert lacks(Point) == ["an `Example:`", "`y` in `Args:`"]
    assert lacks(check_whole) == ["`value` in `Args:`", "`Raises:`"]
    assert lacks(check_whole, refuses=False) == ["`value` in `Args:`"]
    assert lacks(Failed) == ["an `Example:`"]
