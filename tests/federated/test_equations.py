"""Every aggregator equals the papers' equations, on any number of ranks."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import numpy as np
import pytest

from lightning_distopt import (
    CoordinateMedian,
    FedAdagrad,
    FedAdam,
    FedAvg,
    FedAvgM,
    FedNova,
    FedProx,
    FedYogi,
    MimeLite,
    OneBit,
    Scaffold,
    TrimmedMean,
)
from tests.federated.problem import fit_quadratic, problem, start
from tests.oracles import compressors
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
    server_moves: bool = False  # also when clients do not

    def __str__(self) -> str:
        return self.name


MATRIX = slice(0, 6)  # of the parameters, [3, 2] and [2]
TOP_K = compressors.per_tensor(compressors.top_k(0.4), [6, 2])
SIGN = compressors.per_tensor(compressors.sign, [6, 2])

ROWS = [
    Row("fedavg", FedAvg, oracle.fed_avg),
    Row("fedavg, momentum", FedAvg, partial(oracle.fed_avg, optimizer=partial(SGD, 0.9, 0.01)), "sgd"),
    Row("fedavg, uniform", FedAvg, partial(oracle.fed_avg, uniform=True), strategy={"weighting": "uniform"}),
    Row("fedprox", partial(FedProx, 0.3), partial(oracle.fed_prox, mu=0.3)),
    Row("fedavgm", partial(FedAvgM, 0.9), partial(oracle.fed_avg_m, beta=0.9), server_moves=True),
    Row(
        "fedadagrad",
        partial(FedAdagrad, 0.2, 0.5, 0.01),
        partial(oracle.fed_opt, kind="adagrad", eta=0.2, b1=0.5, b2=None, tau=0.01),
        server_moves=True,
    ),
    Row(
        "fedadam",
        partial(FedAdam, 0.1, 0.8, 0.95, 0.01),
        partial(oracle.fed_opt, kind="adam", eta=0.1, b1=0.8, b2=0.95, tau=0.01),
        server_moves=True,
    ),
    Row(
        "fedyogi",
        partial(FedYogi, 0.1, 0.8, 0.95, 0.3),
        partial(oracle.fed_opt, kind="yogi", eta=0.1, b1=0.8, b2=0.95, tau=0.3),
        server_moves=True,
    ),
    Row("fednova", FedNova, oracle.fed_nova),
    Row("fednova, momentum", FedNova, partial(oracle.fed_nova, rho=0.9, weight_decay=0.01), "sgd"),
    Row("scaffold", Scaffold, oracle.scaffold),
    Row(
        "scaffold, a paper's server",
        partial(Scaffold, server_lr=0.7),
        partial(oracle.scaffold, eta_g=0.7, uniform=True),
        strategy={"weighting": "uniform"},
    ),
    Row("scaffold, option 1", partial(Scaffold, 1), partial(oracle.scaffold, option=1)),
    Row("mimelite", partial(MimeLite, 0.8), partial(oracle.mime_lite, beta=0.8)),
    Row("coordinate median", CoordinateMedian, partial(oracle.coordinate_wise, combine=partial(np.median, axis=0))),
    Row("trimmed mean", partial(TrimmedMean, 0.3), partial(oracle.coordinate_wise, combine=oracle.trimmed_mean(0.3))),
    Row("one bit", OneBit, partial(oracle.one_bit, matrix=MATRIX), server_moves=True),
    Row(
        "one bit, fedprox",
        lambda: OneBit(FedProx(0.3)),
        partial(oracle.one_bit, matrix=MATRIX, mu=0.3),
        server_moves=True,
    ),
    Row(
        "top-k up",
        FedAvg,
        partial(oracle.compressed, up=TOP_K),
        strategy={"uplink": "top_k:0.4"},
        server_moves=True,
    ),
    Row(
        "top-k down",
        FedAvg,
        partial(oracle.compressed, down=TOP_K),
        strategy={"downlink": "top_k:0.4"},
    ),
    Row(
        "top-k up, sign down",
        FedAvg,
        partial(oracle.compressed, up=TOP_K, down=SIGN),
        strategy={"uplink": "top_k:0.4", "downlink": "sign"},
        server_moves=True,
    ),
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
    if not row.server_moves:
        np.testing.assert_allclose(models[3], models[2], rtol=0, atol=1e-15)
