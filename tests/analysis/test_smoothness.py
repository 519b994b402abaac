"""`estimate_smoothness`: exact on quadratics, on several ranks too, and in training mode."""

from __future__ import annotations

import math

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.smoothness import Smoothness, estimate_smoothness

D = 4


class Point(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.linspace(-1, 1, D, dtype=torch.float64))


def samples(count=10):
    rng = np.random.default_rng(3)
    return torch.from_numpy(rng.normal(size=(count, D)))


def quadratic(net, z):
    """x^T A x / 2 with the second moments A of the samples of a batch."""
    return 0.5 * (z @ net.x).square().mean()


def quartic(net, z):
    return 0.25 * (z @ net.x).pow(4).mean()


def update():
    return torch.from_numpy(np.random.default_rng(8).normal(size=D))


@pytest.mark.parametrize(("steps", "size"), [(8, 0.2), (8, 0.3), (1, 1.0)])
def test_a_quadratic(steps, size):
    z, u = samples(), update()
    f = Objective(Point(), quadratic, [z[:6], z[6:]])
    found = estimate_smoothness(f, u, steps=steps, size=size)
    A = z.numpy().T @ z.numpy() / 10
    expected = np.linalg.norm(A @ u.numpy()) / np.linalg.norm(u.numpy())
    np.testing.assert_allclose(found.ratio, np.full(steps, expected), rtol=1e-12)
    assert found.lipschitz == pytest.approx(expected, rel=1e-12)
    np.testing.assert_allclose(found.distance, size * np.arange(1, steps + 1) * np.linalg.norm(u.numpy()), rtol=1e-12)


def test_the_largest_of_all_steps():
    z, u, net = samples(), update(), Point()
    found = estimate_smoothness(Objective(net, quartic, [z]), u, at=2 * net.x, steps=8, size=0.3)
    x, z, u = 2 * net.x.detach().numpy(), z.numpy(), u.numpy()

    def gradient(x):
        return z.T @ (z @ x) ** 3 / len(z)

    def loss(x):
        return np.mean((z @ x) ** 4) / 4

    places = [x + 0.3 * k * u for k in range(9)]
    ratios = [np.linalg.norm(gradient(y) - gradient(x)) / np.linalg.norm(y - x) for y in places[1:]]
    np.testing.assert_allclose(found.ratio, ratios, rtol=1e-10)
    assert found.lipschitz == max(found.ratio) > min(found.ratio)
    np.testing.assert_allclose(found.loss, [loss(y) for y in places], rtol=1e-10)
    numbers = found.numbers()
    assert numbers["gradient_norm"] == pytest.approx(np.linalg.norm(gradient(x)), rel=1e-12)
    assert numbers["loss_change"] == pytest.approx(loss(places[-1]) - loss(x), rel=1e-12)


def on_rank(rank, world_size):
    z = samples()
    f = Objective(Point(), quartic, [z[rank::world_size]], reduce=dist.all_reduce if world_size > 1 else None)
    return estimate_smoothness(f, update()).ratio


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks(ranks, world_size):
    alone = ranks.run(1, on_rank)[0]
    for ratio in ranks.run(world_size, on_rank):
        np.testing.assert_allclose(ratio, alone, rtol=1e-10)


@pytest.mark.parametrize("inference", [False, True])
def test_batch_norm_and_dropout_of_training(inference):
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.Dropout(0.5), nn.Linear(8, 1)).double()
    before = {key: value.clone() for key, value in net.state_dict().items()}
    batches = [torch.randn(6, 3).double()]
    found = {}
    with torch.inference_mode(inference):
        u = torch.ones(sum(p.numel() for p in net.parameters()), dtype=torch.float64)
        for mode in ("train", "eval"):
            f = Objective(net, lambda net, x: net(x).square().mean(), batches, mode=mode, check=False)
            found[mode] = [estimate_smoothness(f, u, at=at, size=1e-4).ratio for at in (None, f.vector())]
            np.testing.assert_array_equal(*found[mode])  # the same units are dropped
    assert not np.allclose(found["train"][0], found["eval"][0])
    # As small steps would show no Lipschitz constant were other units dropped at each.
    assert np.ptp(found["train"][0]) < 0.01 * found["train"][0].max()
    assert all(torch.equal(value, before[key]) for key, value in net.state_dict().items())
    assert all(p.grad is None for p in net.parameters())


def test_files_and_figure(tmp_path):
    found = estimate_smoothness(Objective(Point(), quartic, [samples()]), update())
    for kind in ("npz", "json"):
        again = Smoothness.load(found.save(tmp_path / f"smoothness.{kind}"))
        assert again.numbers() == found.numbers()
    figure = found.figure()
    assert isinstance(figure, matplotlib.figure.Figure)
    np.testing.assert_array_equal(figure.axes[0].lines[0].get_ydata(), found.ratio)
    assert len(figure.axes[1].lines[0].get_xdata()) == 9


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"steps": 0}, "`steps` must be a whole number, at least 1; got 0"),
        ({"size": -0.2}, r"`size` must be a number above 0; got -0\.2"),
        ({"size": math.inf}, "`size` must be a number above 0"),
        ({"update": torch.zeros(D)}, "The update has the length 0, so there is no direction"),
        ({"update": torch.full((D,), math.nan)}, "The update has the length nan"),
    ],
)
def test_options_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        estimate_smoothness(Objective(Point(), quadratic, [samples()]), **{"update": update(), **options})
