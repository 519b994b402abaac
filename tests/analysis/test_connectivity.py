"""`connect`: curves, their training, what is measured along them; nothing but bends changes."""

from __future__ import annotations

import dataclasses
import math
from functools import partial

import matplotlib.figure
import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_distopt.analysis import interpolate
from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from lightning_distopt.analysis.connectivity import Path, coefficients, connect, on_curve
from lightning_distopt.analysis.objective import Objective
from tests.oracles import paths

QUIET = {"progress": False}
CURVES = ["bezier", "chain"]


class Point(nn.Module):
    """Nothing but its coordinates."""

    def __init__(self, d: int = 3) -> None:
        super().__init__()
        self.x = nn.Parameter(torch.zeros(d, dtype=torch.float64))


def quadratic(net, batch):
    """The mean of |a (x - c)|^2 / 2 over the samples of a batch."""
    a, c = batch
    return 0.5 * (a * (net.x - c)).square().sum(dim=1).mean()


def batches(sizes=(4, 4, 2), d=3):
    rng = np.random.default_rng(4)
    return [tuple(torch.from_numpy(x) for x in (rng.uniform(0.3, 1.2, (n, d)), rng.normal(size=(n, d)))) for n in sizes]


def ends(d=3):
    rng = np.random.default_rng(9)
    return [torch.from_numpy(x) for x in rng.normal(size=(2, d))]


def valley(net, batch):
    """Low on the circle with radius one; the second coordinate of a batch only shifts it."""
    return (net.x.norm() - 1) ** 2 + 0 * batch.sum()


# ---------------------------------------------------------------------------------------------------------------- curves
@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("bends", [1, 2, 3, 7])
def test_points_of_a_curve(curve, bends):
    nodes = np.random.default_rng(bends).normal(size=(bends + 2, 5))
    for t in np.linspace(0, 1, 23):
        c = coefficients(t, bends, curve)
        assert sum(c) == pytest.approx(1, abs=1e-14)
        assert min(c) >= 0
        expected = paths.bezier(nodes, t) if curve == "bezier" else paths.chain(nodes, t)
        np.testing.assert_allclose(on_curve(torch.from_numpy(nodes), t, curve).numpy(), expected, rtol=0, atol=1e-13)


@pytest.mark.parametrize("curve", CURVES)
def test_ends_are_exact_whatever_is_between(curve):
    x = torch.tensor([0.1, -3e-40, 1e30])
    nodes = [x, torch.full_like(x, math.inf), -x / 3]
    assert torch.equal(on_curve(nodes, 0.0, curve), x)
    assert torch.equal(on_curve(nodes, 1.0, curve), -x / 3)


# -------------------------------------------------------------------------------------------------------------- training
class Seen:
    """A loss that notes which batch was evaluated while gradients are taken."""

    def __init__(self):
        self.data, self.taken = [], []

    def __call__(self, net, batch):
        if torch.is_grad_enabled():
            self.taken.append(next(k for k, own in enumerate(self.data) if own is batch))
        return quadratic(net, batch)


def loss_and_gradient(batch):
    a, c = (x.numpy() for x in batch)
    return lambda x: (0.5 * np.mean(np.sum((a * (x - c)) ** 2, axis=1)), np.mean(a**2 * (x - c), axis=0))


@pytest.mark.parametrize("curve", CURVES)
@pytest.mark.parametrize("bends", [1, 3])
def test_training_of_the_bends(curve, bends):
    data, (x_0, x_1) = batches(), ends()
    seen = Seen()
    f = Objective(Point(), seen, data)
    seen.data = f.batches
    path = connect(f, x_0, x_1, bends, curve, steps=40, lr=0.2, seed=5, **QUIET)
    assert len(seen.taken) == 40
    for k in range(0, 39, 3):  # every batch once, then all of them again
        assert sorted(seen.taken[k : k + 3]) == [0, 1, 2]
    assert len({tuple(seen.taken[k : k + 3]) for k in range(0, 39, 3)}) > 1

    draws = torch.Generator().manual_seed(5)
    ts = [torch.rand((), generator=draws, dtype=torch.float64).item() for _ in range(40)]
    steps = [loss_and_gradient(data[k]) for k in seen.taken]
    nodes, losses = paths.train_curve(x_0.numpy(), x_1.numpy(), bends, curve, ts, steps, lr=0.2)
    np.testing.assert_allclose(path.nodes, nodes, rtol=0, atol=1e-10)
    np.testing.assert_allclose(path.training_loss, losses, rtol=0, atol=1e-10)
    assert path.training_t.tolist() == ts


