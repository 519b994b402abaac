"""The template that every algorithm fills in."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

from torch import Tensor
from torch.optim import Optimizer

from lightning_distopt.algorithms.schedules import period_at
from lightning_distopt.communication import Communicator, Replicas


class Algorithm:
    """What an algorithm does around the optimizer steps of `n` replicas.

    A training step, with the hooks in the order in which they run:

    ```
    before_step(step)             look-ahead, extrapolation, start of overlapped communication
    forward and backward pass of every replica on this rank
    reduce_gradients(step)        means over replicas, before clipping
    gradient clipping of every replica
    transform_gradients(step)     after clipping: momentum of the algorithm's own, corrections
    before_update()               of every replica, where it steps from another point than that of its gradient: go there
    optimizer step of every replica
    after_update()                and come back
    after_step(step)              average, mix, exchange; often nothing
    ```

    `step` counts attempted optimizer steps from 0 and is the same on all ranks. Hooks work on blocks
    `replicas.parameters` and `replicas.gradients`, tuples of tensors `[m, d]`, in place. Between communication events a hook
    must not touch another rank.

    Example:
        >>> class OneShotAveraging(Algorithm):
        ...     def __init__(self, at: int) -> None:
        ...         self.at = at
        ...
        ...     def ends_round(self, step: int) -> bool:
        ...         return step + 1 == self.at
        ...
        ...     def after_step(self, step: int) -> int:
        ...         if not self.ends_round(step):
        ...             return 0
        ...         for block in self.replicas.parameters:
        ...             self.communicator.mean(block)
        ...         return self.communicator.num_replicas
    """

    replicas: Replicas
    communicator: Communicator

    seed: int = 0
    """What the algorithm's random choices derive from, beside the replica's number and the step; the same on all ranks."""

    transforms_gradients: bool = False
    """Whether `transform_gradients` works on `replicas.gradients`, so that they must be kept."""

    steps_elsewhere: bool = False
    """Whether optimizers step another point than that of the gradients: `before_update` and `after_update` are called."""

    acts_alone: bool = False
    """Whether it does something where there is a single replica."""

    takes_mean: bool = False
    """Whether a round over all replicas leaves each with the plain mean of their parameters."""

    sends_columns: bool = False
    """Whether rounds send `replicas.columns` alone, where there are such."""

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Bind the algorithm to the replicas of this rank and allocate its blocks; options that do not fit `n` fail here."""
        self.replicas = replicas
        self.communicator = communicator

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Raise a `ValueError` for optimizers that the algorithm can't work with; called before training starts."""

    def before_step(self, step: int) -> None:
        """Run before the first forward pass of a step."""

    def gradient_group(self, step: int) -> int:
        """Return `g` if this step averages the gradients over groups of `g` consecutive replicas, 1 if it does not.

        Where a rank hosts one replica this is done by torch's DDP, which overlaps it with the backward pass.
        """
        return 1

    def reduce_gradients(self, step: int) -> None:
        """Average gradients over replicas, before they are clipped; called unless DDP has done it."""
        group = self.gradient_group(step)
        for block, numel in zip(self.replicas.gradients, self.replicas.numel, strict=True):
            self.communicator.mean(block, group, numel=numel)  # charged without padding: DDP, which it stands for, sends none

    def transform_gradients(self, step: int) -> None:
        """Change `replicas.gradients` after clipping; called if `transforms_gradients`."""

    def before_update(self) -> None:
        """Run right before the optimizer steps the active replica, if `steps_elsewhere`."""

    def after_update(self) -> None:
        """Run right after it."""

    def ends_round(self, step: int) -> bool:
        """Return whether `after_step(step)` will communicate; asked right before it, the same answer on every rank."""
        return True

    def after_step(self, step: int) -> int:
        """Communicate after the optimizer steps.

        Returns:
            The number of replicas in each group that has just come to agree or mixed, 0 if there was no round. Policies for
            buffers and optimizer state act on the same groups, and stop signals travel at rounds.
        """
        return 0

    def finish(self) -> None:
        """Receive what is still under way; called when training ends."""

    def iterates(self) -> tuple[Tensor, ...]:
        """Return blocks whose rows are the replicas' iterates: the parameters, unless these are at another point just now."""
        return self.replicas.parameters

    def models(self) -> tuple[Tensor, ...]:
        """Return blocks whose mean over all replicas is the model that is evaluated and saved."""
        return self.iterates()

    def combine(self, block: Tensor, group: int) -> None:
        """Average values that lie beside the parameters, such as buffers, as the last round did the parameters, in place."""
        self.communicator.mean(block, group)

    def state_dict(self) -> dict[str, Any]:
        """Return what an exact resume needs, as tensors and plain numbers."""
        return {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""


class PeriodicAlgorithm(Algorithm):
    """An algorithm that communicates every `H` optimizer steps.

    It fills in `begin_round`, if it has something to start then, and `finish_round`.

    Example:
        >>> class Averaging(PeriodicAlgorithm):
        ...     def finish_round(self, step: int) -> int:
        ...         for block in self.replicas.parameters:
        ...             self.communicator.mean(block)
        ...         return self.communicator.num_replicas
        >>> algorithm = Averaging(sync_period=8)

    Args:
        sync_period: `H`, a number or a callable of the step at which a round starts.
    """

    def __init__(self, sync_period: int | Callable[[int], int] = 1) -> None:
        self.sync_period = sync_period
        self._period = 1  # H of the round under way
        self._local_steps = 0  # h, steps since the last round

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Start with a round."""
        super().setup(replicas, communicator)
        self._period, self._local_steps = 1, 0

    def begin_round(self, step: int) -> None:
        """Run before the first of the round's steps."""

    def finish_round(self, step: int) -> int:
        """Communicate after the last of the round's steps; returns what `after_step` returns."""
        raise NotImplementedError

    def before_step(self, step: int) -> None:
        """Settle `H` when a round starts."""
        if self._local_steps == 0:
            self._period = period_at(self.sync_period, step)
            self.begin_round(step)

    def ends_round(self, step: int) -> bool:
        """Return whether this step is the last of `H`."""
        return self._local_steps + 1 >= self._period

    def after_step(self, step: int) -> int:
        """Finish the round when `H` steps are done."""
        if not self.ends_round(step):
            self._local_steps += 1
            return 0
        group = self.finish_round(step)
        self._local_steps = 0
        self.communicator.traffic.rounds += group > 0
        return group

    def state_dict(self) -> dict[str, Any]:
        """Return the position inside the round."""
        return {"period": self._period, "local_steps": self._local_steps}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue inside a round."""
        self._period, self._local_steps = int(state["period"]), int(state["local_steps"])
