"""A row of the table of algorithms: how users ask for it, and what is true of it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Case:
    """A row.

    `oracle(x0, gradients, etas, n, optimizer, limit)` returns the trajectory `[steps, n, d]`. `rounds(steps)` counts
    communication events.

    Attributes:
        sizes: the `n` for which it is compared with the oracle in every layout.
        refuses_one: what it says for `n = 1`, where it can't do that.
        diverges: whether replicas differ between rounds.
        preserves_mean: whether communication leaves the mean over replicas alone.
        exact: whether replicas that are equal are trained as a single one is.
        learns: accuracy on the digits that it reaches.
        takes: the optimizer that it works with, if not any: "sgd" (without momentum) or "adam".
        decays: whether it learns where the learning rate falls.
        acts_alone: whether a single replica is not trained as without the strategy.
    """

    name: str
    strategy: Callable[..., Any]
    oracle: Callable[..., Any]
    rounds: Callable[[int], int]
    callbacks: Callable[[], list[Any]] = field(default=list)
    sizes: tuple[int, ...] = (2, 3, 4)
    refuses_one: str = ""
    diverges: bool = True
    preserves_mean: bool = True
    exact: bool = True
    learns: float = 0.9
    takes: str = ""
    decays: bool = True
    acts_alone: bool = False

    def __str__(self) -> str:
        return self.name
