"""Matrices that mix half."""

from __future__ import annotations

from lightning_distopt.topologies.topology import Topology

__all__ = ["Lazy"]


class Lazy(Topology):
    r"""A topology that keeps half of what it has: `(W + I) / 2`, whose eigenvalues are not negative if `W` is symmetric.

    Example:
        >>> from lightning_distopt.topologies import Ring
        >>> Lazy(Ring(4)).weights(0)
        {0: 0.667, 1: 0.167, 3: 0.167}

    Args:
        topology: `W`.
    """

    def __init__(self, topology: Topology) -> None:
        super().__init__(topology.num_replicas, topology.period, topology.symmetric, topology.doubly_stochastic)
        self.topology = topology

    def __repr__(self) -> str:
        return f"Lazy({self.topology!r})"

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        """Return row `i` of step `t`'s matrix."""
        return {j: weight / 2 + (0.5 if j == i else 0.0) for j, weight in self.topology.weights(i, t).items()}

    def listeners(self, i: int, t: int = 0) -> list[int]:
        """Return the replicas that receive from `i`."""
        return self.topology.listeners(i, t)
