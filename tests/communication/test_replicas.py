"""The block of replicas: views that stay views, and everything a replica has of its own."""

from __future__ import annotations

import copy
import io
import random
from datetime import timedelta
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor, nn

from lightning_distopt.communication import Communicator, Replicas
from tests.pool import RankPool


class Net(nn.Module):
    """Channels-last, tied, frozen, scalar, empty; buffers of several kinds, one assigned anew in every forward pass."""

    def __init__(self) -> None:
        super().__init__()
        self.conv = nn.Conv2d(3, 4, 3, padding=1).to(memory_format=torch.channels_last)
        self.norm = nn.BatchNorm2d(4)
        self.first = nn.Linear(4, 4)
        self.second = nn.Linear(4, 4)
        self.second.weight = self.first.weight
        self.frozen = nn.Linear(4, 4).requires_grad_(False)
        self.scale = nn.Parameter(torch.tensor(1.5))
        self.empty = nn.Parameter(torch.zeros(0, 3))
        self.unused = nn.Parameter(torch.ones(5))
        self.register_buffer("count", torch.zeros((), dtype=torch.long))
        self.register_buffer("average", torch.zeros(4))
        self.register_buffer("mask", torch.tensor([True, False]))
        self.register_buffer("nothing", None)

    def forward(self, x: Tensor) -> Tensor:
        x = self.norm(self.conv(x)).mean(dim=(2, 3))
        self.average = 0.5 * self.average + 0.5 * x.detach().mean(dim=0)
        self.count += 1
        return self.scale * self.second(self.first(self.frozen(x)))


def net(seed: int = 0) -> Net:
    torch.manual_seed(seed)
    return Net().double()


def images(k: int) -> Tensor:
    return torch.randn(2, 3, 5, 5, dtype=torch.float64, generator=torch.Generator().manual_seed(k))


def assert_same(a: Any, b: Any) -> None:
    """Nested states, equal to the last bit."""
    assert type(a) is type(b)
    if isinstance(a, dict):
        assert list(a) == list(b)
        a, b = list(a.values()), list(b.values())
    if isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for one, other in zip(a, b, strict=True):
            assert_same(one, other)
    elif isinstance(a, Tensor):
        torch.testing.assert_close(a, b, rtol=0, atol=0)
    else:
        assert a == b


def trainable(module: nn.Module) -> Tensor:
    return torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad])


def train(module: nn.Module, optimizer: torch.optim.Optimizer, batches: list[int]) -> None:
    for k in batches:
        optimizer.zero_grad()
        module(images(k)).square().sum().backward()
        optimizer.step()


def are_views(replicas: Replicas) -> bool:
    """Whether the module's parameters lie in the active row, where the slots say."""
    trained = [p for p in replicas.module.parameters() if p.requires_grad]
    for slot, parameter in zip(replicas.slots, trained, strict=True):
        block = replicas.parameters[slot.block]
        start = block.data_ptr() + (replicas.active * block.shape[1] + slot.offset) * block.element_size()
        if parameter.numel() and parameter.data_ptr() != start:
            return False
    return True


# --------------------------------------------------------------------------------------------------------------- layout


@pytest.mark.parametrize("m", [1, 3])
def test_layout(m: int) -> None:
    module = net()
    reference = copy.deepcopy(module)
    replicas = Replicas(module, m)
    names = [name for name, p in module.named_parameters() if p.requires_grad]
    assert [slot.name for slot in replicas.slots] == names
    assert "second.weight" not in names  # tied: one slice
    assert "frozen.weight" not in names
    assert len(replicas.parameters) == 1
    block = replicas.parameters[0]
    assert block.is_contiguous()
    assert block.shape[0] == m
    assert replicas.numel == (trainable(reference).numel(),)
    assert torch.equal(replicas.matrix(), trainable(reference).expand(m, -1))
    for row in range(m):
        replicas.activate(row)
        assert are_views(replicas)
        for own, other in zip(module.parameters(), reference.parameters(), strict=True):
            assert torch.equal(own, other)
            assert own.stride() == other.stride()
        assert module.second.weight is module.first.weight
    assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
    assert not module.conv.weight.is_contiguous()


