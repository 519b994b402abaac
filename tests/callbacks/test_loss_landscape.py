"""`LossLandscape`: what it measures and draws, and that training does not notice it."""

from __future__ import annotations

import csv

import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt import LossLandscape
from lightning_distopt.analysis import Landscape1D, Landscape2D, landscape_1d, landscape_2d
from lightning_distopt.callbacks import loss_landscape
from tests.analysis.linear import same
from tests.callbacks.attached import objective, probe_options, train, train_replicas, unnoticed
from tests.conformance.problems import SmallNet

OFTEN = {"every": ["start", "7 steps", "validation", "end"], "points": 3, "seed": 2}
QUIET = {"progress": False}


def probes(dimensions=(1, 2), **options):
    kinds = {1: {"directions": 1}, 2: {"dimensions": 2, "trajectory": 1, "batch_norm": "reestimate", "name": "plane"}}
    return [LossLandscape(**probe_options(**OFTEN, **kinds[k], **options)) for k in dimensions]


# ------------------------------------------------------------------------------------------------- training does not notice
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["plain", "accumulated"]
)
def test_training_does_not_notice_it(options):
    plain, _ = train(0, 1, **options)
    line, plane = probes()
    probed, _ = train(0, 1, line, plane, **options)
    same(probed, plain)
    steps = 12 // options.get("accumulate_grad_batches", 1)
    assert [entry["step"] for entry in line.history][-1] == steps
    assert len(line.history) == len(plane.history) >= 3


def test_ddp_does_not_notice_it(ranks):
    def fit(rank, world_size, attached):
        line, plane = probes()
        notes, module = train(rank, world_size, *([line, plane] if attached else []))
        f = objective(module)
        expected = landscape_1d(f, directions=1, points=3, seed=2, **QUIET)
        return notes, line.result and line.result.values, expected.values

    plain, probed = ranks.run(2, fit, False), ranks.run(2, fit, True)
    for a, b in zip(plain, probed, strict=True):
        same(b[0], a[0])
        np.testing.assert_allclose(b[1], b[2], rtol=1e-10)
    same(probed[0][1], probed[1][1])


