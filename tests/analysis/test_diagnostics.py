"""Gradient noise, diversity, losses of replicas, distances and effective step sizes against their definitions."""

from __future__ import annotations

import math

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from lightning_distopt.analysis.diagnostics import (
    GradientNoise,
    ReplicaLosses,
    distances,
    effective_step_size,
    gradient_diversity,
    gradient_noise,
    replica_losses,
)
from lightning_distopt.analysis.history import History
from lightning_distopt.analysis.objective import Objective
from tests.oracles import paths

D = 5


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1, D, dtype=torch.float64))


def quadratic(net, batch):
    a, c = batch
    return 0.5 * (a * (net.x - c)).square().sum(dim=1).mean()


def batches(sizes, seed=1):
    rng = np.random.default_rng(seed)
    return [tuple(torch.from_numpy(x) for x in (rng.uniform(0.3, 1.2, (n, D)), rng.normal(size=(n, D)))) for n in sizes]


def gradient(batch, x):
    a, c = (part.numpy() for part in batch)
    return np.mean(a**2 * (x - c), axis=0)


def summing(world_size):
    return dist.all_reduce if world_size > 1 else None


# ----------------------------------------------------------------------------------------------------------------- noise
def noise(rank, world_size, sizes, at):
    return gradient_noise(Objective(Point(), quadratic, batches(sizes)[rank::world_size], reduce=summing(world_size)), at)


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("sizes", [[4] * 6, [4, 4, 4, 4, 1]], ids=str)
@pytest.mark.parametrize("moved", [False, True])
def test_noise(ranks, world_size, sizes, moved):
    at = torch.full((D,), 0.3, dtype=torch.float64) if moved else None
    x = at.numpy() if moved else np.linspace(-1, 1, D)
    data = batches(sizes)
    g = np.array([gradient(batch, x) for batch in data])
    mean = np.average(g, axis=0, weights=sizes)
    squares, b = np.mean(np.sum(g**2, axis=1)), 1 / np.mean([1 / n for n in sizes])
    signal, variance = paths.noise_of_two(squares, mean @ mean, b, sum(sizes))
    for found in ranks.run(world_size, noise, sizes, at):
        assert found.signal == pytest.approx(signal, rel=1e-10)
        assert found.variance == pytest.approx(variance, rel=1e-10)
        assert found.gradient_norm == pytest.approx(np.linalg.norm(mean), rel=1e-12)
        assert found.batch_gradient_norm == pytest.approx(np.mean(np.linalg.norm(g, axis=1)), rel=1e-12)
        assert found.samples == sum(sizes)
        numbers = found.numbers()
        assert numbers["noise_scale"] == pytest.approx(variance / signal if signal > 0 else math.inf, rel=1e-10)
        assert numbers["batch_variance"] == pytest.approx(variance / b, rel=1e-10)
        if len(set(sizes)) == 1:  # then it is the sample covariance of the gradients of batches, times their size
            assert found.variance == pytest.approx(4 * np.trace(np.cov(g.T)), rel=1e-10)


@pytest.mark.parametrize("sizes", [[4, 4, 4], [6, 3, 1]], ids=str)
def test_noise_is_estimated_without_bias(sizes):
    """The mean over all ways to draw the samples of batches from three is the truth."""
    three = [np.array([1.0, 0.0]), np.array([0.0, 2.0]), np.array([-1.0, 1.0])]
    truth = np.mean(three, axis=0)
    trace = np.mean([np.sum((z - truth) ** 2) for z in three])

    class Linear(nn.Module):
        def __init__(self):
            super().__init__()
            self.w = nn.Parameter(torch.zeros(2, dtype=torch.float64))

    rng = np.random.default_rng(0)
    found = []
    for _ in range(4000):
        data = [torch.from_numpy(np.array(three)[rng.integers(3, size=n)]) for n in sizes]
        # Without a graph: the gradient of a linear function of w is its factor.
        g = np.array([z.mean(dim=0).numpy() for z in data])
        mean, N, b = np.average(g, axis=0, weights=sizes), sum(sizes), 1 / np.mean([1 / n for n in sizes])
        found.append(paths.noise_of_two(np.mean(np.sum(g**2, axis=1)), mean @ mean, b, N))
    signal, variance = np.mean(found, axis=0)
    assert signal == pytest.approx(truth @ truth, abs=0.02)
    assert variance == pytest.approx(trace, rel=0.03)
    last = gradient_noise(Objective(Linear(), lambda net, z: (z @ net.w).mean(), data))
    assert (last.signal, last.variance) == pytest.approx(found[-1], rel=1e-10)


