"""Federated learning: what clients and their server do, whatever trains them."""

from __future__ import annotations

import difflib

from lightning_distopt.federated.aggregator import Aggregator, Client, Vector
from lightning_distopt.federated.fed_avg import FedAvg
from lightning_distopt.federated.fed_prox import FedProx
from lightning_distopt.federated.federation import Federation

__all__ = ["AGGREGATORS", "Aggregator", "Client", "FedAvg", "FedProx", "Federation", "Vector", "make"]

AGGREGATORS: dict[str, type[Aggregator]] = {"fedavg": FedAvg, "fedprox": FedProx}
"""Aggregators by the names that `FederatedStrategy(aggregator=...)` takes."""


def make(aggregator: Aggregator | str) -> Aggregator:
    """Return the aggregator of a name, with its defaults; an aggregator is returned as it is.

    Example:
        >>> make("fedprox")
        FedProx(mu=0.01)

    Raises:
        ValueError: if there is none of that name.
    """
    if isinstance(aggregator, Aggregator):
        return aggregator
    if isinstance(aggregator, str) and aggregator in AGGREGATORS:
        return AGGREGATORS[aggregator]()
    close = difflib.get_close_matches(aggregator.lower(), AGGREGATORS, n=1) if isinstance(aggregator, str) else []
    hint = f" (did you mean {close[0]!r}?)" if close else ""
    raise ValueError(
        f"There is no aggregator {aggregator!r}{hint}: use {', '.join(map(repr, AGGREGATORS))}, or an object such as "
        "`FedProx(mu=0.1)`."
    )
