"""The line between two models: equal to both at its ends, to the bit, and refused where there is none."""

from __future__ import annotations

import dataclasses

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_distopt.analysis import Interpolation, interpolate
from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from tests.analysis.linear import images, linear, numbers, same, small_net, state_of
from tests.oracles import landscape as oracle

QUIET = {"progress": False}


# ------------------------------------------------------------------------------------------------------------------ numbers
def test_line():
    f = linear()
    a, b = np.random.default_rng(1).normal(size=(2, 8))
    found = interpolate(f, torch.from_numpy(a), torch.from_numpy(b), points=5, margin=0.6, **QUIET)
    np.testing.assert_array_equal(found.positions, np.arange(-2, 7) / 4)
    expected = [oracle.loss(*numbers(), position * b + (1 - position) * a) for position in found.positions]
    np.testing.assert_allclose(found.curves()[0], expected, rtol=1e-10)
    assert found.distances[0] == pytest.approx(np.linalg.norm(b - a), rel=1e-12)
    # f is a parabola along the line, below its secant
    assert found.barriers().tolist() == [0.0]
    assert found.numbers() == pytest.approx(
        {"distance": found.distances[0], "loss_0": expected[2], "loss_1": expected[6], "barrier": 0}
    )


def test_barrier():
    positions = np.arange(-1, 6) / 4
    curve = np.array([9.0, 1.0, 2.0, 4.0, 3.0, 2.0, 8.0])  # above the line 1, 1.25, 1.5, 1.75, 2 by 2.5
    found = Interpolation(positions, np.array([[[curve, 0 * curve]]]), np.ones(2), [""], ["loss"])
    assert found.barriers().tolist() == [2.5, 0.0]
    assert found.numbers() == {"distance": 1.0, "loss_0": 0.5, "loss_1": 1.0, "barrier": 1.25}


@pytest.mark.parametrize("points", [2, 8, 21])
@pytest.mark.parametrize("margin", [0, 0.2])
@pytest.mark.parametrize("as_checkpoint", [False, True])
def test_the_ends_are_the_models_to_the_bit(points, margin, as_checkpoint):
    """The module is a third one; frozen parameters, buffers and tied parameters are those of each end."""
    ends = [small_net(1), small_net(2)]
    for k, end in enumerate(ends):
        end.frozen.weight.data += k
    states = [{"state_dict": end.state_dict()} if as_checkpoint else end.state_dict() for end in ends]
    train, test = images(small_net(3)), images(small_net(3), slice(0, 2))
    test.module = train.module
    found = interpolate({"train": train, "test": test}, *states, points=points, margin=margin, **QUIET)
    assert (found.data, found.metrics) == (["train", "test"], ["loss", "accuracy"])
    for position, end in enumerate(ends):
        at = found.positions.tolist().index(position)
        for data, part in (("train", slice(None)), ("test", slice(0, 2))):
            own = images(end, part).measure()
            assert {metric: found.curves(data, metric)[0, at] for metric in found.metrics} == own


def test_vectors_keep_the_buffers_of_the_module():
    net = small_net()
    f = images(net)
    a, b = f.vector(), f.vector() + 0.1
    found = interpolate(f, a, b, points=3, margin=0, **QUIET)
    assert found.curves()[0].tolist() == [f.loss(x) for x in (a, 0.5 * b + 0.5 * a, b)]
    mixed = interpolate(f, net.state_dict(), b, points=3, margin=0, **QUIET)
    same(mixed.values, found.values)


def test_several_lines_from_one_model():
    f = linear()
    rows = torch.from_numpy(np.random.default_rng(1).normal(size=(3, 8)))
    found = interpolate(f, rows.mean(dim=0), rows, points=3, **QUIET)
    for row, curve, distance in zip(rows, found.curves(), found.distances, strict=True):
        alone = interpolate(f, rows.mean(dim=0), row, points=3, **QUIET)
        same(curve, alone.curves()[0])
        assert distance == pytest.approx(float((row - rows.mean(dim=0)).norm()), rel=1e-12)
    same(interpolate(f, rows.mean(dim=0), list(rows), points=3, **QUIET).values, found.values)
    assert found.numbers()["loss_1"] == pytest.approx(np.mean([f.loss(row) for row in rows]))


