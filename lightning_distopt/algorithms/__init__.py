"""The algorithms, one file each: pure tensor mathematics on blocks of replicas."""

from lightning_distopt.algorithms.base import Algorithm, PeriodicAlgorithm
from lightning_distopt.algorithms.choco import CHOCO
from lightning_distopt.algorithms.dcd import DCD
from lightning_distopt.algorithms.deep_squeeze import DeepSqueeze
from lightning_distopt.algorithms.dpsgd import DPSGD
from lightning_distopt.algorithms.dsgd import DSGD
from lightning_distopt.algorithms.ecd import ECD
from lightning_distopt.algorithms.ef_sign import EFSign
from lightning_distopt.algorithms.gossip import GossipAlgorithm
from lightning_distopt.algorithms.local_sgd import LocalSGD
from lightning_distopt.algorithms.schedules import ConstantWarmup, ExponentialWarmup, LinearWarmup, SyncPeriod

__all__ = [
    "ALGORITHMS",
    "CHOCO",
    "DCD",
    "DPSGD",
    "DSGD",
    "ECD",
    "Algorithm",
    "ConstantWarmup",
    "DeepSqueeze",
    "EFSign",
    "ExponentialWarmup",
    "GossipAlgorithm",
    "LinearWarmup",
    "LocalSGD",
    "PeriodicAlgorithm",
    "SyncPeriod",
]

ALGORITHMS: dict[str, type[GossipAlgorithm]] = {
    "dsgd": DSGD,
    "dpsgd": DPSGD,
    "choco": CHOCO,
    "dcd": DCD,
    "ecd": ECD,
    "deep_squeeze": DeepSqueeze,
    "ef_sign": EFSign,
}
"""Gossip algorithms by the names that `GossipStrategy(algorithm=...)` takes."""
