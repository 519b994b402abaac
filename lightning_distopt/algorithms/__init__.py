"""The algorithms, one file each: pure tensor mathematics on blocks of replicas."""

from lightning_distopt.algorithms.base import Algorithm
from lightning_distopt.algorithms.local_sgd import LocalSGD
from lightning_distopt.algorithms.schedules import ConstantWarmup, ExponentialWarmup, LinearWarmup, SyncPeriod

__all__ = ["Algorithm", "ConstantWarmup", "ExponentialWarmup", "LinearWarmup", "LocalSGD", "SyncPeriod"]
