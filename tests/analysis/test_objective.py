from __future__ import annotations

from itertools import count
from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn

from lightning_distopt.analysis import CurvatureOperator, Objective, gradient_noise, landscape_1d
from lightning_distopt.analysis.points import read_point
from tests.analysis.matrices import Sequence, classified, conv, entropy, perceptron


def all_at_once(f: Objective) -> tuple[torch.Tensor, torch.Tensor]:
    x, y = (torch.cat(parts) for parts in zip(*f.batches, strict=True))
    loss = entropy(f.module.eval(), (x, y))
    return loss.detach(), torch.cat([g.reshape(-1) for g in torch.autograd.grad(loss, list(f.parameters.values()))])


@pytest.mark.parametrize(("net", "shape"), [(perceptron, (4,)), (conv, (1, 4, 4)), (Sequence, (3, 2))])
def test_loss_and_gradient_at_any_point(net: Any, shape: tuple[int, ...]) -> None:
    f = classified(net(), shape)
    step = 0.1 * torch.randn(f.dim).double()
    with torch.no_grad():
        moved = classified(net(), shape)
        moved.module.load_state_dict(f.module.state_dict())
        torch.nn.utils.vector_to_parameters(f.vector() + step, list(moved.parameters.values()))
    for objective, at in ((f, None), (moved, None), (moved, f.vector() + step)):
        expected = all_at_once(objective)
        loss, gradient = (f if objective is moved and at is not None else objective).loss_and_gradient(at)
        assert loss == pytest.approx(expected[0].item(), rel=1e-13)
        torch.testing.assert_close(gradient, expected[1], rtol=0, atol=1e-14)
    with torch.inference_mode():
        loss, gradient = f.loss_and_gradient(f.vector() + step)
        f.loss_and_gradient(f.vector() - 0.1 * gradient)
    torch.testing.assert_close(gradient.clone(), expected[1], rtol=0, atol=1e-14)


def test_a_part_made_inside_a_session_disturbs_nothing() -> None:
    f = classified(conv(), (1, 4, 4), mode="train", check=False)
    with f.session():
        part = f.restricted("0.*")
    before = f.module[1].running_mean.clone()
    part.loss()
    assert f.module[1].running_mean.equal(before)


def test_empty_batches_count_for_nothing() -> None:
    f = classified(perceptron(), (4,))
    nothing = torch.empty(0, 4).double(), torch.empty(0, dtype=torch.long)
    again = Objective(f.module, entropy, [nothing, *f.batches, nothing])
    assert again.loss() == f.loss() and len(again.batches) == 3


def squared(net: nn.Module, batch: Any) -> torch.Tensor:
    return (net(batch[0]) - batch[1]).square().mean()


def test_sums_over_many_batches_in_half_precision() -> None:
    torch.manual_seed(0)
    net, batch = nn.Linear(1, 1).bfloat16(), (torch.randn(4, 1).bfloat16(), torch.randn(4, 1).bfloat16())
    one, many = (Objective(net, squared, [batch] * count) for count in (1, 1000))
    v = torch.tensor([0.5, 2.0]).bfloat16()
    assert many.loss_and_gradient()[0] == pytest.approx(many.loss(), rel=1e-6)
    torch.testing.assert_close(many.gradient(), one.gradient(), rtol=1e-6, atol=0)
    torch.testing.assert_close(CurvatureOperator(many).matvec(v), CurvatureOperator(one).matvec(v), rtol=1e-6, atol=0)
    large = Objective(nn.Linear(1, 1).half(), lambda net, x: 2 + 0 * net(x).mean(), [torch.ones(64, 1).half()] * 600)
    loss, gradient = large.loss_and_gradient()
    assert loss == large.loss() == 2 and gradient.tolist() == [0, 0]


class Mixed(nn.Module):
    """Two layers whose numbers are not the same."""

    def __init__(self, first: torch.dtype, last: torch.dtype) -> None:
        super().__init__()
        self.first, self.last = nn.Linear(2, 3, dtype=first), nn.Linear(3, 1, dtype=last)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return self.last(self.first(x.to(self.first.weight.dtype)).to(self.last.weight.dtype).tanh())


@pytest.mark.parametrize("dtypes", [(torch.bfloat16, torch.float32), (torch.float32, torch.float64)])
def test_parameters_of_two_dtypes(dtypes: Any) -> None:
    torch.manual_seed(0)
    f = Objective(Mixed(*dtypes), squared, [(torch.randn(5, 2), torch.randn(5, 1).to(dtypes[1]))] * 2)
    assert f.dtype == dtypes[1]
    w = f.vector()
    assert f.loss(w) == f.loss()
    torch.testing.assert_close(f.gradient(w), f.gradient(), rtol=0, atol=0)
    for name, value in f.tensors(w).items():
        assert value.equal(f.parameters[name]) and value.dtype == f.parameters[name].dtype
    product = CurvatureOperator(f).matvec(torch.ones(f.dim, dtype=f.dtype))
    assert product.isfinite().all() and bool(product[:6].any())
    assert landscape_1d(f, directions=1, points=3, progress=False).curves()[0, 1] == f.loss()
    assert gradient_noise(f, w).gradient_norm == pytest.approx(float(f.gradient().norm()), rel=1e-6)
    read = read_point(f, f.module.state_dict())
    assert read.vector.equal(w)


def test_a_metric_that_is_called_as_the_loss() -> None:
    f = classified(perceptron(), (4,), metrics=lambda net, batch: {"loss": torch.zeros(())})
    with pytest.raises(ValueError, match="`metrics` returns 'loss', which is the name of what `loss_fn` returns"):
        f.measure()
    assert f.loss() > 0


