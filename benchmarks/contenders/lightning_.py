"""Contenders that a Lightning `Trainer` runs: its DDP with torch's communication hooks, and the strategies of this package."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.strategies import DDPStrategy
from torch.distributed.algorithms.ddp_comm_hooks.default_hooks import bf16_compress_hook
from torch.distributed.algorithms.ddp_comm_hooks.powerSGD_hook import PowerSGDState, powerSGD_hook

from benchmarks.contenders.task import Pace, Task
from benchmarks.harness import trainer
from lightning_distopt.strategies.base import ReplicaStrategy

DENSE_STEPS = 2
"""Steps before PowerSGD begins, the fewest that torch allows."""


class HookedDDP(DDPStrategy):
    """Lightning's DDP with a communication hook; Lightning's own option for one has no effect on CPU.

    Args:
        hook: the hook.
        state: makes its state, when there is a process group.
        **options: of `DDPStrategy`.
    """

    def __init__(self, hook: Callable[..., Any], state: Callable[[], Any] = lambda: None, **options: Any) -> None:
        super().__init__(process_group_backend="gloo", **options)
        self._hook, self._state = hook, state

    def configure_ddp(self) -> None:
        super().configure_ddp()
        self.model.register_comm_hook(self._state(), self._hook)  # type: ignore[union-attr,operator]


def plain_ddp() -> DDPStrategy:
    """Return Lightning's DDP as it is."""
    return DDPStrategy(process_group_backend="gloo")


def bf16_ddp() -> DDPStrategy:
    """Return DDP that sends gradients in bfloat16."""
    return HookedDDP(bf16_compress_hook)


def power_sgd(rank: int) -> DDPStrategy:
    """Return DDP that compresses gradients to a low rank; in one bucket, since with more of them the hook hangs on gloo."""

    def state() -> PowerSGDState:
        return PowerSGDState(None, matrix_approximation_rank=rank, start_powerSGD_iter=DENSE_STEPS)

    return HookedDDP(powerSGD_hook, state, bucket_cap_mb=1000)


class _Steps(pl.Callback):
    def __init__(self, pace: Pace) -> None:
        self.pace = pace

    def on_train_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        self.pace.begin()

    def on_train_batch_end(self, *_: Any) -> None:
        self.pace.step()


def fit(
    task: Task,
    pace: Pace,
    strategy: Callable[[Task], Any],
    callbacks: Callable[[Task], Sequence[pl.Callback]] = lambda task: (),
) -> None:
    """Train with a strategy.

    Args:
        task: what is trained.
        pace: told about every step.
        strategy, callbacks: made for the task.
    """
    chosen = strategy(task)
    if isinstance(chosen, ReplicaStrategy):
        task.sent = lambda: chosen.traffic.bytes_sent
    options = {"callbacks": [*callbacks(task), _Steps(pace)], "use_distributed_sampler": False, "num_nodes": task.clusters}
    trainer(chosen, task.n // task.clusters, **options).fit(task.module, task.loader)


def alone(task: Task, pace: Pace) -> None:
    """Train every rank by itself: what a step takes without any communication."""
    trainer("auto", callbacks=[_Steps(pace)], use_distributed_sampler=False).fit(task.module, task.loader)
