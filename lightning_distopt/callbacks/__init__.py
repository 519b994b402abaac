"""Callbacks, one file each."""

from lightning_distopt.callbacks.client_monitor import ClientMonitor
from lightning_distopt.callbacks.communication_monitor import CommunicationMonitor
from lightning_distopt.callbacks.consensus_control import ConsensusControl
from lightning_distopt.callbacks.post_local_switch import PostLocalSwitch

__all__ = ["ClientMonitor", "CommunicationMonitor", "ConsensusControl", "PostLocalSwitch"]
