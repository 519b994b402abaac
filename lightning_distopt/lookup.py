"""What users name, and what they may have meant by a name that there is not."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from typing import Any, TypeVar

T = TypeVar("T")


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return a question for an error message: which known name was meant; nothing, if there is none like it.

    Example:
        >>> f"There is no topology 'rign'{nearest('rign', ['ring', 'torus'])}."
        "There is no topology 'rign' (did you mean 'ring'?)."
    """
    close = difflib.get_close_matches(name.lower(), known, n=1) if isinstance(name, str) else []
    return f" (did you mean {close[0]!r}?)" if close else ""


def by_name(given: Any, named: Mapping[str, type[T]], kind: type[T], what: str, example: str) -> T:
    """Return an object of the class of a name, with its defaults; an object is returned as it is.

    Example:
        >>> by_name("int", {"int": int, "bool": bool}, int, "number", "3")
        0
        >>> by_name("boole", {"int": int, "bool": bool}, int, "number", "3")
        Traceback (most recent call last):
        ValueError: There is no number 'boole' (did you mean 'bool'?): use 'int', 'bool', or an object such as `3`.

    Args:
        given: a name or an object.
        named: classes.
        kind: of the objects.
        what: they are, in a word.
        example: an object, as it would be written.

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(given, kind):
        return given
    if isinstance(given, str) and given in named:
        return named[given]()
    raise ValueError(
        f"There is no {what} {given!r}{nearest(given, named)}: use {', '.join(map(repr, named))}, or an object such as "
        f"`{example}`."
    )
