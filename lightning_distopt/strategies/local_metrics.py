"""What the replicas themselves can do, beside their average."""

from __future__ import annotations

from typing import Any

from lightning_distopt.strategies import _lightning as private


def mean_of_replicas(strategy: Any) -> private.Metrics:
    """Validate every replica by itself, and return the mean over all of them of each metric. Collective.

    With several ranks, what a replica is validated on is its rank's part of the validation data.
    """
    replicas, communicator = strategy._require_replicas(), strategy._require_communicator()
    rows: list[private.Metrics] = []
    for row in range(strategy.replicas_per_device):
        replicas.activate(row)
        with strategy._isolated():
            rows.append(private.validate_unseen(strategy.lightning_module.trainer))
    replicas.activate(0)
    every: list[private.Metrics] = [row for of_rank in communicator.gather(rows) for row in of_rank]
    means: private.Metrics = {}
    for name, (_, in_logger, in_bar) in rows[0].items():
        values = [row[name][0] for row in every if name in row]
        means[name] = sum(values) / len(values), in_logger, in_bar
    return means
