"""`TrainingDiagnostics`: every number against NumPy, on replicas in any layout; training does not notice it."""

from __future__ import annotations

import math

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import FederatedStrategy, GossipStrategy, LocalSGDStrategy, TrainingDiagnostics
from lightning_distopt.analysis import History
from tests.conformance.problems import LAYOUTS, Quadratic
from tests.oracles import paths
from tests.probes import Net, disturbance, fit

ALWAYS = {"effective_step_size", "weight_norm", "distance_from_start"}
REPLICAS = {"consensus_distance", "distance_in_round"}
STRATEGIES = {
    "single": (1, "auto", ["noise"], {}),
    "accumulated": (1, "auto", ["noise"], {"accumulate_grad_batches": 2, "gradient_clip_val": 0.1}),
    "ddp": (2, "ddp_find_unused_parameters_true", ["noise"], {}),
    "local_sgd": (
        2,
        lambda: LocalSGDStrategy(2, replicas_per_device=2, partition="fixed"),
        ["noise", "losses", "diversity"],
        {},
    ),
    "gossip": (2, lambda: GossipStrategy(topology="ring", partition="dirichlet:1"), ["losses", "diversity"], {}),
}


# ------------------------------------------------------------------------------------------------ training is not touched
def watched(rank, world, name, attached):
    strategy, passes, options = STRATEGIES[name][1:]
    given = [(x, y) for x, y in zip(torch.randn(3, 4, 1, 6, 6).double(), torch.randint(3, (3, 4)), strict=True)]
    probes = [
        TrainingDiagnostics(["step", "epoch"], save=()),
        TrainingDiagnostics(["start", "3 steps", "validation"], passes, given, samples=12, save=(), name="diagnostics/costly"),
    ]
    options = {"folder": None, **options}
    found = fit(rank, world, strategy, probes if attached else [], Labelled, Labelled.data(), **options)
    return found


class Labelled(Net):
    """With data whose labels a partitioner can look at."""

    @staticmethod
    def data():
        draws = torch.Generator().manual_seed(3)
        x = torch.randn(24, 1, 6, 6, generator=draws, dtype=torch.float64)
        return DataLoader(TensorDataset(x, torch.arange(24) % 3), 3, shuffle=True)


@pytest.mark.parametrize("name", STRATEGIES)
def test_training_does_not_notice_it(ranks, name):
    world, _, passes, _ = STRATEGIES[name]
    plain, probed = (ranks.run(world, watched, name, attached) for attached in (False, True))
    several = name in ("local_sgd", "gossip")
    for a, b in zip(plain, probed, strict=True):
        assert disturbance(a, b, "diagnostics") == ""
        cheap, costly = b["histories"]
        assert {entry["step"] for entry in cheap} == set(range(1, b["step"] + 1))
        assert set(cheap[-1]) == {"step", "epoch"} | ALWAYS | (REPLICAS if several else set())
        names = {"noise": "noise_scale", "losses": "loss_average", "diversity": "zeta"}
        assert all((key in costly[-1]) == (one in passes) for one, key in names.items())
        assert [{k: v for k, v in entry.items() if k in ALWAYS} for entry in cheap] == [
            pytest.approx({k: v for k, v in entry.items() if k in ALWAYS}) for entry in probed[0]["histories"][0]
        ]


# --------------------------------------------------------------------------------------------------------------- numbers
ETAS = [0.3, 0.2, 0.0, 0.1, 0.05, 0.02, 0.02, 0.02]
H = 3


class Rounds(L.Callback):
    """Keeps the replicas of this rank when training starts, after every batch, and around rounds."""

    def __init__(self):
        self.rows, self.moved = [], []

    def on_train_start(self, trainer, module):
        self.rows.append(trainer.strategy.replica_parameters())
        self.met = self.rows[0]

    def on_before_round(self, trainer, module):
        self.moved.append(trainer.strategy.replica_parameters() - self.met)

    def on_after_round(self, trainer, module, group):
        self.met = trainer.strategy.replica_parameters()

    def on_train_batch_end(self, trainer, *args):
        self.rows.append(trainer.strategy.replica_parameters())


def samples(count, seed=5):
    rng = np.random.default_rng(seed)
    return rng.uniform(0.3, 1.2, (count, 8)), rng.normal(size=(count, 8))


def loss(own, x):
    a, c = own
    return np.mean(np.sum((a * (x - c)) ** 2, axis=1)) / 2


def gradient(own, x):
    a, c = own
    return np.mean(a**2 * (x - c), axis=0)


