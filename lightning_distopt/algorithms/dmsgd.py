"""Decentralized momentum SGD after Balu et al.: a momentum of moves, before and after mixing."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import torch
from torch.optim import Optimizer

from lightning_distopt.algorithms.gossip import Blocks, GossipAlgorithm
from lightning_distopt.algorithms.momentum import check_plain_sgd
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.compression.compressor import working_type
from lightning_distopt.options import check_factor, is_number


class DMSGD(GossipAlgorithm):
    r"""Decentralized SGD with a momentum between that of a replica's own moves and that of its neighbourhood's.

    $$ v_i^t = \sum_j w_{ij} \, x_j^t, \qquad
       \hat m_i^t = \mu \, ( x_i^t - x_i^{t-1} ) + (1 - \mu) \, ( v_i^t - v_i^{t-1} ) $$

    $$ x_i^{t+1} = v_i^t - \eta \, g_i^t + \beta \hat m_i^t \quad \text{(option 1)}, \qquad
       x_i^{t+1} = x_i^t - \eta \, g_i^t + \beta \hat m_i^t \quad \text{(option 2)} $$

    with gradients at `x^t` and a first momentum of zero. Option 2 mixes through the momentum alone. The momentum is one of
    moves: when the learning rate falls, it goes on with the size of the moves before. (In the thesis's reorganised form,
    algorithm 24, line 7 lacks the division by `eta` with which both forms are the same.)

    Gradients are those at `x^t`, so the rows travel while they are computed. The optimizer is SGD without momentum; learning
    rate, schedule and weight decay are its own, the latter part of the gradient at `x^t`. A single replica is heavy-ball
    momentum.

    Example:
        >>> DMSGD()
        DMSGD(option=1, beta=0.9, mu=0.9)

    Args:
        option: 1 or 2.
        beta: weight of the momentum.
        mu: share of a replica's own moves in it.

    Memory: `x^t`, what the next momentum is measured from, and what is received.

    Raises:
        ValueError: if `option` is neither, or `beta` or `mu` out of range; when fitting starts, for an optimizer that is not
            SGD without momentum.

    Reference: A. Balu, Z. Jiang, S. Y. Tan, C. Hedge, Y. M. Lee and S. Sarkar, *Decentralized deep learning using
    momentum-accelerated consensus*, ICASSP 2021; T. Lin, *Optimization for deep learning in distributed and heterogeneous
    systems*, algorithm 23.
    """

    acts_alone = True
    gossips_freely = False
    local_steps = False
    overlap_is_free = True
    kept = ("z", "start")

    def __init__(self, option: Literal[1, 2] = 1, beta: float = 0.9, mu: float = 0.9) -> None:
        super().__init__()
        if option not in (1, 2) or isinstance(option, bool):
            raise ValueError(f"`option` must be 1 or 2; got {option!r}.")
        if not (is_number(mu) and 0 <= mu <= 1):
            raise ValueError(f"`mu` must be at least 0 and at most 1; got {mu!r}.")
        self.option, self.beta, self.mu = option, check_factor("beta", beta), float(mu)
        self._start: Blocks = ()
        self._z: Blocks = ()  # mu x^{t-1} + (1 - mu) v^{t-1}

    def __repr__(self) -> str:
        return f"DMSGD(option={self.option}, beta={self.beta}, mu={self.mu})"

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse all but SGD without momentum."""
        check_plain_sgd(optimizers, type(self).__name__)

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Start without momentum."""
        super().setup(replicas, communicator)
        self._start, self._z = tuple(torch.empty_like(block) for block in replicas.parameters), ()

    def begin_round(self, step: int) -> None:
        """Send the iterates at which gradients are about to be computed."""
        for start, x in zip(self._start, self.replicas.parameters, strict=True):
            start.copy_(x)
        super().begin_round(step)

    def begin_gossip(self) -> None:
        """Send them to the neighbours."""
        self.share(self._start)
        if not self.overlap:
            self.wait()

    def finish_round(self, step: int) -> int:
        """Add momentum and mixing to the step."""
        x, first = self.replicas.parameters, not self._z
        self._z = self._z or tuple(torch.zeros_like(block, dtype=working_type(block.dtype)) for block in x)
        # The parameters themselves, but for half precision: those are summed up before they are rounded.
        sums = [block.to(z.dtype) for block, z in zip(x, self._z, strict=True)]
        for total, z, start in zip(sums, self._z, self._start, strict=True):
            if not first:
                total.sub_(z, alpha=self.beta)
            if self.option == 1:
                total.sub_(start)
            z.copy_(start).mul_(self.mu)
        if self.communicator.num_replicas > 1:
            self.mix(self._start)  # v_i = sum_j w_ij x_j
        for block, total, z, v in zip(x, sums, self._z, self._start, strict=True):
            z.add_(v, alpha=1 - self.mu)  # z^t = mu x^t + (1 - mu) v^t
            if self.option == 1:
                total.add_(v)
            if not first:
                total.add_(z, alpha=self.beta)  # beta m^t = beta (z^t - z^{t-1})
            block.copy_(total)
        return self.communicator.num_replicas
