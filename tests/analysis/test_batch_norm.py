from __future__ import annotations

from typing import Any

import pytest
import torch
import torch.distributed as dist

from lightning_distopt.analysis import Objective, interpolate
from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from tests.analysis.matrices import classified, conv, entropy, perceptron


def means(f: Objective, at: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Return the means over batches of the mean and the unbiased variance of what goes into the norm."""
    place = f.tensors(at)
    rows = []
    for x, _ in f.batches:
        h = torch.nn.functional.conv2d(x, place["0.weight"], place["0.bias"]).transpose(0, 1).flatten(1)
        rows.append((h.mean(1), h.var(1)))
    return tuple(torch.stack(values).mean(0) for values in zip(*rows, strict=True))  # type: ignore[return-value]


def test_statistics_of_any_point() -> None:
    f = classified(conv(), (1, 4, 4))
    before = {name: value.clone() for name, value in f.module.state_dict().items()}
    for at in (f.vector(), f.vector() + 0.3):
        found = batch_norm_statistics(f, at)
        assert list(found) == ["1.running_mean", "1.running_var"]
        for value, expected in zip(found.values(), means(f, at), strict=True):
            torch.testing.assert_close(value, expected, rtol=0, atol=1e-13)
    for name, value in f.module.state_dict().items():
        assert value.equal(before[name])
    assert f.loss(at, found) != f.loss(at)
    assert batch_norm_statistics(classified(perceptron(), (4,))) == {}


def test_does_not_spoil_kept_graphs() -> None:
    from lightning_distopt.analysis import CurvatureOperator

    f = classified(conv(), (1, 4, 4))
    operator, v = CurvatureOperator(f, keep_graph=True), torch.ones(f.dim)
    product = operator.matvec(v)
    batch_norm_statistics(f)
    assert operator.matvec(v).equal(product)


@pytest.mark.parametrize("world", [2, 4])  # the fourth rank has no batch
def test_ranks(ranks: Any, world: int) -> None:
    net = conv()
    f = classified(net, (1, 4, 4))

    def statistics(rank: int, world_size: int) -> dict[str, torch.Tensor]:
        return batch_norm_statistics(Objective(net, entropy, f.batches[rank::world_size], reduce=dist.all_reduce))

    for found in ranks.run(world, statistics):
        torch.testing.assert_close(found, batch_norm_statistics(f), rtol=0, atol=1e-13)


def test_an_error_on_one_rank_ends_all(ranks: Any) -> None:
    net = conv()
    f = classified(net, (1, 4, 4))

    def wrong(rank: int, world_size: int) -> None:
        def loss(net: Any, batch: Any) -> torch.Tensor:
            if rank == 1:
                raise IndexError
            return entropy(net, batch)

        mine = Objective(net, loss, f.batches[rank::world_size], reduce=dist.all_reduce, check=False)
        with pytest.raises((ValueError, IndexError)):
            batch_norm_statistics(mine)

    ranks.run(2, wrong)


def test_frozen_parameters_of_the_point_count() -> None:
    torch.manual_seed(0)
    nets = [torch.nn.Sequential(torch.nn.Linear(3, 3), torch.nn.BatchNorm1d(3), torch.nn.Linear(3, 2)).double() for _ in "ab"]
    for net in nets:
        net[0].requires_grad_(False)
    data = [(torch.randn(8, 3).double(), torch.randint(2, (8,))) for _ in range(2)]
    here, there = (Objective(net, entropy, data) for net in nets)
    rest = {name: value for name, value in nets[1].state_dict().items() if name not in there.parameters}
    found, expected = batch_norm_statistics(here, there.vector(), rest), batch_norm_statistics(there)
    for name, value in expected.items():
        torch.testing.assert_close(found[name], value, rtol=0, atol=1e-14)
    ends = interpolate(here, nets[0].state_dict(), nets[1].state_dict(), 3, 0, "reestimate", progress=False).curves()[0, [0, 2]]
    assert ends == pytest.approx([here.loss(buffers=batch_norm_statistics(here)), there.loss(buffers=expected)], abs=1e-14)