def test_slices_and_rows_are_aligned_and_disjoint() -> None:
    class Mixed(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            for k, dtype in enumerate([torch.float32, torch.float64, torch.bfloat16, torch.float16] * 3):
                setattr(self, f"p{k}", nn.Parameter(torch.randn(k + 1, 3).to(dtype)))

    replicas = Replicas(Mixed(), 3)
    dtypes = {torch.float32, torch.float64, torch.bfloat16, torch.float16}
    assert {block.dtype for block in replicas.parameters} == dtypes
    for k, block in enumerate(replicas.parameters):
        size = block.element_size()
        assert block.data_ptr() % 64 == 0
        assert block.stride(0) * size % 64 == 0
        slots = [slot for slot in replicas.slots if slot.block == k]
        assert all(slot.offset * size % 64 == 0 for slot in slots)
        ends = [slot.offset + slot.numel for slot in slots]
        assert all(end <= after.offset for end, after in zip(ends[:-1], slots[1:], strict=True))
        assert ends[-1] <= block.shape[1]
        assert replicas.numel[k] == sum(slot.numel for slot in slots)


def test_matrix_has_no_padding_and_the_order_of_the_module() -> None:
    """Also where dtypes alternate, so that the blocks have another order than the module."""

    class Alternating(nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.a = nn.Parameter(torch.arange(3.0))
            self.b = nn.Parameter(torch.arange(3.0, 5.0, dtype=torch.float64))
            self.c = nn.Parameter(torch.arange(5.0, 8.0).view(3, 1))
            self.d = nn.Parameter(torch.arange(8.0, 9.0, dtype=torch.float64))

    module = Alternating()
    replicas = Replicas(module, 2)
    replicas.activate(1)
    with torch.no_grad():
        for parameter in module.parameters():
            parameter.add_(100)
    assert replicas.matrix().tolist() == [[float(k) for k in range(9)], [100.0 + k for k in range(9)]]
    matrix = replicas.matrix()
    matrix.fill_(0)  # a copy
    assert replicas.matrix()[0].tolist() == [float(k) for k in range(9)]


def test_matrix_of_channels_last_is_in_logical_order() -> None:
    module = nn.Conv2d(3, 2, 2, bias=False).to(memory_format=torch.channels_last)
    expected = module.weight.detach().contiguous().flatten().clone()
    assert torch.equal(Replicas(module, 2).matrix()[1], expected)


def test_strides_that_are_not_dense_become_so() -> None:
    module = nn.Module()
    module.expanded = nn.Parameter(torch.randn(3, 1).expand(3, 4))
    module.sliced = nn.Parameter(torch.randn(4, 6)[:, ::2])
    module.transposed = nn.Parameter(torch.randn(4, 6).t())
    expected = trainable(module).clone()
    replicas = Replicas(module, 2)
    assert torch.equal(replicas.matrix()[1], expected)
    with torch.no_grad():
        module.expanded[0, 0] = 9.0
    assert (module.expanded == 9.0).sum() == 1
    assert module.transposed.stride() == (1, 6)


def test_nothing_is_repointed_with_one_replica() -> None:
    module = net()
    replicas = Replicas(module)
    pointers = [p.data_ptr() for p in module.parameters()]
    objects = [id(p) for p in module.parameters()]
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    replicas.attach_optimizers([optimizer])
    replicas.activate(0)
    train(module, optimizer, [0, 1])
    assert [p.data_ptr() for p in module.parameters()] == pointers
    assert [id(p) for p in module.parameters()] == objects


def test_new_blocks() -> None:
    replicas = Replicas(net(), 2)
    (block,) = replicas.new_blocks()
    assert block.shape == replicas.parameters[0].shape
    assert not block.any()
    assert block.data_ptr() != replicas.parameters[0].data_ptr()


# ------------------------------------------------------------------------------------------------- what must be refused


def test_lazy_parameters_and_buffers_are_refused() -> None:
    with pytest.raises(ValueError, match=r"parameter `1.weight` is lazy"):
        Replicas(nn.Sequential(nn.Linear(2, 2), nn.LazyLinear(3)))
    with pytest.raises(ValueError, match=r"buffer `1.running_mean` is lazy"):
        Replicas(nn.Sequential(nn.Linear(2, 2), nn.LazyBatchNorm1d(affine=False)))


@pytest.mark.parametrize("module", [nn.Identity(), nn.Linear(2, 2).requires_grad_(False)])
def test_nothing_to_train_is_refused(module: nn.Module) -> None:
    with pytest.raises(ValueError, match="no trainable parameter"):
        Replicas(module)


def test_signatures_tell_layouts_apart() -> None:
    modules = [
        net(),
        nn.Linear(2, 3),
        nn.Linear(3, 2),
        nn.Linear(2, 3).double(),
        nn.Linear(2, 3, bias=False),
        nn.Sequential(nn.Linear(2, 3)),
        nn.Conv2d(2, 3, 3),
        nn.Conv2d(2, 3, 3).to(memory_format=torch.channels_last),
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3)),
        nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3, track_running_stats=False)),
    ]
    frozen = nn.Linear(2, 3)
    frozen.bias.requires_grad_(False)
    retyped = nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))
    retyped[1].running_mean = retyped[1].running_mean.double()
    signatures = [Replicas(module).signature() for module in [*modules, frozen, retyped]]
    assert len(set(signatures)) == len(signatures)
    assert Replicas(net(1)).signature() == signatures[0]  # of the layout, not of the values
    assert Replicas(net(), 3, first_replica=6).signature() == signatures[0]  # whatever the number of replicas here


