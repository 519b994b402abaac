"""Decentralized parallel SGD: mix while the gradient is computed."""

from __future__ import annotations

import torch
from torch import Tensor

from lightning_distopt.algorithms.gossip import GossipAlgorithm
from lightning_distopt.communication import Communicator, Replicas


class DPSGD(GossipAlgorithm):
    r"""Average with the neighbours at the point where the gradient is taken (combine while adapting).

    $$ x_i^{t+1} = \sum_j w_{ij} \, x_j^t + \Delta_i^t $$

    Gradients are those at `x^t`, so the rows travel while they are computed; nothing is delayed.

    Example:
        >>> DPSGD()
        DPSGD()

    Memory: what is received, a row for each neighbour heard in a gossip step, and what was sent.

    Reference: X. Lian et al., 2017, arXiv:1705.09056; T. Lin, *Optimization for deep learning in distributed and
    heterogeneous systems*, appendix 13 ("exact averaging").
    """

    overlap_is_free = True

    def __init__(self) -> None:
        super().__init__()
        self._start: list[Tensor] = []

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Forget the rows of an earlier training."""
        super().setup(replicas, communicator)
        self._start = []

    def __repr__(self) -> str:
        return "DPSGD()"

    def begin_gossip(self) -> None:
        """Send the iterates at which gradients are about to be computed."""
        self._start = self._start or [torch.empty_like(block) for block in self.replicas.parameters]
        for start, block in zip(self._start, self.replicas.parameters, strict=True):
            start.copy_(block)
        self.share(self._start)
        if not self.overlap:
            self.wait()

    def finish_gossip(self) -> None:
        """Add the steps to the mixed iterates."""
        x = self.replicas.parameters
        if self.control is None and self.gossip_steps == 1:
            self.mix(x)  # x_i + Delta_i + sum_j w_ij x_j - x_i
            return
        y = self._sent
        for step, start in zip(x, y, strict=True):
            step -= start  # Delta_i
        done = 0
        while self.wants_more(done):
            if done:
                self.gossip(y)
            else:
                self.mix(y)  # y_i <- sum_j w_ij y_j
            done += 1
        for block, mixed in zip(x, y, strict=True):
            block += mixed
