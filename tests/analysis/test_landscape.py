"""Landscapes: equal the loss at every point, on any number of ranks, and leave the model alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_distopt.analysis import (
    Landscape1D,
    Landscape2D,
    gaussian_direction,
    landscape_1d,
    landscape_2d,
    plane_of_three,
    random_direction,
    trajectory_plane,
)
from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from tests.analysis.linear import entropy, images, linear, numbers, same, small_net, state_of
from tests.oracles import landscape as oracle

QUIET = {"progress": False}


# ------------------------------------------------------------------------------------------------------------------ numbers
def test_line():
    f = linear()
    found = landscape_1d(f, directions=3, radius=0.7, points=7, seed=4, **QUIET)
    np.testing.assert_allclose(found.positions, np.linspace(-0.7, 0.7, 7), atol=1e-15)
    w = f.vector().numpy()
    for k, curve in enumerate(found.curves()):
        d = [piece.numpy() for piece in f.tensors(gaussian_direction(f, 4, k)).values()]
        normalised = oracle.filter_normalise(d, [piece.numpy() for piece in f.tensors(f.vector()).values()])
        d = np.concatenate([piece.ravel() for piece in normalised])
        expected = [oracle.loss(*numbers(), w + position * d) for position in found.positions]
        np.testing.assert_allclose(curve, expected, rtol=1e-10)
    assert found.numbers()["loss"] == f.loss()
    rise = np.mean([oracle.loss(*numbers(), w + s * random_direction(f, 4, k).numpy()) for k in range(3) for s in (-0.7, 0.7)])
    assert found.numbers()["rise"] == pytest.approx(rise - f.loss(), rel=1e-10)


@pytest.mark.parametrize(("radius", "points"), [(0.3, 7), (0.1, 31), (1 / 3, 11)])
def test_the_model_itself_is_the_middle_point(radius, points):
    f = images(small_net())
    found = landscape_1d(f, directions=2, radius=radius, points=points, **QUIET)
    middle = points // 2
    assert found.positions[middle] == 0
    assert (found.positions == -found.positions[::-1]).all()
    for metric in ("loss", "accuracy"):
        assert (found.curves(metric=metric)[:, middle] == f.measure()[metric]).all()
    grid = landscape_2d(f, radius=radius, points=5, **QUIET)
    assert grid.grid()[2, 2] == f.loss()


def test_models_are_compared_along_shared_directions():
    net, other = small_net(1), small_net(2)
    f, g = images(net), images(other)
    both = landscape_1d(f, {"a": net.state_dict(), "b": other.state_dict()}, directions=2, points=3, **QUIET)
    for name, objective in (("a", f), ("b", g)):
        alone = landscape_1d(objective, directions=2, points=3, **QUIET)
        np.testing.assert_allclose(both.curves(name), alone.curves(), rtol=1e-12)
    assert set(both.numbers()) == {"a/loss", "a/rise", "b/loss", "b/rise"}


def test_given_directions_are_taken_as_they_are():
    f = linear()
    d = torch.arange(8.0, dtype=torch.float64)
    found = landscape_1d(f, {"now": f.vector(), "zero": torch.zeros(8)}, directions=[d, 2 * d], points=3, **QUIET)
    assert found.curves("zero")[1].tolist() == [f.loss(-2 * d), f.loss(0 * d), f.loss(2 * d)]


def test_plane():
    f, g = linear(), linear(slice(0, 1))
    g.module = f.module
    points = [torch.from_numpy(p) for p in np.random.default_rng(3).normal(size=(5, 8))]
    plane = trajectory_plane(f, points)
    found = landscape_2d({"train": f, "first": g}, plane, points=5, **QUIET)
    a, y = numbers()
    for i, row in enumerate(found.y):
        for k, column in enumerate(found.x):
            x = (plane.origin.vector + column * plane.u + row * plane.v).numpy()
            assert found.grid()[i, k] == pytest.approx(oracle.loss(a, y, x), rel=1e-10)
            assert found.grid("first")[i, k] == pytest.approx(oracle.loss(a[:4], y[:4], x), rel=1e-10)
    assert (found.x[0], found.x[-1], found.y[0], found.y[-1]) == pytest.approx(plane.window(), rel=1e-14)
    assert found.numbers()["explained"] == pytest.approx(plane.explained.sum())


def test_statistics_of_batch_norm_are_kept_or_taken_anew():
    net = small_net()
    f = images(net)
    kept, anew = (landscape_1d(f, directions=1, points=3, batch_norm=policy, **QUIET) for policy in ("keep", "reestimate"))
    for position, a, b in zip(kept.positions, kept.curves()[0], anew.curves()[0], strict=True):
        at = f.vector() + position * random_direction(f)
        assert a == f.loss(at)
        assert b == f.loss(at, batch_norm_statistics(f, at))
        assert abs(a - b) > 1e-4


def test_overflow_is_kept_and_drawn(tmp_path):
    f = linear()
    d = torch.full((8,), 1e160, dtype=torch.float64)
    found = landscape_1d(f, directions=[d], points=5, **QUIET)
    assert np.isinf(found.curves()[0, [0, 1, 3, 4]]).all()
    assert found.curves()[0, 2] == f.loss()
    line = found.figure().axes[0].lines[1]
    assert list(line.get_xdata()) == [-1, -0.5, 0.5, 1]  # crosses

    plane = plane_of_three(f, [torch.zeros(8), torch.eye(8)[0], torch.eye(8)[1]])
    plane.u *= 1e160
    grid = landscape_2d(f, plane, points=5, **QUIET)
    assert np.isfinite(grid.grid()).all(axis=0).sum() <= 1
    for result in (found, grid):
        assert result.save(tmp_path / "picture.png").stat().st_size > 5000


# ------------------------------------------------------------------------------------------------------------------- ranks
def shared(rank, world_size, shard, batch_norm="keep"):
    part = slice(rank, None, world_size) if shard == "data" else slice(None)
    options = {"reduce": dist.all_reduce} if world_size > 1 else {}
    f = images(small_net(), part, **options)
    kinds = {"batch_norm": batch_norm, "shard": shard, **QUIET}
    line = landscape_1d(f, directions=2, points=5, **kinds)
    plane = landscape_2d(f, points=3, **kinds)
    return line.values, plane.values, line.metrics


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("shard", ["data", "points"])
@pytest.mark.parametrize("batch_norm", ["keep", "reestimate"])
def test_ranks_share_data_or_points(ranks, world_size, shard, batch_norm):
    alone = shared(0, 1, "data", batch_norm)
    for values in ranks.run(world_size, shared, shard, batch_norm):
        np.testing.assert_allclose(values[0], alone[0], rtol=1e-10)
        np.testing.assert_allclose(values[1], alone[1], rtol=1e-10)
        assert values[2] == ["loss", "accuracy"]


def test_more_ranks_than_points(ranks):
    def measure(rank, world_size):
        f = linear(reduce=dist.all_reduce)
        return landscape_1d(f, directions=1, points=3, shard="points", **QUIET).values

    for values in ranks.run(4, measure):
        np.testing.assert_allclose(values, landscape_1d(linear(), directions=1, points=3, **QUIET).values, rtol=1e-10)


def test_overflow_on_another_rank(ranks):
    def measure(rank, world_size):
        f = linear(reduce=dist.all_reduce)
        d = torch.full((8,), 1e160, dtype=torch.float64)
        return landscape_1d(f, directions=[d], points=3, shard="points", **QUIET).curves()[0]

    for curve in ranks.run(2, measure):
        assert [np.isinf(value) for value in curve] == [True, False, True]


def test_each_rank_evaluates_its_part_of_the_points(ranks):
    def measure(rank, world_size):
        calls = []

        def count(net, batch):
            calls.append(1)
            return entropy(net, batch)

        f = images(small_net(), reduce=dist.all_reduce)
        f.loss_fn = f._call.function = count
        landscape_1d(f, directions=1, points=41, shard="points", **QUIET)
        return len(calls) / len(f.batches)

    # 21 and 20 of 41 points, and one evaluation to see whether all have the same data
    assert ranks.run(2, measure) == [21 + 1, 20 + 1]


@pytest.mark.parametrize("uneven", [False, True])
def test_points_are_not_shared_where_data_differ(ranks, uneven):
    def measure(rank, world_size):
        f = linear(slice(0, 2 * (1 - rank)) if uneven else slice(rank, None, 2), reduce=dist.all_reduce)
        sentence = "Not every rank has a batch" if uneven else "Ranks have different parts of the data"
        with pytest.raises(ValueError, match=rf"{sentence}.*use `shard='data'`"):
            landscape_1d(f, directions=1, points=3, shard="points", **QUIET)
        return True

    assert ranks.run(2, measure) == [True, True]


@pytest.mark.parametrize("at_once", [False, True])
def test_an_error_of_one_rank_is_one_of_all(ranks, at_once):
    def measure(rank, world_size):
        f = images(small_net(), reduce=dist.all_reduce)
        w = f.vector()

        def fails(net, batch):
            if rank == 1 and (at_once or not torch.equal(net.head.weight.reshape(-1), w[-111:-3])):
                raise RuntimeError("no memory left")
            return entropy(net, batch)

        f.loss_fn = f._call.function = fails
        with pytest.raises((RuntimeError, ValueError), match="no memory left" if rank else "its own error says why"):
            landscape_1d(f, directions=1, points=5, shard="points", **QUIET)
        return True

    assert ranks.run(2, measure) == [True, True]


# ------------------------------------------------------------------------------------------------------------- undisturbed
@pytest.mark.parametrize("batch_norm", ["keep", "reestimate"])
def test_nothing_is_disturbed(batch_norm):
    net = small_net().train()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before = state_of(net)
    f = images(net)
    landscape_1d(f, directions=1, points=3, batch_norm=batch_norm, **QUIET)
    landscape_2d(f, points=3, batch_norm=batch_norm, **QUIET)
    same(state_of(net), before)


def test_it_works_in_inference_mode():
    f = images(small_net())
    plain = landscape_1d(f, directions=1, points=3, batch_norm="reestimate", **QUIET).values
    with torch.inference_mode():
        inside = landscape_1d(f, directions=1, points=3, batch_norm="reestimate", **QUIET).values
        landscape_2d(f, points=3, **QUIET)
    same(inside, plain)


# ------------------------------------------------------------------------------------------------------- files and pictures
def test_files_and_pictures(tmp_path):
    f, g = images(small_net()), images(small_net(), slice(0, 2))
    g.module = f.module
    line = landscape_1d({"train": f, "test": g}, directions=2, points=3, **QUIET)
    points = [f.vector() + k * random_direction(f, index=k) for k in range(4)]
    plane = landscape_2d({"train": f, "test": g}, trajectory_plane(f, points), points=5, **QUIET)
    three = landscape_2d(f, plane_of_three(f, points[:3], ["one", "two", "three"]), points=5, **QUIET)
    for result in (line, plane, three):
        for kind in ("npz", "json"):
            loaded = type(result).load(result.save(tmp_path / f"result.{kind}"))
            np.testing.assert_equal(vars(loaded), vars(result))
    assert [axes.get_ylabel() for axes in line.figure().axes] == [
        f"{a} {b}" for b in ("loss", "accuracy") for a in ("train", "test")
    ]
    panels = plane.figure().axes
    assert "% of the variance" in panels[0].get_xlabel()
    assert len(panels[0].lines[0].get_xdata()) == 4  # the trajectory
    assert {text.get_text() for text in three.figure().axes[0].texts} == {"one", "two", "three"}


def test_a_flat_and_a_negative_landscape_are_drawn():
    mark, none = np.zeros((1, 2)), np.zeros(0)
    axis = np.arange(3.0)
    for losses in (np.full((1, 1, 3, 3), 0.7), -np.arange(9.0).reshape(1, 1, 3, 3), np.full((1, 1, 3, 3), np.nan)):
        figure = Landscape2D(axis, axis, losses, [""], ["loss"], mark, [], none).figure()
        figure.canvas.draw()
        assert len(figure.axes) == (2 if np.isfinite(losses).any() else 1)  # a colour bar where there are colours
    Landscape1D(axis - 1, np.full((1, 1, 1, 2, 3), np.nan), [""], [""], ["loss"]).figure().canvas.draw()


# ------------------------------------------------------------------------------------------------------------------ refusal
@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"points": 20}, "`points` must be an odd number from 3 on, so that the middle is one of them; got 20."),
        ({"points": 1}, "got 1."),
        ({"radius": 0}, "`radius` must be a number above 0; got 0."),
        ({"radius": float("inf")}, "got inf"),
        ({"directions": 0}, "`directions` must be a whole number, at least 1; got 0."),
        ({"directions": 2.5}, "`directions` must be a whole number, at least 1; got 2.5."),
        ({"directions": []}, "got 0."),
        ({"directions": [torch.zeros(3)]}, "The vector of a direction must have the shape [8]; got [3]."),
        ({"shard": "rows"}, "`shard` must be one of 'data', 'points'; got 'rows'."),
        ({"batch_norm": "interpolate"}, "`batch_norm` must be one of 'reestimate', 'keep'; got 'interpolate'."),
        ({"one_dimensional": "zero"}, "`one_dimensional` must be one of 'ignore', 'whole'; got 'zero'."),
        ({"objective": {}}, "There is no objective to measure."),
        (
            {"models": {"last": {"weight": torch.zeros(2, 4), "bias": torch.zeros(2)}}},
            "model 'last' is another one: 'weight' is of shape [2, 4] there and of shape [2, 3] in the module.",
        ),
    ],
)
def test_options(options, sentence):
    with pytest.raises(ValueError) as caught:
        landscape_1d(**{"objective": linear(), **QUIET, **options})
    assert sentence in str(caught.value)


def test_objectives_of_different_parameters():
    with pytest.raises(ValueError, match="'train', 'bias' must be functions of the same parameters"):
        landscape_1d({"train": linear(), "bias": linear(parameters="bias")}, **QUIET)
    with pytest.raises(ValueError, match="'train', 'eval' must have the same `mode`"):
        landscape_1d({"train": linear(mode="train"), "eval": linear()}, **QUIET)