@pytest.mark.parametrize("layout", [(4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("strategy", ["local_sgd", "gossip"])
def test_replicas_do_not_notice_it(ranks, strategy, layout):
    m, world_size = layout

    def fit(rank, world_size, attached):
        found = probes() if attached else []
        return train_replicas(rank, world_size, m, strategy, *found), [probe.result for probe in found]

    plain, probed = ranks.run(world_size, fit, False), ranks.run(world_size, fit, True)
    for (a, _), (b, results) in zip(plain, probed, strict=True):
        unnoticed(a, b)
        same(results[0].values, probed[0][1][0].values)
        assert np.isfinite(results[1].values).all()


# ------------------------------------------------------------------------------------------------------------------ numbers
@pytest.mark.parametrize("layout", [(1, 1), (4, 1), (2, 2), (1, 2)], ids=str)
def test_it_is_the_landscape_of_the_average(ranks, layout):
    m, world_size = layout

    def fit(rank, world_size):
        probe = LossLandscape(**probe_options(every="end", directions=2, points=3))
        result = train_replicas(rank, world_size, m, "local_sgd", probe)
        return result["state"], probe.result, probe.history

    for state, result, history in ranks.run(world_size, fit):
        net = SmallNet().double()
        net.load_state_dict(state)  # after training it is the average
        f = objective(net)
        expected = landscape_1d(f, directions=2, points=3, **QUIET)
        np.testing.assert_allclose(result.values, expected.values, rtol=1e-10)
        assert history[0]["data/loss"] == pytest.approx(f.loss(), rel=1e-10)
        assert len(history) == 1


def test_local_replicas_are_measured_by_themselves(ranks):
    def fit(rank, world_size):
        probe = LossLandscape(**probe_options(every="10 steps", directions=1, points=3, model="local"))
        train_replicas(rank, world_size, 1, "local_sgd", probe)
        return probe.result.curves()[0, 1], probe.history[-1]["data/loss"]

    (a, mean), (b, other) = ranks.run(2, fit)
    assert a != b
    assert mean == other == pytest.approx((a + b) / 2, rel=1e-12)


def test_trajectory():
    probe = LossLandscape(**probe_options(every=["epoch", "end"], dimensions=2, trajectory=1, points=5))
    _, module = train(0, 1, probe, max_epochs=4)
    found = probe.result
    assert isinstance(found, Landscape2D)
    assert len(found.marks) == 5  # the start, and four epochs
    np.testing.assert_array_equal(found.marks[-1], [0, 0])
    assert 0.5 < found.explained.sum() <= 1
    assert probe.history[-1]["explained"] == pytest.approx(found.explained.sum())
    assert found.grid().min() < objective(module).loss() < found.grid().max()


def test_a_trajectory_too_short_for_a_plane(monkeypatch):
    said = []
    monkeypatch.setattr(loss_landscape, "rank_zero_warn", said.append)
    probe = LossLandscape(**probe_options(dimensions=2, trajectory=1, points=3))
    _, module = train(0, 1, probe, max_epochs=1)
    assert len(said) == 1
    assert "draws a random plane, since there is none of the trajectory: A trajectory needs three models" in said[0]
    expected = landscape_2d(objective(module), points=3, **QUIET)
    same(probe.result.values, expected.values)


def test_it_logs_and_writes(tmp_path):
    probe = LossLandscape(**probe_options(every="epoch", directions=2, points=3))
    train(0, 1, probe, logger=CSVLogger(tmp_path, name="", version="run"))
    files = sorted(path.name for path in (tmp_path / "run" / "landscape").iterdir())
    assert files == [f"step={step:06d}.{kind}" for step in (6, 12) for kind in ("npz", "png")]
    loaded = Landscape1D.load(tmp_path / "run" / "landscape" / "step=000012.npz")
    same(loaded.values, probe.result.values)
    with open(tmp_path / "run" / "metrics.csv") as file:
        rows = [row for row in csv.DictReader(file) if row["landscape/data/rise"]]
    assert [float(row["landscape/data/rise"]) for row in rows] == [entry["data/rise"] for entry in probe.history]


# ------------------------------------------------------------------------------------------------------------------ refusal
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"dimensions": 3}, "`dimensions` must be one of 1, 2; got 3."),
        ({"directions": 0}, "`directions` must be a whole number, at least 1; got 0."),
        ({"directions": 5, "dimensions": 2}, "`directions` are those of lines, and a plane has two: leave it out"),
        ({"radius": -1}, "`radius` must be a number above 0; got -1."),
        ({"points": 10}, "`points` must be an odd number from 3 on, so that the middle is one of them; got 10."),
        ({"trajectory": 1}, "A trajectory is drawn into a plane: use `dimensions=2` with `trajectory`."),
        ({"trajectory": 0, "dimensions": 2}, "`trajectory` must be a whole number, at least 1; got 0."),
        ({"one_dimensional": "zero"}, "`one_dimensional` must be one of 'ignore', 'whole'; got 'zero'."),
        ({"batch_norm": "interpolate"}, "`batch_norm` must be one of 'reestimate', 'keep'; got 'interpolate'."),
        ({"every": "sometimes"}, "`every` does not understand 'sometimes'"),
    ],
)
def test_options(options, sentence):
    with pytest.raises(ValueError) as caught:
        LossLandscape(**options)
    assert sentence in str(caught.value)


def test_parameters_without_a_direction_are_refused_before_training():
    probe = LossLandscape(**probe_options(parameters=["*.bias"]))
    with pytest.raises(MisconfigurationException, match=r"ignores parameters with one dimension, and conv\.bias, norm\.bias"):
        train(0, 1, probe)
    assert probe.history == []
    probe = LossLandscape(**probe_options(parameters=["*.bias"], one_dimensional="whole", directions=1, points=3))
    train(0, 1, probe, max_epochs=1)
    assert torch.tensor(probe.history[0]["data/rise"]).isfinite()
