"""The algorithms, one file each: pure tensor mathematics on blocks of replicas."""

from lightning_distopt.algorithms.base import Algorithm, PeriodicAlgorithm
from lightning_distopt.algorithms.choco import CHOCO
from lightning_distopt.algorithms.d2 import D2
from lightning_distopt.algorithms.dcd import DCD
from lightning_distopt.algorithms.deep_squeeze import DeepSqueeze
from lightning_distopt.algorithms.dmsgd import DMSGD
from lightning_distopt.algorithms.dpsgd import DPSGD
from lightning_distopt.algorithms.dsgd import DSGD
from lightning_distopt.algorithms.ecd import ECD
from lightning_distopt.algorithms.ef_sign import EFSign
from lightning_distopt.algorithms.gossip import GossipAlgorithm
from lightning_distopt.algorithms.gradient_tracking import GradientTracking
from lightning_distopt.algorithms.local_sgd import LocalSGD
from lightning_distopt.algorithms.power_gossip import PowerGossip
from lightning_distopt.algorithms.push_sum import PushSum
from lightning_distopt.algorithms.quasi_global import QuasiGlobal
from lightning_distopt.algorithms.quasi_global_adam import QuasiGlobalAdam
from lightning_distopt.algorithms.relay_sum import RelaySum
from lightning_distopt.algorithms.schedules import ConstantWarmup, ExponentialWarmup, LinearWarmup, SyncPeriod

__all__ = [
    "ALGORITHMS",
    "CHOCO",
    "D2",
    "DCD",
    "DMSGD",
    "DPSGD",
    "DSGD",
    "ECD",
    "Algorithm",
    "ConstantWarmup",
    "DeepSqueeze",
    "EFSign",
    "ExponentialWarmup",
    "GossipAlgorithm",
    "GradientTracking",
    "LinearWarmup",
    "LocalSGD",
    "PeriodicAlgorithm",
    "PowerGossip",
    "PushSum",
    "QuasiGlobal",
    "QuasiGlobalAdam",
    "RelaySum",
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
    "quasi_global": QuasiGlobal,
    "quasi_global_adam": QuasiGlobalAdam,
    "dmsgd": DMSGD,
    "d2": D2,
    "gradient_tracking": GradientTracking,
    "push_sum": PushSum,
    "relay_sum": RelaySum,
    "power_gossip": PowerGossip,
}
"""Gossip algorithms by the names that `GossipStrategy(algorithm=...)` takes."""
