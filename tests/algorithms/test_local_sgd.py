"""Options of local SGD that contradict each other or the replicas, and the rounds of those that do not."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import nn

from lightning_distopt import ConstantWarmup, LocalSGD
from lightning_distopt.communication import Communicator, Replicas


def bound(n: int, *args: Any, **kwargs: Any) -> LocalSGD:
    algorithm = LocalSGD(*args, **kwargs)
    algorithm.setup(Replicas(nn.Linear(2, 1, bias=False).double(), n), Communicator(n))
    return algorithm


def rounds(algorithm: LocalSGD, steps: int, start: int = 0) -> list[int]:
    """What group agrees after each step; the replicas drift apart by their number in between."""
    groups = []
    n = algorithm.communicator.num_replicas
    (block,) = algorithm.replicas.parameters
    for step in range(start, start + steps):
        algorithm.before_step(step)
        gradients = torch.arange(n, dtype=torch.float64).view(n, 1).repeat(1, block.shape[1]) + step
        g = algorithm.gradient_group(step)
        if g > 1:
            algorithm.communicator.mean(gradients, g)
        block.sub_(gradients)
        groups.append(algorithm.after_step(step))
    return groups


@pytest.mark.parametrize("wrong", [0, -1, 2.5, True, "8", None, float("nan"), lambda step: 0, lambda step: 1.5])
def test_sync_period_must_be_a_period(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`sync_period` must be a whole number of steps, at least 1"):
        LocalSGD(wrong)


@pytest.mark.parametrize("name", ["block_size", "block_period"])
@pytest.mark.parametrize("wrong", [0, -2, 1.5, "2", True])
def test_block_options_must_be_whole_numbers(name: str, wrong: Any) -> None:
    options = {"block_size": 2, "block_period": 2, name: wrong}
    with pytest.raises(ValueError, match=f"`{name}` must be a whole number, at least 1; got {wrong!r}"):
        LocalSGD(4, **options)


def test_block_options_need_each_other() -> None:
    with pytest.raises(ValueError, match="`block_period`"):
        LocalSGD(4, block_size=2)
    with pytest.raises(ValueError, match="`block_size`"):
        bound(4, 4, block_period=2)


@pytest.mark.parametrize(("n", "size"), [(4, 3), (4, 8), (6, 4), (5, 2), (1, 2)])
def test_block_size_must_divide(n: int, size: int) -> None:
    with pytest.raises(ValueError, match=rf"`block_size={size}` does not divide the {n} replicas") as caught:
        bound(n, 4, size, 2)
    for divisor in (g for g in range(1, n + 1) if n % g == 0):
        assert str(divisor) in str(caught.value).split("use one of")[1]


@pytest.mark.parametrize("wrong", ["gradients", "", None, True])
def test_average_must_be_known(wrong: Any) -> None:
    with pytest.raises(ValueError, match="`average` must be 'auto' or 'parameters'"):
        LocalSGD(4, average=wrong)


def test_options_show() -> None:
    """Ranks compare options by how they look, so each must show."""
    assert repr(LocalSGD(16)) == "LocalSGD(sync_period=16)"
    different = [LocalSGD(16), LocalSGD(8), LocalSGD(16, 2, 2), LocalSGD(16, 2, 4), LocalSGD(16, 4, 2)]
    different += [LocalSGD(16, average="parameters"), LocalSGD(ConstantWarmup(16, 3)), LocalSGD(ConstantWarmup(16, 4))]
    assert len({repr(algorithm) for algorithm in different}) == len(different)


def test_rounds_of_local_sgd() -> None:
    algorithm = bound(4, 3)
    assert rounds(algorithm, 7) == [0, 0, 4, 0, 0, 4, 0]
    assert algorithm.communicator.traffic.rounds == 2


def test_rounds_of_hierarchical_local_sgd() -> None:
    """Every second block round is one over all replicas instead."""
    algorithm = bound(4, 2, 2, 2)
    assert rounds(algorithm, 8) == [0, 2, 0, 4, 0, 2, 0, 4]
    assert algorithm.communicator.traffic.rounds == 4


def test_a_block_of_all_and_a_block_of_one() -> None:
    assert rounds(bound(4, 2, 4, 2), 4) == [0, 4, 0, 4]
    assert rounds(bound(4, 2, 1, 2), 8) == [0, 1, 0, 4, 0, 1, 0, 4]


@pytest.mark.parametrize("options", [{}, {"average": "parameters"}, {"block_size": 2, "block_period": 3}])
def test_replicas_of_a_group_agree_after_its_round(options: Any) -> None:
    for schedule in (1, 2, ConstantWarmup(3, 4)):
        algorithm = bound(4, schedule, **options)
        (block,) = algorithm.replicas.parameters
        for step in range(12):
            (group,) = rounds(algorithm, 1, step)
            if group > 1:
                members = block.view(4 // group, group, -1)
                assert torch.equal(members, members[:, :1].expand_as(members)), (schedule, step)


def test_a_new_schedule_takes_effect_when_the_next_round_starts() -> None:
    algorithm = bound(2, 4)
    assert rounds(algorithm, 2) == [0, 0]
    algorithm.sync_period = 1
    assert rounds(algorithm, 4, 2) == [0, 2, 2, 2]


def test_a_second_training_starts_with_a_round() -> None:
    """Whatever is left of the first one's, which may have ended anywhere."""
    for options in ((4,), (2, 2, 3)):
        algorithm = bound(4, *options)
        fresh = rounds(algorithm, 9)
        for steps in range(1, 9):
            algorithm.setup(algorithm.replicas, algorithm.communicator)
            rounds(algorithm, steps)
            algorithm.setup(algorithm.replicas, algorithm.communicator)
            assert rounds(algorithm, 9) == fresh