# -------------------------------------------------------------------------------------------------------- staying views


@pytest.mark.parametrize("m", [1, 3])
def test_views_survive_what_users_do(m: int) -> None:
    module = net()
    replicas = Replicas(module, m)
    optimizer = torch.optim.SGD(module.parameters(), lr=0.1, momentum=0.9)
    replicas.attach_optimizers([optimizer])
    others = replicas.matrix()[: m - 1]
    replicas.activate(m - 1)
    loaded = net(5)
    module.load_state_dict(loaded.state_dict())
    assert are_views(replicas)
    assert torch.equal(replicas.matrix()[m - 1], trainable(loaded))
    train(module, optimizer, [0, 1])
    module.zero_grad(set_to_none=True)
    module.to("cpu")
    module.train()
    nn.utils.clip_grad_norm_(module.parameters(), 1.0)
    with torch.no_grad():
        module.scale.fill_(4.0)
    assert are_views(replicas)
    assert torch.equal(replicas.matrix()[m - 1], trainable(module))
    assert torch.equal(replicas.matrix()[: m - 1], others)


def test_rows_of_the_block_are_the_replicas() -> None:
    module = net()
    replicas = Replicas(module, 2)
    replicas.parameters[0][1] += 1
    assert torch.equal(trainable(module), replicas.matrix()[0])
    replicas.activate(1)
    assert torch.equal(trainable(module), replicas.matrix()[0] + 1)


# ------------------------------------------------------------------------------ each replica trains as if it were alone

OPTIMIZERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.05),
    "momentum": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, nesterov=True, weight_decay=0.01),
    "adam": lambda p: torch.optim.Adam(p, lr=0.01, amsgrad=True),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, foreach=True),
    "adamw fused": lambda p: torch.optim.AdamW(p, lr=0.01, fused=True),
    "sgd fused": lambda p: torch.optim.SGD(p, lr=0.05, momentum=0.9, fused=True),
    "adagrad": lambda p: torch.optim.Adagrad(p, lr=0.05),
}


def alone(seed: int, make: Any, batches: list[int], groups: bool = False) -> tuple[Net, Any]:
    module = net(seed)
    optimizer = make(two_groups(module) if groups else module.parameters())
    train(module, optimizer, batches)
    return module, optimizer


def two_groups(module: nn.Module) -> list[dict[str, Any]]:
    parameters = [p for p in module.parameters() if p.requires_grad and p.numel()]
    return [{"params": parameters[:2]}, {"params": parameters[2:], "lr": 0.02}]


