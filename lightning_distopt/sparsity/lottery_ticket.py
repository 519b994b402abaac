"""Pruning in rounds of training from the same start."""

from __future__ import annotations

from torch import Tensor

from lightning_distopt.options import check_whole
from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.selection import Distribution, largest


class LotteryTicket(PruningMethod):
    r"""Train, prune by magnitude, and go back to the start, several times; the last time train what is left.

    Training is divided into `R + 1` equal parts. After the first `R` of them masks get sparser by the same factor,

    $$ 1 - s_r = (1 - s)^{r/R}, \qquad m_r = m_{r-1} \odot [\, |x| \text{ is among the largest} \,], \qquad x \leftarrow x_k $$

    and weights, buffers and learning-rate schedules go back to where they were after `k = rewind_to` steps. So a schedule
    should be as long as a part, `T / (R + 1)`: with 5 times the epochs and `rounds=4` everything is trained as long as a dense
    network. Optimizers start anew, and the data goes on.

    Pruned weights never come back. With `rewind_to=0` these are the tickets of Frankle and Carbin (2019), who prune small
    networks layer by layer and deep ones globally; a later point is what Frankle et al. (2020) recommend for deep ones.

    Example:
        >>> ticket = LotteryTicket(rounds=2)
        >>> [step for step in range(10) if ticket.due(step, total=9, period=1)]
        [3, 6]

    Args:
        rounds: `R`, how often weights are pruned, at least 1.
        rewind_to: `k`, optimizer steps, fewer than a part of training has.
        distribution: "global", "layer" or "erk", see `largest`.

    Raises:
        ValueError: for options out of range, or, before training starts, if that is too short for them.

    Reference: Frankle, Carbin: The lottery ticket hypothesis. ICLR 2019, section 2; Frankle, Dziugaite, Roy, Carbin: Linear
    mode connectivity and the lottery ticket hypothesis. ICML 2020.
    """

    ramp = False
    period = None

    def __init__(self, rounds: int = 4, rewind_to: int = 0, distribution: Distribution | None = None) -> None:
        super().__init__(distribution)
        self.rounds = check_whole("rounds", rounds)
        self.rewind_to = check_whole("rewind_to", rewind_to, least=0)

    def check(self, total: float) -> None:
        """Raise an error if training has no known length, or is too short."""
        self._known(total, least=self.rounds + 1)
        part = self.steps(int(total))[0]
        if self.rewind_to is not None and self.rewind_to >= part:
            raise ValueError(
                f"`rewind_to={self.rewind_to}` comes after the first of the {self.rounds + 1} parts of training, which ends at "
                f"step {part}: choose an earlier step."
            )

    def steps(self, total: int) -> list[int]:
        """After each part but the last."""
        return [r * total // (self.rounds + 1) for r in range(1, self.rounds + 1)]

    def update(self, layers: Layers) -> list[Tensor]:
        """Keep the largest of the weights that are alive."""
        r = sum(step <= layers.step for step in self.steps(layers.total))
        # s_r = 1 - (1 - s)^(r/R)
        sparsity = layers.sparsity if r == self.rounds else 1 - (1 - layers.sparsity) ** (r / self.rounds)
        return largest(layers.magnitudes, sparsity, self.distribution)