def on_rank(rank, world, m):
    rounds, (a, c) = Rounds(), map(torch.from_numpy, samples(50))
    given = list(zip(*(x.split(4) for x in map(torch.from_numpy, samples(22, seed=2))), strict=True))
    probe = TrainingDiagnostics("step", ["noise", "diversity", "losses"], given, samples=None, save=())
    made = LocalSGDStrategy(H, replicas_per_device=m, partition="fixed")
    data = DataLoader(TensorDataset(a, c), 2)
    fit(rank, world, made, [probe], Quadratic(ETAS).double(), data, validation=[], callbacks=[rounds], max_epochs=1)
    return rounds.rows, rounds.moved, probe.history


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_numbers(ranks, layout):
    m, world = layout
    results = ranks.run(world, on_rank, m)
    X = torch.cat([torch.stack(rows) for rows, _, _ in results], dim=1).numpy()  # [batches + 1, n, d]
    moved = torch.cat([torch.stack(moved) for _, moved, _ in results], dim=1).numpy()
    given = [np.split(x, range(4, 22, 4)) for x in samples(22, seed=2)]
    batches, everything = list(zip(*given, strict=True)), samples(22, seed=2)
    own = [[x[i::4] for x in samples(50)] for i in range(4)]  # 13, 13, 12 and 12 samples
    assert len(X) == 8
    rms = lambda D: np.sqrt(np.mean(np.sum(D**2, axis=-1)))  # noqa: E731
    for _, _, history in results:
        assert [entry["step"] for entry in history] == list(range(1, 8))
        for t, entry in enumerate(history, start=1):
            x = X[t].mean(axis=0)
            g = np.array([gradient(batch, x) for batch in batches])
            sizes = [len(batch[0]) for batch in batches]
            mean, b = gradient(everything, x), 1 / np.mean([1 / n for n in sizes])
            signal, variance = paths.noise_of_two(np.mean(np.sum(g**2, axis=1)), mean @ mean, b, 22)
            losses = [loss(everything, row) for row in X[t]]
            local = [gradient(part, x) for part in own]
            expected = {
                "effective_step_size": ETAS[t] / (x @ x),  # the learning rate of the next step
                "weight_norm": np.linalg.norm(x),
                "distance_from_start": rms(X[t] - X[0]),
                "consensus_distance": rms(X[t] - x),
                "gradient_norm": np.linalg.norm(mean),
                "batch_gradient_norm": np.mean(np.linalg.norm(g, axis=1)),
                "variance": variance,
                "batch_variance": variance / b,
                "noise_scale": variance / signal if signal > 0 else math.inf,
                "zeta": math.sqrt(paths.zeta_squared(local)),
                "global_gradient_norm": np.linalg.norm(np.mean(local, axis=0)),
                "local_gradient_norm": np.mean(np.linalg.norm(local, axis=1)),
                "loss_average": loss(everything, x),
                "loss_replicas": np.mean(losses),
                "loss_replicas_min": min(losses),
                "loss_replicas_max": max(losses),
            }
            if t >= H:
                expected["distance_in_round"] = rms(moved[t // H - 1])
            found = {name: value for name, value in entry.items() if name not in ("step", "epoch")}
            assert found == pytest.approx(expected, rel=1e-8, abs=1e-12)


def test_one_device():
    probe = TrainingDiagnostics("2 steps", save=())
    a, c = map(torch.from_numpy, samples(12))
    module = Quadratic(ETAS).double()
    start = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    fit(probes=[probe], module=module, data=DataLoader(TensorDataset(a, c), 3), validation=[], max_epochs=1)
    end = torch.cat([p.detach().reshape(-1) for p in module.parameters()])
    last = probe.history[-1]
    assert last["distance_from_start"] == pytest.approx(float((end - start).norm()), rel=1e-12)
    assert last["effective_step_size"] == pytest.approx(ETAS[4] / float(end @ end), rel=1e-12)
    assert [entry["step"] for entry in probe.history] == [2, 4]


class Manual(Quadratic):
    """Steps by itself, with two learning rates."""

    def __init__(self):
        super().__init__(ETAS)
        self.automatic_optimization = False

    def training_step(self, batch, batch_idx):
        optimizer = self.optimizers()
        optimizer.zero_grad()
        self.manual_backward(super().training_step(batch, batch_idx))
        optimizer.step()

    def configure_optimizers(self):
        return torch.optim.SGD([{"params": [self.weight], "lr": 0.2}, {"params": [self.bias], "lr": 0.04}])


def test_manual_optimization_and_several_learning_rates():
    probe = TrainingDiagnostics("step", save=())
    a, c = map(torch.from_numpy, samples(12))
    fit(probes=[probe], module=Manual().double(), data=DataLoader(TensorDataset(a, c), 3), validation=[], max_epochs=1)
    last = probe.history[-1]
    eta = (6 * 0.2 + 2 * 0.04) / 8  # of six weights and two biases
    assert last["effective_step_size"] == pytest.approx(eta / last["weight_norm"] ** 2, rel=1e-12)


class Unfreezes(L.Callback):
    def on_train_start(self, trainer, module):
        module.bias.requires_grad_(False)

    def on_train_batch_start(self, trainer, module, batch, batch_idx):
        module.bias.requires_grad_(batch_idx >= 2)


def test_parameters_that_are_set_free():
    probe = TrainingDiagnostics("step", save=())
    a, c = map(torch.from_numpy, samples(12))
    options = {"validation": [], "max_epochs": 1, "callbacks": [Unfreezes()]}
    fit(probes=[probe], module=Quadratic(ETAS).double(), data=DataLoader(TensorDataset(a, c), 3), **options)
    distances = [entry["distance_from_start"] for entry in probe.history]
    assert 0 < distances[0] < distances[1]
    assert distances[2] == 0 < distances[3]  # counted from then on


def test_the_history_is_drawn(tmp_path):
    probe = TrainingDiagnostics("step", save=["npz", "png"])
    a, c = map(torch.from_numpy, samples(12))
    data = DataLoader(TensorDataset(a, c), 3)
    fit(probes=[probe], module=Quadratic(ETAS).double(), data=data, validation=[], folder=tmp_path, max_epochs=1)
    assert {path.name for path in tmp_path.rglob("diagnostics/*")} == {"step=000004.npz", "step=000004.png"}
    history = History.load(next(tmp_path.rglob("*.npz")))
    assert history.values == {name: [entry[name] for entry in probe.history] for name in ALWAYS}


@pytest.mark.parametrize("passes", [[], ["diversity"]])
def test_inside_validation_without_data_of_its_own(passes):
    probe = TrainingDiagnostics("validation", passes, save=(), progress=False)
    strategy = LocalSGDStrategy(2, replicas_per_device=2, partition="fixed")
    fit(strategy=strategy, probes=[probe], module=Labelled, data=Labelled.data(), num_sanity_val_steps=1)
    assert [entry["step"] for entry in probe.history] == [2, 4, 6, 8]
    assert all(("zeta" in entry) == bool(passes) for entry in probe.history)
    assert not probe._started


# ------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"passes": ["zeta"]}, r"`passes` must be a list of 'noise', 'diversity', 'losses'; got \['zeta'\]"),
        ({"passes": "noise"}, "`passes` must be a list"),
        ({"data": ["train", "val"]}, "TrainingDiagnostics measures on one kind of data"),
        ({"every": "often"}, "`every` does not understand 'often'"),
    ],
)
def test_options_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        TrainingDiagnostics(**options)


