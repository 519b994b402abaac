"""Index lists, one for each replica or client: what is taken for one, and what is refused."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from numpy.typing import NDArray
from torch import Tensor

Indices = NDArray[np.int64]


def checked_lists(lists: Any, count: int, size: int, who: str) -> list[Indices]:
    """Return the samples that each of `count` replicas or clients (`who`) has of a dataset of this size.

    Example:
        >>> checked_lists([range(2), [4, 3]], count=2, size=5, who="client")
        [array([0, 1]), array([4, 3])]

    Args:
        lists: of indices, of any kind: lists, ranges, arrays, tensors; or an array of two dimensions, whose rows they are.
        count: how many there are to be.
        size: of the dataset.
        who: what the lists are of.

    Raises:
        MisconfigurationException: unless there are `count` lists, each of some indices of samples that exist.
    """
    if not isinstance(lists, Sequence | np.ndarray | Tensor) or isinstance(lists, str | bytes):
        raise MisconfigurationException(f"`partition` must give index lists; got {described(lists)}.")
    if len(lists) != count:
        raise MisconfigurationException(f"`partition` gives {len(lists)} index lists, but there are {count} {who}s.")
    checked = []
    for k, part in enumerate(lists):
        indices = _as_array(part)
        if indices is not None and indices.shape == (0,):
            raise MisconfigurationException(
                f"`partition` gives {who} {k} no sample: use fewer {who}s, or a `partition` that gives each at least one."
            )
        if indices is None or indices.ndim != 1 or indices.dtype.kind not in "iu":
            what = described(part)
            if indices is not None and indices.ndim == 1:
                what = f"values of type {type(indices[:1].tolist()[0]).__name__}"
            raise MisconfigurationException(
                f"`partition` gives {who} {k} {what} in place of samples: give indices, such as `np.flatnonzero(mask)`."
            )
        wrong = [i for i in (int(indices.min()), int(indices.max())) if not 0 <= i < size]
        if wrong:
            raise MisconfigurationException(
                f"`partition` gives {who} {k} the sample {wrong[0]}, but the dataset has only {size}."
            )
        checked.append(indices.astype(np.int64))
    return checked


def same_lists(one: Any, other: Any) -> bool:
    """Return whether two divisions of a dataset are the same."""
    if not hasattr(one, "__len__") or not hasattr(other, "__len__"):
        return True  # they are no lists, which is said elsewhere
    pairs = ((_as_array(a), _as_array(b)) for a, b in zip(one, other, strict=False))
    return len(one) == len(other) and all(a is None or b is None or np.array_equal(a, b) for a, b in pairs)


def described(value: Any) -> str:
    """Return what a value is that is no index lists, without printing all of it.

    Example:
        >>> described(np.zeros(3)), described({0: [1], 1: [0]})
        ('an array of shape (3,) and type float64', 'a dict: give `list(d.values())`')
    """
    if isinstance(value, np.ndarray | Tensor):
        return f"an array of shape {tuple(value.shape)} and type {value.dtype}"
    if isinstance(value, Mapping):
        return f"a {type(value).__name__}: give `list(d.values())`"
    if value is None or isinstance(value, bool | int | float):
        return repr(value)
    return f"an object of type {type(value).__name__}"


def _as_array(part: Any) -> NDArray[Any] | None:
    """Return an array of what can be one, None otherwise."""
    try:
        array = part.cpu() if isinstance(part, Tensor) else part
        return np.asarray(array if isinstance(array, np.ndarray | Sequence | Tensor) else list(array))
    except (TypeError, ValueError):  # no collection, or lists of different lengths
        return None
