"""Callbacks, one file each."""

from lightning_distopt.callbacks.client_monitor import ClientMonitor
from lightning_distopt.callbacks.communication_monitor import CommunicationMonitor
from lightning_distopt.callbacks.consensus_control import ConsensusControl
from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
from lightning_distopt.callbacks.post_local_switch import PostLocalSwitch
from lightning_distopt.callbacks.weight_masking import WeightMasking

__all__ = [
    "ClientMonitor",
    "CommunicationMonitor",
    "ConsensusControl",
    "DynamicPruning",
    "PostLocalSwitch",
    "WeightMasking",
]