@pytest.mark.parametrize("groups", [False, True])
@pytest.mark.parametrize("name", list(OPTIMIZERS))
def test_replicas_train_as_if_each_were_alone(name: str, groups: bool) -> None:
    """Parameters, buffers (integers too) and optimizer state of each row, bit for bit, in turns and in any order."""
    make, m, module = OPTIMIZERS[name], 3, net()
    replicas = Replicas(module, m)
    optimizer = make(two_groups(module) if groups else module.parameters())
    replicas.attach_optimizers([optimizer])
    for step in range(3):
        for row in [(2, 1, 0), (0, 1, 2), (1, 2, 0)][step]:
            replicas.activate(row)
            train(module, optimizer, [10 * row + step])
    for row in range(m):
        reference, own = alone(0, make, [10 * row + step for step in range(3)], groups)
        replicas.activate(row)
        assert torch.equal(replicas.matrix()[row], trainable(reference))
        for (key, mine), theirs in zip(module.state_dict().items(), reference.state_dict().values(), strict=True):
            assert torch.equal(mine, theirs), (row, key)
            assert mine.dtype == theirs.dtype
        assert module.count == 3
        torch.testing.assert_close(optimizer.state_dict()["state"], own.state_dict()["state"], rtol=0, atol=0)


def test_optimizers_with_a_state_from_the_start_are_reset_to_it() -> None:
    module = net()
    replicas = Replicas(module, 2)
    optimizer = torch.optim.Adagrad(module.parameters(), lr=0.05, initial_accumulator_value=0.5)
    replicas.attach_optimizers([optimizer])
    first = states_of(replicas, optimizer)
    assert_same(first[1], first[0])
    for row in (1, 0):
        replicas.activate(row)
        train(module, optimizer, [row])
    assert not torch.equal(states_of(replicas, optimizer)[1]["0 sum"], first[1]["0 sum"])
    replicas.reset_optimizer_state()
    assert_same(states_of(replicas, optimizer), first)
    train(module, optimizer, [5])
    assert_same(states_of(replicas, optimizer)[1], first[1])


def test_several_optimizers() -> None:
    module = net()
    replicas = Replicas(module, 2)
    first = torch.optim.SGD(module.conv.parameters(), lr=0.1, momentum=0.9)
    second = torch.optim.Adam(module.first.parameters(), lr=0.1)
    replicas.attach_optimizers([first, second])
    for row in (1, 0):
        replicas.activate(row)
        module(images(row)).square().sum().backward()
        first.step()
        second.step()
        module.zero_grad()
    states = []
    for row in (0, 1):
        replicas.activate(row)
        momentum = first.state[module.conv.weight]["momentum_buffer"]
        states.append((momentum, second.state[module.first.weight]["exp_avg"]))
    assert not torch.equal(states[0][0], states[1][0])
    assert not torch.equal(states[0][1], states[1][1])


def test_gradients_follow_the_replica() -> None:
    module = net()
    replicas = Replicas(module, 2)
    for row in (0, 1):
        replicas.activate(row)
        module(images(row)).square().sum().backward()
    seen = module.conv.weight.grad
    assert module.unused.grad is None
    replicas.activate(0)
    assert module.conv.weight.grad is not seen
    reference = net()
    reference(images(0)).square().sum().backward()
    assert torch.equal(module.conv.weight.grad, reference.conv.weight.grad)
    replicas.drop_gradients()
    assert all(p.grad is None for p in module.parameters())
    replicas.activate(1)
    assert module.conv.weight.grad is seen


def test_collected_gradients() -> None:
    """They lie in the block in its layout; a parameter without one counts as zero; collecting twice changes nothing."""
    module = net()
    replicas = Replicas(module, 2)
    for row in (1, 0):
        replicas.activate(row)
        module(images(row)).square().sum().backward()
        replicas.collect_gradients()
        replicas.collect_gradients()
    assert torch.equal(module.unused.grad, torch.zeros(5).double())
    for row in (0, 1):
        reference = net()
        reference(images(row)).square().sum().backward()
        replicas.activate(row)
        for slot, (own, theirs) in zip(
            replicas.slots,
            [(p, q) for p, q in zip(module.parameters(), reference.parameters(), strict=True) if p.requires_grad],
            strict=True,
        ):
            view = slot.view(replicas.gradients[slot.block][row])
            assert own.grad.stride() == own.stride()
            assert not own.numel() or own.grad.data_ptr() == view.data_ptr()
            expected = torch.zeros_like(theirs) if theirs.grad is None else theirs.grad
            assert torch.equal(own.grad, expected), slot.name
    replicas.gradients[0].mul_(2)
    assert torch.equal(module.scale.grad, 2 * reference.scale.grad)
    module.zero_grad(set_to_none=True)
    replicas.collect_gradients()
    assert not replicas.gradients[0][1].any()  # nothing stale


