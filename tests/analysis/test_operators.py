from __future__ import annotations

from typing import Any

import numpy as np
import pytest
import torch
import torch.distributed as dist
from torch import nn
from torch.autograd.function import once_differentiable

from lightning_distopt.analysis import CurvatureOperator, Objective
from tests.analysis.matrices import Fused, Sequence, classified, conv, dense, entropy, matrix_of, perceptron
from tests.oracles import curvature


def data(size: int = 11, d: int = 4) -> tuple[torch.Tensor, torch.Tensor]:
    generator = torch.Generator().manual_seed(2)
    return torch.randn(size, d, generator=generator).double(), torch.randint(0, 3, (size,), generator=generator)


def batches(x: torch.Tensor, y: torch.Tensor, size: int = 4) -> list[Any]:
    return list(zip(x.split(size), y.split(size), strict=True))


@pytest.mark.parametrize("keep_graph", [False, True])
def test_linear_regression(keep_graph: bool) -> None:
    x, _ = data()
    y = torch.randn(11, 1).double()
    f = Objective(nn.Linear(4, 1, bias=False).double(), lambda net, b: (net(b[0]) - b[1]).square().mean() / 2, batches(x, y))
    H = matrix_of(CurvatureOperator(f, keep_graph=keep_graph))
    np.testing.assert_allclose(H, curvature.linear(x.numpy()), rtol=0, atol=1e-12)


def test_logistic_regression() -> None:
    x, labels = data()
    y = 2.0 * (labels > 0) - 1
    net = nn.Linear(4, 1, bias=False).double()
    f = Objective(net, lambda net, b: nn.functional.softplus(-b[1] * net(b[0])[:, 0]).mean(), batches(x, y))
    g, H = curvature.logistic(x.numpy(), y.numpy(), net.weight.detach().numpy()[0])
    np.testing.assert_allclose(f.gradient().numpy(), g, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix_of(CurvatureOperator(f)), H, rtol=0, atol=1e-12)


@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])  # the same for a linear network
def test_softmax_regression(kind: Any) -> None:
    x, y = data()
    net = nn.Linear(4, 3).double()
    f = Objective(net, entropy, batches(x, y))
    g, H = curvature.softmax(x.numpy(), y.numpy(), net.weight.detach().numpy(), net.bias.detach().numpy())
    np.testing.assert_allclose(f.gradient().numpy(), g, rtol=0, atol=1e-12)
    np.testing.assert_allclose(matrix_of(CurvatureOperator(f, kind)), H, rtol=0, atol=1e-12)
    finite = CurvatureOperator(f, derivatives="finite_differences")
    np.testing.assert_allclose(matrix_of(finite), H, rtol=0, atol=1e-8)


@pytest.mark.parametrize(
    ("net", "shape"), [(perceptron, (4,)), (conv, (1, 4, 4)), (Sequence, (3, 2)), (Fused, (3, 2))], ids=lambda x: str(x)[:12]
)
def test_networks(net: Any, shape: tuple[int, ...]) -> None:
    f = classified(net(), shape)
    expected = dense(f)
    np.testing.assert_allclose(matrix_of(CurvatureOperator(f)), expected, rtol=0, atol=1e-12)
    finite = CurvatureOperator(f, derivatives="finite_differences")
    v = torch.randn(f.dim).double()
    np.testing.assert_allclose(finite.matvec(v).numpy(), expected @ v.numpy(), rtol=0, atol=1e-7)


def test_batch_norm_of_each_batch() -> None:
    f = classified(conv(), (1, 4, 4), mode="train")
    assert np.abs(dense(f) - dense(classified(f.module, (1, 4, 4)))).max() > 1e-3
    for keep_graph in (False, True):
        np.testing.assert_allclose(matrix_of(CurvatureOperator(f, keep_graph=keep_graph)), dense(f), rtol=0, atol=1e-12)


