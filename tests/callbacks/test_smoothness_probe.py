"""`SmoothnessProbe`: exact on quadratics, along the steps that training takes, which does not notice it."""

from __future__ import annotations

import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.loggers import CSVLogger
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import FederatedStrategy, GossipStrategy, LocalSGDStrategy, SmoothnessProbe
from lightning_distopt.analysis import History
from tests.conformance.problems import Quadratic
from tests.probes import disturbance, fit

STRATEGIES = {
    "single": (1, "auto", {}),
    "accumulated": (1, "auto", {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "ddp": (2, "ddp_find_unused_parameters_true", {}),
    "local_sgd": (2, lambda: LocalSGDStrategy(2, replicas_per_device=2), {}),
    "gossip": (2, lambda: GossipStrategy(topology="ring", replicas_per_device=2), {"max_epochs": 4}),
}


# ------------------------------------------------------------------------------------------------ training is not touched
def watched(rank, world, name, attached):
    strategy, options = STRATEGIES[name][1:]
    probes = [
        SmoothnessProbe("step", steps=2, save=()),
        SmoothnessProbe("2 steps", 1, data=["val"], model="local", mode="eval", save=(), name="smoothness/local"),
    ]
    return fit(rank, world, strategy, probes if attached else [], **options)


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_does_not_notice_it(ranks, name):
    world = STRATEGIES[name][0]
    plain, probed = (ranks.run(world, watched, name, attached) for attached in (False, True))
    for a, b in zip(plain, probed, strict=True):
        assert disturbance(a, b, "smoothness") == ""
        steps = b["step"]
        assert [entry["step"] for entry in b["histories"][0]] == list(range(1, steps + 1))
        assert [entry["step"] for entry in b["histories"][1]] == list(range(2, steps + 1, 2))
        assert b["histories"] == probed[0]["histories"]
        assert all(0 < entry["lipschitz"] < math.inf for history in b["histories"] for entry in history)


# --------------------------------------------------------------------------------------------------------------- numbers
ETAS = [0.3, 0.2, 0.0, 0.1, 0.1, 0.05]


class Notes(L.Callback):
    """Keeps the average of the replicas of this rank before and after every step, and its batches."""

    def __init__(self):
        self.x, self.batches = [], []

    def on_train_start(self, trainer, module):
        self.x.append(torch.cat([p.detach().reshape(-1) for p in module.parameters()]))

    def on_train_batch_end(self, trainer, module, outputs, batch, batch_idx):
        rows = trainer.strategy.replica_parameters() if hasattr(trainer.strategy, "replicas") else None
        x = torch.cat([p.detach().reshape(-1) for p in module.parameters()]) if rows is None else rows.mean(dim=0)
        self.x.append(x.clone())
        self.batches.append(batch)


def samples(count, seed=5):
    rng = np.random.default_rng(seed)
    return torch.from_numpy(rng.uniform(0.3, 1.2, (count, 8))), torch.from_numpy(rng.normal(size=(count, 8)))


def quadratic(rank, world, strategy, probes, **options):
    notes = Notes()
    data = DataLoader(TensorDataset(*samples(36 * world)), 3)
    options = {"max_steps": 6, **options}
    found = fit(rank, world, strategy, probes, Quadratic(ETAS).double(), data, validation=[], callbacks=[notes], **options)
    return {**found, "x": notes.x, "batches": notes.batches}


def estimate(a, update):
    """|A u| / |u| for f = mean |a (x - c)|^2 / 2, whose Hessian A is diagonal."""
    u = update.numpy()
    return np.linalg.norm(np.mean(a.numpy() ** 2, axis=0) * u) / np.linalg.norm(u)


@pytest.mark.parametrize("strategy", ["auto", lambda: LocalSGDStrategy(3, replicas_per_device=2)], ids=["single", "local_sgd"])
@pytest.mark.parametrize("of_batch", [True, False])
def test_numbers_on_quadratics(strategy, of_batch):
    given = list(zip(*(x.split(4) for x in samples(11, seed=2)), strict=True))
    probe = SmoothnessProbe("step", data="batch" if of_batch else given, model="average", save=())
    found = quadratic(0, 1, strategy, [probe])
    x, updates = found["x"], np.diff(torch.stack(found["x"]).numpy(), axis=0)
    assert len(x) == 7
    assert not updates[2].any()  # the learning rate was zero, and nothing is measured
    assert [entry["step"] for entry in probe.history] == [1, 2, 4, 5, 6]
    for entry in probe.history:
        k = entry["step"] - 1
        a = found["batches"][k][0] if of_batch else samples(11, seed=2)[0]
        assert entry["lipschitz"] == pytest.approx(estimate(a, x[k + 1] - x[k]), rel=1e-8)
        a, c = found["batches"][k] if of_batch else samples(11, seed=2)
        gradient = np.mean(a.numpy() ** 2 * (x[k] - c).numpy(), axis=0)  # at the point where the step began
        assert entry["gradient_norm"] == pytest.approx(np.linalg.norm(gradient), rel=1e-10)
    assert len(probe.result.ratio) == 8
    assert probe.result.distance[-1] == pytest.approx(1.6 * np.linalg.norm(updates[-1]), rel=1e-12)
    step, logged = next((step, values) for step, values in found["logged"] if "smoothness/lipschitz" in values)
    assert (step, logged["smoothness/lipschitz"]) == (1, probe.history[0]["lipschitz"])
    assert found["metrics"]["smoothness/lipschitz"] == probe.history[-1]["lipschitz"]


def on_ranks(rank, world, model):
    probe = SmoothnessProbe("2 steps", data="batch", model=model, save=())
    found = quadratic(rank, world, lambda: GossipStrategy(topology="ring"), [probe], max_steps=6)
    return found["x"], [batch[0] for batch in found["batches"]], probe.history


@pytest.mark.parametrize("model", ["average", "local"])
def test_all_ranks(ranks, model):
    results = ranks.run(2, on_ranks, model)
    xs, batches = [torch.stack(x) for x, _, _ in results], [batches for _, batches, _ in results]
    for _, _, history in results:
        assert history == results[0][2]
        for entry in history:
            k = entry["step"] - 1
            own = [estimate(a[k], x[k + 1] - x[k]) for x, a in zip(xs, batches, strict=True)]
            mean = sum(xs) / 2
            together = estimate(torch.cat([a[k] for a in batches]), mean[k + 1] - mean[k])
            assert entry["lipschitz"] == pytest.approx(together if model == "average" else np.mean(own), rel=1e-8)


def test_accumulation():
    """The step is that of all its batches, and looked at on the last of them."""
    probe = SmoothnessProbe("step", save=())
    found = quadratic(0, 1, "auto", [probe], accumulate_grad_batches=2, max_steps=3)
    assert [entry["step"] for entry in probe.history] == [1, 2]  # the third learning rate is zero
    for k, entry in enumerate(probe.history):
        update = found["x"][2 * k + 2] - found["x"][2 * k]
        assert entry["lipschitz"] == pytest.approx(estimate(found["batches"][2 * k + 1][0], update), rel=1e-8)


def test_some_parameters():
    probe = SmoothnessProbe("step", parameters="bias", save=())
    found = quadratic(0, 1, "auto", [probe], max_steps=1)
    update = found["x"][1] - found["x"][0]
    expected = estimate(found["batches"][0][0][:, 6:], update[6:])
    assert probe.history[0]["lipschitz"] == pytest.approx(expected, rel=1e-8)


# ----------------------------------------------------------------------------------------------------- history and files
def test_the_history_is_written_once_when_training_ends(tmp_path):
    probe = SmoothnessProbe("2 steps", save=["npz", "json", "png"])
    quadratic(0, 1, "auto", [probe], folder=tmp_path, logger=CSVLogger(tmp_path, version="a"))
    folder = next(tmp_path.rglob("smoothness"))
    assert sorted(path.name for path in folder.iterdir()) == [f"step=000006.{kind}" for kind in ("json", "npz", "png")]
    history = History.load(folder / "step=000006.npz")
    assert history.step.tolist() == [2, 4, 6]
    assert history.values["lipschitz"] == [entry["lipschitz"] for entry in probe.history]
    assert [axes.get_title() for axes in probe.series().figure().axes[:2]] == ["lipschitz", "gradient norm"]


class Fails(L.Callback):
    def on_train_batch_end(self, trainer, *args):
        if trainer.global_step == 5:
            raise RuntimeError("That is enough.")


def test_a_training_that_fails_leaves_its_history(tmp_path):
    probe = SmoothnessProbe("step", save=["json"])
    with pytest.raises(RuntimeError, match="That is enough"):
        quadratic(0, 1, "auto", [probe, Fails()], folder=tmp_path)
    assert History.load(next(tmp_path.rglob("step=*.json"))).step.tolist() == [1, 2, 4, 5]


# ------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"every": "epoch"}, "looks at updates, so `every` must be a number of steps; got 'epoch'"),
        ({"every": ["2 steps", "end"]}, "`every` must be a number of steps"),
        ({"steps": 0}, "`steps` must be a whole number, at least 1; got 0"),
        ({"size": 0}, "`size` must be a number above 0"),
        ({"mode": "both"}, "`mode` must be one of 'eval', 'train'; got 'both'"),
        ({"data": "test"}, "`data` must be"),
        ({"data": ["train", "val"]}, "`data` must be 'train', 'val' or batches: SmoothnessProbe measures on one kind of data"),
    ],
)
def test_options_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        SmoothnessProbe(**options)


def test_another_fit_after_one_that_failed():
    """Nothing is left of the step in which the first one failed."""
    probe, fresh = SmoothnessProbe("step", save=()), SmoothnessProbe("step", mode="eval", save=(), name="fresh")
    with pytest.raises(RuntimeError, match="That is enough"):
        quadratic(0, 1, "auto", [FailsInStep(1), probe])
    assert probe._before is None
    quadratic(0, 1, "auto", [probe, fresh], max_steps=1)
    assert len(probe.history) == 1
    assert probe.history == fresh.history  # there is nothing in the module that knows modes


class FailsInStep(L.Callback):
    def __init__(self, step):
        self.step = step

    def on_before_optimizer_step(self, trainer, *args):
        if trainer.global_step == self.step:
            raise RuntimeError("That is enough.")


def test_clients_are_refused():
    with pytest.raises(MisconfigurationException, match="those of clients are counted when their round ends"):
        fit(strategy=FederatedStrategy(clients=2, fraction=1.0), probes=[SmoothnessProbe()], val_check_interval=1.0)
