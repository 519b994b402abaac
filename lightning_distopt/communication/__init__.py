"""Blocks of replicas and the communication between them. Plain torch: nothing here knows Lightning."""

from lightning_distopt.communication.communicator import Communicator, Handle
from lightning_distopt.communication.layout import Slot
from lightning_distopt.communication.replicas import Replicas
from lightning_distopt.communication.rng import derive_seed, isolated_streams
from lightning_distopt.communication.traffic import Traffic, all_reduce_bytes
from lightning_distopt.communication.watch import CommunicationError, Failure, Watch

__all__ = [
    "CommunicationError",
    "Communicator",
    "Failure",
    "Handle",
    "Replicas",
    "Slot",
    "Traffic",
    "Watch",
    "all_reduce_bytes",
    "derive_seed",
    "isolated_streams",
]
