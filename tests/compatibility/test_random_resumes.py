"""Random runs are resumed bit for bit; `python -m benchmarks.resume` makes more of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.helpers import skip_if_workers_may_hang
from tests.pool import RankPool
from tests.resuming import MOMENTS, WITHOUT_RESUME, Run, different, draw, resume


@pytest.mark.parametrize("number", range(6))
def test_random_resume(ranks: RankPool, number: int, tmp_path: Path) -> None:
    run = draw(number)
    skip_if_workers_may_hang(run.loader)
    for result in ranks.run(run.world, resume, run, str(tmp_path), timeout=60):
        assert not result["differences"], f"{run}: {result['differences']}"
        assert 0 < result["stopped"] < result["total"]


NAMED = {
    "a validation is due at the step of the checkpoint": Run(-1, ("frozen", "batch_norm"), 2, 1, 2, position=0.66),
    "workers have loaded ahead when an epoch ends": Run(
        -2, ("uneven",), 1, 2, 3, loader={"shuffle": True, "num_workers": 2}, moment="epoch"
    ),
    "loaders are made before the checkpoint is read": Run(-3, ("one_cycle",), 2, 1, 2, loader={"shuffle": True}),
    "epochs have no limit": Run(-4, ("max_steps", "shuffle"), 2, 1, 1, moment="epoch"),
    "the shorter one of several loaders is about to start over": Run(-5, ("several_loaders",), 1, 2, 2),
    "the shorter one of several loaders has started over": Run(-6, ("several_loaders",), 2, 1, 2, position=0.6),
    "it is about to start over, for several replicas": Run(-7, ("several_loaders",), 2, 1, 2),
    "it is about to start over, and workers have loaded ahead": Run(
        -8, ("several_loaders",), 2, 1, 2, loader={"num_workers": 2}
    ),
}
"""Runs that once came out different."""


@pytest.mark.parametrize("name", NAMED)
def test_resume(ranks: RankPool, name: str, tmp_path: Path) -> None:
    run = NAMED[name]
    skip_if_workers_may_hang(run.loader)
    for result in ranks.run(run.world, resume, run, str(tmp_path), timeout=60):
        assert not result["differences"], f"{run}: {result['differences']}"
        assert 0 < result["stopped"] < result["total"]
        assert result["moment"] == run.moment


def test_runs_follow_from_their_numbers() -> None:
    runs = [draw(number) for number in range(200)]
    assert runs == [draw(number) for number in range(200)]
    assert len({str(run).partition(" ")[2] for run in runs}) == 200
    assert {run.moment for run in runs} == {"step", "validation", "epoch"}
    assert not {key for run in runs for key in run.rows} & WITHOUT_RESUME.keys()
    assert all(run.moment in MOMENTS.get(key, {run.moment}) for run in runs for key in run.rows)


def test_a_last_bit_is_a_difference() -> None:
    one = torch.tensor([1.0, 2.0])
    assert not different(one, one.clone())
    assert different(one, torch.nextafter(one, torch.tensor(3.0)))
    assert different(one, one.double())
    assert different({"a": one}, {})
    assert different([1, 2], [1, 3])
