"""Local SGD, post-local SGD, hierarchical local SGD and mini-batch SGD."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, Literal

from lightning_distopt.algorithms import LocalSGD, SyncPeriod
from lightning_distopt.strategies.base import ReplicaStrategy
from lightning_distopt.strategies.checks import check_keywords


class LocalSGDStrategy(ReplicaStrategy):
    r"""Train replicas independently for `H` optimizer steps, then average them; for any optimizer.

    $$ x^k_{t+h+1} = x^k_{t+h} - \eta_t \, g(x^k_{t+h}), \quad h = 0, \dots, H-1; \qquad
       x^k_{t+1} = \frac{1}{K} \sum_j x^j_{t+H} $$

    `sync_period=1` is mini-batch SGD: gradients are averaged, by torch's DDP. With blocks it is hierarchical local SGD: the
    replicas of a block are averaged every `sync_period` steps, all replicas every `block_period` of these rounds.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_distopt import LocalSGDStrategy
        >>> strategy = LocalSGDStrategy(sync_period=4, replicas_per_device=2)
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=8, limit_val_batches=0, **quiet)
        >>> trainer.fit(BoringModel())
        >>> strategy.traffic.rounds
        2

    Args:
        sync_period: `H`, optimizer steps to the next average; a number, or a callable of the step at which a round starts
            (`ConstantWarmup`, `LinearWarmup`, `ExponentialWarmup`, or any of yours). Counts attempted optimizer steps, whatever
            `accumulate_grad_batches`.
        block_size: replicas in a block, consecutive numbers. By default those of a node, if `block_period` is given.
        block_period: block rounds to the average over all replicas. None: no blocks.
        average: "auto" averages gradients where `H = 1`, "parameters" averages parameters there too.
        **kwargs: options of every strategy, see `ReplicaStrategy`: replicas_per_device, evaluate, buffers, optimizer_state,
            nonfinite, partition, ddp_kwargs, and Lightning's own.

    Raises:
        ValueError: for `H < 1`, contradictory block options, or a block size that does not divide the number of replicas.
        TypeError: for an unknown option.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, chapter 2.
    """

    def __init__(
        self,
        sync_period: int | SyncPeriod | Callable[[int], int] = 8,
        block_size: int | None = None,
        block_period: int | None = None,
        average: Literal["auto", "parameters"] = "auto",
        **kwargs: Any,
    ) -> None:
        check_keywords(type(self), LocalSGDStrategy, kwargs)
        super().__init__(algorithm=LocalSGD(sync_period, block_size, block_period, average), **kwargs)

    @property
    def sync_period(self) -> int | Callable[[int], int]:
        """`H`, or its schedule; a new one takes effect when the next round starts."""
        return self.algorithm.sync_period  # type: ignore[attr-defined, no-any-return]

    @sync_period.setter
    def sync_period(self, schedule: int | Callable[[int], int]) -> None:
        self.algorithm.sync_period = schedule  # type: ignore[attr-defined]

    def _setup_replicas(self) -> None:
        if self.algorithm.block_period is not None and self.algorithm.block_size is None:  # type: ignore[attr-defined]
            self.algorithm.block_size = self.num_processes * self.replicas_per_device  # type: ignore[attr-defined]
        super()._setup_replicas()
