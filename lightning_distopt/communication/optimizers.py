"""What replicas have of optimizers: options that they share, and a state of each one's own."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Iterator, Sequence
from typing import Any

from torch import Tensor, nn
from torch.optim import Optimizer

from lightning_distopt.communication.averages import Combine
from lightning_distopt.communication.communicator import Communicator
from lightning_distopt.communication.tensors import clone_tree, combine_tensors


class OptimizersMixin:
    """Optimizers of a module that is several replicas, for `Replicas`."""

    _parameters: list[nn.Parameter]
    _state_rows: list[list[Any]]

    def attach_optimizers(self: Any, optimizers: Sequence[Optimizer]) -> None:
        """Give every replica its own state of these optimizers, which update the module's parameters."""
        self.optimizers = list(optimizers)
        self._first_states = [clone_tree(dict(optimizer.state)) for optimizer in optimizers]  # nearly always empty
        self._state_rows = [[defaultdict(dict) for _ in optimizers] for _ in range(self.replicas_per_rank)]
        self._state_rows[self.active] = [optimizer.state for optimizer in optimizers]
        for row in range(self.replicas_per_rank):
            if row != self.active:
                self._reset_states(row)

    def learning_rates(self: Any) -> list[float]:
        """Return the learning rate of each slot's parameter; 0 for one that no optimizer has."""
        return [0.0 if options is None else float(options[0]) for options in self.options("lr")]

    def options(self: Any, *names: str) -> list[tuple[Any, ...] | None]:
        """Return what the optimizers' `param_groups` say of each slot's parameter; None for one that no optimizer has."""
        of: dict[int, tuple[Any, ...]] = {}
        for group in (group for optimizer in self.optimizers for group in optimizer.param_groups):
            values = tuple(v.item() if isinstance(v := group.get(name), Tensor) else v for name in names)
            of |= {id(parameter): values for parameter in group["params"]}
        return [of.get(id(parameter)) for parameter in self._parameters]

    def average_optimizer_state(self: Any, communicator: Communicator, combine: Combine) -> bool:
        """Replace the floating-point optimizer state by its mean over groups of replicas.

        Counts (`step`) stay. Where some replica has no state yet (it skipped its first step) all states stay as they are.

        Returns:
            Whether the states were averaged.
        """
        rows, names = [], set()
        for row in range(self.replicas_per_rank):
            entries = list(self._float_state(row))
            rows.append([tensor for _, tensor in entries])
            names.add(tuple(name for name, _ in entries))
        if len({name for gathered in communicator.gather(names) for name in gathered}) != 1:
            return False
        combine_tensors(rows, combine)
        return True

    def share_optimizer_state(self: Any) -> None:
        """Give every replica a copy of the first one's optimizer state."""
        states = self.pack_optimizers(0)
        for row in range(1, self.replicas_per_rank):
            self.load_optimizers(row, states)
        self.activate(0)

    def reset_optimizer_state(self: Any) -> None:
        """Forget the optimizer state of every replica."""
        for row in range(self.replicas_per_rank):
            self._reset_states(row)

    def pack_optimizers(self: Any, row: int) -> list[Any]:
        """Return a copy of the state that each optimizer has for a row."""
        return [self._packed_state(k, row) for k in range(len(self.optimizers))]

    def load_optimizers(self: Any, row: int, states: Sequence[Any] | None = None) -> None:
        """Give a row the state of `pack_optimizers`, or that of optimizers that have not stepped yet."""
        if states is None:
            self._reset_states(row)
            return
        self.activate(row)
        for optimizer, saved in zip(self.optimizers, states, strict=True):
            optimizer.load_state_dict({"state": clone_tree(saved), "param_groups": optimizer.state_dict()["param_groups"]})

    def _states(self: Any, row: int) -> list[Any]:
        return [optimizer.state for optimizer in self.optimizers] if row == self.active else self._state_rows[row]

    def _reset_states(self: Any, row: int) -> None:
        for state, first in zip(self._states(row), self._first_states, strict=True):
            state.clear()
            state.update(clone_tree(first))

    def _packed_state(self: Any, k: int, row: int) -> Any:
        """Return a copy of a row's state of the `k`-th optimizer, with numbers in place of parameters."""
        optimizer, own = self.optimizers[k], self.optimizers[k].state
        try:
            optimizer.state = self._states(row)[k]
            return clone_tree(optimizer.state_dict()["state"])
        finally:
            optimizer.state = own

    def _float_state(self: Any, row: int) -> Iterator[tuple[tuple[object, ...], Tensor]]:
        names = {id(p): slot.name for p, slot in zip(self._parameters, self.slots, strict=True)}
        for k, (optimizer, states) in enumerate(zip(self.optimizers, self._states(row), strict=True)):
            for group in optimizer.param_groups:
                for parameter in group["params"]:
                    for key, value in sorted(states.get(parameter, {}).items()):
                        if isinstance(value, Tensor) and value.is_floating_point() and key != "step":
                            yield (k, names.get(id(parameter), "frozen"), key, tuple(value.shape)), value
