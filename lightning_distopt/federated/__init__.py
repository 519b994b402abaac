"""Federated learning: what clients and their server do, whatever trains them."""

from __future__ import annotations

from lightning_distopt.federated.aggregator import Aggregator, Client, Vector
from lightning_distopt.federated.coordinate_median import CoordinateMedian
from lightning_distopt.federated.drop_worst import DropWorst
from lightning_distopt.federated.fed_avg import FedAvg
from lightning_distopt.federated.fed_avg_m import FedAvgM
from lightning_distopt.federated.fed_df import FedDF
from lightning_distopt.federated.fed_nova import FedNova
from lightning_distopt.federated.fed_opt import FedAdagrad, FedAdam, FedYogi
from lightning_distopt.federated.fed_prox import FedProx
from lightning_distopt.federated.federation import Federation
from lightning_distopt.federated.mime_lite import MimeLite
from lightning_distopt.federated.one_bit import OneBit
from lightning_distopt.federated.scaffold import Scaffold
from lightning_distopt.federated.trimmed_mean import TrimmedMean
from lightning_distopt.lookup import by_name

__all__ = [
    "AGGREGATORS",
    "Aggregator",
    "Client",
    "CoordinateMedian",
    "DropWorst",
    "FedAdagrad",
    "FedAdam",
    "FedAvg",
    "FedAvgM",
    "FedDF",
    "FedNova",
    "FedProx",
    "FedYogi",
    "Federation",
    "MimeLite",
    "OneBit",
    "Scaffold",
    "TrimmedMean",
    "Vector",
    "make",
]

AGGREGATORS: dict[str, type[Aggregator]] = {
    "fedavg": FedAvg,
    "fedprox": FedProx,
    "fedavgm": FedAvgM,
    "fedadagrad": FedAdagrad,
    "fedadam": FedAdam,
    "fedyogi": FedYogi,
    "feddf": FedDF,
    "fednova": FedNova,
    "scaffold": Scaffold,
    "mimelite": MimeLite,
    "coordinate_median": CoordinateMedian,
    "trimmed_mean": TrimmedMean,
    "drop_worst": DropWorst,
    "one_bit": OneBit,
}
"""Aggregators by the names that `FederatedStrategy(aggregator=...)` takes."""


def make(aggregator: Aggregator | str) -> Aggregator:
    """Return the aggregator of a name, with its defaults; an aggregator is returned as it is.

    Example:
        >>> make("fedprox")
        FedProx(mu=0.01)

    Args:
        aggregator: a name that `AGGREGATORS` has, or an `Aggregator`.

    Raises:
        ValueError: if there is none of that name.
    """
    return by_name(aggregator, AGGREGATORS, Aggregator, "aggregator", "FedProx(mu=0.1)")