def test_another_optimizer():
    data, (x_0, x_1) = batches(), ends()
    made = []

    def adam(bends, lr):
        made.append((len(bends), lr))
        return torch.optim.Adam(bends, lr=lr, betas=(0.5, 0.9))

    path = connect(Objective(Point(), quadratic, data), x_0, x_1, 2, steps=1, lr=0.25, optimizer=adam, **QUIET)
    assert made == [(2, 0.25)]
    start = np.array([x_0 + (x_1 - x_0) * i / 3 for i in range(4)])
    np.testing.assert_allclose(np.abs(path.nodes - start)[1:3], 0.25, atol=1e-3)  # the first step of Adam


def ranked(rank, world_size, sizes):
    data = batches(sizes)
    own = [tuple(x[rank::world_size] for x in batch) for batch in data]
    reduce = dist.all_reduce if world_size > 1 else None
    f = Objective(Point(), quadratic, own, reduce=reduce, check=False)
    path = connect(f, *ends(), bends=2, steps=25, lr=0.2, points=5, **QUIET)
    return path.nodes, path.values, path.training_loss, path.numbers()


@pytest.mark.parametrize("world_size", [2, 4])
def test_several_ranks_are_one_with_larger_batches(ranks, world_size):
    sizes = (6, 5, 4)  # which ranks share unevenly
    alone = ranks.run(1, ranked, sizes)[0]
    results = ranks.run(world_size, ranked, sizes)
    for result in results:
        for one, other in zip(result[:3], alone[:3], strict=True):
            np.testing.assert_allclose(one, other, rtol=0, atol=1e-10)
        assert result[3] == pytest.approx(alone[3], rel=1e-10)
        np.testing.assert_array_equal(result[0], results[0][0])


def idle(rank, world_size):
    f = Objective(Point(), quadratic, batches((4, 4)) if rank == 0 else [], reduce=dist.all_reduce)
    return connect(f, *ends(), steps=10, lr=0.2, points=3, **QUIET).nodes


def test_a_rank_without_data(ranks):
    alone = connect(Objective(Point(), quadratic, batches((4, 4))), *ends(), steps=10, lr=0.2, points=3, **QUIET).nodes
    for nodes in ranks.run(2, idle):
        np.testing.assert_allclose(nodes, alone, rtol=0, atol=1e-12)


# ----------------------------------------------------------------------------------------------------------- measurement
@pytest.fixture(scope="module")
def path():
    train = Objective(Point(2), valley, [torch.zeros(3)], metrics=lambda net, batch: {"radius": net.x.norm()})
    test = Objective(Point(2), lambda net, batch: 2 * valley(net, batch), [torch.zeros(1)], metrics=train.metrics)
    x_0, x_1 = torch.tensor([1.0, 0.0]).double(), torch.tensor([0.0, 2.0]).double()
    return connect({"train": train, "test": test}, x_0, x_1, bends=2, steps=300, lr=0.1, points=9, **QUIET)


def test_what_is_measured(path):
    points = np.array([paths.bezier(path.nodes, t) for t in path.t])
    line = np.array([(1 - t) * path.nodes[0] + t * path.nodes[-1] for t in path.t])
    assert (path.data, path.metrics) == (["train", "test"], ["loss", "radius"])
    for found, places in ((path.values, points), (path.straight, line)):
        radius = np.linalg.norm(places, axis=1)
        expected = np.array([[(radius - 1) ** 2, radius], [2 * (radius - 1) ** 2, radius]])
        np.testing.assert_allclose(found, expected, atol=1e-12)
    np.testing.assert_array_equal(path.straight[..., [0, -1]], path.values[..., [0, -1]])
    np.testing.assert_allclose(np.diff(path.arc), np.linalg.norm(np.diff(points, axis=0), axis=1), rtol=1e-12)
    np.testing.assert_allclose(path.point(0.3), paths.bezier(path.nodes, 0.3), atol=1e-14)


def test_numbers(path):
    found = path.numbers()
    points = np.array([path.point(t) for t in path.t])
    loss = path.values[1, 0]
    assert found["test/loss_max"] == loss.max()
    assert found["test/loss_mean"] == pytest.approx(loss.mean(), rel=1e-14)
    assert found["test/loss_integral"] == pytest.approx(paths.integral(loss, points), rel=1e-12)
    assert found["test/radius_min"] == path.values[1, 1].min()
    line = [(1 - t) * path.nodes[0] + t * path.nodes[-1] for t in path.t]
    straight = path.straight[0, 0]
    assert found["train/straight_loss_integral"] == pytest.approx(paths.integral(straight, line), rel=1e-12)
    barrier = max(value - ((1 - t) * straight[0] + t * straight[-1]) for t, value in zip(path.t, straight, strict=True))
    assert found["train/straight_loss_barrier"] == pytest.approx(barrier, rel=1e-12)
    assert "test/radius_barrier" not in found
    assert found["length"] > np.linalg.norm(path.nodes[-1] - path.nodes[0])
    assert found["train/loss_max"] == path.values[0, 0, -1] == 1  # the end that lies beside the valley
    assert found["train/loss_mean"] < 0.9 * found["train/straight_loss_mean"]


