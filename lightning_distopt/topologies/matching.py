"""Random pairs, drawn anew for each gossip step."""

from __future__ import annotations

import numpy as np

from lightning_distopt.options import is_whole
from lightning_distopt.topologies.topology import Topology

__all__ = ["RandomMatching"]


class RandomMatching(Topology):
    r"""In each step all replicas are paired at random, and pairs average.

    $$ w_{ii} = w_{ij} = \tfrac12, \qquad p = \frac{n}{2 (n - 1)} \text{ for even } n, \quad p = \tfrac12 \text{ for odd } n $$

    If `n` is odd, a replica that is drawn too is idle in a step. The pairs of a step follow from the seed and its number
    alone, so all ranks draw the same without communication, and a resumed run goes on with them.

    Example:
        >>> topology = RandomMatching(6)
        >>> [topology.neighbors(0, t) for t in range(4)]
        [[4], [5], [5], [4]]
        >>> topology.contraction
        0.6

    Args:
        num_replicas: `n`.
        seed: of the draws, from 0 on; the same on all ranks.

    Raises:
        ValueError: if the seed is not a whole number between 0 and 2^32 - 1.
    """

    def __init__(self, num_replicas: int, seed: int = 0) -> None:
        super().__init__(num_replicas, period=None, symmetric=True)
        if not is_whole(seed, least=0) or seed >= 2**32:
            raise ValueError(f"The seed of a random matching is a whole number from 0 to 2^32 - 1; got {seed!r}.")
        if self.num_replicas <= 2:  # there is but one matching
            self.period = 1
        self.seed = seed
        self._last: tuple[int, list[int]] = (-1, [])

    def __repr__(self) -> str:
        return f"RandomMatching({self.num_replicas}, seed={self.seed})"

    def _peers(self, t: int) -> list[int]:
        """Return each replica's peer in step `t`; all rows of a step are asked for one after the other."""
        step, peers = self._last
        if step != t:
            # Not numpy's newer generators, whose streams may change from version to version.
            order = np.random.RandomState([self.seed, t]).permutation(self.num_replicas).tolist()
            peers = list(range(self.num_replicas))
            for i, j in zip(order[::2], order[1::2], strict=False):
                peers[i], peers[j] = j, i
            self._last = t, peers
        return peers

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        """Return row `i` of step `t`'s matrix."""
        peer = self._peers(t)[i]
        return {i: 1.0} if peer == i else dict.fromkeys(sorted((i, peer)), 0.5)

    @property
    def max_degree(self) -> int:
        """1, or 0 for a single replica."""
        return min(1, self.num_replicas - 1)

    def bytes_per_step(self, row_bytes: float) -> tuple[float, float]:
        """Return the expected bytes that a replica sends per gossip step, which are those of the busiest, too."""
        mean = row_bytes * (self.num_replicas - self.num_replicas % 2) / self.num_replicas
        return mean, mean

    @property
    def contraction(self) -> float:
        r"""The expectation over matchings: `1 - \lambda_2(E[W^T W])`."""
        n = self.num_replicas
        return 1.0 if n == 1 else 0.5 if n % 2 else n / (2 * (n - 1))
