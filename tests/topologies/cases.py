"""Topologies that the tests go through."""

from __future__ import annotations

from typing import Any

from lightning_distopt.topologies import TOPOLOGIES, Topology, make

SIZES = (1, 2, 3, 4, 5, 6, 7, 8, 9, 12, 16, 32, 33)


def possible(name: str, n: int) -> bool:
    prime = n > 1 and all(n % d for d in range(2, n))
    return {
        "torus": not prime,
        "hypercube": n & (n - 1) == 0,
        "bipartite_exponential": n % 2 == 0 or n == 1,
        "social_network": n == 32,
    }.get(name, True)


CASES = [(name, n) for name in TOPOLOGIES for n in SIZES if possible(name, n)]


class Alternating(Topology):
    """A topology as a user may write it: pairs (0, 1), (2, 3), ... and (1, 2), (3, 4), ... in turns."""

    def __init__(self, num_replicas: int, **options: Any) -> None:
        super().__init__(num_replicas, **{"period": 2, "symmetric": True, **options})

    def weights(self, i: int, t: int = 0) -> dict[int, float]:
        peer = i + 1 if i % 2 == t % 2 else i - 1
        return dict.fromkeys(sorted((i, peer)), 0.5) if 0 <= peer < self.num_replicas else {i: 1.0}


def all_topologies() -> list[Topology]:
    return [make(name, n) for name, n in CASES] + [Alternating(6), make([(0, 1), (1, 2), (2, 0), (2, 3)], 4)]
