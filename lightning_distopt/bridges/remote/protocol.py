"""What a server and clients elsewhere have in common: messages, what carries them, and what has to be the same."""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Mapping
from typing import Any, Protocol

import torch

from lightning_distopt.strategies import FederatedStrategy

Message = dict[str, Any]
"""Tensors, numbers and strings, in dictionaries and lists; see `bridges.messages`."""

OPTIONS = ("aggregator", "clients", "fraction", "local_epochs", "local_steps", "weighting", "optimizer_state", "buffers")


class Engine(Protocol):
    """What carries messages to clients, and brings their answers; in place of one that it can't bring, the reason why.

    Example:
        >>> class Silence:
        ...     def introduce(self, message):
        ...         return {}
        ...
        ...     def exchange(self, messages):
        ...         return {k: "it is switched off" for k in messages}
        >>> engine: Engine = Silence()
        >>> engine.exchange({0: {"round": 1}})
        {0: 'it is switched off'}
    """

    def introduce(self, message: Message) -> dict[int, Message]:
        """Ask all clients who they are; returns the answers by the clients' numbers."""

    def exchange(self, messages: Mapping[int, Message]) -> Mapping[int, Message | str]:
        """Send messages to clients, by number, and wait for the answers."""


def check_options(options: Mapping[str, Any]) -> None:
    """Refuse options that `FederatedStrategy` would refuse, or that have no meaning for clients elsewhere.

    Example:
        >>> check_options({"aggregator": "fedprox", "clients": 2, "fraction": 1})

    Args:
        options: of `FederatedStrategy`.

    Raises:
        TypeError: for one that there is not, or that has no meaning here.
        ValueError: for one out of range.
    """
    if "partition" in options:
        raise TypeError("`partition` divides data among clients, but clients elsewhere have their own: leave it out.")
    if "uplink" in options or "downlink" in options:
        raise TypeError("`uplink` and `downlink` can't be used with clients elsewhere, to whom models are sent as they are.")
    for name in options:
        if name not in OPTIONS:
            raise TypeError(f"Clients elsewhere have no option `{name}`: use {', '.join(OPTIONS)}.")
    aggregator = FederatedStrategy(**options).aggregator
    if aggregator.needs_data_of_both:
        raise ValueError(
            f"{aggregator!r} needs data of the server and of clients in one place, and clients elsewhere keep theirs: use no "
            '`DropWorst`, and another `data` than "noise" for `FedDF`.'
        )


def copies(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return options of a strategy's own: aggregators are bound to the strategy that has them."""
    return copy.deepcopy(dict(options))


def signature(strategy: FederatedStrategy) -> dict[str, str]:
    """Return what has to be the same on both sides: the options, and the model but for the values that are sent."""
    replicas = strategy._require_replicas()
    digest = hashlib.sha256(replicas.signature().encode())
    for name, parameter in replicas.module.named_parameters():
        if not parameter.requires_grad:
            digest.update(name.encode())
            digest.update(parameter.detach().cpu().contiguous().flatten().view(torch.uint8).numpy().tobytes())
    return {"options": strategy._described_options(), "parameters": digest.hexdigest()}