def counted() -> Any:
    calls = count()
    return lambda net, batch: entropy(net, batch) * (1 + next(calls))


@pytest.mark.parametrize(
    ("loss", "options", "sentence"),
    [
        (lambda net, b: net(b[0]).sum(1), {}, r"tensor with one element; got a tensor of shape \[3\]"),
        (lambda net, b: 1.0, {}, "tensor with one element; got a float"),
        (lambda net, b: entropy(net, b) * float("nan"), {}, "The loss is nan"),
        (lambda net, b: entropy(net, b) * torch.rand(()), {}, "something in the module is random"),
        (counted(), {}, "The same batch has the loss"),
        (entropy, {"batches": []}, "the data is empty"),
        (entropy, {"batches": [3]}, "pass `size_of"),
        (entropy, {"mode": "test"}, "`mode` must be"),
        (entropy, {"parameters": "3.*"}, "matches none of the trainable ones"),
        (entropy, {"parameters": lambda name, p: False}, "chooses none"),
    ],
)
def test_bad_input(loss: Any, options: dict[str, Any], sentence: str) -> None:
    f = classified(perceptron(), (4,))
    with pytest.raises(ValueError, match=sentence) as caught:
        Objective(f.module, loss, **{"batches": f.batches, **options})
    assert len(str(caught.value).splitlines()) == 1


def test_a_random_loss_may_be_kept_to_one_draw() -> None:
    f = classified(nn.Sequential(nn.Dropout(0.5), nn.Linear(4, 3)), (4,), mode="train", check=False)
    assert f.loss() == f.loss() == f.loss(f.vector())


def test_frozen_modules_are_refused() -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        classified(perceptron().requires_grad_(False), (4,))


def scores(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
    hits = (net(batch[0]).argmax(1) == batch[1]).double()
    return {"accuracy": hits.mean(), "größe": batch[0].square().mean()}


@pytest.mark.parametrize("world", [2, 4])  # the fourth rank has no batch
def test_ranks(ranks: Any, world: int) -> None:
    torch.manual_seed(1)
    f = classified(perceptron(), (4,), metrics=scores)

    def measured(rank: int, world_size: int) -> Any:
        mine = Objective(f.module, entropy, f.batches[rank::world_size], metrics=scores, reduce=dist.all_reduce)
        return mine.measure(), mine.measure(f.vector() + 0.1), mine.gradient()

    expected = f.measure(), f.measure(f.vector() + 0.1), f.gradient()
    for here, there, gradient in ranks.run(world, measured):
        assert here == pytest.approx(expected[0], rel=1e-12) and there == pytest.approx(expected[1], rel=1e-12)
        torch.testing.assert_close(gradient, expected[2], rtol=0, atol=1e-14)


@pytest.mark.parametrize("what", ["size", "shape", "nan", "loss", "gradient", "metrics", "names", "longer names"])
def test_an_error_on_one_rank_ends_all(ranks: Any, what: str) -> None:
    net = perceptron().double()
    batch = classified(net, (4,)).batches[0]

    def wrong(rank: int, world_size: int) -> str:
        checked: list[int] = []

        def loss(net: nn.Module, batch: Any) -> torch.Tensor:
            value = entropy(net, batch)
            if rank == 1 and what == "shape":
                return value.expand(2)
            if rank == 1 and what == "nan":
                return value * float("nan")
            if rank == 1 and checked:
                raise KeyError(what)
            return value

        def metrics(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
            if rank == 1 and what == "metrics":
                raise KeyError(what)
            name = {"names": rank, "longer names": 1000 * rank}.get(what, 0)
            return {f"of rank {name}": torch.ones(())}

        with pytest.raises((ValueError, KeyError)) as caught:
            mine = [3] if rank == 1 and what == "size" else [batch]
            f = Objective(net, loss, mine, metrics=metrics, reduce=dist.all_reduce)
            if what in ("loss", "gradient"):
                checked.append(1)
            f.gradient() if what == "gradient" else f.measure()
        return str(caught.value)

    other, own = ranks.run(2, wrong)
    if what in ("names", "longer names"):
        assert "must measure the same" in own + other
    else:
        assert other == "Another rank can't measure its part of the data; its own error says why." != own


def test_an_error_on_all_ranks_is_each_ones_own(ranks: Any) -> None:
    net = perceptron().double()
    batch = classified(net, (4,)).batches[0]

    def wrong(rank: int, world_size: int) -> str:
        def metrics(net: nn.Module, batch: Any) -> dict[str, torch.Tensor]:
            raise KeyError(f"rank {rank}")

        f = Objective(net, entropy, [batch], metrics=metrics, reduce=dist.all_reduce)
        with pytest.raises(KeyError) as caught:
            f.measure()
        return str(caught.value)

    assert ranks.run(2, wrong) == ["'rank 0'", "'rank 1'"]


def test_vectors() -> None:
    f = classified(conv().to(memory_format=torch.channels_last), (1, 4, 4))
    w = f.vector()
    assert w.data_ptr() != next(iter(f.parameters.values())).data_ptr() and len(w) == f.dim
    for name, tensor in f.tensors(w).items():
        assert tensor.equal(f.parameters[name])
    np.testing.assert_array_equal(f.flatten(list(f.tensors(w).values())), w)
    assert f.flatten([None] * len(f.parameters)).equal(torch.zeros(f.dim).double())
