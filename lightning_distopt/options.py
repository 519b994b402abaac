"""What the values of options may be, and what is said of others."""

from __future__ import annotations

from collections.abc import Iterable
from numbers import Integral, Real
from typing import Any, TypeGuard


def is_whole(value: Any, least: int | None = None) -> TypeGuard[int]:
    """Return whether a value is a whole number, and not below `least`; true and false are none.

    Example:
        >>> is_whole(3, least=1), is_whole(0, least=1), is_whole(3.0), is_whole(True)
        (True, False, False, False)

    Args:
        value: anything.
        least: the smallest number that is good. None: there is none.
    """
    return isinstance(value, Integral) and not isinstance(value, bool) and (least is None or int(value) >= least)


def is_number(value: Any) -> TypeGuard[int | float]:
    """Return whether a value is a number, a whole one or not; true and false are none.

    Example:
        >>> is_number(3), is_number(0.5), is_number("0.5"), is_number(True)
        (True, True, False, False)
    """
    return isinstance(value, Real) and not isinstance(value, bool)


def check_whole(name: str, value: Any, least: int = 1) -> int:
    """Return a whole number.

    Example:
        >>> check_whole("steps", 0)
        Traceback (most recent call last):
        ValueError: `steps` must be a whole number, at least 1; got 0.

    Args:
        name: of the option.
        value: what was given for it.
        least: the smallest number that is good.

    Raises:
        ValueError: if it is none, or below `least`.
    """
    if not is_whole(value, least):
        raise ValueError(f"`{name}` must be a whole number, at least {least}; got {value!r}.")
    return int(value)


def check_positive(name: str, value: Any) -> float:
    """Return a number above 0 that is finite.

    Example:
        >>> check_positive("tau", 1)
        1.0

    Raises:
        ValueError: if it is none.
    """
    if not (is_number(value) and 0 < value < float("inf")):
        raise ValueError(f"`{name}` must be a number above 0; got {value!r}.")
    return float(value)


def check_factor(name: str, value: Any) -> float:
    """Return the factor of a moving average, at least 0 and below 1.

    Example:
        >>> check_factor("beta", 0.9)
        0.9

    Raises:
        ValueError: if it is none.
    """
    if not (is_number(value) and 0 <= value < 1):
        raise ValueError(f"`{name}` must be at least 0 and below 1; got {value!r}.")
    return float(value)


def check_part(name: str, value: Any) -> float:
    """Return a number between 0 and 1, neither of which it is.

    Example:
        >>> check_part("drop", 0.3)
        0.3

    Raises:
        ValueError: if it is none.
    """
    if not (is_number(value) and 0 < value < 1):
        raise ValueError(f"`{name}` must be above 0 and below 1; got {value!r}.")
    return float(value)


def check_share(name: str, value: Any) -> float:
    """Return a share of a whole, above 0 and at most 1.

    Example:
        >>> check_share("ratio", 1)
        1.0

    Raises:
        ValueError: if it is none.
    """
    if not (is_number(value) and 0 < value <= 1):
        raise ValueError(f"`{name}` must be above 0 and at most 1; got {value!r}.")
    return float(value)


def check_choice(name: str, value: Any, allowed: Iterable[Any]) -> None:
    """Refuse a value that is none of those there are.

    Example:
        >>> check_choice("mode", "mean", ("max", "min"))
        Traceback (most recent call last):
        ValueError: `mode` must be one of 'max', 'min'; got 'mean'.

    Args:
        name: of the option.
        value: what was given for it.
        allowed: what may be.

    Raises:
        ValueError: if it is not among them.
    """
    known = list(allowed)
    if value not in known:
        raise ValueError(f"`{name}` must be one of {', '.join(map(repr, known))}; got {value!r}.")
