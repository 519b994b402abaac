"""Local SGD, its two-phase (post-local) and its hierarchical form, and mini-batch SGD as the case `H = 1`."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning_distopt.algorithms.base import PeriodicAlgorithm
from lightning_distopt.algorithms.schedules import SyncPeriod, check_schedule, period_at
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.options import check_whole


class LocalSGD(PeriodicAlgorithm):
    r"""Train replicas independently for `H` steps, then average them.

    With any optimizer in place of SGD, replica `k` of `K` makes `H` local steps and all are averaged (eq. 2.2):

    $$ x^k_{t+h+1} = x^k_{t+h} - \eta_t \, g(x^k_{t+h}), \quad h = 0, \dots, H-1; \qquad
       x^k_{t+1} = \frac{1}{K} \sum_j x^j_{t+H} $$

    Post-local SGD (algorithm 8) is a schedule of `H`: 1 up to a switch, `H` from there on. Before the switch there are no
    blocks.

    Hierarchical local SGD (eq. 11.1): after `H` steps the replicas of a block are averaged; after `H^b` such block rounds all
    replicas are, in place of the last block round:

    $$ x^k_{[(t)+l+1]} = \frac{1}{K_b} \sum_{j \in \text{block}(k)} x^j_{[(t)+l]+H}, \qquad
       x^k_{[(t+1)]} = \frac{1}{K} \sum_j x^j_{[(t)+H^b]} $$

    As printed, algorithms 7, 8 and 11 multiply the model difference by the learning rate a second time, and algorithm 11
    swaps its inner loops; this is the corrected form, which equations 2.2 and 11.1 state.

    Example:
        >>> LocalSGD(sync_period=16)
        LocalSGD(sync_period=16)
        >>> LocalSGD(sync_period=4, block_size=8, block_period=2)
        LocalSGD(sync_period=4, block_size=8, block_period=2)

    Args:
        sync_period: `H`, optimizer steps to the next average (inside the block if there are blocks); a number or a
            callable of the step at which a round starts.
        block_size: replicas in a block; consecutive numbers. None: no blocks.
        block_period: `H^b`, block rounds to the average over all replicas.
        average: what is averaged at `H = 1`: "auto" averages gradients there (mini-batch SGD, or DDP inside a block),
            "parameters" averages parameters always. The two agree for SGD with momentum, not for Adam or with clipping.

    Raises:
        ValueError: if `H < 1` or is no number, or the block options contradict each other or `n`.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, eq. 2.2, 11.1,
    algorithms 7, 8, 11.
    """

    takes_mean = True
    sends_columns = True

    def __init__(
        self,
        sync_period: int | Callable[[int], int] = 8,
        block_size: int | None = None,
        block_period: int | None = None,
        average: Literal["auto", "parameters"] = "auto",
    ) -> None:
        check_schedule(sync_period)
        for name, value in (("block_size", block_size), ("block_period", block_period)):
            if value is not None:
                check_whole(name, value)
        if block_size is not None and block_period is None:
            raise ValueError(
                f"`block_size={block_size}` makes blocks, so say with `block_period` after how many block rounds all "
                "replicas are averaged."
            )
        if average not in ("auto", "parameters"):
            raise ValueError(f"`average` must be 'auto' or 'parameters'; got {average!r}.")
        super().__init__(sync_period)
        self.block_size = block_size
        self.block_period = block_period
        self.average = average
        self._before_switch = False
        self._block_rounds = 0  # l, block rounds since the last average over all

    def __repr__(self) -> str:
        options = [f"sync_period={self.sync_period!r}"]
        if self.block_period is not None:
            options += [f"block_size={self.block_size}", f"block_period={self.block_period}"]
        if self.average != "auto":
            options.append(f"average={self.average!r}")
        return f"LocalSGD({', '.join(options)})"

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Check the blocks against `n`, and start with a block round."""
        super().setup(replicas, communicator)
        self._block_rounds, self._before_switch = 0, False
        n = communicator.num_replicas
        if self.block_period is not None and self.block_size is None:
            raise ValueError("`block_period` needs blocks: give `block_size`, the number of replicas in one.")
        if self.block_size is not None and n % self.block_size:
            sizes = ", ".join(str(g) for g in range(1, n + 1) if n % g == 0)
            raise ValueError(
                f"`block_size={self.block_size}` does not divide the {n} replicas into equal blocks: use one of {sizes}."
            )
        communicator.prepare(self._group)

    def begin_round(self, step: int) -> None:
        """Settle whether there are blocks."""
        self._before_switch = isinstance(self.sync_period, SyncPeriod) and self.sync_period.before(step)

    def gradient_group(self, step: int) -> int:
        """Average gradients where `H = 1`: over the block, or over all replicas if there are no blocks."""
        return self._group if self._period == 1 and self.average == "auto" else 1

    @property
    def _group(self) -> int:
        if self.block_size is None or self._before_switch:
            return self.communicator.num_replicas
        return self.block_size

    def finish_round(self, step: int) -> int:
        """Average over the block, or over all replicas when it is their turn."""
        averaged = self.gradient_group(step)
        group = self._group
        if self.block_period is not None and not self._before_switch:
            self._block_rounds += 1
            if self._block_rounds == self.block_period:
                self._block_rounds, group = 0, self.communicator.num_replicas

        # From the next step on gradients are averaged: those keep replicas equal only if all of their values are by now.
        last = averaged == 1 < self._group and self.average == "auto" and period_at(self.sync_period, step + 1) == 1
        if last:
            self.replicas.columns = None
        if averaged != group:  # x^k <- mean over the group; where gradients were averaged over it, the x^k are equal
            with self.replicas.sent() as blocks:
                for block in blocks:
                    self.communicator.mean(block, group)
        if last:  # and their momentum
            self.replicas.average_optimizer_state(self.communicator, lambda block: self.combine(block, self._group))
        return group

    def state_dict(self) -> dict[str, Any]:
        """Return the position inside the round, and among rounds."""
        return {**super().state_dict(), "block_rounds": self._block_rounds}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue inside a round."""
        super().load_state_dict(state)
        self._block_rounds = int(state["block_rounds"])