@pytest.mark.parametrize(("n", "options"), [(1, (1,)), (1, (8,)), (4, (1, 1, 4)), (4, (1,))])
def test_optimizer_state_is_averaged_only_before_gradients_are(
    n: int, options: tuple[int, ...], monkeypatch: pytest.MonkeyPatch
) -> None:
    """A group of one replica has nothing to average, and one whose gradients are averaged anyway neither."""
    monkeypatch.setattr(Replicas, "average_optimizer_state", lambda *_: pytest.fail("averaged"))
    rounds(bound(n, *options), 12)


def test_warm_up_is_a_first_phase_without_blocks() -> None:
    """As with `PostLocalSwitch`: gradients are averaged over all replicas up to it."""
    algorithm = bound(4, ConstantWarmup(2, 3), 2, 2)
    assert rounds(algorithm, 11) == [4, 4, 4, 0, 2, 0, 4, 0, 2, 0, 4]


def test_the_mean_is_preserved() -> None:
    generator = torch.Generator().manual_seed(0)
    algorithm = bound(6, 2, 3, 2)
    (block,) = algorithm.replicas.parameters
    block.copy_(torch.randn(block.shape, generator=generator, dtype=torch.float64))
    for step in range(8):
        algorithm.before_step(step)
        block.add_(torch.randn(block.shape, generator=generator, dtype=torch.float64))
        before = block.mean(dim=0)
        algorithm.after_step(step)
        torch.testing.assert_close(block.mean(dim=0), before, rtol=0, atol=1e-14)


def test_one_replica_sends_nothing() -> None:
    for options in ({"sync_period": 1}, {"sync_period": 3}, {"sync_period": 1, "average": "parameters"}):
        algorithm = bound(1, **options)
        rounds(algorithm, 6)
        assert algorithm.communicator.traffic.bytes_sent == 0


@pytest.mark.parametrize("stop", range(1, 12))
def test_state_continues_inside_of_a_round(stop: int) -> None:
    def make() -> LocalSGD:
        return bound(4, ConstantWarmup(3, 2), 2, 2)

    whole = rounds(make(), 14)
    first = make()
    assert rounds(first, stop) == whole[:stop]
    second = make()
    second.load_state_dict(first.state_dict())
    assert rounds(second, 14 - stop, stop) == whole[stop:]


def test_bytes_of_a_round_follow_the_formula() -> None:
    """A row of two float64 values is padded to 64 bytes in the block, and the padding crosses the wire as well."""
    algorithm = bound(4, 2)
    rounds(algorithm, 2)
    (block,) = algorithm.replicas.parameters
    assert algorithm.communicator.traffic.bytes_sent == 2 * 3 * block.shape[1] * 8 // 4
