"""What users name, and what they may have meant by a name that there is not."""

from __future__ import annotations

import difflib
import fnmatch
import inspect
from collections.abc import Iterable, Mapping, Sequence
from typing import Any, TypeVar

T = TypeVar("T")


def closest(name: Any, known: Iterable[str], cutoff: float = 0.6) -> str | None:
    """Return the known name that is most like another, whatever their case; None, if there is none like it.

    Example:
        >>> closest("localsgd", ["GossipStrategy", "LocalSGD"])
        'LocalSGD'
        >>> closest("ring", ["grid"], cutoff=0.9)

    Args:
        name: what was given; anything but a text is like no name.
        known: the names that there are.
        cutoff: how alike they have to be, from 0 to 1, equal.
    """
    names = {known_name.lower(): known_name for known_name in known}
    found = difflib.get_close_matches(name.lower(), names, n=1, cutoff=cutoff) if isinstance(name, str) else []
    return names[found[0]] if found else None


def nearest(name: Any, known: Iterable[str]) -> str:
    """Return a question for an error message: which known name was meant; nothing, if there is none like it.

    Example:
        >>> f"There is no topology 'rign'{nearest('rign', ['ring', 'torus'])}."
        "There is no topology 'rign' (did you mean 'ring'?)."

    Args:
        name: what was given; anything but a text is like no name.
        known: the names that there are.
    """
    close = closest(name, known)
    return f" (did you mean {close!r}?)" if close else ""


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
    if isinstance(given, type):
        raise ValueError(f"{given.__name__} is a class: give an object of it, such as `{example}`.")
    if isinstance(given, str) and given.partition(":")[0] in named:
        raise ValueError(f"The {what} {given!r} is given by an object, such as `{example}`: a name alone has no options.")
    raise ValueError(
        f"There is no {what} {given!r}{nearest(given, named)}: use {', '.join(map(repr, named))}, or an object such as "
        f"`{example}`."
    )


def short_form(
    text: str, named: Mapping[str, type[T]], what: str, examples: Mapping[str, str]
) -> tuple[type[T], dict[str, Any]]:
    """Return what a name with, after a colon, its option means: a class, and the option.

    Example:
        >>> from fractions import Fraction
        >>> short_form("fraction:3", {"fraction": Fraction}, "number", {"fraction": "numerator:2"})
        (<class 'fractions.Fraction'>, {'numerator': 3})
        >>> short_form("fraction:x", {"fraction": Fraction}, "number", {"fraction": "numerator:2"})
        Traceback (most recent call last):
        ValueError: After the colon of 'fraction' stands its `numerator`, as in 'fraction:2'; got 'fraction:x'.

    Args:
        text: as the user wrote it.
        named: classes.
        what: they are, in a word.
        examples: of each class that takes something after a colon: the option's name and a value of its kind, a whole number,
            a number, or else a text.

    Raises:
        ValueError: if there is none of that name, or what follows the colon is missing or of another kind.
    """
    name, colon, value = text.partition(":")
    if name not in named:
        raise ValueError(f"There is no {what} {name!r}{nearest(name, named)}; the names are {', '.join(named)}.")
    cls = named[name]
    if name not in examples:
        if colon:
            raise ValueError(f"The {what} {name!r} takes nothing after a colon; got {text!r}.")
        return cls, {}
    option, _, example = examples[name].partition(":")
    if not colon and inspect.signature(cls).parameters[option].default is not inspect.Parameter.empty:
        return cls, {}
    try:
        return cls, {option: _like(example, value)}
    except ValueError:
        raise ValueError(
            f"After the colon of {name!r} stands its `{option}`, as in '{name}:{example}'; got {text!r}."
        ) from None


def _like(example: str, value: str) -> int | float | str:
    """Return a value of the kind of another, both written out."""
    if example.isdigit():
        return int(value)
    if example.replace(".", "", 1).isdigit():
        return float(value)
    if not value:
        raise ValueError
    return value


def matching(patterns: str | Sequence[str], names: Iterable[str], option: str, nothing: str) -> list[str]:
    """Return the names that patterns match, in the order of the names.

    Example:
        >>> matching(["2.*", "0.bias"], ["0.weight", "0.bias", "2.weight"], "parameters", "no parameter")
        ['0.bias', '2.weight']
        >>> matching("1.*", ["0.weight", "0.bias"], "parameters", "no parameter")
        Traceback (most recent call last):
        ValueError: `parameters` has the pattern '1.*', which matches no parameter.

    Args:
        patterns: one or several, such as "stage*.conv?" (fnmatch).
        names: those to choose from.
        option: what the user calls the patterns.
        nothing: the end of the sentence about a pattern that matches none of them.

    Raises:
        ValueError: if one of the patterns matches nothing.
    """
    known, found = list(names), set[str]()
    for pattern in [patterns] if isinstance(patterns, str) else patterns:
        matched = [name for name in known if fnmatch.fnmatchcase(name, pattern)]
        if not matched:
            raise ValueError(f"`{option}` has the pattern {pattern!r}, which matches {nothing}.")
        found.update(matched)
    return [name for name in known if name in found]
