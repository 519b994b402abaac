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
    """
    digest = hashlib.blake2b(repr((seed, *path)).encode(), digest_size=8).digest()
    return int.from_bytes(digest, "little") >> 1


def seed_streams(seed: int) -> None:
    """Seed torch (every device), Python's `random` and NumPy's global stream from `seed`."""
    torch.manual_seed(seed)
    random.seed(seed)
    np.random.seed(seed % 2**32)


def get_streams(device: torch.device) -> dict[str, Any]:
    """Return the state of all global streams as plain tensors and numbers, fit for a checkpoint."""
    name, keys, position, has_gauss, gauss = np.random.get_state(legacy=True)  # type: ignore[misc]
    state: dict[str, Any] = {
        "torch": torch.get_rng_state(),
        "python": random.getstate(),
        "numpy": (str(name), torch.from_numpy(keys.astype(np.int64)), int(position), int(has_gauss), float(gauss)),
    }
    if device.type == "cuda":
        state["cuda"] = torch.cuda.get_rng_state(device)
    return state


def set_streams(state: dict[str, Any], device: torch.device) -> None:
    """Put the global streams into a `state` that `get_streams` returned."""
    torch.set_rng_state(state["torch"].cpu())
    version, internal, gauss = state["python"]
    random.setstate((version, tuple(internal), gauss))
    name, keys, *rest = state["numpy"]
    np.random.set_state((name, keys.numpy().astype(np.uint32), *rest))
    if device.type == "cuda" and "cuda" in state:
        torch.cuda.set_rng_state(state["cuda"].cpu(), device)


@contextmanager
def isolated_streams(device: torch.device) -> Iterator[None]:
    """Undo on exit whatever the body draws from the global streams."""
    state = get_streams(device)
    try:
        yield
    finally:
        set_streams(state, device)
