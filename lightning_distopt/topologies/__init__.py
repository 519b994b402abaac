"""Graphs over replicas and their mixing matrices, for gossip: plain torch and networkx, without Lightning."""

from lightning_distopt.topologies.custom import Custom
from lightning_distopt.topologies.exponential import BipartiteExponential, Exponential, OnePeerExponential
from lightning_distopt.topologies.lazy import Lazy
from lightning_distopt.topologies.make import TOPOLOGIES, make
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

__all__ = [
    "TOPOLOGIES",
    "BinaryTree",
    "BipartiteExponential",
    "Chain",
    "Complete",
    "Custom",
    "ErdosRenyi",
    "Exponential",
    "Grid",
    "Hypercube",
    "Lazy",
    "OnePeerExponential",
    "RandomMatching",
    "Ring",
    "SocialNetwork",
    "Star",
    "Topology",
    "Torus",
    "make",
]