def test_accumulation_goes_on_in_collected_gradients() -> None:
    module = net()
    replicas = Replicas(module, 2)
    module.eval()  # no running statistics in the way
    module(images(0)).sum().backward()
    replicas.collect_gradients()
    module(images(1)).sum().backward()
    replicas.collect_gradients()
    reference = net().eval()
    (reference(images(0)).sum() + reference(images(1)).sum()).backward()
    torch.testing.assert_close(module.conv.weight.grad, reference.conv.weight.grad, rtol=0, atol=1e-12)
    assert not replicas.gradients[0][1].any()


# -------------------------------------------------------------------------------------------------------------- streams


def draw() -> tuple[float, ...]:
    return torch.rand(()).item(), random.random(), float(np.random.rand()), float(np.random.normal())


@pytest.mark.parametrize("m", [1, 2, 4])
def test_streams_depend_on_the_number_of_the_replica_alone(m: int) -> None:
    """Not on the layout, nor on the order in which replicas draw."""
    expected = {}
    for k in range(4):
        Replicas(nn.Linear(1, 1), first_replica=k).seed(5)
        expected[k] = [draw() for _ in range(3)]
    assert len({value for draws in expected.values() for numbers in draws for value in numbers}) == 4 * 3 * 4
    for first in range(0, 4, m):
        replicas = Replicas(nn.Linear(1, 1), m, first_replica=first)
        replicas.seed(5)
        drawn: dict[int, list[Any]] = {row: [] for row in range(m)}
        for step in range(3):
            for row in sorted(range(m), reverse=step % 2 == 0):
                if step == 1:
                    replicas.activate_streams(row)
                else:
                    replicas.activate(row)
                drawn[row].append(draw())
        assert [drawn[row] for row in range(m)] == [expected[first + row] for row in range(m)]


def test_seeding_again_starts_again() -> None:
    replicas = Replicas(nn.Linear(1, 1), 2)
    replicas.seed(5)
    first = draw()
    replicas.activate(1)
    replicas.seed(5)  # while row 1 is active
    second = draw()
    replicas.activate(0)
    assert draw() == first
    replicas.seed(6)
    assert draw() != first
    assert second != first


# -------------------------------------------------------------------------------------------------- averaging of states


def diverged(m: int, seed: int = 0, first: int = 0) -> tuple[Net, Replicas, torch.optim.Optimizer]:
    module = net()
    replicas = Replicas(module, m, first_replica=first)
    optimizer = torch.optim.Adam(module.parameters(), lr=0.01)
    replicas.attach_optimizers([optimizer])
    replicas.seed(seed)
    for row in reversed(range(m)):
        replicas.activate(row)
        train(module, optimizer, [first + row, 10 + first + row])
        replicas.drop_gradients()
    return module, replicas, optimizer


def buffers_of(replicas: Replicas) -> list[dict[str, Tensor]]:
    found = []
    for row in range(replicas.replicas_per_rank):
        replicas.activate(row)
        found.append({name: b.clone() for name, b in replicas.module.named_buffers()})
    replicas.activate(0)
    return found


