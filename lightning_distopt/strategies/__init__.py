"""Lightning strategies, one file for each family; importing this registers their names."""

from lightning.pytorch.strategies import StrategyRegistry

from lightning_distopt.strategies.base import ReplicaStrategy
from lightning_distopt.strategies.faults import NonFiniteError
from lightning_distopt.strategies.federated import FederatedStrategy
from lightning_distopt.strategies.gossip import GossipStrategy
from lightning_distopt.strategies.local_sgd import LocalSGDStrategy

__all__ = ["FederatedStrategy", "GossipStrategy", "LocalSGDStrategy", "NonFiniteError", "ReplicaStrategy"]

_NAMES = {"local_sgd": LocalSGDStrategy, "gossip": GossipStrategy, "federated": FederatedStrategy}
_LAUNCHES = {"": "popen", "_spawn": "spawn", "_fork": "fork", "_notebook": "fork"}

for _name, _strategy in _NAMES.items():
    for _ending, _start_method in _LAUNCHES.items():
        StrategyRegistry.register(
            _name + _ending,
            _strategy,
            description=f"{_strategy.__name__}, processes started by {_start_method}",
            override=True,
            start_method=_start_method,
        )
