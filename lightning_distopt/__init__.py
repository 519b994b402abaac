"""Communication-efficient, decentralized, federated and sparse deep learning for PyTorch Lightning.

Importing the package registers its strategies, so that `Trainer(strategy="local_sgd")` works.
"""

from lightning_distopt.__about__ import __version__
from lightning_distopt.algorithms import (
    CHOCO,
    D2,
    DCD,
    DMSGD,
    DPSGD,
    DSGD,
    ECD,
    ConstantWarmup,
    DeepSqueeze,
    EFSign,
    ExponentialWarmup,
    GradientTracking,
    LinearWarmup,
    LocalSGD,
    PowerGossip,
    PushSum,
    QuasiGlobal,
    QuasiGlobalAdam,
    RelaySum,
    SyncPeriod,
)
from lightning_distopt.callbacks import CommunicationMonitor, ConsensusControl, PostLocalSwitch
from lightning_distopt.communication import CommunicationError, Traffic
from lightning_distopt.data import IID, ByClass, ByKey, Dirichlet, LabelShards
from lightning_distopt.federated import FedAvg, FedProx
from lightning_distopt.models import EvoNormS0
from lightning_distopt.strategies import FederatedStrategy, GossipStrategy, LocalSGDStrategy, NonFiniteError

__all__ = [  # noqa: RUF022 - as `sorted` has it
    "ByClass",
    "ByKey",
    "CHOCO",
    "CommunicationError",
    "CommunicationMonitor",
    "ConsensusControl",
    "ConstantWarmup",
    "D2",
    "DCD",
    "DMSGD",
    "DPSGD",
    "DSGD",
    "DeepSqueeze",
    "Dirichlet",
    "ECD",
    "EFSign",
    "EvoNormS0",
    "ExponentialWarmup",
    "FedAvg",
    "FedProx",
    "FederatedStrategy",
    "GossipStrategy",
    "GradientTracking",
    "IID",
    "LabelShards",
    "LinearWarmup",
    "LocalSGD",
    "LocalSGDStrategy",
    "NonFiniteError",
    "PostLocalSwitch",
    "PowerGossip",
    "PushSum",
    "QuasiGlobal",
    "QuasiGlobalAdam",
    "RelaySum",
    "SyncPeriod",
    "Traffic",
    "__version__",
]
