"""Quasi-global moments for Adam."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch.optim import Adam, AdamW, Optimizer

from lightning_distopt.algorithms.dsgd import DSGD
from lightning_distopt.algorithms.gossip import Blocks
from lightning_distopt.communication import Communicator, Replicas

OPTIONS = ("lr", "betas", "eps", "weight_decay", "decoupled_weight_decay")


class QuasiGlobalAdam(DSGD):
    r"""D-SGD with Adam whose moments follow what all replicas do (QG-DAdam).

    $$ m_i^t = \beta_1 \hat m_i^{t-1} + (1 - \beta_1) \, g_i^t, \qquad
       v_i^t = \beta_2 \hat v_i^{t-1} + (1 - \beta_2) \, g_i^t \odot g_i^t $$

    $$ x_i^{t+1/2} = x_i^t - \eta \, \frac{m_i^t}{\sqrt{v_i^t} + \epsilon}, \qquad
       x_i^{t+1} = \sum_j w_{ij} \, x_j^{t+1/2}, \qquad
       d_i^t = \frac{x_i^t - x_i^{t+1}}{\| x_i^t - x_i^{t+1} \|_2} $$

    $$ \hat m_i^t = \beta_1 \hat m_i^{t-1} + (1 - \beta_1) \, d_i^t, \qquad
       \hat v_i^t = \beta_2 \hat v_i^{t-1} + (1 - \beta_2) \, d_i^t \odot d_i^t $$

    The norm is that of all trainable parameters of the replica; a replica that has not moved has `d = 0`. There is no bias
    correction. Where the listing has `sqrt(v + epsilon)`, this has Adam's `sqrt(v) + epsilon`, so that the optimizer's `eps`
    keeps its meaning. Its baseline, DAdam, is `DSGD` with the same optimizer.

    The moments of the optimizer, `Adam` or `AdamW`, are not used, and it makes no step of its own: `lr`, `betas`, `eps` and
    `weight_decay` are taken from it (in `Adam` weight decay is part of `g`, in `AdamW` it is apart). Moments have the size of
    `d`, not of gradients: the thesis tunes the learning rate anew.

    Example:
        >>> QuasiGlobalAdam()
        QuasiGlobalAdam()

    Memory: both moments, `x^t` and gradients.

    Raises:
        ValueError: when fitting starts, for an optimizer that is not `Adam` or `AdamW`, or has `amsgrad` or `maximize`.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, algorithm 19; T. Lin,
    S. P. Karimireddy, S. U. Stich and M. Jaggi, *Quasi-global momentum*, ICML 2021.
    """

    acts_alone = True
    local_steps = False
    overlap_delays = False
    transforms_gradients = True
    kept = ("m", "v")

    def __init__(self) -> None:
        super().__init__()
        self._m: Blocks = ()
        self._v: Blocks = ()
        self._start: Blocks = ()

    def __repr__(self) -> str:
        return "QuasiGlobalAdam()"

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse all but Adam and AdamW."""
        for optimizer in optimizers:
            if not isinstance(optimizer, Adam | AdamW):
                raise ValueError(
                    f"QuasiGlobalAdam takes its options from Adam or AdamW, not from {type(optimizer).__name__}: use one of "
                    "them, or QuasiGlobal, which takes SGD."
                )
            for option in ("amsgrad", "maximize"):
                if any(group.get(option) for group in optimizer.param_groups):
                    raise ValueError(f"QuasiGlobalAdam has no `{option}`: leave it out of the optimizer.")

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Start without moments."""
        super().setup(replicas, communicator)
        self._m, self._v, self._start = replicas.new_blocks(), replicas.new_blocks(), replicas.new_blocks()

    def transform_gradients(self, step: int) -> None:
        """Make the step, in the optimizer's place."""
        replicas = self.replicas
        decoupled = any(isinstance(optimizer, AdamW) for optimizer in replicas.optimizers)
        for start, x in zip(self._start, replicas.parameters, strict=True):
            start.copy_(x)
        for k, columns, options in replicas.parts(replicas.options(*OPTIONS)):
            if options is None:
                continue
            eta, (beta1, beta2), eps, decay, apart = options
            x, g, m_hat, v_hat = (b[k][:, columns] for b in (replicas.parameters, replicas.gradients, self._m, self._v))
            if decoupled or apart:
                x.mul_(1 - eta * decay)
            elif decay:
                g.add_(x, alpha=decay)
            # v = beta2 v^ + (1 - beta2) g^2, m = beta1 m^ + (1 - beta1) g
            v = (v_hat * beta2).addcmul_(g, g, value=1 - beta2)
            m = g.mul_(1 - beta1).add_(m_hat, alpha=beta1)
            x.addcdiv_(m, v.sqrt_().add_(eps), value=-eta)  # x <- x - eta m / (sqrt(v) + eps)
        replicas.drop_all_gradients()  # so that the optimizer's own step does nothing

    def finish_round(self, step: int) -> int:
        """Gossip, and learn from where that has led."""
        group = super().finish_round(step)
        for start, x in zip(self._start, self.replicas.parameters, strict=True):
            start.sub_(x)
        squares = [torch.linalg.vector_norm(block, dim=1, keepdim=True).square() for block in self._start]
        device = squares[0].device
        norm = torch.stack([square.to(device, torch.float64) for square in squares]).sum(dim=0).sqrt()
        for k, columns, options in self.replicas.parts(self.replicas.options("betas")):
            if options is None:
                continue
            beta1, beta2 = options[0]
            d = self._start[k][:, columns]
            d /= torch.where(norm > 0, norm, 1.0).to(d.device, d.dtype)
            self._m[k][:, columns].mul_(beta1).add_(d, alpha=1 - beta1)
            self._v[k][:, columns].mul_(beta2).addcmul_(d, d, value=1 - beta2)
        return group
