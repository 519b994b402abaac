"""Callbacks, one file each."""

from lightning_distopt.callbacks.client_monitor import ClientMonitor
from lightning_distopt.callbacks.communication_monitor import CommunicationMonitor
from lightning_distopt.callbacks.consensus_control import ConsensusControl
from lightning_distopt.callbacks.dynamic_pruning import DynamicPruning
from lightning_distopt.callbacks.hessian_probe import HessianProbe
from lightning_distopt.callbacks.linear_interpolation import LinearInterpolation
from lightning_distopt.callbacks.loss_landscape import LossLandscape
from lightning_distopt.callbacks.mode_connectivity import ModeConnectivity
from lightning_distopt.callbacks.post_local_switch import PostLocalSwitch
from lightning_distopt.callbacks.smoothness_probe import SmoothnessProbe
from lightning_distopt.callbacks.training_diagnostics import TrainingDiagnostics
from lightning_distopt.callbacks.weight_masking import WeightMasking

__all__ = [
    "ClientMonitor",
    "CommunicationMonitor",
    "ConsensusControl",
    "DynamicPruning",
    "HessianProbe",
    "LinearInterpolation",
    "LossLandscape",
    "ModeConnectivity",
    "PostLocalSwitch",
    "SmoothnessProbe",
    "TrainingDiagnostics",
    "WeightMasking",
]
