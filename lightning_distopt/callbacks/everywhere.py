"""What callbacks do with all replicas of a strategy, whether or not it is one of this package."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from lightning.pytorch.strategies import Strategy
from torch import Tensor

from lightning_distopt.strategies.base import ReplicaStrategy


def replicas_differ(strategy: Strategy) -> bool:
    """Return whether there are replicas with weights of their own."""
    return isinstance(strategy, ReplicaStrategy) and strategy.num_replicas > 1


def replicas_meet(strategy: Strategy) -> bool:
    """Return whether rounds leave all replicas with one average, or there is nothing to average."""
    return not replicas_differ(strategy) or strategy.algorithm.takes_mean  # type: ignore[attr-defined]


def shards_weights(strategy: Strategy) -> bool:
    """Return whether each rank has parts of the weights alone; Lightning loads checkpoints later then."""
    return strategy.restore_checkpoint_after_setup


def average_shown(strategy: Strategy) -> AbstractContextManager[None]:
    """Let the module be the average of all replicas inside the body, where they differ. Collective."""
    return strategy.average_parameters() if replicas_differ(strategy) else nullcontext()  # type: ignore[attr-defined, no-any-return]


def round_follows(strategy: Strategy) -> bool:
    """Return whether the optimizer step under way ends with a round, as it does where replicas are always equal."""
    return not replicas_differ(strategy) or strategy.algorithm.ends_round(strategy.steps)  # type: ignore[attr-defined]


def each_replica(strategy: Strategy) -> Iterator[int]:
    """Make each replica of this rank the module in turn, the first one last, which everybody sees between steps."""
    rows = strategy.replicas_per_device if isinstance(strategy, ReplicaStrategy) and strategy.replicas is not None else 1
    for row in reversed(range(rows)):
        if rows > 1:
            strategy.replicas.activate(row)  # type: ignore[attr-defined]
        yield row


def sum_over_ranks(strategy: Strategy, values: Tensor) -> Tensor:
    """Return the sum over all ranks, charged to the traffic. Collective."""
    if isinstance(strategy, ReplicaStrategy):
        strategy._require_communicator().sum(values)
        return values
    ranks: int = getattr(strategy, "world_size", 1)
    return strategy.reduce(values, reduce_op="sum") if ranks > 1 else values  # type: ignore[return-value]


def from_rank_zero(strategy: Strategy, values: Tensor) -> Tensor:
    """Return what rank 0 passes, charged to the traffic. Collective."""
    if not isinstance(strategy, ReplicaStrategy):
        result: Any = strategy.broadcast(values)
        return result.to(values.device)
    communicator = strategy._require_communicator()
    block = values.repeat(strategy.replicas_per_device, 1)
    communicator.broadcast(block)
    communicator.traffic.bytes_sent += values.nbytes
    return block[0]


@contextmanager
def buffers_of_rank_zero(strategy: Strategy) -> Iterator[None]:
    """Let all ranks have the running statistics of rank 0: under DDP they differ until the next step. Collective."""
    assert strategy.lightning_module is not None
    buffers = [buffer for buffer in strategy.lightning_module.buffers() if buffer.is_floating_point()]
    own = [buffer.clone() for buffer in buffers]
    try:
        with torch.no_grad():
            for buffer in buffers:
                buffer.copy_(from_rank_zero(strategy, buffer))
        yield
    finally:
        with torch.no_grad():
            for buffer, before in zip(buffers, own, strict=True):
                buffer.copy_(before)


def after_teardown(strategy: Strategy, then: Callable[[], None]) -> None:
    """Call `then` once the strategy has been torn down: where training has failed, no hook of a callback runs as late."""
    own, teardown = vars(strategy).get("teardown"), strategy.teardown

    def last() -> None:
        if own is None:
            del strategy.teardown
        else:
            strategy.teardown = own  # type: ignore[method-assign]
        try:
            teardown()
        finally:
            then()

    strategy.teardown = last  # type: ignore[method-assign]