def test_gauss_newton() -> None:
    net = perceptron().double()
    f = classified(net, (4,))
    x, y = (torch.cat(parts) for parts in zip(*f.batches, strict=True))

    def outputs(vector: torch.Tensor) -> torch.Tensor:
        return torch.func.functional_call(net, f.tensors(vector), (x,))

    J = torch.autograd.functional.jacobian(outputs, f.vector())
    z = net(x).detach()
    G = torch.zeros(f.dim, f.dim).double()
    for i in range(len(x)):
        curved = torch.autograd.functional.hessian(lambda z, i=i: nn.functional.cross_entropy(z, y[i]), z[i])
        G += J[i].T @ curved @ J[i] / len(x)
    for keep_graph in (False, True):
        found = matrix_of(CurvatureOperator(f, "gauss_newton", keep_graph=keep_graph))
        np.testing.assert_allclose(found, G.numpy(), rtol=0, atol=1e-12)
    assert np.linalg.eigvalsh(found).min() > -1e-12

    class Wrapped(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.model = net

    inner = Objective(Wrapped(), lambda module, b: entropy(module.model, b), f.batches)
    np.testing.assert_allclose(matrix_of(CurvatureOperator(inner, "gauss_newton", outputs="model")), G.numpy(), atol=1e-12)
    with pytest.raises(ValueError, match="Name it by `outputs`"):
        CurvatureOperator(inner, "gauss_newton").matvec(torch.ones(f.dim))


@pytest.mark.filterwarnings("ignore")
def test_equals_curvlinops() -> None:
    curvlinops = pytest.importorskip("curvlinops")
    f = classified(perceptron(), (4,))
    net, loss = f.module, nn.CrossEntropyLoss()
    v = torch.randn(f.dim).double()
    for kind, theirs in (("hessian", curvlinops.HessianLinearOperator), ("gauss_newton", curvlinops.GGNLinearOperator)):
        try:
            reference = theirs(net, loss, dict(net.named_parameters()), f.batches)
        except Exception:  # before version 3: a list
            reference = theirs(net, loss, list(net.parameters()), f.batches)
        np.testing.assert_allclose(CurvatureOperator(f, kind).matvec(v).numpy(), (reference @ v).detach().numpy(), atol=1e-12)


def test_some_parameters() -> None:
    f = classified(perceptron(), (4,))
    whole = matrix_of(CurvatureOperator(f))
    last = f.restricted("2.*")
    assert list(last.parameters) == ["2.weight", "2.bias"]
    np.testing.assert_allclose(matrix_of(CurvatureOperator(last)), whole[25:, 25:], rtol=0, atol=1e-13)
    same = classified(f.module, (4,), parameters=lambda name, p: p.dim() == 2)
    keep = np.r_[0:20, 25:40]
    np.testing.assert_allclose(matrix_of(CurvatureOperator(same)), whole[np.ix_(keep, keep)], rtol=0, atol=1e-13)


def test_frozen_unused_and_tied_parameters() -> None:
    class Net(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.first, self.second, self.unused = nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(2, 2)
            self.second.weight = self.first.weight
            self.first.bias.requires_grad_(False)

        def forward(self, x: torch.Tensor) -> torch.Tensor:
            return self.second(torch.tanh(self.first(x)))

    f = classified(Net(), (3,))
    assert list(f.parameters) == ["first.weight", "second.bias", "unused.weight", "unused.bias"]
    H = dense(f)
    assert np.abs(H).max() > 0.01
    for options in ({}, {"kind": "gauss_newton"}):
        found = matrix_of(CurvatureOperator(f, **options))
        assert np.abs(found[12:]).max() == np.abs(found[:, 12:]).max() == 0
    np.testing.assert_allclose(matrix_of(CurvatureOperator(f)), H, rtol=0, atol=1e-13)
    finite = matrix_of(CurvatureOperator(f, derivatives="finite_differences"))
    np.testing.assert_allclose(finite, H, rtol=0, atol=1e-7)


def test_kept_graphs_stay_valid() -> None:
    f = classified(conv(), (1, 4, 4))
    operator, v = CurvatureOperator(f, keep_graph=True), torch.randn(f.dim).double()
    calls: list[int] = []
    f.module.register_forward_hook(lambda *args: calls.append(1))
    before = operator.matvec(v)
    f.loss_and_gradient()
    with f.session():
        f.module.train()
        f.module(torch.randn(5, 1, 4, 4).double())
    calls.clear()
    assert operator.matvec(v).equal(before)
    assert not calls
    operator.release()
    operator.matvec(v)
    assert len(calls) == 3


def test_products_inside_inference_mode() -> None:
    f = classified(perceptron(), (4,))
    v = torch.randn(f.dim).double()
    for options in ({}, {"kind": "gauss_newton"}, {"derivatives": "finite_differences"}):
        expected = CurvatureOperator(f, **options).matvec(v)
        with torch.inference_mode():
            inner = classified(f.module, (4,))
            found = CurvatureOperator(inner, **options).matvec(v.clone())
        torch.testing.assert_close(found.clone(), expected, rtol=0, atol=1e-15)


class _Once(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: torch.Tensor) -> torch.Tensor:
        ctx.save_for_backward(x)
        return x**3

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, gradient: torch.Tensor) -> torch.Tensor:
        return 3 * ctx.saved_tensors[0] ** 2 * gradient


class _Cubes(nn.Module):
    def __init__(self, once: bool) -> None:
        super().__init__()
        self.first, self.last, self.once = nn.Linear(4, 3), nn.Linear(3, 3), once

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        h = self.first(x)
        return self.last(_Once.apply(h) if self.once else h**3)


@pytest.mark.parametrize("place", ["inside", "last"])
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_no_second_derivative(place: str, kind: Any) -> None:
    torch.manual_seed(1)
    cubed = classified(_Cubes(once=False), (4,))
    once = classified(_Cubes(once=True), (4,), check=False)
    once.module.load_state_dict(cubed.module.state_dict())
    if place == "last":
        cubed = Objective(cubed.module, lambda net, b: entropy(net, b) ** 3, cubed.batches)
        once = Objective(cubed.module, lambda net, b: _Once.apply(entropy(net, b)), cubed.batches)
    v = torch.randn(cubed.dim).double()
    with pytest.raises(ValueError, match="no second derivative in some layer: use `derivatives='finite_differences'`"):
        CurvatureOperator(once, kind).matvec(v)
    found = CurvatureOperator(once, derivatives="finite_differences").matvec(v)
    torch.testing.assert_close(found, CurvatureOperator(cubed).matvec(v), rtol=0, atol=1e-6)


def test_not_finite() -> None:
    net = nn.Linear(1, 1, bias=False).double()
    nn.init.zeros_(net.weight)
    f = Objective(net, lambda net, x: net(x).abs().pow(1.5).mean(), [torch.ones(2, 1).double()])
    with pytest.raises(ValueError, match="not finite"):
        CurvatureOperator(f).matvec(torch.ones(1))


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"kind": "fisher"}, "`kind` must be"),
        ({"derivatives": "none"}, "`derivatives` must be"),
        ({"derivatives": "finite_differences", "keep_graph": True}, "no graph to keep"),
        ({"derivatives": "finite_differences", "kind": "gauss_newton"}, "products with the Hessian only"),
        ({"outputs": "modle"}, "which there is not"),
    ],
)
def test_options_that_make_no_sense(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=sentence):
        CurvatureOperator(classified(perceptron(), (4,)), **options)


