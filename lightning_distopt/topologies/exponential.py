"""Graphs whose edges bridge powers of two, so that information reaches all replicas in about log2 n steps."""

from __future__ import annotations

from lightning_distopt.topologies.topology import Topology

__all__ = ["BipartiteExponential", "Exponential", "OnePeerExponential"]


class Exponential(Topology):
    r"""Each replica receives from those `1, 2, 4, ...` places before it: directed, static.

    $$ w_{ij} = \frac{1}{1 + p} \text{ for } j = i \text{ and all } j = i - 2^k \bmod n, \quad k < p = \lceil \log_2 n \rceil $$

    For even `n` its spectral gap is `2 / (1 + p)`, far above that of a ring.

    Example:
        >>> Exponential(8).neighbors(0)
        [4, 6, 7]
        >>> Exponential(8).spectral_gap
        0.5

    Args:
        num_replicas: `n`.

    Raises:
        ValueError: if `n` is no whole number of at least 1.

    Reference:
        B. Ying et al., *Exponential graph is provably efficient for decentralized deep training*, 2021.
    """

    def __init__(self, num_replicas: int) -> None:
        super().__init__(num_replicas)
        self._offsets = _powers_of_two(self.num_replicas)
        self.symmetric = {-offset % self.num_replicas for offset in self._offsets} == set(self._offsets)

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        """Return row `i` of the matrix."""
        senders = [i, *((i - offset) % self.num_replicas for offset in self._offsets)]
        return dict.fromkeys(sorted(senders), 1 / len(senders))

    def listeners(self, i: int, t: int = 0) -> list[int]:
        """Return the replicas that receive from `i`."""
        return sorted((i + offset) % self.num_replicas for offset in self._offsets)


class OnePeerExponential(Topology):
    r"""In step `t` each replica sends to a single one, `2^(t mod p)` places after it: directed, time-varying.

    $$ W_t = \tfrac12 (I + P_t), \qquad w_{ii} = w_{i, i - 2^{t \bmod p}} = \tfrac12, \qquad p = \lceil \log_2 n \rceil $$

    If `n` is a power of two, `p` steps average exactly, as an all-reduce would. A step costs one message, whatever `n`.

    Example:
        >>> topology = OnePeerExponential(8)
        >>> [topology.listeners(0, t) for t in range(4)]
        [[1], [2], [4], [1]]
        >>> topology.contraction
        1.0

    Args:
        num_replicas: `n`.

    Raises:
        ValueError: if `n` is no whole number of at least 1.

    Reference:
        M. Assran et al., *Stochastic gradient push for distributed deep learning*, 2019; B. Ying et al., *Exponential graph is
        provably efficient for decentralized deep training*, 2021.
    """

    def __init__(self, num_replicas: int) -> None:
        super().__init__(num_replicas)
        self._offsets = _powers_of_two(self.num_replicas)
        self.period = max(1, len(self._offsets))
        self.symmetric = self.num_replicas <= 2

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        """Return row `i` of step `t`'s matrix."""
        if not self._offsets:
            return {i: 1.0}
        sender = (i - self._offsets[t % len(self._offsets)]) % self.num_replicas
        return dict.fromkeys(sorted((i, sender)), 0.5)

    def listeners(self, i: int, t: int = 0) -> list[int]:
        """Return the replica that receives from `i` in step `t`."""
        return [(i + self._offsets[t % len(self._offsets)]) % self.num_replicas] if self._offsets else []


class BipartiteExponential(Topology):
    r"""Pairs of an odd and an even replica average; the odd ones go through even ones at distances 1, 3, 7, ...

    $$ w_{ii} = w_{ij} = \tfrac12, \qquad j = i + 2^k - 1 \bmod n \text{ for odd } i, \quad
       k = 1 + (t \bmod P), \quad P = \lfloor \log_2 (n - 1) \rfloor $$

    The thesis prints distances from `2^0 - 1 = 0` on, which is the replica itself. One distance doesn't connect four
    replicas: they take 1 and 3.

    Example:
        >>> topology = BipartiteExponential(8)
        >>> [topology.neighbors(1, t) for t in range(3)]
        [[2], [4], [2]]

    Args:
        num_replicas: `n`, an even number, or 1.

    Raises:
        ValueError: if `n` is odd: then odd and even replicas can't be paired.
    """

    def __init__(self, num_replicas: int) -> None:
        super().__init__(num_replicas, symmetric=True)
        n = self.num_replicas
        if n % 2 and n > 1:
            raise ValueError(f"Odd and even replicas can't be paired if there are {n}: use 'random_matching'.")
        last = max((n - 1).bit_length() - 1, min(2, n // 2))
        self._distances = [2**k - 1 for k in range(1, last + 1)]
        self.period = max(1, last)

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        """Return row `i` of step `t`'s matrix."""
        if not self._distances:
            return {i: 1.0}
        distance = self._distances[t % len(self._distances)]
        peer = (i + distance if i % 2 else i - distance) % self.num_replicas
        return dict.fromkeys(sorted((i, peer)), 0.5)


def _powers_of_two(num_replicas: int) -> list[int]:
    return [2**k for k in range((num_replicas - 1).bit_length())]
