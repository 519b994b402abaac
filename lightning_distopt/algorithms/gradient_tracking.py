"""Gradient tracking: every replica follows the mean gradient of all."""

from __future__ import annotations

import torch

from lightning_distopt.algorithms.gossip import Blocks, GossipAlgorithm
from lightning_distopt.communication import Communicator, Replicas


class GradientTracking(GossipAlgorithm):
    r"""D-SGD whose steps follow an estimate `y_i` of the mean gradient, which is gossiped too.

    $$ y_i^t = \sum_j w_{ij} \, y_j^{t-1} + g_i^t - g_i^{t-1}, \qquad y_i^0 = g_i^0, \qquad
       x_i^{t+1} = \sum_j w_{ij} \, ( x_j^t - \eta \, y_j^t ) $$

    The mean of the `y_i` is that of the gradients at every step, so fixed points are optima of the mean of all objectives,
    however different the data are. It sends twice what D-SGD sends.

    Any optimizer steps along `y_i` in the gradient's place; weight decay enters there, and is not tracked. A replica whose
    gradient is not finite counts with zero in that step.

    Example:
        >>> GradientTracking()
        GradientTracking()

    Memory: `y`, what remains of it for the next step, and gradients.

    Reference: P. Di Lorenzo and G. Scutari, *NEXT: in-network nonconvex optimization*, 2016, arXiv:1602.00591; A. Koloskova,
    T. Lin and S. U. Stich, *An improved analysis of gradient tracking for decentralized machine learning*, NeurIPS 2021.
    """

    gossips_freely = False
    local_steps = False
    transforms_gradients = True
    kept = ("z",)

    def __init__(self) -> None:
        super().__init__()
        self._y: Blocks = ()
        self._z: Blocks = ()  # sum_j w_ij y_j^{t-1} - g_i^{t-1}

    def __repr__(self) -> str:
        return "GradientTracking()"

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Start from the first gradients."""
        super().setup(replicas, communicator)
        self._y, self._z = replicas.new_blocks(), replicas.new_blocks()

    def transform_gradients(self, step: int) -> None:
        """Put `y` in the gradients' place."""
        if self.communicator.num_replicas == 1:
            return
        for g, y, z in zip(self.replicas.gradients, self._y, self._z, strict=True):
            finite = g.sum(dim=1, keepdim=True, dtype=torch.promote_types(g.dtype, torch.float32)).isfinite()
            counted = torch.where(finite, g, 0.0)
            torch.add(z, counted, out=y)  # y_i^t = sum_j w_ij y_j^{t-1} - g_i^{t-1} + g_i^t
            torch.neg(counted, out=z)
            g.copy_(torch.where(finite, y, g))

    def finish_gossip(self) -> None:
        """Mix iterates and estimates in one round of messages."""
        self.gossip([*self.replicas.parameters, *self._y])
        for y, z in zip(self._y, self._z, strict=True):
            z += y