@pytest.mark.parametrize("world", [2, 4])  # the fourth rank has no batch
@pytest.mark.parametrize("kind", ["hessian", "gauss_newton"])
def test_ranks(ranks: Any, world: int, kind: Any) -> None:
    torch.manual_seed(1)
    net = perceptron()
    f = classified(net, (4,))
    v = torch.randn(f.dim).double()

    def products(rank: int, world_size: int) -> torch.Tensor:
        mine = Objective(net, entropy, f.batches[rank::world_size], reduce=dist.all_reduce)
        assert mine.samples == 7
        return CurvatureOperator(mine, kind, keep_graph=rank == 0).matvec(v)

    expected = CurvatureOperator(f, kind).matvec(v)
    for found in ranks.run(world, products):
        torch.testing.assert_close(found, expected, rtol=0, atol=1e-12)


def test_an_error_on_one_rank_ends_all(ranks: Any) -> None:
    net = perceptron()
    f = classified(net, (4,))

    def wrong(rank: int, world_size: int) -> str:
        calls = []

        def loss(net: nn.Module, batch: Any) -> torch.Tensor:
            calls.append(1)
            if rank == 1 and len(calls) > 2:  # not when it is checked
                raise IndexError("the 7th token")
            return entropy(net, batch)

        operator = CurvatureOperator(Objective(net, loss, f.batches[rank::world_size], reduce=dist.all_reduce))
        with pytest.raises((ValueError, IndexError)) as caught:
            operator.matvec(torch.ones(f.dim))
        return str(caught.value)

    assert ranks.run(2, wrong) == ["Another rank can't measure its part of the data; its own error says why.", "the 7th token"]
