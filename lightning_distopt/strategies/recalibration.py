"""Batch-norm statistics of the average model, estimated from training batches."""

from __future__ import annotations

import itertools
from collections import defaultdict, deque
from typing import Any

import torch
from torch import Tensor, nn

from lightning_distopt.analysis.undisturbed import undisturbed
from lightning_distopt.communication.tensors import clone_tree, map_tensors
from lightning_distopt.strategies import _lightning as private

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

    def state_dict(self) -> dict[int, list[Any]]:
        """Return the batches of each row, as far as a checkpoint can hold them: tensors and plain values in containers."""
        return {row: [clone_tree(batch) for batch in batches if _is_plain(batch)] for row, batches in self._batches.items()}

    def load_state_dict(self, state: dict[int, list[Any]], device: torch.device) -> None:
        """Go on with the batches of a checkpoint."""
        for row, batches in state.items():
            self._batches[row].extend(map_tensors(batches, lambda tensor: tensor.to(device)))

    def run(self, strategy: Any) -> None:
        """Estimate the statistics of the module as it is now, over all ranks. Collective."""
        module, communicator = strategy.lightning_module, strategy.communicator
        norms: list[Any] = [
            n for n in module.modules() if isinstance(n, nn.modules.batchnorm._BatchNorm) and n.track_running_stats
        ]
        if not norms or communicator.any(not any(self._batches.values()))[0]:  # before the first batch the averages stay
            return
        with undisturbed(module), torch.no_grad(), private.captured_logs(module):
            for norm in norms:
                norm.reset_running_stats()
                norm.momentum = None  # a plain mean over batches
                norm.train()
            for args, kwargs in itertools.chain.from_iterable(self._batches.values()):
                with strategy.precision_plugin.train_step_context():
                    module.training_step(*args, **kwargs)
            found = [(norm.running_mean.clone(), norm.running_var.clone()) for norm in norms]
        with torch.no_grad():
            for norm, statistics in zip(norms, found, strict=True):
                for target, statistic in zip((norm.running_mean, norm.running_var), statistics, strict=True):
                    target.copy_(communicator.average(statistic.reshape(1, -1).repeat(strategy.replicas_per_device, 1)))


def _is_plain(tree: Any) -> bool:
    if type(tree) is dict:
        return all(map(_is_plain, tree.values()))
    if type(tree) in (list, tuple):
        return all(map(_is_plain, tree))
    return tree is None or type(tree) in (Tensor, bool, int, float, str, bytes)