@pytest.mark.parametrize(
    ("strategy", "passes", "sentence"),
    [
        ("auto", ["losses"], "'losses' compares replicas, but SingleDeviceStrategy keeps none that differ"),
        ("auto", ["diversity"], "'diversity' compares replicas"),
        (lambda: LocalSGDStrategy(2, replicas_per_device=2), ["diversity"], "give the strategy a fixed `partition`"),
        (lambda: FederatedStrategy(clients=3, fraction=1.0), ["losses"], "'losses' compares replicas"),
    ],
    ids=["auto_losses", "auto_diversity", "gossip_diversity", "gossip_losses"],
)
def test_replicas_that_can_not_be_compared(strategy, passes, sentence):
    with pytest.raises(MisconfigurationException, match=sentence):
        fit(strategy=strategy, probes=[TrainingDiagnostics("step", passes, save=())])


class NeverTrains(Quadratic):
    def on_train_batch_start(self, *args):
        raise AssertionError("training starts")


@pytest.mark.parametrize("samples_", [1, None], ids=str)
def test_noise_in_one_batch_is_refused_before_training(samples_):
    a, c = map(torch.from_numpy, samples(12))
    probe = TrainingDiagnostics("5 steps", ["noise"], samples=samples_, save=(), progress=False)
    with pytest.raises(ValueError, match="The noise of gradients takes two batches at least"):
        fit(probes=[probe], module=NeverTrains(ETAS).double(), data=DataLoader(TensorDataset(a, c), 12), validation=[])
