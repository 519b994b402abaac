"""The template that every pruning method fills in."""

from __future__ import annotations

import inspect
import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor

from lightning_distopt.sparsity.selection import DISTRIBUTIONS, Distribution


@dataclass
class Layers:
    """What a method looks at when masks are due: one entry for each layer, in a fixed order.

    Example:
        >>> layers = Layers(weights=[torch.tensor([3.0, 1.0])], masks=[torch.tensor([1.0, 0.0])], sparsity=0.5)
        >>> layers.magnitudes, layers.dense
        ([tensor([3., 0.])], False)

    Args:
        weights: the dense values.
        masks: ones and zeros, in the weights' types; all ones before the first update.
        sparsity: part of all weights that is to be zero now.
        step: optimizer steps done.
        total: optimizer steps in all.
        gradients: with respect to the weights that the network computed with, of the step before, pruned ones included, if the
            method `needs` them: summed over replicas.
        moments: the optimizer's running mean of the gradients, if the method `needs` them.
        first: the weights where training started, if the method `needs` them.
        generator: for random choices; the same on all ranks.
    """

    weights: Sequence[Tensor]
    masks: Sequence[Tensor]
    sparsity: float
    step: int = 0
    total: int = 1
    gradients: Sequence[Tensor] = ()
    moments: Sequence[Tensor] = ()
    first: Sequence[Tensor] = ()
    generator: torch.Generator = field(default_factory=lambda: torch.Generator().manual_seed(0))

    @property
    def dense(self) -> bool:
        """Whether nothing is pruned, as before the first update."""
        return all(bool(m.all()) for m in self.masks)

    @property
    def magnitudes(self) -> list[Tensor]:
        """The magnitudes of weights that are alive, all above zero, and zeros for the others, which so are the smallest."""
        pairs = zip(self.weights, self.masks, strict=True)
        return [torch.where(m != 0, w.abs().clamp_min(torch.finfo(w.dtype).tiny), 0.0) for w, m in pairs]


class PruningMethod:
    r"""When masks change, and to what.

    Every forward pass computes with `mask * weight`. After `step` optimizer steps (from 0, before the first) `due` is asked;
    if it says so, `update` returns the new masks. Hooks see plain tensors and change none of them.

    Example:
        >>> from lightning_distopt.sparsity.selection import largest
        >>> class Random(PruningMethod):
        ...     '''Weights that chance has chosen, anew at each update.'''
        ...
        ...     def update(self, layers):
        ...         scores = [torch.rand(w.shape, generator=layers.generator) for w in layers.weights]
        ...         return largest(scores, layers.sparsity, self.distribution)
        >>> Random().update(Layers([torch.ones(2, 2)], [torch.ones(2, 2)], sparsity=0.5))[0].sum()
        tensor(2.)

    Args:
        distribution: of the sparsity over layers: "global", "layer" or "erk", see `largest`. None: the method's own.

    Raises:
        ValueError: for one that there is not, or that the method has no use for.
    """

    pruned: Literal["rest", "learn", "zero", "train"] = "rest"
    """What pruned weights do until masks change again.

    "rest": no gradient reaches them, and they come back from zero. "learn": the gradient at the network without them reaches
    them, and they come back with the value that they have reached. "zero": gradients reach what the optimizer keeps of them,
    and they themselves are set back to zero after every step. "train": they are set to zero only when masks change, and train
    on like all others, in a network that computes with all.
    """

    limit: bool = False
    """Whether the gradient of a filter without weights is held down to its layer's median, see `StraightThroughMask`."""

    filters: bool = False
    """Whether whole filters are pruned; the sparsity is a part of all filters then."""

    ramp: bool = True
    """Whether the sparsity rises from zero, along the cubic schedule; else it is there from the first update on."""

    period: int | Literal["epoch"] | None = 16
    """Optimizer steps between two updates, unless the user says otherwise. None: they are after the method's own `steps`."""

    distributions: tuple[Distribution, ...] = DISTRIBUTIONS
    """Distributions that it can work with, the default first."""

    needs: tuple[Literal["gradients", "moments", "first"], ...] = ()
    """What `update` looks at beside weights and masks, see `Layers`."""

    waits: bool = True
    """Whether an update waits for the next round of all replicas, where they have weights of their own."""

    rewind_to: int | None = None
    """The step that every update goes back to, but for the masks. None: training goes on."""

    def __init__(self, distribution: Distribution | None = None) -> None:
        if distribution is not None and distribution not in self.distributions:
            known = ", ".join(map(repr, self.distributions))
            raise ValueError(f"{type(self).__name__} knows the `distribution` {known}, not {distribution!r}.")
        self.distribution: Distribution = distribution or self.distributions[0]

    def check(self, total: float) -> None:
        """Raise a `ValueError` if training of `total` optimizer steps, inf if that is unknown, is nothing for the method."""

    def _known(self, total: float, least: int = 1) -> None:
        """Raise an error if the length of training is not known, or less than `least` steps."""
        if not math.isfinite(total):
            raise ValueError(
                f"{type(self).__name__} has to know how long training is: give the Trainer `max_epochs` or `max_steps`."
            )
        if total < least:
            raise ValueError(f"{type(self).__name__} needs at least {least} optimizer steps; training has {total:g}.")

    @property
    def settles(self) -> bool:
        """Whether the method says itself when masks change for the last time, so that `fine_tune` has no use."""
        return self.period is None or self.pruned == "train"

    def steps(self, total: int) -> list[int]:
        """Return the steps after which masks change, in their order, if the method has no `period`."""
        raise NotImplementedError

    def due(self, step: int, total: int, period: int) -> bool:
        """Return whether masks change after `step` of `total` optimizer steps; `period` is in steps.

        By default every `period` steps, but not at the end, where weights that come back could learn no more.
        """
        return step in self.steps(total) if self.period is None else step % period == 0 and step < total

    def update(self, layers: Layers) -> list[Tensor]:
        """Return the new masks, ones and zeros in the weights' types."""
        raise NotImplementedError

    def state_dict(self) -> dict[str, Any]:
        """Return what the method keeps between updates, as tensors and plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""

    def __repr__(self) -> str:
        options = [f"{name}={getattr(self, name)!r}" for name in inspect.signature(type(self)).parameters]
        return f"{type(self).__name__}({', '.join(options)})"
