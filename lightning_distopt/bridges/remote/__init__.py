"""Both ends of a federation whose clients are elsewhere, for any engine that carries messages between them."""

from lightning_distopt.bridges.remote.client import RemoteClient
from lightning_distopt.bridges.remote.protocol import Engine, Message, check_options
from lightning_distopt.bridges.remote.server import RemoteStrategy

__all__ = ["Engine", "Message", "RemoteClient", "RemoteStrategy", "check_options"]
