"""Sharpness: equal to what quadratics have in closed form, and safe where the loss overflows."""

from __future__ import annotations

import sys

import numpy as np
import pytest
import torch
import torch.distributed as dist

from lightning_distopt.analysis import (
    Objective,
    Sharpness,
    average_sharpness,
    gaussian_direction,
    keskar_sharpness,
    random_direction,
    worst_case_sharpness,
)
from lightning_distopt.communication.rng import derive_seed
from tests.analysis.linear import images, linear, numbers, same, small_net, state_of
from tests.oracles import landscape as oracle

QUIET = {"progress": False}


def point(f):
    return (*numbers(), f.vector().numpy())


# ------------------------------------------------------------------------------------------------------------------ average
@pytest.mark.parametrize("noise", ["filter", "gaussian"])
def test_average_is_that_of_the_noise(noise):
    f = linear()
    a, y, x = point(f)
    found = average_sharpness(f, 0.3, samples=5, noise=noise, seed=2, **QUIET)
    rises = []
    for k in range(5):
        d = random_direction(f, 2, k) if noise == "filter" else gaussian_direction(f, 2, k) / np.sqrt(8)
        rises.append(oracle.loss(a, y, x + 0.3 * d.numpy()) - oracle.loss(a, y, x))
    np.testing.assert_allclose(found.rises, rises, rtol=1e-10)
    assert found.value == pytest.approx(np.mean(rises), rel=1e-10)
    assert found.standard_error == pytest.approx(np.sqrt(np.var(rises) * 5 / 4 / 5), rel=1e-10)
    assert found.loss == f.loss()
    assert found.numbers() == {"average": found.value, "average_error": found.standard_error}


def test_average_comes_to_the_expectation():
    f = linear()
    a, y, x = point(f)
    gaussian = average_sharpness(f, 0.3, samples=400, noise="gaussian", **QUIET)
    expected = 0.3**2 / 2 * np.trace(a.T @ a / len(y)) / 8
    assert abs(gaussian.value - expected) < 3 * gaussian.standard_error < 0.6 * expected
    filters = average_sharpness(f, 0.3, samples=400, **QUIET)
    expected = oracle.average_under_filter_noise(a, y, x, [[0, 1, 2], [3, 4, 5]], 0.3)
    assert abs(filters.value - expected) < 3 * filters.standard_error < 0.6 * expected


# --------------------------------------------------------------------------------------------------------------- worst case
@pytest.mark.parametrize("radius", [0.05, 2.0])
def test_one_step_is_that_of_sam(radius):
    f = linear()
    found = worst_case_sharpness(f, radius, **QUIET)
    assert found.value == pytest.approx(oracle.sam(*point(f), radius), rel=1e-10)
    assert found.numbers() == {"worst_case": found.value}


@pytest.mark.parametrize("radius", [0.05, 0.5, 5.0])
def test_many_steps_come_to_the_largest_rise_in_the_ball(radius):
    f = linear()
    exact = oracle.trust_region(*point(f), radius)
    found = worst_case_sharpness(f, radius, steps=150, **QUIET)
    assert found.value == pytest.approx(exact, rel=1e-8)
    assert (np.diff(found.rises) >= 0).all()
    assert found.rises[0] < (1 - 1e-5) * exact


def test_at_a_minimum_it_is_the_largest_eigenvalue():
    f = linear()
    a, y = numbers()
    f.module.weight.data.zero_()
    f.module.bias.data.zero_()
    f.batches = [(x, 0 * target) for x, target in f.batches]
    assert not f.gradient().any()
    found = worst_case_sharpness(f, 0.2, steps=150, **QUIET)
    assert found.value == pytest.approx(0.2**2 / 2 * np.linalg.eigvalsh(a.T @ a / len(y))[-1], rel=1e-9)


# ----------------------------------------------------------------------------------------------------------------- keskar's
@pytest.mark.parametrize("optimizer", ["ascent", "l-bfgs-b"])
@pytest.mark.parametrize("epsilon", [1e-3, 0.3])
def test_keskar_in_the_whole_space(optimizer, epsilon):
    f = linear()
    found = keskar_sharpness(f, epsilon, optimizer=optimizer, **QUIET)
    assert found.value == pytest.approx(oracle.keskar(*point(f), epsilon), rel=1e-10)
    assert found.numbers() == {"keskar": found.value}


@pytest.mark.parametrize("optimizer", ["ascent", "l-bfgs-b"])
@pytest.mark.parametrize("subspace", [1, 3, 8])
def test_keskar_in_a_subspace(optimizer, subspace):
    f = linear()
    A = np.stack([gaussian_direction(f, derive_seed(6, "subspace"), k).numpy() for k in range(subspace)], axis=1)
    found = keskar_sharpness(f, 1e-3, subspace, seed=6, optimizer=optimizer, **QUIET)
    assert found.value == pytest.approx(oracle.keskar(*point(f), 1e-3, A), rel=1e-9)


@pytest.mark.parametrize("optimizer", ["ascent", "l-bfgs-b"])
def test_keskar_stays_in_the_box(optimizer):
    net = small_net()
    f = images(net)
    x, seen = f.vector(), []

    def noted(at):
        seen.append(at)
        return type(f).loss_and_gradient(f, at)

    f.loss_and_gradient = noted
    found = keskar_sharpness(f, 0.01, optimizer=optimizer, **QUIET)
    assert all(((at - x).abs() <= 0.01 * (x.abs() + 1) * (1 + 1e-12)).all() for at in seen)
    assert len(found.rises) == len(seen)
    assert found.rises[0] == 0
    assert found.value == pytest.approx(100 * found.rises[-1] / (1 + f.loss()), rel=1e-12)
    assert found.value > 2


