"""Directions and planes: equal the papers' definitions, the same on every rank, and refuse what spans nothing."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import nn

from lightning_distopt.analysis import (
    Objective,
    filter_normalized,
    gaussian_direction,
    plane_of_three,
    random_direction,
    random_plane,
    trajectory_plane,
)
from tests.analysis.linear import entropy, images, linear, same, small_net, state_of
from tests.conformance.problems import Augmented
from tests.oracles import landscape as oracle


def arrays(objective: Objective, vector: torch.Tensor) -> list[np.ndarray]:
    return [piece.numpy().copy() for piece in objective.tensors(vector).values()]


# -------------------------------------------------------------------------------------------------------- random directions
def test_filters_have_the_length_of_the_weights():
    f = images(small_net())
    found = arrays(f, random_direction(f, seed=5, index=2))
    expected = oracle.filter_normalise(arrays(f, gaussian_direction(f, 5, 2)), arrays(f, f.vector()))
    for a, b in zip(found, expected, strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-12, atol=0)
    assert [np.any(a != 0) for a in found] == [a.ndim > 1 for a in expected]


def test_one_dimensional_parameters_as_one_filter():
    f = linear()
    d = f.tensors(random_direction(f, one_dimensional="whole"))
    assert d["bias"].norm().item() == pytest.approx(f.module.bias.norm().item(), rel=1e-14)
    assert d["bias"].abs().min() > 0


def test_the_length_is_that_of_other_weights_if_asked():
    f = linear()
    other = torch.arange(8.0, dtype=torch.float64)
    d = f.tensors(random_direction(f, weights=other))["weight"]
    torch.testing.assert_close(d.norm(dim=1), other[:6].view(2, 3).norm(dim=1))


def test_models_share_the_draw():
    """The same direction, filter by filter, whatever the weights, their dtype and the state of the global stream."""
    f, g = images(small_net(1)), images(small_net(2))
    torch.manual_seed(99)
    same(gaussian_direction(f, 4), gaussian_direction(g, 4))
    a, b = f.tensors(random_direction(f, 4)), g.tensors(random_direction(g, 4))
    cosines = nn.functional.cosine_similarity(a["hidden.weight"], b["hidden.weight"], dim=1)
    torch.testing.assert_close(cosines, torch.ones(36, dtype=torch.float64))
    single = Objective(small_net().float(), entropy, [(Augmented(5).x.float(), Augmented(5).y)])
    same(gaussian_direction(single, 4), gaussian_direction(f, 4).float())
    assert not torch.equal(gaussian_direction(f, 4), gaussian_direction(f, 5))
    assert not torch.equal(gaussian_direction(f, 4), gaussian_direction(f, 4, 1))


def test_it_is_gaussian():
    net = nn.Linear(300, 200)
    draw = gaussian_direction(Objective(net, lambda net, x: net(x).mean(), [torch.ones(1, 300)])).double()
    n = len(draw)
    assert abs(draw.mean()) < 4 / n**0.5
    assert abs(draw.var() - 1) < 4 * (2 / n) ** 0.5
    assert abs((draw**4).mean() - 3) < 4 * (96 / n) ** 0.5  # a uniform distribution has 1.8 variances


def test_zero_filters_stay_zero():
    f = linear()
    f.module.weight.data[1] = 0
    d = f.tensors(random_direction(f))["weight"]
    assert d[0].abs().min() > 0
    assert not d[1].any()
    still = filter_normalized(f, torch.zeros(8, dtype=torch.float64))
    assert not still.any()


def test_scaled_networks_have_scaled_directions():
    f = linear()
    before = f.tensors(random_direction(f))["weight"].clone()
    f.module.weight.data *= 8
    same(f.tensors(random_direction(f))["weight"], 8 * before)


def test_nothing_is_disturbed():
    net, states = small_net(), [small_net(k).state_dict() for k in (1, 2, 3)]
    before = state_of(net)
    random_plane(images(net))
    trajectory_plane(images(net), states)
    same(state_of(net), before)


def test_directions_are_the_same_on_every_rank(ranks):
    def draw(rank, world_size):
        torch.manual_seed(rank)
        return random_direction(linear(slice(rank, None, world_size)), seed=3)

    first, second = ranks.run(2, draw)
    same(first, second)
    same(first, random_direction(linear(), seed=3))


# ------------------------------------------------------------------------------------------------------------------- planes
def test_random_plane():
    f = linear()
    plane = random_plane(f, seed=2)
    same(plane.at(0.5, -2.0).vector, f.vector() + 0.5 * random_direction(f, 2, 0) - 2.0 * random_direction(f, 2, 1))
    assert plane.window() == (-1, 1, -1, 1)
    assert plane.window(3.0) == (-3, 3, -3, 3)


@pytest.mark.parametrize("count", [3, 4, 12])
def test_trajectory_plane(count):
    f = linear()
    points = np.cumsum(np.random.default_rng(1).normal(size=(count, 8)), axis=0)
    plane = trajectory_plane(f, [torch.from_numpy(p) for p in points])
    u, v, x, y, shares = oracle.principal_plane(points)
    for found, expected, coordinates, k in ((plane.u, u, x, 0), (plane.v, v, y, 1)):
        sign = np.sign(found.numpy() @ expected)
        np.testing.assert_allclose(found.numpy(), sign * expected, atol=1e-10)
        np.testing.assert_allclose(plane.marks[:, k], sign * coordinates, atol=1e-10)
    np.testing.assert_allclose(plane.explained, shares, atol=1e-10)
    assert 0 < plane.explained[1] <= plane.explained[0]
    same(plane.origin.vector, torch.from_numpy(points[-1]))
    if count == 3:  # all of them lie in the plane
        for point, mark in zip(points, plane.marks, strict=True):
            np.testing.assert_allclose(plane.at(*mark).vector.numpy(), point, atol=1e-12)
    left, right, bottom, top = plane.window()
    inside = (plane.marks > [left, bottom]) & (plane.marks < [right, top])
    assert inside.all()


def test_plane_of_three():
    f = linear()
    points = np.random.default_rng(2).normal(size=(3, 8))
    plane = plane_of_three(f, [torch.from_numpy(p) for p in points], ["a", "b", "c"])
    u, v, marks = oracle.three_points(*points)
    np.testing.assert_allclose(plane.u, u, atol=1e-12)
    np.testing.assert_allclose(plane.v, v, atol=1e-12)
    np.testing.assert_allclose(plane.marks, marks, atol=1e-12)
    for point, mark in zip(points, plane.marks, strict=True):
        np.testing.assert_allclose(plane.at(*mark).vector.numpy(), point, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------------ refusal
def test_what_spans_nothing():
    f = linear()
    a, b = torch.eye(8, dtype=torch.float64)[:2]
    with pytest.raises(ValueError, match="lie on one line: draw it by `interpolate`"):
        plane_of_three(f, [a, 2 * a, 3 * a])
    with pytest.raises(ValueError, match="lie on one line: draw it by `interpolate`"):
        trajectory_plane(f, [a, 2 * a, 3 * a, 4 * a])
    with pytest.raises(ValueError, match="lie on one line"):
        trajectory_plane(f, [a, a, a])
    with pytest.raises(ValueError, match="The first two models are the same"):
        plane_of_three(f, [a, a, b])
    with pytest.raises(ValueError, match="needs three models at least to lie in a plane; got 2"):
        trajectory_plane(f, [a, b])
    with pytest.raises(ValueError, match="takes three models with a label each; got 2 and 3"):
        plane_of_three(f, [a, b])
    with pytest.raises(ValueError, match="`one_dimensional` must be 'ignore' or 'whole'; got 'keep'"):
        random_direction(f, one_dimensional="keep")
    with pytest.raises(ValueError, match="direction is zero: no parameter has two dimensions"):
        random_direction(linear(parameters="bias"))