def test_ends_stay_to_the_bit():
    data, (x_0, x_1) = batches(), ends()
    copies = x_0.clone(), x_1.clone()
    net = Point()
    path = connect(Objective(net, quadratic, data), x_0, x_1, bends=3, steps=20, lr=0.3, points=3, **QUIET)
    for x, copy, node in zip((x_0, x_1), copies, path.nodes[[0, -1]], strict=True):
        assert torch.equal(x, copy)
        assert torch.equal(torch.from_numpy(node), copy)
    assert not net.x.detach().any()
    assert net.x.grad is None


def test_models_that_are_the_same():
    (x, _), f = ends(), Objective(Point(), quadratic, batches())
    path = connect(f, x, x, steps=0, points=4, **QUIET)
    assert path.arc[-1] < 1e-14
    assert path.numbers()["loss_integral"] == pytest.approx(f.loss(x), rel=1e-12)


def test_files(path, tmp_path):
    whole = Path.load(path.save(tmp_path / "path.npz"))
    for name, value in vars(path).items():
        np.testing.assert_array_equal(getattr(whole, name), value)
    slim = Path.load(path.save(tmp_path / "path.json"))
    assert slim.numbers() == path.numbers()
    with pytest.raises(ValueError, match=r"save it as `\.npz`"):
        slim.point(0.5)


