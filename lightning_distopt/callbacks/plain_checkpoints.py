"""Checkpoints that hold the plain module, while its layers compute with something else than their weights."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from lightning.pytorch.strategies import Strategy

Change = Callable[[dict[str, Any]], dict[str, Any]]

_CHANGES = "_lightning_distopt_changes"


def change_checkpoints(strategy: Strategy, change: Change) -> Callable[[], None]:
    """Let `change` be applied to the module's state dict that checkpoints of a strategy get.

    Args:
        strategy: several callbacks may change its checkpoints, and stop in any order.
        change: returns the new state dict; with a strategy of this package the module shows the average of all replicas, and
            so does the state dict.

    Returns:
        A function that undoes it; a second call does nothing.
    """
    changes: list[Change] = vars(strategy).setdefault(_CHANGES, [])
    if not changes:
        original = strategy.lightning_module_state_dict

        def changed() -> dict[str, Any]:
            state = original()
            for each in changes:
                state = each(state)
            return state

        strategy.lightning_module_state_dict = changed  # type: ignore[method-assign]
    changes.append(change)

    def undo() -> None:
        if change in changes:
            changes.remove(change)
            if not changes:
                del strategy.lightning_module_state_dict
                delattr(strategy, _CHANGES)

    return undo
