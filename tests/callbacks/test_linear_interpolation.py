"""`LinearInterpolation`: from the start, a checkpoint or the average, to the model or all replicas; training unnoticed."""

from __future__ import annotations

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException

from lightning_distopt import LinearInterpolation
from lightning_distopt.analysis import interpolate
from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from tests.analysis.linear import same, small_net
from tests.callbacks.attached import objective, probe_options, train, train_replicas, unnoticed
from tests.conformance.problems import SmallNet

OFTEN = {"every": ["start", "7 steps", "validation", "end"], "points": 3, "margin": 0.5}
QUIET = {"progress": False}


# ------------------------------------------------------------------------------------------------- training does not notice
@pytest.mark.parametrize(
    "options", [{}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}], ids=["plain", "accumulated"]
)
def test_training_does_not_notice_it(options):
    plain, _ = train(0, 1, **options)
    start = LinearInterpolation("start", **probe_options(**OFTEN, batch_norm="reestimate"))
    other = LinearInterpolation(small_net(4).state_dict(), **probe_options(**OFTEN, name="from_other"))
    probed, _ = train(0, 1, start, other, **options)
    same(probed, plain)
    assert len(start.history) == len(other.history) >= 3
    assert start.history[0]["distance"] == 0 < start.history[-1]["distance"]


def test_ddp_does_not_notice_it(ranks):
    def fit(rank, world_size, attached):
        probe = LinearInterpolation("start", **probe_options(**OFTEN))
        start = Start()
        notes, module = train(rank, world_size, *([probe] if attached else []), callbacks=[start])
        expected = interpolate(objective(module), start.state, module.state_dict(), 3, 0.5, **QUIET)
        return notes, probe.result and probe.result.values, expected.values

    for a, b in zip(ranks.run(2, fit, False), ranks.run(2, fit, True), strict=True):
        same(b[0], a[0])
        np.testing.assert_allclose(b[1], b[2], rtol=1e-10)


@pytest.mark.parametrize("layout", [(4, 1), (2, 2)], ids=str)
@pytest.mark.parametrize("strategy", ["local_sgd", "gossip"])
@pytest.mark.parametrize("other", ["start", "replicas"])
def test_replicas_do_not_notice_it(ranks, strategy, other, layout):
    m, world_size = layout

    def fit(rank, world_size, attached):
        probe = LinearInterpolation(other, **probe_options(**OFTEN))
        return train_replicas(rank, world_size, m, strategy, *([probe] if attached else [])), probe.result

    plain, probed = ranks.run(world_size, fit, False), ranks.run(world_size, fit, True)
    for (a, _), (b, result) in zip(plain, probed, strict=True):
        unnoticed(a, b)
        same(result.values, probed[0][1].values)


# ------------------------------------------------------------------------------------------------------------------ numbers
class Start(L.Callback):
    """Keeps the model that training starts with."""

    def on_train_start(self, trainer, module):
        self.state = {name: value.clone() for name, value in module.state_dict().items()}


def test_from_the_start():
    start, probe = Start(), LinearInterpolation(**probe_options(points=5))
    _, module = train(0, 1, probe, callbacks=[start])
    expected = interpolate(objective(module), start.state, module.state_dict(), 5, **QUIET)
    same(probe.result.values, expected.values)
    numbers = {name if name == "distance" else f"data/{name}": value for name, value in expected.numbers().items()}
    assert [entry["step"] for entry in probe.history] == [12]
    assert probe.result.models == ["start of training", "step 12"]
    assert numbers.items() <= probe.history[0].items()


def test_from_a_checkpoint(tmp_path):
    """At its end it is exactly the model of the file, whose buffers and frozen weights are others."""
    other = SmallNet().double()
    other.load_state_dict(small_net(4).state_dict())
    path = tmp_path / "other.ckpt"
    torch.save({"state_dict": other.state_dict(), "epoch": 3}, path)
    probe = LinearInterpolation(path, **probe_options(points=3))
    _, module = train(0, 1, probe)
    at = {end: probe.result.positions.tolist().index(end) for end in (0, 1)}
    assert probe.result.curves()[0, at[0]] == objective(other.eval()).loss()
    assert probe.result.curves()[0, at[1]] == objective(module).loss()
    assert probe.result.models == ["other", "step 12"]


class Rows(L.Callback):
    """Notes all replicas of this rank with their buffers, and their average, at every measurement."""

    def on_train_batch_end(self, trainer, module, *args):
        if trainer.global_step != 10:
            return
        strategy = trainer.strategy
        shapes = {name: p.shape for name, p in module.named_parameters() if p.requires_grad}
        self.models = []
        for row, vector in enumerate(strategy.replica_parameters()):
            pieces = vector.split([shape.numel() for shape in shapes.values()])
            model = {name: piece.view(shapes[name]) for name, piece in zip(shapes, pieces, strict=True)}
            buffers = zip(dict(module.named_buffers()), strategy.replicas.buffers(row), strict=True)
            self.models.append(model | {name: buffer.clone() for name, buffer in buffers})
        with strategy.average_parameters():
            self.average = {name: value.clone() for name, value in module.state_dict().items()}


