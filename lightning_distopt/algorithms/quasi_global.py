"""Quasi-global momentum: a momentum that follows what all replicas do, learned from where gossip has moved the iterate."""

from __future__ import annotations

from collections.abc import Sequence

from torch import Tensor
from torch.optim import Optimizer

from lightning_distopt.algorithms.dsgd import DSGD
from lightning_distopt.algorithms.gossip import Blocks
from lightning_distopt.algorithms.momentum import check_plain_sgd
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.options import check_factor, check_whole


class QuasiGlobal(DSGD):
    r"""D-SGD with quasi-global momentum (QG-DSGDm, with `nesterov` QG-DSGDm-N).

    $$ x_i^{t+1/2} = x_i^t - \eta \, ( \beta \hat m_i^{t-1} + g_i^t ), \qquad
       x_i^{t+1} = \sum_j w_{ij} \, x_j^{t+1/2}, \qquad
       \hat m_i^t = \mu \, \hat m_i^{t-1} + (1 - \mu) \, \frac{x_i^t - x_i^{t+1}}{\eta} $$

    A local momentum follows the gradients of a replica's own data, and drives replicas with different data apart: its fixed
    points are those of D-SGD with a step size of `eta / (1 - beta)`. This one follows the step that was made after gossip, in
    which the gradients of neighbours are; its fixed points are those of D-SGD with `eta`. It sends what D-SGD sends.

    With `nesterov` the gradient is taken at `x - eta beta m`. (The thesis has no listing of it for several replicas; as printed
    for one, the look-ahead lacks the `eta`.) With `period` the momentum learns from steps 0, `period`, 2 `period`, ... alone
    (algorithm 20).

    A single replica is quasi-hyperbolic momentum with the step size `eta / (1 - beta)`, momentum `mu + (1 - mu) beta` and
    immediate discount `beta / (mu + (1 - mu) beta)`. That is Nesterov's momentum for `mu = (sqrt(beta) - beta) / (1 - beta)`
    alone, not for `mu = beta`. It gains the full `1 / (1 - beta)` of heavy-ball momentum, but later.

    The optimizer is SGD without momentum; learning rate, schedule and weight decay are its own, the latter part of the
    gradient. A step with learning rate zero leaves the momentum as it is. In `on_before_round` callbacks see the iterate before
    the momentum is added, unless `nesterov`.

    Example:
        >>> QuasiGlobal()
        QuasiGlobal(nesterov=False, period=1, beta=0.9, mu=0.9)

    Args:
        nesterov: whether gradients are taken at the look-ahead point.
        period: the momentum learns from one step in so many, the first of them.
        beta: weight of the momentum in a step.
        mu: of the moving average; None: `beta`, as in all experiments of the thesis.

    Memory: the momentum, and `x^t`.

    Raises:
        ValueError: if `period` is no whole number of at least 1, or `beta` or `mu` not in [0, 1); when fitting starts, for an
            optimizer that is not SGD without momentum.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, algorithms 6 and 20; T. Lin,
    S. P. Karimireddy, S. U. Stich and M. Jaggi, *Quasi-global momentum*, ICML 2021.
    """

    acts_alone = True
    local_steps = False
    overlap_delays = False

    def __init__(self, nesterov: bool = False, period: int = 1, beta: float = 0.9, mu: float | None = None) -> None:
        super().__init__()
        self.nesterov, self.period = bool(nesterov), check_whole("period", period)
        self.beta, self.mu = check_factor("beta", beta), check_factor("mu", beta if mu is None else mu)
        self._m: Blocks = ()
        self._start: Blocks = ()
        self._ahead = False

    def __repr__(self) -> str:
        return f"QuasiGlobal(nesterov={self.nesterov}, period={self.period}, beta={self.beta}, mu={self.mu})"

    def check_optimizers(self, optimizers: Sequence[Optimizer]) -> None:
        """Refuse all but SGD without momentum."""
        check_plain_sgd(optimizers, type(self).__name__)

    def setup(self, replicas: Replicas, communicator: Communicator) -> None:
        """Start without momentum."""
        super().setup(replicas, communicator)
        self._m, self._start, self._ahead = replicas.new_blocks(), replicas.new_blocks(), False

    def begin_round(self, step: int) -> None:
        """Keep `x^t`, and look ahead."""
        for start, x in zip(self._start, self.replicas.parameters, strict=True):
            start.copy_(x)
        if self.nesterov:
            self._add_momentum()
            self._ahead = True
        super().begin_round(step)

    def _add_momentum(self) -> None:
        for k, columns, eta in self.replicas.parts(self.replicas.learning_rates()):
            # x_i <- x_i - eta beta m_i
            self.replicas.parameters[k][:, columns].sub_(self._m[k][:, columns], alpha=eta * self.beta)

    def finish_round(self, step: int) -> int:
        """Add the momentum, gossip, and learn from where that has led."""
        self._ahead = False
        if not self.nesterov:
            self._add_momentum()
        group = super().finish_round(step)
        if step % self.period == 0:  # t mod tau = 0
            for k, columns, eta in self.replicas.parts(self.replicas.learning_rates()):
                if eta:
                    m, start, x = (block[k][:, columns] for block in (self._m, self._start, self.replicas.parameters))
                    # m_i <- mu m_i + (1 - mu) (x_i^t - x_i^{t+1}) / eta
                    m.mul_(self.mu).add_(start.sub_(x), alpha=(1 - self.mu) / eta)
        return group

    def iterates(self) -> tuple[Tensor, ...]:
        """Return the iterates, also where the parameters look ahead, as between batches whose gradients add up."""
        return self._start if self._ahead else self.replicas.parameters

    def blocks(self) -> dict[str, Blocks]:
        """Return the momentum, and `x^t` where the parameters look ahead."""
        return {"m": self._m, "start": self._start if self._ahead else ()}

    def load_blocks(self, blocks: dict[str, Blocks]) -> None:
        """Continue with the momentum of a checkpoint, from the iterate."""
        self._m = blocks["m"]
        for x, start in zip(self.replicas.parameters, blocks["start"], strict=False):
            x.copy_(start)