def test_statistics_of_batch_norm():
    a, b = small_net(1), small_net(2)
    f = images(small_net(1))
    options = {"points": 3, "margin": 0, **QUIET}
    mixed, anew = (
        interpolate(f, a.state_dict(), b.state_dict(), batch_norm=policy, **options) for policy in ("interpolate", "reestimate")
    )
    middle = {key: 0.5 * a.state_dict()[key] + 0.5 * b.state_dict()[key] for key in a.state_dict()}
    middle["norm.num_batches_tracked"] = torch.tensor(1)
    half = small_net()
    half.load_state_dict(middle)
    assert mixed.curves()[0, 1] == pytest.approx(images(half).loss(), rel=1e-12)
    half = images(half)
    assert anew.curves()[0, 1] == pytest.approx(half.loss(half.vector(), batch_norm_statistics(half)), rel=1e-12)
    end = images(a)
    assert anew.curves()[0, 0] == pytest.approx(end.loss(end.vector(), batch_norm_statistics(end)), rel=1e-12)
    assert np.abs(mixed.curves() - anew.curves()).min() > 1e-4


def test_variances_do_not_become_negative():
    a, b = small_net(1), small_net(2)
    a.norm.running_var.fill_(1.0)
    b.norm.running_var.fill_(10.0)
    found = interpolate(images(a), a.state_dict(), b.state_dict(), points=6, margin=0.4, **QUIET)  # -0.2: 1 - 0.2 * 9 < 0
    assert np.isfinite(found.values).all()


# ------------------------------------------------------------------------------------------------------ ranks and the model
def on_ranks(rank, world_size, shard):
    part = slice(rank, None, world_size) if shard == "data" else slice(None)
    f = images(small_net(3), part, **({"reduce": dist.all_reduce} if world_size > 1 else {}))
    states = [small_net(k).state_dict() for k in (1, 2)]
    policies = ("interpolate", "reestimate")
    return [interpolate(f, *states, points=4, batch_norm=policy, shard=shard, **QUIET).values for policy in policies]


@pytest.mark.parametrize("world_size", [2, 4])
@pytest.mark.parametrize("shard", ["data", "points"])
def test_ranks(ranks, world_size, shard):
    alone = on_ranks(0, 1, "data")
    for values in ranks.run(world_size, on_ranks, shard):
        np.testing.assert_allclose(values, alone, rtol=1e-10)


def test_nothing_is_disturbed():
    net, ends = small_net().train(), [small_net(k).state_dict() for k in (1, 2)]
    copies = [{key: value.clone() for key, value in end.items()} for end in ends]
    before = state_of(net)
    for policy in ("interpolate", "reestimate"):
        interpolate(images(net), *ends, points=3, batch_norm=policy, **QUIET)
    same(state_of(net), before)
    same(ends, copies)


def test_it_works_in_inference_mode():
    a, b = (small_net(k).state_dict() for k in (1, 2))
    f = images(small_net())
    plain = interpolate(f, a, b, points=3, **QUIET).values
    with torch.inference_mode():
        same(interpolate(f, a, b, points=3, **QUIET).values, plain)
        interpolate(f, f.vector(), f.vector() + 1, points=3, batch_norm="reestimate", **QUIET)


def test_a_point_without_number_is_kept_and_drawn():
    f = linear()
    found = interpolate(f, f.vector(), torch.full((8,), 1e200, dtype=torch.float64), points=3, margin=0, **QUIET)
    assert np.isfinite(found.curves()[0]).tolist() == [True, False, False]
    found.figure().canvas.draw()
    assert np.isinf(found.numbers()["loss_1"])


# -------------------------------------------------------------------------------------------------------------------- files
def test_files_and_picture(tmp_path):
    f, g = images(small_net(1)), images(small_net(1), slice(0, 2))
    g.module = f.module
    found = interpolate(
        {"train": f, "test": g}, f.vector(), torch.stack([f.vector() + k for k in (0.1, 0.2)]), points=4, **QUIET
    )
    for kind in ("npz", "json"):
        np.testing.assert_equal(vars(Interpolation.load(found.save(tmp_path / f"line.{kind}"))), vars(found))
    loss, accuracy = found.figure().axes
    assert (loss.get_ylabel(), accuracy.get_ylabel()) == ("loss", "accuracy")
    assert [text.get_text() for text in loss.get_legend().get_texts()] == ["train", "test"]

    assert loss.get_title() == "mean of 2 lines, in a band from min to max"
    assert loss.get_xlabel() == "position (0: x_0, 1: x_1)"