def test_noise_without_a_signal():
    data = [torch.tensor([[1.0]]), torch.tensor([[-1.0]])]
    net = nn.Linear(1, 1, bias=False)
    found = gradient_noise(Objective(net, lambda net, z: (z * net.weight).mean(), data))
    assert found.signal == -1
    assert found.numbers()["noise_scale"] == math.inf


def test_one_batch_has_no_noise(tmp_path):
    with pytest.raises(ValueError, match="takes two batches at least"):
        gradient_noise(Objective(Point(), quadratic, batches([4])))
    found = gradient_noise(Objective(Point(), quadratic, batches([4, 4])))
    assert GradientNoise.load(found.save(tmp_path / "noise.npz")) == found


# ------------------------------------------------------------------------------------------------------------- diversity
def diversity(rank, world_size, m, sizes):
    own = [batches(sizes[i], seed=i) for i in range(rank * m, (rank + 1) * m)]
    return gradient_diversity([Objective(Point(), quadratic, data, reduce=summing(world_size)) for data in own])


@pytest.mark.parametrize(("m", "world_size"), [(4, 1), (2, 2), (1, 4)])
def test_diversity(ranks, m, world_size):
    sizes = [[3, 2], [4], [1, 1, 5], [2, 2]]  # replicas count the same, whatever they have
    x = np.linspace(-1, 1, D)
    g = [np.average([gradient(b, x) for b in batches(own, i)], axis=0, weights=own) for i, own in enumerate(sizes)]
    for found in ranks.run(world_size, diversity, m, sizes):
        assert found.zeta_squared == pytest.approx(paths.zeta_squared(g), rel=1e-10)
        assert found.replicas == 4
        assert found.gradient_norm == pytest.approx(np.linalg.norm(np.mean(g, axis=0)), rel=1e-10)
        assert found.local_gradient_norm == pytest.approx(np.mean(np.linalg.norm(g, axis=1)), rel=1e-10)
        assert found.numbers()["zeta"] == math.sqrt(found.zeta_squared)


def test_the_same_data_have_no_diversity():
    f = Objective(Point(), quadratic, batches([4]))
    assert gradient_diversity([f, f, f]).zeta_squared == pytest.approx(0, abs=1e-28)
    with pytest.raises(ValueError, match="There is no replica"):
        gradient_diversity([])


def missing(rank, world_size):
    f = Objective(Point(), quadratic, batches([4]) if rank == 0 else [], reduce=dist.all_reduce)
    with pytest.raises(ValueError, match="Another rank" if rank == 0 else "A replica has no data of its own"):
        gradient_diversity([f])
    return rank


def test_a_replica_without_data(ranks):
    assert ranks.run(2, missing) == [0, 1]


# ---------------------------------------------------------------------------------------------------------------- losses
class Normed(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.first, self.norm, self.last = nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 1)
        self.double()

    def forward(self, x):
        return self.last(torch.relu(self.norm(self.first(x))))


def normed(world_size, rank):
    torch.manual_seed(1)
    net, data = Normed(), [torch.randn(6, 3).double() for _ in range(4)]
    metrics = lambda net, x: {"positive": (net(x) > 0).double().mean()}  # noqa: E731
    options = {"metrics": metrics, "reduce": summing(world_size)}
    return Objective(net, lambda net, x: (net(x) - 1).square().mean(), data[rank::world_size], **options)


