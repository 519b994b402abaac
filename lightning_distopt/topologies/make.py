"""Topologies by name."""

from __future__ import annotations

from typing import Any

from lightning_distopt.lookup import short_form
from lightning_distopt.topologies.custom import Custom
from lightning_distopt.topologies.exponential import BipartiteExponential, Exponential, OnePeerExponential
from lightning_distopt.topologies.matching import RandomMatching
from lightning_distopt.topologies.static import (
    BinaryTree,
    Chain,
    Complete,
    ErdosRenyi,
    Grid,
    Hypercube,
    Ring,
    SocialNetwork,
    Star,
    Torus,
)
from lightning_distopt.topologies.topology import Topology

__all__ = ["TOPOLOGIES", "make"]

TOPOLOGIES: dict[str, type[Topology]] = {
    "ring": Ring,
    "torus": Torus,
    "grid": Grid,
    "star": Star,
    "complete": Complete,
    "hypercube": Hypercube,
    "chain": Chain,
    "binary_tree": BinaryTree,
    "exponential": Exponential,
    "one_peer_exponential": OnePeerExponential,
    "bipartite_exponential": BipartiteExponential,
    "random_matching": RandomMatching,
    "social_network": SocialNetwork,
    "erdos_renyi": ErdosRenyi,
}
"""Topologies that `make` takes by name."""

_OPTIONS = {"torus": "rows:2", "grid": "rows:2", "random_matching": "seed:7", "erdos_renyi": "probability:0.3"}


def make(topology: Any, num_replicas: int, column_stochastic: bool = False) -> Topology:
    """Make a topology from a name, a graph, edges or a matrix.

    Example:
        >>> make("ring", 8)
        Ring(8)
        >>> make("torus:2", 8)
        Torus(8, rows=2)
        >>> make([(0, 1), (1, 2)], 3).neighbors(1)
        [0, 2]

    Args:
        topology: a name among `TOPOLOGIES`; after a colon may follow the rows of a torus or grid, the seed of a random matching
            or the probability of an Erdos-Renyi graph. Or what `Custom` takes, or a `Topology`.
        num_replicas: `n`.
        column_stochastic: how `Custom` reads a graph, edges or a matrix: for push-sum, if True.

    Returns:
        The topology, or the one that was given.

    Raises:
        ValueError: if there is none of this name, or not with `n` replicas.
    """
    if isinstance(topology, Topology):
        if topology.num_replicas != num_replicas:
            raise ValueError(
                f"{topology!r} has {topology.num_replicas} replicas, but there are {num_replicas} here: make it for so many, "
                "or give its name."
            )
        if type(topology) not in (Custom, *TOPOLOGIES.values()):
            topology.validate()
        return topology
    if not isinstance(topology, str):
        return Custom(num_replicas, topology, column_stochastic)
    cls, options = read(topology)
    return cls(num_replicas, **options)


def read(name: str) -> tuple[type[Topology], dict[str, Any]]:
    """Return what a name, and what stands after its colon, mean, for any number of replicas.

    Example:
        >>> read("torus:2")
        (<class 'lightning_distopt.topologies.static.Torus'>, {'rows': 2})

    Raises:
        ValueError: if there is no topology of that name, or what follows the colon is not what it takes.
    """
    return short_form(name, TOPOLOGIES, "topology", _OPTIONS)
