"""What travels between a server and clients elsewhere: trees of tensors and numbers, as arrays and a line of text."""

from __future__ import annotations

import json
from typing import Any

import numpy as np
import torch
from torch import Tensor

Arrays = dict[str, np.ndarray[Any, Any]]


def encode(tree: Any) -> tuple[str, Arrays]:
    """Return the arrays of a tree, by numbers, and the rest of it as JSON.

    Example:
        >>> text, arrays = encode({"loss": 0.5, "model": {"weight": torch.ones(2)}})
        >>> arrays
        {'0': array([1., 1.], dtype=float32)}
        >>> decode(text, arrays)
        {'loss': 0.5, 'model': {'weight': tensor([1., 1.])}}

    Args:
        tree: dictionaries, lists and tuples of tensors, numbers, strings and None. Values of type bfloat16, which NumPy does
            not have, travel in single precision.

    Raises:
        TypeError: for a tree that holds anything else.
    """
    arrays: Arrays = {}
    return json.dumps(_encode(tree, "", arrays)), arrays


def decode(text: str, arrays: Arrays) -> Any:
    """Return the tree that `encode` has made into text and arrays; its tensors are new ones, on the CPU.

    Example:
        >>> decode(*encode(["round", 3]))
        ['round', 3]

    Args:
        text: the JSON.
        arrays: by their numbers.
    """
    return _decode(json.loads(text), arrays)


def _encode(tree: Any, path: str, arrays: Arrays) -> Any:
    """Return lists of what JSON can say; each begins with a letter that names the kind."""
    if isinstance(tree, Tensor):
        tensor = tree.detach().cpu()
        name = str(len(arrays))
        arrays[name] = np.array((tensor.float() if tensor.dtype == torch.bfloat16 else tensor).numpy(), order="C")
        return ["array", name]
    if isinstance(tree, dict):
        return ["dict", [[key, _encode(value, f"{path}/{key}" if path else str(key), arrays)] for key, value in tree.items()]]
    if isinstance(tree, list | tuple):
        kind = "list" if isinstance(tree, list) else "tuple"
        return [kind, [_encode(value, f"{path}/{k}" if path else str(k), arrays) for k, value in enumerate(tree)]]
    if tree is None or isinstance(tree, bool | int | float | str):
        return ["plain", tree]
    raise TypeError(f"Messages hold tensors, numbers and strings; `{path}` is of type {type(tree).__name__}.")


def _decode(node: Any, arrays: Arrays) -> Any:
    kind, value = node
    if kind == "array":
        return torch.from_numpy(np.array(arrays[value]))
    if kind == "dict":
        return {key: _decode(child, arrays) for key, child in value}
    if kind in ("list", "tuple"):
        children = [_decode(child, arrays) for child in value]
        return children if kind == "list" else tuple(children)
    return value
