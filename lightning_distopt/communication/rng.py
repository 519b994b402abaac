"""Random streams: every replica has its own, and they depend on its number alone, not on where it runs."""

from __future__ import annotations

import hashlib
import random
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import numpy as np
import torch


def derive_seed(seed: int, *path: object) -> int:
    """Return a 63-bit seed for the stream that `path` names, below the base `seed`.

    Example:
        >>> derive_seed(0, "replica", 1) == derive_seed(0, "replica", 1)
        True
        >>> derive_seed(0, "replica", 1) == derive_seed(0, "replica", 2)
        False

    Args:
        seed: the base.
        *path: numbers and texts.
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_streams(seed: int, device: torch.device | None = None) -> None:
    """Seed torch, Python's `random` and NumPy's global stream from `seed`.

    Args:
        seed: for all of them.
        device: whose streams are seeded, beside those of the CPU. None: every device's, which takes 200 us.
    """
    if device is None:
        torch.manual_seed(seed)
    else:
        torch.default_generator.manual_seed(seed)
        if device.type == "cuda":
            with torch.cuda.device(device):
                torch.cuda.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def get_streams(device: torch.device) -> dict[str, Any]:
    """Return the state of all global streams."""
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": np.random.get_state(),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_streams(state: dict[str, Any], device: torch.device) -> None:
    """Put the global streams into a `state` that `get_streams` returned."""
    torch.set_rng_state(state["torch"])
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"], device)


def pack_streams(state: dict[str, Any]) -> dict[str, Any]:
    """Return a state of streams as plain tensors and numbers, which `torch.load(weights_only=True)` accepts."""
    name, keys, *rest = state["numpy"]
    numpy = (str(name), torch.from_numpy(keys.astype(np.int64)), *map(_plain, rest))
    return {**state, "numpy": numpy}


def unpack_streams(state: dict[str, Any]) -> dict[str, Any]:
    """Undo `pack_streams`, after a checkpoint has moved tensors and turned tuples into lists."""
    name, keys, *rest = state["numpy"]
    version, internal, gauss = state["python"]
    unpacked = {key: value.cpu() if isinstance(value, torch.Tensor) else value for key, value in state.items()}
    unpacked["numpy"] = (name, keys.cpu().numpy().astype(np.uint32), *rest)
    unpacked["python"] = (version, tuple(internal), gauss)
    return unpacked


def _plain(value: Any) -> Any:
    return value.item() if isinstance(value, np.generic) else value


@contextmanager
def isolated_streams(device: torch.device) -> Iterator[None]:
    """Undo on exit whatever the body draws from the global streams.

    Example:
        >>> with isolated_streams(torch.device("cpu")):
        ...     inside = torch.rand(1)
        >>> inside.equal(torch.rand(1))
        True

    Args:
        device: whose streams are undone, beside those of the CPU.
    """
    state = get_streams(device)
    try:
        yield
    finally:
        set_streams(state, device)
