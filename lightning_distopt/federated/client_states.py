"""What single clients keep between rounds, in memory or on disk."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

import torch

from lightning_distopt.communication.tensors import clone_tree, map_tensors
from lightning_distopt.files import replacing


class ClientStates:
    """The states of clients, by number: nested containers of tensors and numbers.

    Example:
        >>> states = ClientStates()
        >>> states[3] = {"drift": torch.ones(2)}
        >>> states.get(3), states.get(4)
        ({'drift': tensor([1., 1.])}, {})

    Args:
        folder: where each client has a file. None: all are kept in memory.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = None if folder is None else Path(folder)
        self._known: dict[int, Any] = {}

    def get(self, client: int) -> dict[str, Any]:
        """Return a copy of a client's state; an empty one if it has none yet."""
        if client not in self._known:
            return {}
        if self.folder is None:
            state: dict[str, Any] = clone_tree(self._known[client])
            return state
        loaded: dict[str, Any] = torch.load(self._file(client), weights_only=True)
        return loaded

    def __setitem__(self, client: int, state: dict[str, Any]) -> None:
        on_cpu = map_tensors(state, lambda tensor: tensor.detach().to("cpu", copy=True))
        if self.folder is None:
            self._known[client] = on_cpu
            return
        with replacing(self._file(client)) as aside:
            torch.save(on_cpu, aside)
        self._known[client] = None

    def __len__(self) -> int:
        return len(self._known)

    def __iter__(self) -> Iterator[int]:
        return iter(sorted(self._known))

    def state_dict(self) -> dict[int, Any]:
        """Return the states of all clients; those on disk are read when they are written elsewhere."""
        if self.folder is None:
            return {client: clone_tree(state) for client, state in self._known.items()}
        return {client: torch.load(self._file(client), weights_only=True, mmap=True) for client in self}

    def load_state_dict(self, state: dict[int, Any]) -> None:
        """Continue from the states of a `state_dict`, and forget all others."""
        self._known.clear()
        for client, own in state.items():
            self[int(client)] = own

    def _file(self, client: int) -> Path:
        assert self.folder is not None
        return self.folder / f"client-{client:07d}.pt"