# -------------------------------------------------------------------------------------------------------------------- all
def measure_all(rank, world_size):
    f = images(small_net(), slice(rank, None, world_size), **({"reduce": dist.all_reduce} if world_size > 1 else {}))
    found = [average_sharpness(f, samples=3, **QUIET), worst_case_sharpness(f, steps=3, **QUIET)]
    found += [keskar_sharpness(f, subspace=5, optimizer=optimizer, steps=3, **QUIET) for optimizer in ("ascent", "l-bfgs-b")]
    return [result.value for result in found]


@pytest.mark.parametrize("world_size", [2, 4])
def test_ranks(ranks, world_size):
    alone = measure_all(0, 1)
    first, *others = ranks.run(world_size, measure_all)
    np.testing.assert_allclose(first, alone, rtol=1e-10)
    assert all(values == first for values in others)


def test_nothing_is_disturbed():
    net = small_net().train()
    for p in net.parameters():
        p.grad = torch.ones_like(p)
    before, f = state_of(net), images(net)
    measure = [average_sharpness, worst_case_sharpness, keskar_sharpness]
    plain = [function(f, **QUIET).value for function in measure]
    with torch.inference_mode():
        assert [function(f, **QUIET).value for function in measure] == plain
    same(state_of(net), before)


def test_overflow_is_an_infinite_rise():
    f = linear()
    f.batches = [(1e100 * x, y) for x, y in f.batches]
    assert worst_case_sharpness(f, 1e60, steps=3, **QUIET).value == np.inf
    assert average_sharpness(f, 1e60, samples=2, **QUIET).value == np.inf
    f.batches = [(1e-50 * x, y) for x, y in f.batches]
    for optimizer in ("ascent", "l-bfgs-b"):
        assert keskar_sharpness(f, 1e120, optimizer=optimizer, **QUIET).value == np.inf


def test_where_the_gradient_is_zero_random_corners_show_the_rise():
    net = torch.nn.Linear(3, 1, bias=False).double()
    f = Objective(net, lambda net, x: net.weight.square().sum(), [torch.zeros(1)])  # |w|^2
    net.weight.data.zero_()
    for optimizer in ("ascent", "l-bfgs-b"):
        assert keskar_sharpness(f, 0.5, optimizer=optimizer, **QUIET).value == pytest.approx(75, rel=1e-12)  # 3 * 0.5^2
    assert keskar_sharpness(f, 0.5, subspace=2, **QUIET).value > 0


def test_sharpness_in_half_precision():
    net = torch.nn.Linear(3, 1, bias=False).bfloat16()
    f = Objective(net, lambda net, x: net(x).square().mean(), [torch.ones(2, 3).bfloat16()] * 3)
    assert worst_case_sharpness(f, 0.5, **QUIET).value > 0
    assert keskar_sharpness(f, 0.5, subspace=2, **QUIET).value > 0


def test_without_scipy(monkeypatch):
    monkeypatch.setitem(sys.modules, "scipy.optimize", None)
    with pytest.raises(ModuleNotFoundError, match=r"L-BFGS-B needs SciPy: pip install 'lightning-distopt\[hessian\]'"):
        keskar_sharpness(linear(), optimizer="l-bfgs-b", **QUIET)


def test_files_and_picture(tmp_path):
    f = linear()
    for found in (average_sharpness(f, **QUIET), worst_case_sharpness(f, steps=4, **QUIET), keskar_sharpness(f, **QUIET)):
        np.testing.assert_equal(vars(Sharpness.load(found.save(tmp_path / "sharp.npz"))), vars(found))
        drawn = found.figure().axes[0].lines[0].get_ydata()
        assert sorted(drawn) == sorted(found.rises)


@pytest.mark.parametrize(
    ("function", "options", "sentence"),
    [
        (average_sharpness, {"radius": 0}, "`radius` must be a number above 0; got 0."),
        (average_sharpness, {"samples": 1}, "`samples` must be a whole number, at least 2; got 1."),
        (average_sharpness, {"samples": 2.5}, "`samples` must be a whole number, at least 2; got 2.5."),
        (average_sharpness, {"radius": "x"}, "`radius` must be a number above 0; got 'x'."),
        (average_sharpness, {"noise": "uniform"}, "`noise` must be one of 'filter', 'gaussian'; got 'uniform'."),
        (worst_case_sharpness, {"radius": float("nan")}, "got nan."),
        (worst_case_sharpness, {"steps": 0}, "`steps` must be a whole number, at least 1; got 0."),
        (keskar_sharpness, {"epsilon": -1e-3}, "`epsilon` must be a number above 0; got -0.001."),
        (keskar_sharpness, {"optimizer": "adam"}, "`optimizer` must be one of 'ascent', 'l-bfgs-b'; got 'adam'."),
        (keskar_sharpness, {"subspace": 9}, "`subspace` must have from 1 to 8 dimensions, those of the parameters; got 9."),
        (keskar_sharpness, {"steps": 0}, "`steps` must be a whole number, at least 1; got 0."),
    ],
)
def test_options(function, options, sentence):
    with pytest.raises(ValueError) as caught:
        function(linear(), **QUIET, **options)
    assert sentence in str(caught.value)
