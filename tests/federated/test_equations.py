"""Every aggregator equals the papers' equations, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from lightning_distopt import FedAvg, FedProx
from tests.federated.problem import fit_quadratic, problem, start
from tests.oracles import federated as oracle
from tests.oracles.local_sgd import SGD


@dataclass
class Row:
    """An aggregator, with options of the strategy and the user's optimizer, and its transcription."""

    name: str
    aggregator: Callable[[], Any]
    expected: Callable[..., np.ndarray]
    optimizer: str = "plain"
    strategy: dict[str, Any] = field(default_factory=dict)

    def __str__(self) -> str:
        return self.name


ROWS = [
    Row("fedavg", FedAvg, oracle.fed_avg),
    Row("fedavg, momentum", FedAvg, partial(oracle.fed_avg, optimizer=partial(SGD, 0.9, 0.01)), "sgd"),
    Row("fedavg, uniform", FedAvg, partial(oracle.fed_avg, uniform=True), strategy={"weighting": "uniform"}),
    Row("fedprox", partial(FedProx, 0.3), partial(oracle.fed_prox, mu=0.3)),
]


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("row", ROWS, ids=str)
def test_equals_the_equations(ranks, row, world_size):
    results = ranks.run(world_size, fit_quadratic, row.aggregator(), row.optimizer, strategy=row.strategy)
    for result in results:
        np.testing.assert_allclose(result["models"].numpy(), row.expected(start(), problem()), rtol=0, atol=1e-10)


@pytest.mark.parametrize("row", ROWS, ids=str)
def test_knows_that_nothing_was_learned_without_a_learning_rate(ranks, row):
    """The fourth round has a learning rate of zero: clients send back what they got."""
    models = ranks.run(1, fit_quadratic, row.aggregator(), row.optimizer, strategy=row.strategy)[0]["models"]
    assert (models[2] != models[1]).any()
    if row.name.startswith(("fedavg", "fedprox")):
        np.testing.assert_allclose(models[3], models[2], rtol=0, atol=1e-15)
