"""Random runs are resumed bit for bit; `python -m benchmarks.resume` makes more of them."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch

from tests.pool import RankPool
from tests.resuming import MOMENTS, WITHOUT_RESUME, different, draw, resume


@pytest.mark.parametrize("number", range(6))
def test_random_resume(ranks: RankPool, number: int, tmp_path: Path) -> None:
    run = draw(number)
    for result in ranks.run(run.world, resume, run, str(tmp_path), timeout=60):
        assert not result["differences"], f"{run}: {result['differences']}"
        assert 0 < result["stopped"] < result["total"]


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