def test_buffers_average_by_groups_and_leave_integers() -> None:
    module, replicas, _ = diverged(4)
    with torch.no_grad():
        for row in range(4):
            replicas.activate(row)
            module.count.fill_(row)
            module.mask[1] = row % 2 == 0
    before = buffers_of(replicas)
    communicator = Communicator(4)
    replicas.average_buffers(lambda block: communicator.mean(block, 2))
    after = buffers_of(replicas)
    for name in before[0]:
        for row in range(4):
            pair = [before[2 * (row // 2)][name], before[2 * (row // 2) + 1][name]]
            floats = pair[0].is_floating_point()
            expected = (pair[0] + pair[1]) / 2 if floats else before[row][name]
            torch.testing.assert_close(after[row][name], expected, rtol=0, atol=1e-15)
    assert [int(b["count"]) for b in after] == [0, 1, 2, 3]
    assert not torch.equal(after[0]["norm.running_mean"], after[2]["norm.running_mean"])
    assert communicator.traffic.bytes_sent == 12 * 8  # running mean, running variance, average; 2 (g - 1) / g = 1


def states_of(replicas: Replicas, optimizer: torch.optim.Optimizer) -> list[dict[str, Tensor]]:
    found = []
    for row in range(replicas.replicas_per_rank):
        replicas.activate(row)
        entries = optimizer.state_dict()["state"].items()
        found.append({f"{k} {key}": value.clone() for k, state in entries for key, value in state.items()})
    replicas.activate(0)
    return found


def test_optimizer_state_averages_and_leaves_counts() -> None:
    module, replicas, optimizer = diverged(3)
    replicas.activate(1)
    train(module, optimizer, [30])  # one step more
    before = states_of(replicas, optimizer)
    assert replicas.average_optimizer_state(Communicator(3), lambda block: Communicator(3).mean(block))
    after = states_of(replicas, optimizer)
    assert before[0]
    for name in before[0]:
        for row in range(3):
            mean = torch.stack([state[name] for state in before]).mean(dim=0)
            expected = before[row][name] if name.endswith(" step") else mean
            torch.testing.assert_close(after[row][name], expected, rtol=0, atol=1e-15)
    assert {float(v) for k, v in after[0].items() if k.endswith(" step")} == {2.0}
    assert {float(v) for k, v in after[1].items() if k.endswith(" step")} == {3.0}


def test_optimizer_state_that_some_replica_lacks_is_left_alone() -> None:
    _, replicas, optimizer = diverged(2)
    replicas.activate(1)
    optimizer.state.clear()
    before = states_of(replicas, optimizer)
    assert not replicas.average_optimizer_state(Communicator(2), lambda block: Communicator(2).mean(block))
    torch.testing.assert_close(states_of(replicas, optimizer), before, rtol=0, atol=0)


def test_optimizer_state_is_shared_and_reset() -> None:
    module, replicas, optimizer = diverged(3)
    first = states_of(replicas, optimizer)[0]
    replicas.activate(2)
    replicas.share_optimizer_state()
    states = states_of(replicas, optimizer)
    torch.testing.assert_close(states, [first] * 3, rtol=0, atol=0)
    replicas.activate(1)
    train(module, optimizer, [5])  # copies: the others do not move along
    torch.testing.assert_close(states_of(replicas, optimizer)[0], first, rtol=0, atol=0)
    replicas.reset_optimizer_state()
    assert states_of(replicas, optimizer) == [{}, {}, {}]
    train(module, optimizer, [5])
    assert {float(v) for k, v in states_of(replicas, optimizer)[0].items() if k.endswith(" step")} == {1.0}


def test_averaging_over_ranks_is_that_over_rows(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> Any:
        m = 4 // world_size
        c = Communicator(m, timeout=timedelta(seconds=20))
        _, replicas, optimizer = diverged(m, first=rank * m)
        with replicas.showing_average(c):
            shown = {name: value.clone() for name, value in replicas.module.state_dict().items()}
        replicas.average_buffers(lambda block: c.mean(block, 2))
        done = replicas.average_optimizer_state(c, lambda block: c.mean(block, 4))
        return shown, buffers_of(replicas), states_of(replicas, optimizer), done, c.traffic.bytes_sent

    (shown, buffers, states, done, sent), *_ = ranks.run(1, fn, timeout=40)
    assert done
    for world_size in (2, 4):
        results = ranks.run(world_size, fn, timeout=40)
        torch.testing.assert_close([b for r in results for b in r[1]], buffers, rtol=0, atol=1e-14)
        torch.testing.assert_close([s for r in results for s in r[2]], states, rtol=0, atol=1e-14)
        for result in results:
            torch.testing.assert_close(result[0], shown, rtol=0, atol=1e-14)
            assert result[3:] == (True, sent)


# -------------------------------------------------------------------------------------------------- showing the average


@pytest.mark.parametrize("layout", [(1, 3), (2, 1), (2, 2), (3, 1)])
def test_starting_equal(ranks: RankPool, layout: tuple[int, int]) -> None:
    """Also parameters that are frozen, in any memory format, and buffers of any dtype."""
    world, m = layout

    def fn(rank: int, world_size: int) -> Any:
        module = net(rank)
        module.frozen.requires_grad_(True)
        module.conv.requires_grad_(False)
        module.register_buffer("flipped", torch.randn(3, 2).t())
        module.register_buffer("shorts", torch.full((2,), rank, dtype=torch.int16))
        module.register_buffer("halves", torch.randn(3).half())
        module.count.fill_(rank)
        module.mask.fill_(rank == 0)
        first = copy.deepcopy(module.state_dict())
        replicas = Replicas(module, m, first_replica=rank * m)
        if m > 1:
            replicas.activate(m - 1)
            module.norm.running_mean.normal_()
        replicas.start_equal(Communicator(m, timeout=timedelta(seconds=20)))
        states = []
        for row in range(m):
            replicas.activate(row)
            states.append(copy.deepcopy(module.state_dict()))
        assert module.conv.weight.is_contiguous(memory_format=torch.channels_last)
        return first, states

    results = ranks.run(world, fn, timeout=40)
    for _, states in results:
        for state in states:
            assert_same(dict(state), dict(results[0][0]))


def everything(replicas: Replicas) -> dict[str, Any]:
    """All that a replica has, as copies."""
    state = replicas.state_dict()
    gradients = [[None if p.grad is None else p.grad.clone() for p in replicas.module.parameters()]]
    return {**state, "active": replicas.active, "gradients": gradients}


@pytest.mark.parametrize("active", [0, 1, 2])
@pytest.mark.parametrize("fails", [False, True])
def test_showing_the_average_changes_nothing(fails: bool, active: int) -> None:
    """Whichever replica is active, and whatever happens inside."""
    module, replicas, _ = diverged(3)
    replicas.activate(active)
    module(images(3)).sum().backward()
    before, rows, buffers = everything(replicas), replicas.matrix(), buffers_of(replicas)
    replicas.activate(active)
    objects = [id(p) for p in module.parameters()]

    def body() -> None:
        with replicas.showing_average(Communicator(3)):
            torch.testing.assert_close(trainable(module), rows.mean(dim=0), rtol=0, atol=1e-15)
            for name in ("norm.running_mean", "average"):
                mean = torch.stack([b[name] for b in buffers]).mean(dim=0)
                torch.testing.assert_close(dict(module.named_buffers())[name], mean, rtol=0, atol=1e-15)
            assert torch.equal(replicas.matrix(), rows)
            with torch.no_grad():
                for p in module.parameters():
                    p.add_(1) if p.requires_grad else None
                module(images(9))  # changes running statistics, assigns a buffer anew
            module.load_state_dict(net(3).state_dict())
            if fails:
                raise ZeroDivisionError

    if fails:
        with pytest.raises(ZeroDivisionError):
            body()
    else:
        body()
    assert replicas.active == active
    assert are_views(replicas)
    assert [id(p) for p in module.parameters()] == objects
    assert_same(everything(replicas), before)
    torch.testing.assert_close(buffers_of(replicas), buffers, rtol=0, atol=0)


def test_frozen_parameters_and_integer_buffers_are_shown_too() -> None:
    module, replicas, _ = diverged(2)
    frozen = module.frozen.weight.clone()
    with replicas.showing_average(Communicator(2)):
        assert torch.equal(module.frozen.weight, frozen)
        assert module.count == 2
        assert module.mask.tolist() == [True, False]
        assert module.second.weight is module.first.weight


def test_a_state_taken_while_the_average_shows_is_that_of_the_replicas() -> None:
    """Checkpoints are written after validation, where the average is still swapped in."""
    module, replicas, _ = diverged(3)
    state, rows = replicas.state_dict(), replicas.matrix()
    with replicas.showing_average(Communicator(3)):
        shown = {name: value.clone() for name, value in module.state_dict().items()}
        inside = replicas.state_dict()
        assert_same(inside, state)
        torch.testing.assert_close(dict(module.state_dict()), shown, rtol=0, atol=0)
    assert_same(replicas.state_dict(), state)
    assert torch.equal(replicas.matrix(), rows)


def test_a_state_taken_while_streams_are_isolated_has_them_as_they_were() -> None:
    """Whatever validation has drawn by then, and however deeply isolation is nested."""
    _, replicas, _ = diverged(2)
    replicas.activate(1)
    draw()
    state = replicas.state_dict()
    following = draw()
    replicas.resume_streams(state["streams"])
    with replicas.isolated_streams():
        draw()
        with replicas.showing_average(Communicator(2)), replicas.isolated_streams():
            draw()
            assert_same(replicas.state_dict(), state)
        draw()
        assert_same(replicas.state_dict(), state)
    with pytest.raises(ZeroDivisionError), replicas.isolated_streams():
        draw()
        raise ZeroDivisionError
    assert draw() == following
    assert replicas.active == 1


def test_streams_that_are_not_seeded_are_not_isolated() -> None:
    """One replica alone leaves the random numbers of the process to the user."""
    replicas = Replicas(net())
    torch.manual_seed(0)
    expected = [torch.rand(()).item() for _ in range(2)]
    torch.manual_seed(0)
    with replicas.showing_average(Communicator()):
        inside = torch.rand(()).item()
    assert [inside, torch.rand(()).item()] == expected


def test_gradients_are_out_of_the_way_while_the_average_shows() -> None:
    module, replicas, _ = diverged(2)
    module(images(0)).sum().backward()
    kept = module.scale.grad.clone()
    with replicas.showing_average(Communicator(2)):
        assert all(p.grad is None for p in module.parameters())
        module(images(1)).sum().backward()
    assert torch.equal(module.scale.grad, kept)


def test_adopting_the_average() -> None:
    module, replicas, _ = diverged(2)
    mean = replicas.matrix().mean(dim=0)
    running = torch.stack([b["norm.running_mean"] for b in buffers_of(replicas)]).mean(dim=0)
    with replicas.showing_average(Communicator(2)):
        replicas.adopt()
    replicas.release()
    torch.testing.assert_close(trainable(module), mean, rtol=0, atol=1e-15)
    torch.testing.assert_close(module.norm.running_mean, running, rtol=0, atol=1e-15)


# ---------------------------------------------------------------------------------------------------------- checkpoints


def test_state_survives_a_strict_checkpoint_bit_for_bit() -> None:
    module, replicas, optimizer = diverged(3)
    replicas.activate(1)
    file = io.BytesIO()
    torch.save(replicas.state_dict(), file)
    assert replicas.active == 1
    following = []
    for row in (1, 0, 2):
        replicas.activate(row)
        train(module, optimizer, [row])
        following.append((draw(), trainable(module).clone()))

    module, replicas, optimizer = diverged(3, seed=77)
    file.seek(0)
    state = torch.load(file, weights_only=True)
    assert state["signature"] == replicas.signature()
    replicas.load_state_dict(state)
    replicas.resume_streams(state["streams"])
    assert are_views(replicas)
    for row, (numbers, parameters) in zip((1, 0, 2), following, strict=True):
        replicas.activate(row)
        train(module, optimizer, [row])
        assert draw() == numbers
        assert torch.equal(trainable(module), parameters)


def test_a_loaded_state_stays_as_it_is() -> None:
    """It can be loaded twice: training does not write into it."""
    module, replicas, optimizer = diverged(2)
    state = replicas.state_dict()
    kept = copy.deepcopy(state)
    replicas.load_state_dict(state)
    train(module, optimizer, [0])
    assert_same(state, kept)


def test_a_state_is_a_copy_without_the_rest_of_the_block() -> None:
    module, replicas, optimizer = diverged(2)
    state = replicas.state_dict()
    kept = copy.deepcopy(state)
    train(module, optimizer, [0])
    assert_same(state, kept)
    bytes_kept = state["parameters"][0].untyped_storage().nbytes()
    assert bytes_kept == replicas.parameters[0].untyped_storage().nbytes()


def test_release_gives_parameters_storage_of_their_own() -> None:
    module, replicas, optimizer = diverged(2)
    replicas.activate(1)
    first = replicas.matrix()[0]
    strides = [p.stride() for p in module.parameters()]
    replicas.release()
    assert torch.equal(trainable(module), first)
    assert [p.stride() for p in module.parameters()] == strides
    for parameter in module.parameters():
        assert parameter.untyped_storage().nbytes() == parameter.numel() * parameter.element_size()
        assert parameter.grad is None
    assert module.second.weight is module.first.weight
    replicas.parameters[0].zero_()
    assert torch.equal(trainable(module), first)
    train(module, optimizer, [0])  # the optimizer still holds these parameters
    assert not torch.equal(trainable(module), first)
