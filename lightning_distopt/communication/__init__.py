"""Blocks of replicas and the communication between them. Plain torch: nothing here knows Lightning."""

from lightning_distopt.communication.communicator import Communicator
from lightning_distopt.communication.exchange import NO_NOTICE, Handle, Shared
from lightning_distopt.communication.layout import Slot
from lightning_distopt.communication.neighbours import Neighbourhood, add_weighted
from lightning_distopt.communication.replicas import Replicas
from lightning_distopt.communication.rng import derive_seed, isolated_streams
from lightning_distopt.communication.traffic import Traffic, all_reduce_bytes
from lightning_distopt.communication.watch import CommunicationError, Failure, Watch, first_line

__all__ = [
    "NO_NOTICE",
    "CommunicationError",
    "Communicator",
    "Failure",
    "Handle",
    "Neighbourhood",
    "Replicas",
    "Shared",
    "Slot",
    "Traffic",
    "Watch",
    "add_weighted",
    "all_reduce_bytes",
    "derive_seed",
    "first_line",
    "isolated_streams",
]