def test_lines_with_names(tmp_path):
    f = images(small_net(1))
    x = f.vector()
    found = interpolate({"train": f, "test": f}, x, [x + 0.1, x + 0.2], points=3, **QUIET)
    named = dataclasses.replace(found, models=["large", "small", "other"])
    assert found.lines == [] and named.lines == ["small", "other"]
    for k, name in enumerate(named.lines):
        alone = interpolate({"train": f, "test": f}, x, x + 0.1 * (k + 1), points=3, **QUIET)
        numbers = {key.removeprefix(f"{name}/"): v for key, v in named.numbers().items() if key.startswith(f"{name}/")}
        assert numbers == alone.numbers() == named.line(name).numbers()
    assert len(named.numbers()) == 2 * len(found.numbers())
    loss = named.figure().axes[0]
    assert [t.get_text() for t in loss.get_legend().get_texts()] == [
        "small, train",
        "small, test",
        "other, train",
        "other, test",
    ]
    assert (loss.get_title(), loss.get_xlabel()) == ("", "position (0: large, 1: the others)")
    assert named.line("other").figure().axes[0].get_xlabel() == "position (0: large, 1: other)"
    for kind in ("npz", "json"):
        assert Interpolation.load(named.save(tmp_path / f"lines.{kind}")).numbers() == named.numbers()


def test_models_are_read_from_files(tmp_path):
    nets = [small_net(k) for k in (1, 2)]
    torch.save(nets[0].state_dict(), tmp_path / "a.pt")
    torch.save({"state_dict": nets[1].state_dict()}, tmp_path / "b.ckpt")
    f = images(small_net(3))
    expected = interpolate(f, *(net.state_dict() for net in nets), points=3, **QUIET)
    for b in (tmp_path / "b.ckpt", [str(tmp_path / "b.ckpt")]):
        np.testing.assert_array_equal(interpolate(f, tmp_path / "a.pt", b, points=3, **QUIET).values, expected.values)
    with pytest.raises(ValueError, match=r"There is no checkpoint '.*c\.ckpt'"):
        interpolate(f, tmp_path / "c.ckpt", f.vector(), **QUIET)
    with pytest.raises(ValueError, match="`x_0` must be a vector, a state dict, a checkpoint or the path of one; got int"):
        interpolate(f, 3, f.vector(), **QUIET)


# ------------------------------------------------------------------------------------------------------------------ refusal
class Other(nn.Module):
    def __init__(self, **layers):
        super().__init__()
        vars(self)["_modules"].update(layers)


def test_another_architecture():
    """One sentence, with the first mismatch in the order of the module."""
    net = small_net()
    f, state = images(net), net.state_dict()
    start = "The architecture of `x_1` is another one: "
    without = {key: value for key, value in state.items() if not key.startswith("tied")}
    wide = {**state, "hidden.weight": torch.zeros(40, 36), "head.weight": torch.zeros(3, 40)}
    for other, sentence in (
        (without, "'tied.weight' is missing there and of shape [36, 36] in the module."),
        (wide, "'hidden.weight' is of shape [40, 36] there and of shape [36, 36] in the module."),
        ({**state, "extra.bias": torch.zeros(2)}, "'extra.bias' is of shape [2] there and missing in the module."),
        (
            Other(conv=nn.Linear(1, 1)).state_dict(),
            "'conv.weight' is of shape [1, 1] there and of shape [4, 1, 3, 3] in the module.",
        ),
        ({"state_dict": without}, "'tied.weight' is missing there"),
    ):
        with pytest.raises(ValueError) as caught:
            interpolate(f, state, other, **QUIET)
        assert start + sentence in str(caught.value)
    with pytest.raises(ValueError, match=r"The vector of `x_1\[1\]` must have the shape"):
        interpolate(f, state, [state, torch.zeros(3)], **QUIET)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"points": 1}, "`points` must be a whole number, at least 2; got 1."),
        ({"points": 2.5}, "got 2.5."),
        ({"margin": "wide"}, "`margin` must be a number that is not negative; got 'wide'."),
        ({"margin": -0.1}, "`margin` must be a number that is not negative; got -0.1."),
        ({"batch_norm": "keep"}, "`batch_norm` must be one of 'reestimate', 'interpolate'; got 'keep'."),
        ({"shard": "lines"}, "`shard` must be one of 'data', 'points'; got 'lines'."),
        ({"x_1": []}, "There is no model `x_1` to go to."),
    ],
)
def test_options(options, sentence):
    with pytest.raises(ValueError) as caught:
        interpolate(**{"objective": linear(), "x_0": torch.zeros(8), "x_1": torch.ones(8), **QUIET, **options})
    assert sentence in str(caught.value)
