"""Aggregators that users write: the one on the page of algorithms of one's own, and mistakes that are easily made."""

from __future__ import annotations

import copy
import inspect
import re
from pathlib import Path

import numpy as np
import pytest
import torch

from lightning_distopt.federated import Aggregator, FedAvg
from tests.federated.problem import FRACTION, SIZES, fit_net, fit_quadratic, problem, start
from tests.federated.test_strategy import stop_and_resume

PAGE = Path(__file__).parent.parent.parent / "docs" / "how_to" / "own_algorithm.md"


def fed_dyn(alpha=0.1):
    """Return the aggregator of the page."""
    (snippet,) = [code for code in re.findall(r"^```python\n(.*?)^```", PAGE.read_text(), re.M | re.S) if "FedDyn" in code]
    namespace = {}
    exec(compile(snippet.partition("strategy = ")[0], PAGE.name, "exec"), namespace)
    return namespace["FedDyn"](alpha)


def expected(alpha):
    """Return the models of Acar et al., algorithm 1, with local SGD."""
    p, x = problem(), start()
    server, own, models = np.zeros_like(x), {k: np.zeros_like(x) for k in range(len(SIZES))}, []
    for eta, chosen in zip(p.etas, p.cohorts, strict=True):
        ends = []
        for k in chosen:
            y = x.copy()
            for h in range(p.steps[k]):
                y = y - eta * (p.gradient(k, h, y) - own[k] + alpha * (y - x))
            own[k] = own[k] - alpha * (y - x)
            ends.append(y)
        server = server - alpha / len(SIZES) * sum(y - x for y in ends)
        x = np.mean(ends, axis=0) - server / alpha
        models.append(x)
    return torch.from_numpy(np.stack(models))


@pytest.mark.parametrize("world_size", [1, 2])
def test_the_example_of_the_page_equals_its_equations(ranks, world_size):
    def fit(rank, world_size):
        return fit_quadratic(rank, world_size, fed_dyn(), strategy={"weighting": "uniform", "fraction": FRACTION})["models"]

    for models in ranks.run(world_size, fit):
        torch.testing.assert_close(models, expected(0.1), rtol=0, atol=1e-10)


@pytest.mark.parametrize("turns", [2, 6])
def test_the_example_of_the_page_resumes_exactly(ranks, tmp_path, turns):
    def fit(rank, world_size):
        whole = fit_net(rank, world_size, fed_dyn())
        return whole, stop_and_resume(rank, world_size, turns, str(tmp_path), aggregator=fed_dyn())

    ((whole, rest),) = ranks.run(1, fit)
    assert torch.equal(whole["models"][-1], rest["models"][-1])


class Rebinding(Aggregator):
    """What FedAvg does, by assigning to the server's model."""

    def finish_round(self, average):
        self.server.model = average


@pytest.mark.parametrize("downlink", [None, "top_k:0.5"])
def test_the_model_may_be_assigned_to(ranks, downlink):
    options = {"strategy": {"downlink": downlink}}
    assigned, copied = (ranks.run(1, fit_quadratic, own(), **copy.deepcopy(options))[0] for own in (Rebinding, FedAvg))
    assert torch.equal(assigned["models"], copied["models"])
    assert not torch.equal(assigned["models"][0], assigned["models"][1])


def test_attributes_are_where_help_shows_them():
    described = inspect.getdoc(Aggregator).partition("Attributes:")[2]
    names = re.findall(r"^    ((?:\w+, )*\w+): ", described, re.M)
    assert sorted(name for entry in names for name in entry.split(", ")) == sorted(
        name for name in inspect.get_annotations(Aggregator) if not name.startswith("_")
    )