def losses(rank, world_size, m, batch_norm):
    f = normed(world_size, rank)
    x = f.vector() + torch.randn(4, f.dim, generator=torch.Generator().manual_seed(3)).double()
    found = replica_losses(f, x[rank * m : (rank + 1) * m], rank * m, 4, batch_norm=batch_norm)
    given = replica_losses(f, x[rank * m : (rank + 1) * m], rank * m, 4, x[3], batch_norm)
    return x, found, given


@pytest.mark.parametrize("batch_norm", ["reestimate", "keep"])
@pytest.mark.parametrize(("m", "world_size"), [(4, 1), (2, 2), (1, 4)])
def test_losses(ranks, m, world_size, batch_norm):
    for x, found, given in ranks.run(world_size, losses, m, batch_norm):
        f = normed(1, 0)
        expected = []
        for point in [*x, x.mean(dim=0)]:
            buffers = batch_norm_statistics(f, point) if batch_norm == "reestimate" else None
            expected.append([f.measure(point, buffers)[name] for name in ("loss", "positive")])
        assert found.metrics == ["loss", "positive"]
        np.testing.assert_allclose(found.replicas, np.array(expected[:4]).T, rtol=1e-10)
        np.testing.assert_allclose(found.average, expected[4], rtol=1e-10)
        np.testing.assert_allclose(given.average, found.replicas[:, 3], rtol=1e-12)
        numbers = found.numbers()
        assert numbers["loss_average"] == found.average[0]
        assert numbers["loss_replicas"] == pytest.approx(np.mean([e[0] for e in expected[:4]]), rel=1e-10)
        assert (numbers["positive_replicas_min"], numbers["positive_replicas_max"]) == (
            found.replicas[1].min(),
            found.replicas[1].max(),
        )


def test_losses_in_files(tmp_path):
    _, found, _ = losses(0, 1, 4, "keep")
    for kind in ("npz", "json"):
        assert ReplicaLosses.load(found.save(tmp_path / f"losses.{kind}")).numbers() == found.numbers()


# ------------------------------------------------------------------------------------------------ distances, step sizes
def apart(rank, world_size, m):
    x = torch.from_numpy(np.random.default_rng(5).normal(size=(4, 7)))
    own = x[rank * m : (rank + 1) * m]
    references = {"start": torch.ones(7), "consensus": x.mean(dim=0), "round": own.flip(1)}
    return distances(own, references, summing(world_size))


@pytest.mark.parametrize(("m", "world_size"), [(4, 1), (2, 2), (1, 4)])
def test_distances(ranks, m, world_size):
    x = np.random.default_rng(5).normal(size=(4, 7))
    expected = {
        name: np.sqrt(np.mean(np.sum((x - r) ** 2, axis=1)))
        for name, r in {"start": np.ones(7), "consensus": x.mean(axis=0), "round": x[:, ::-1]}.items()
    }
    for found in ranks.run(world_size, apart, m):
        assert found == pytest.approx(expected, rel=1e-12)


def test_effective_step_size():
    weights = torch.tensor([3.0, -4.0])
    assert effective_step_size(0.5, weights) == 0.02
    # Of weights whose scale does not count, twice as long ones turn as far with four times the learning rate.
    assert effective_step_size(2.0, 2 * weights) == effective_step_size(0.5, weights)
    assert effective_step_size(0.1, torch.zeros(3)) == math.inf


def test_history(tmp_path):
    history = History(np.array([8, 16, 24, 32]), {"zeta": [1.0, 0.5, math.nan, 0.2], "noise_scale": [math.inf, 3.0, 2.0, 1.0]})
    assert history.numbers() == {"zeta": 0.2, "noise_scale": 1.0}
    figure = history.figure()
    assert isinstance(figure, matplotlib.figure.Figure)
    shown = [axes for axes in figure.axes if axes.get_visible()]
    assert [axes.get_title() for axes in shown] == ["zeta", "noise scale"]
    assert shown[0].lines[0].get_xdata().tolist() == [8, 16, 32]
    assert shown[1].lines[0].get_ydata().tolist() == [3, 2, 1]
    again = History.load(history.save(tmp_path / "history.json"))
    assert again.numbers() == history.numbers()
    assert history.save(tmp_path / "history.png").stat().st_size > 3000
