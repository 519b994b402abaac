"""Batch-norm statistics of the average model, estimated from training batches."""

from __future__ import annotations

from collections import defaultdict, deque
from typing import Any

import torch
from torch import nn

BATCHES = 8
"""Training batches of each replica from which the statistics are estimated: the last ones."""


class Recalibration:
    r"""Estimates batch-norm statistics anew for the average model.

    The mean of statistics that belong to different weights belongs to none. Here the average model itself sees the last
    batches of every replica, and its statistics are the mean over those of the batches:

    $$ \mu = \frac{1}{nB} \sum_{i=1}^n \sum_{b=1}^B \mu(\bar x; \xi_{i,b}) $$

    Reference: the procedure of stochastic weight averaging (Izmailov et al., 2018), on the batches at hand.
    """

    def __init__(self) -> None:
        self._batches: dict[int, deque[Any]] = defaultdict(lambda: deque(maxlen=BATCHES))

    def remember(self, row: int, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        """Keep what `training_step` of a row was called with."""
        self._batches[row].append((args, kwargs))

    @torch.no_grad()
    def run(self, strategy: Any) -> None:
        """Estimate the statistics of the module as it is now, over all ranks. Collective."""
        module, communicator = strategy.lightning_module, strategy.communicator
        norms: list[Any] = [
            n for n in module.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm) and n.track_running_stats
        ]
        if not norms:
            return
        saved = [(norm, norm.momentum, norm.training, norm.num_batches_tracked.clone()) for norm in norms]
        muted = {name: module.__dict__.get(name) for name in ("log", "log_dict")}
        try:
            for name in muted:
                module.__dict__[name] = lambda *args, **kwargs: None
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over batches
                norm.train()
            for batches in self._batches.values():
                for args, kwargs in batches:
                    with strategy.precision_plugin.train_step_context():
                        module.training_step(*args, **kwargs)
        finally:
            for norm, momentum, training, count in saved:
                norm.momentum = momentum
                norm.train(training)
                norm.num_batches_tracked.copy_(count)
            for name, original in muted.items():
                if original is None:
                    del module.__dict__[name]
                else:
                    module.__dict__[name] = original
        for norm in norms:
            for statistic in (norm.running_mean, norm.running_var):
                statistic.copy_(communicator.average(statistic.reshape(1, -1).repeat(strategy.replicas_per_device, 1)))
