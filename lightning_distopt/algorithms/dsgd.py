"""Decentralized SGD: step, then mix with the neighbours."""

from __future__ import annotations

from lightning_distopt.algorithms.gossip import GossipAlgorithm


class DSGD(GossipAlgorithm):
    r"""Step, then average with the neighbours (adapt, then combine).

    $$ x_i^{t+1} = \sum_j w_{ij} \, ( x_j^t + \Delta_j^t ) $$

    With `overlap=True` the neighbours' rows of one round arrive at the end of the next, so that they travel during its
    gradient computations. That is another algorithm: what is mixed is a round old,

    $$ y_i^r = x_i^r + \Delta_i^r, \qquad
       x_i^{r+1} = y_i^r + \tfrac12 \Bigl( \sum_j w_{ij} \, y_j^{r-1} - y_i^{r-1} \Bigr), $$

    with nothing to arrive in the first round. The mean is preserved. Half of the mixing is left out because of the delay: a
    mode of `W` with eigenvalue `l` would grow by `(1 - l)^(1/2)` in each round without it, so every negative one. `DPSGD`
    overlaps without a delay.

    Example:
        >>> DSGD()
        DSGD()

    Memory: pieces of what is received; with `overlap=True` a row for each neighbour, and two for what was sent and is to be.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 5.4.1; X. Lian et al.,
    2017, arXiv:1705.09056.
    """

    overlap_delays = True

    @property
    def sends_columns(self) -> bool:  # type: ignore[override]
        """Whether rounds send `replicas.columns` alone: where no message of other columns is under way, and nobody measures."""
        return type(self) is DSGD and not self.overlap and self.control is None

    def __repr__(self) -> str:
        return "DSGD()"

    def finish_gossip(self) -> None:
        """Mix the stepped iterates, or those of the round before."""
        x = self.replicas.parameters
        if self.overlap:
            y = [block.clone() for block in x]
            if self._pending is not None:
                self.mix(x, factor=0.5)  # x_i <- y_i + 1/2 (sum_j w_ij y_j' - y_i'), with the y' of the round before
            self.share(y)
            return
        done = 0
        with self.replicas.sent() as blocks:
            while self.wants_more(done):
                self.gossip(blocks)  # x_i <- sum_j w_ij x_j
                done += 1
