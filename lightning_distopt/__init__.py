"""Communication-efficient, decentralized, federated and sparse deep learning for PyTorch Lightning.

Importing the package registers its strategies, so that `Trainer(strategy="local_sgd")` works.
"""

from lightning_distopt.__about__ import __version__
from lightning_distopt.algorithms import (
    CHOCO,
    DCD,
    DPSGD,
    DSGD,
    ECD,
    ConstantWarmup,
    DeepSqueeze,
    EFSign,
    ExponentialWarmup,
    LinearWarmup,
    LocalSGD,
    SyncPeriod,
)
from lightning_distopt.callbacks import CommunicationMonitor, ConsensusControl, PostLocalSwitch
from lightning_distopt.communication import CommunicationError, Traffic
from lightning_distopt.strategies import GossipStrategy, LocalSGDStrategy, NonFiniteError

__all__ = [  # noqa: RUF022 - as `sorted` has it
    "CHOCO",
    "CommunicationError",
    "CommunicationMonitor",
    "ConsensusControl",
    "ConstantWarmup",
    "DCD",
    "DPSGD",
    "DSGD",
    "DeepSqueeze",
    "ECD",
    "EFSign",
    "ExponentialWarmup",
    "GossipStrategy",
    "LinearWarmup",
    "LocalSGD",
    "LocalSGDStrategy",
    "NonFiniteError",
    "PostLocalSwitch",
    "SyncPeriod",
    "Traffic",
    "__version__",
]