def test_figure(path, tmp_path):
    figure = path.figure()
    assert isinstance(figure, matplotlib.figure.Figure)
    assert [axes.get_ylabel() for axes in figure.axes] == ["loss", "radius"]
    labels = [line.get_label() for line in figure.axes[0].lines]
    assert labels == ["straight line, train", "straight line, test", "Bezier curve, train", "Bezier curve, test"]
    np.testing.assert_array_equal(figure.axes[1].lines[3].get_ydata(), path.values[1, 1])
    named = dataclasses.replace(path, models=["tuned", "masked"]).figure()
    assert [f.axes[0].get_xlabel() for f in (figure, named)] == ["t (0: x_0, 1: x_1)", "t (0: tuned, 1: masked)"]
    assert path.save(tmp_path / "path.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------- modules with state
class Normed(nn.Module):
    def __init__(self, frozen: bool = True) -> None:
        super().__init__()
        self.first, self.norm, self.drop = nn.Linear(4, 6), nn.BatchNorm1d(6), nn.Dropout(0.5)
        self.last = nn.Linear(6, 2)
        self.fixed = nn.Linear(2, 2).requires_grad_(not frozen)
        self.register_buffer("scale", torch.ones(1))
        self.double()

    def forward(self, x):
        return self.fixed(self.scale * self.last(self.drop(torch.relu(self.norm(self.first(x))))))


def cross_entropy(net, batch):
    return nn.functional.cross_entropy(net(batch[0]), batch[1])


def labelled(count=3, size=8):
    draws = torch.Generator().manual_seed(2)
    return [
        (torch.randn(size, 4, generator=draws, dtype=torch.float64), torch.randint(2, (size,), generator=draws))
        for _ in range(count)
    ]


def two_states():
    torch.manual_seed(6)
    net = Normed()
    first = {key: value.clone() for key, value in net.state_dict().items()}
    for parameter in net.parameters():
        if parameter.requires_grad:
            nn.init.normal_(parameter)
    net.norm.running_mean += 3
    net.scale *= 2
    return net, first, {key: value.clone() for key, value in net.state_dict().items()}


@pytest.mark.parametrize("inference", [False, True])
def test_statistics_of_batches_in_training_and_new_ones_for_every_point(inference):
    net, first, second = two_states()
    kept = [{key: value.clone() for key, value in state.items()} for state in (second, first)]
    net.norm.eval()  # a mode of its own
    modes = []

    def loss_fn(module, batch):
        if torch.is_grad_enabled():  # while the curve is trained
            modes.append((module.norm.training, module.drop.training))
        return cross_entropy(module, batch)

    f = Objective(net, loss_fn, labelled())
    state = torch.get_rng_state()
    with torch.inference_mode(inference):
        path = connect(f, first, second, bends=1, steps=6, lr=0.5, points=3, **QUIET)
    assert torch.equal(torch.get_rng_state(), state)
    assert modes == [(True, False)] * 6  # nothing is dropped
    assert [child.training for child in (net, net.norm, net.drop)] == [True, False, True]
    for key, value in net.state_dict().items():
        assert torch.equal(value, kept[0][key])
    assert all(torch.equal(value, first[key]) for key, value in kept[1].items())
    middle = torch.from_numpy(path.nodes)
    for k, weights in enumerate([middle[0], (middle[0] + 2 * middle[1] + middle[2]) / 4, middle[2]]):
        buffers = {**batch_norm_statistics(f, weights), "scale": torch.tensor([1 + k / 2]).double()}
        assert path.values[0, 0, k] == pytest.approx(f.loss(weights, buffers), rel=1e-12)


def test_buffers_are_mixed_where_they_are_kept():
    net, first, second = two_states()
    f = Objective(net, cross_entropy, labelled())
    path = connect(f, first, second, steps=0, points=3, batch_norm="interpolate", **QUIET)
    mixed = {name: torch.lerp(first[name], second[name], 0.5) for name in ("norm.running_mean", "norm.running_var", "scale")}
    weights = torch.from_numpy(path.nodes[1])
    assert path.values[0, 0, 1] == pytest.approx(f.loss(weights, mixed), rel=1e-12)
    assert path.values[0, 0, 2] == pytest.approx(f.loss(), rel=1e-12)  # the module is the second


def test_dropout_where_the_objective_is_in_training_mode():
    net, first, second = two_states()
    found = [
        connect(
            Objective(net, cross_entropy, labelled(), mode=mode, check=False), first, second, steps=6, lr=0.5, points=2, **QUIET
        )
        for mode in ("eval", "train", "train")
    ]
    assert not np.allclose(found[0].nodes, found[1].nodes)
    np.testing.assert_array_equal(found[1].nodes, found[2].nodes)


def test_the_straight_line_is_that_of_interpolate_with_whole_numbers_too():
    class Counting(Point):
        def __init__(self):
            super().__init__()
            self.register_buffer("count", torch.tensor(0))
            self.register_buffer("shift", torch.zeros(3, dtype=torch.float64))

    def loss(net, batch):
        return quadratic(net, batch) + net.count + net.shift.square().sum()

    f = Objective(Counting(), loss, batches())
    first, last = ({"x": x, "count": torch.tensor(k), "shift": x + k} for k, x in enumerate(ends()))
    path = connect(f, first, last, points=11, steps=0, batch_norm="interpolate", **QUIET)
    line = interpolate(f, first, last, points=11, margin=0, **QUIET)
    np.testing.assert_array_equal(path.straight[0, 0], line.curves()[0])
    np.testing.assert_allclose(path.values[0, 0], line.curves()[0], rtol=1e-12)  # the bend is still on the line
    assert path.numbers()["straight_loss_barrier"] == line.numbers()["barrier"]


def test_half_precision():
    net = nn.Linear(1, 1).half()
    f = Objective(net, lambda net, x: 2000 + net(x).square().mean(), [torch.ones(64, 1).half()] * 2)
    path = connect(f, torch.ones(2).half(), -torch.ones(2).half(), steps=3, lr=1e-3, points=3, **QUIET)
    assert np.isfinite(path.training_loss).all()  # though 64 * 2000 is more than there is room for


# ------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"bends": 0}, "`bends` must be a whole number, at least 1; got 0"),
        ({"bends": 1.5}, "`bends` must be a whole number"),
        ({"steps": -1}, "`steps` must be a whole number, at least 0"),
        ({"points": 1}, "`points` must be a whole number, at least 2"),
        ({"lr": 0.0}, "`lr` must be a number above 0; got 0.0"),
        ({"lr": math.nan}, "`lr` must be a number above 0"),
        ({"curve": "spline"}, "`curve` must be one of 'bezier', 'chain'; got 'spline'"),
        ({"batch_norm": "new"}, "`batch_norm` must be one of 'reestimate', 'interpolate'"),
    ],
)
def test_options_that_make_no_sense(options, sentence):
    with pytest.raises(ValueError, match=sentence):
        connect(Objective(Point(), quadratic, batches()), *ends(), **options, **QUIET)


def test_ends_that_do_not_fit():
    f = Objective(Point(), quadratic, batches())
    x_0, x_1 = ends()
    run = partial(connect, f, points=2, steps=3, **QUIET)
    with pytest.raises(ValueError, match=r"`x_1` must have the shape \[3\]; got \[2\]"):
        run(x_0, x_1[:2])
    with pytest.raises(ValueError, match="`x_0` has values that are not finite"):
        run(x_0 / 0, x_1)
    with pytest.raises(ValueError, match=r"`x_1` is another one: 'x' is of shape \[2\] there and of shape \[3\]"):
        run(x_0, Point(2).state_dict())
    net, first, second = two_states()
    second["fixed.bias"] = second["fixed.bias"] + 1
    with pytest.raises(ValueError, match=r"other values of 'fixed\.bias', which is no variable"):
        connect(Objective(net, cross_entropy, labelled()), first, second, **QUIET)


def test_a_loss_that_overflows():
    f = Objective(Point(), quadratic, batches())
    with pytest.raises(ValueError, match=r"not finite in step \d+: make `lr` smaller than 1e\+30"):
        connect(f, *ends(), lr=1e30, **QUIET)