@pytest.mark.parametrize("layout", [(4, 1), (2, 2), (1, 4)], ids=str)
@pytest.mark.parametrize("options", [{}, {"batch_norm": "reestimate"}, {"parameters": ["conv.*", "head.*"]}], ids=str)
def test_replicas_against_their_average(ranks, layout, options):
    m, world_size = layout

    def fit(rank, world_size):
        rows, probe = Rows(), LinearInterpolation("replicas", **probe_options(every="10 steps", points=3, margin=0, **options))
        train_replicas(rank, world_size, m, "gossip", rows, probe)
        return rows.models, rows.average, probe.result

    results = ranks.run(world_size, fit)
    models = [model for of_rank, _, _ in results for model in of_rank]
    expected = []
    for model in models:
        points = []
        for position in (0, 0.5, 1):
            net = SmallNet().double()
            mixed = dict(results[0][1])
            for name, value in model.items():
                moves = "parameters" not in options or name.startswith(("conv", "head", "norm.running"))
                if moves and value.is_floating_point():
                    mixed[name] = position * value + (1 - position) * mixed[name]
            net.load_state_dict({**mixed, "tied.weight": mixed["hidden.weight"]})
            f = objective(net)
            buffers = batch_norm_statistics(f) if "batch_norm" in options else None
            points.append(f.loss(f.vector(), buffers))
        expected.append(points)
    assert len(expected) == 4
    assert np.ptp(expected, axis=0)[2] > 1e-4
    for _, _, found in results:
        np.testing.assert_allclose(found.curves(), expected, rtol=1e-10)
        assert found.distances.min() > 0.01


def test_the_start_outlives_a_resume(tmp_path):
    class Save(L.Callback):
        def on_train_epoch_end(self, trainer, module):
            if trainer.current_epoch == 0:
                trainer.save_checkpoint(tmp_path / "half.ckpt")

    options = probe_options(every=["start", "end"], points=3)
    whole, resumed = LinearInterpolation(**options), LinearInterpolation(**options)
    train(0, 1, whole, callbacks=[Save()], max_epochs=3)
    train(0, 1, resumed, max_epochs=3, ckpt_path=tmp_path / "half.ckpt")
    same(resumed.result.values[..., 0], whole.result.values[..., 0])
    assert resumed.history[0] == whole.history[0]
    assert resumed.result.curves()[0, 0] == pytest.approx(whole.history[0]["data/loss_0"], rel=1e-12)


def test_what_it_holds_is_let_go_of_after_an_error_but_for_the_start():
    class Fails(L.Callback):
        def on_train_batch_end(self, *args):
            raise RuntimeError("on purpose")

    start = LinearInterpolation(**probe_options())
    other = LinearInterpolation(small_net(4).state_dict(), **probe_options(name="other"))
    with pytest.raises(RuntimeError, match="on purpose"):
        train(0, 1, start, other, callbacks=[Fails()])
    assert start._batches == other._batches == {} and other._other is None
    assert "start" in start.state_dict()  # for a checkpoint that is written because of the error


# ------------------------------------------------------------------------------------------------------------------ refusal
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"other": ""}, "`other` must be 'start', 'replicas', the path of a checkpoint or a state dict; got ''."),
        ({"other": 3}, "got 3."),
        ({"other": "replicas", "model": "local"}, "Replicas are compared with their average: leave `model='local'` out"),
        ({"points": 1}, "`points` must be a whole number, at least 2; got 1."),
        ({"margin": -1}, "`margin` must be a number that is not negative; got -1."),
        ({"batch_norm": "keep"}, "`batch_norm` must be one of 'reestimate', 'interpolate'; got 'keep'."),
    ],
)
def test_options(options, sentence):
    with pytest.raises(ValueError) as caught:
        LinearInterpolation(**options)
    assert sentence in str(caught.value)


def test_what_is_refused_before_training(tmp_path):
    state = small_net().state_dict()
    torch.save({"state_dict": {**state, "head.weight": torch.zeros(4, 36)}}, tmp_path / "other.ckpt")
    (tmp_path / "text.ckpt").write_text("no checkpoint")
    for other, sentence in (
        ("replicas", "SingleDeviceStrategy has no replicas that differ: use a strategy such as `LocalSGDStrategy`"),
        ("nowhere.ckpt", "There is no checkpoint 'nowhere.ckpt'."),
        (tmp_path / "text.ckpt", "can't be read as a checkpoint of tensors and plain values"),
        (tmp_path / "other.ckpt", "'head.weight' is of shape [4, 36] there and of shape [3, 36] in the module."),
        ({"weight": torch.zeros(1)}, "architecture of the model is another one: 'conv.weight' is missing there"),
    ):
        probe = LinearInterpolation(other, **probe_options())
        with pytest.raises((MisconfigurationException, ValueError)) as caught:
            train(0, 1, probe)
        assert sentence in str(caught.value)
        assert probe.history == []


def test_a_checkpoint_that_one_rank_lacks(ranks, tmp_path):
    torch.save(small_net().state_dict(), tmp_path / "0.ckpt")

    def fit(rank, world_size):
        probe = LinearInterpolation(tmp_path / f"{rank}.ckpt", **probe_options())
        kind = ValueError if rank else MisconfigurationException
        with pytest.raises(kind, match="There is no checkpoint" if rank else "Another rank can't read"):
            train(rank, world_size, probe)
        return True

    assert ranks.run(2, fit) == [True, True]
