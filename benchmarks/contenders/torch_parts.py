"""Post-local and hierarchical local SGD from the parts that torch has, in a loop without Lightning."""

from __future__ import annotations

import warnings
from collections import OrderedDict
from collections.abc import Callable

from torch.distributed.algorithms.ddp_comm_hooks.post_localSGD_hook import PostLocalSGDState, post_localSGD_hook
from torch.distributed.algorithms.model_averaging.averagers import ModelAverager, PeriodicModelAverager
from torch.distributed.algorithms.model_averaging.hierarchical_model_averager import HierarchicalModelAverager
from torch.distributed.optim import PostLocalSGDOptimizer
from torch.nn.parallel import DistributedDataParallel

from benchmarks.contenders.task import Pace, Task


def periodic(period: int, warmup: int, n: int) -> ModelAverager:
    """Return what averages all ranks every `period` steps."""
    return PeriodicModelAverager(period, warmup)


def halves(period: int, block_period: int, warmup: int, n: int) -> ModelAverager:
    """Return what averages two halves every `period` steps, and all ranks every `block_period` of these."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        return HierarchicalModelAverager(OrderedDict([(period, n // 2), (period * block_period, n)]), warmup)


def loop(task: Task, pace: Pace, averager: Callable[[int, int], ModelAverager]) -> None:
    """Train; gradients are averaged up to the switch, and stay local from there on.

    Args:
        task: what is trained.
        pace: told about every step.
        averager: made for the step of the switch and the number of ranks.
    """
    network = DistributedDataParallel(task.module.network, broadcast_buffers=False)
    state = PostLocalSGDState(None, None, start_localSGD_iter=task.switch, post_local_gradient_allreduce=False)
    network.register_comm_hook(state, post_localSGD_hook)
    made = task.module.configure_optimizers()
    optimizer = PostLocalSGDOptimizer(made["optimizer"], averager(task.switch, task.n))
    task.train(pace, network, optimizer, made["lr_scheduler"]["scheduler"])
