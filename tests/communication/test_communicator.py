"""The communicator: the same numbers, bytes and rounds in every layout, and failures that say where."""

from __future__ import annotations

import os
import re
import time
from collections.abc import Callable
from datetime import timedelta
from typing import Any

import pytest
import torch
import torch.distributed as dist
from torch import Tensor

from lightning_distopt.communication import (
    NO_NOTICE,
    CommunicationError,
    Communicator,
    Handle,
    Neighbourhood,
    all_reduce_bytes,
    levels,
)
from lightning_distopt.communication.neighbours import Edge
from lightning_distopt.topologies import make
from tests.pool import RankError, RankPool

LAYOUTS = [(world, m) for world in (1, 2, 3, 4) for m in (1, 2, 3)]
D = 7


def rows_of(n: int, d: int = D, dtype: torch.dtype = torch.float64, seed: int = 0) -> Tensor:
    """The rows of all replicas, the same in every process."""
    return torch.randn(n, d, dtype=torch.float64, generator=torch.Generator().manual_seed(seed)).to(dtype)


def own(matrix: Tensor, communicator: Communicator) -> Tensor:
    local = communicator.local_replicas
    return matrix[local.start : local.stop].clone()


def grouped_mean(matrix: Tensor, g: int) -> Tensor:
    n, d = matrix.shape
    return matrix.double().view(n // g, g, d).mean(dim=1, keepdim=True).expand(n // g, g, d).reshape(n, d)


def divisors(n: int) -> list[int]:
    return [g for g in range(1, n + 1) if n % g == 0]


def on_layout(ranks: RankPool, layout: tuple[int, int], fn: Callable[..., Any], *args: Any) -> list[Any]:
    """Run `fn(communicator, *args)` on every rank of a layout."""

    def run(rank: int, world_size: int) -> Any:
        communicator = Communicator(layout[1], timeout=timedelta(seconds=20))
        try:
            return fn(communicator, *args)
        finally:
            communicator.close()

    return ranks.run(layout[0], run, timeout=40)


# ---------------------------------------------------------------------------------------------------------------- shape


@pytest.mark.parametrize("layout", LAYOUTS)
def test_numbering(ranks: RankPool, layout: tuple[int, int]) -> None:
    world, m = layout
    found = on_layout(ranks, layout, lambda c: (c.rank, c.world_size, c.num_replicas, list(c.local_replicas)))
    assert found == [(r, world, world * m, list(range(r * m, r * m + m))) for r in range(world)]


# ----------------------------------------------------------------------------------------------------------------- mean


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mean_over_groups(ranks: RankPool, layout: tuple[int, int]) -> None:
    """All group sizes, also those whose groups straddle ranks; bytes follow the formula in every layout."""
    n = layout[0] * layout[1]

    def fn(c: Communicator) -> list[tuple[int, bool, Tensor, int]]:
        results = []
        for g in divisors(n):
            for async_op in (False, True):
                block, before = own(rows_of(n), c), c.traffic.bytes_sent
                handle = c.mean(block, g, async_op=async_op)
                handle.wait()
                handle.wait()  # again does nothing
                results.append((g, async_op, block, c.traffic.bytes_sent - before))
        return results

    per_rank = on_layout(ranks, layout, fn)
    for results in zip(*per_rank, strict=True):
        g = results[0][0]
        expected = grouped_mean(rows_of(n), g)
        torch.testing.assert_close(torch.cat([r[2] for r in results]), expected, rtol=0, atol=1e-14)
        assert {r[3] for r in results} == {all_reduce_bytes(D, 8, g)}, f"group size {g}"
        if g > 1:  # replicas of a group agree to the last bit, whatever the order of summation
            matrix = torch.cat([r[2] for r in results]).view(n // g, g, D)
            assert torch.equal(matrix, matrix[:, :1].expand_as(matrix))


@pytest.mark.parametrize("layout", [(1, 3), (2, 1), (2, 2), (3, 2), (4, 1)])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16, torch.float16])
def test_mean_of_dtypes(ranks: RankPool, layout: tuple[int, int], dtype: torch.dtype) -> None:
    n = layout[0] * layout[1]
    matrix = rows_of(n, dtype=dtype)

    def fn(c: Communicator) -> tuple[Tensor, Tensor, int]:
        block = own(matrix, c)
        mean = c.average(block)
        c.mean(block)
        return block, mean, c.traffic.bytes_sent

    size = torch.empty((), dtype=dtype).element_size()
    for block, mean, sent in on_layout(ranks, layout, fn):
        assert block.dtype == mean.dtype == dtype
        tolerance = 4 * n * torch.finfo(dtype).eps
        expected = matrix.double().mean(dim=0)
        torch.testing.assert_close(block.double(), expected.expand_as(block), rtol=tolerance, atol=tolerance)
        torch.testing.assert_close(mean.double(), expected, rtol=tolerance, atol=tolerance)
        assert sent == all_reduce_bytes(D, size, n)


def test_mean_refuses_sizes_that_do_not_divide() -> None:
    c = Communicator(4)
    for g in (3, 5, 8):
        with pytest.raises(ValueError, match=rf"group size {g} does not divide .* 4"):
            c.mean(torch.zeros(4, 2), g)
    for g in (0, -2):
        with pytest.raises(ValueError, match="group size"):
            c.mean(torch.zeros(4, 2), g)
    assert c.traffic.bytes_sent == 0


def test_mean_of_nothing() -> None:
    """A block without columns is no reason to crash."""
    block = torch.zeros(4, 0)
    Communicator(4).mean(block)
    Communicator(4).mean(block, 2)
    assert block.shape == (4, 0)


def test_mean_within_groups_of_one_changes_nothing(ranks: RankPool) -> None:
    def fn(c: Communicator) -> tuple[Tensor, int]:
        block = own(rows_of(4), c)
        c.mean(block, 1, async_op=True).wait()
        return block, c.traffic.bytes_sent

    results = on_layout(ranks, (2, 2), fn)
    assert torch.equal(torch.cat([r[0] for r in results]), rows_of(4))
    assert [r[1] for r in results] == [0, 0]


def test_several_means_in_flight(ranks: RankPool) -> None:
    """Handles may be waited for in any order, also across groups of different sizes."""

    def fn(c: Communicator) -> list[Tensor]:
        blocks = [own(rows_of(4, seed=k), c) for k in range(6)]
        sizes = [4, 2, 4, 2, 4, 2]
        handles = [c.mean(b, g, async_op=True) for b, g in zip(blocks, sizes, strict=True)]
        for handle in reversed(handles):
            handle.wait()
        return blocks

    for world, m in ((4, 1), (2, 2), (1, 4)):
        per_rank = on_layout(ranks, (world, m), fn)
        for k, g in enumerate([4, 2, 4, 2, 4, 2]):
            matrix = torch.cat([blocks[k] for blocks in per_rank])
            torch.testing.assert_close(matrix, grouped_mean(rows_of(4, seed=k), g), rtol=0, atol=1e-14)


def test_mean_charges_given_numel() -> None:
    c = Communicator(4)
    c.mean(torch.zeros(4, 64), numel=50)
    assert c.traffic.bytes_sent == all_reduce_bytes(50, 4, 4)


@pytest.mark.parametrize("layout", [(1, 1), (1, 4), (4, 1), (2, 2), (3, 2)])
def test_average_leaves_the_block(ranks: RankPool, layout: tuple[int, int]) -> None:
    n = layout[0] * layout[1]

    def fn(c: Communicator) -> tuple[Tensor, Tensor, int, int]:
        block = own(rows_of(n), c)
        mean = c.average(block)
        kept = block.clone()
        mean.fill_(9)  # the result is the caller's
        assert torch.equal(block, kept)
        return block, c.average(block), c.traffic.bytes_sent, c.traffic.evaluation_bytes

    results = on_layout(ranks, layout, fn)
    assert torch.equal(torch.cat([r[0] for r in results]), rows_of(n))
    for _, mean, sent, evaluation in results:
        torch.testing.assert_close(mean, rows_of(n).mean(dim=0), rtol=0, atol=1e-14)
        assert sent == 0
        assert evaluation == 2 * all_reduce_bytes(D, 8, n)


# ------------------------------------------------------------------------------------------------------------------ mix


def sparse_matrix(n: int, seed: int) -> Tensor:
    """Any real weights, most of them zero; some rows without themselves, one that only copies another."""
    generator = torch.Generator().manual_seed(seed)
    weights = torch.randn(n, n, dtype=torch.float64, generator=generator)
    weights[torch.rand(n, n, generator=generator) < 0.6] = 0
    weights[0] = 0
    weights[0, n - 1] = 1
    return weights


@pytest.mark.parametrize("layout", LAYOUTS)
def test_mix_is_a_matrix_product(ranks: RankPool, layout: tuple[int, int]) -> None:
    n = layout[0] * layout[1]
    matrices = [sparse_matrix(n, seed) for seed in range(3)]
    matrices += [torch.eye(n).double(), torch.full((n, n), 1 / n).double(), torch.roll(torch.eye(n), 1, 0).double()]
    matrices.append(torch.zeros(n, n).double())

    def fn(c: Communicator) -> list[Tensor]:
        blocks = []
        for k, weights in enumerate(matrices):
            block = own(rows_of(n, seed=k), c)
            handle = c.mix(block, weights, async_op=k % 2 == 1)
            if k % 2:
                block.fill_(float("nan"))  # what was sent are the rows at the call
            handle.wait()
            blocks.append(block)
        return blocks

    per_rank = on_layout(ranks, layout, fn)
    for k, weights in enumerate(matrices):
        mixed = torch.cat([blocks[k] for blocks in per_rank])
        torch.testing.assert_close(mixed, weights @ rows_of(n, seed=k), rtol=1e-13, atol=1e-13)


def test_mix_keeps_dtype_and_several_are_in_flight(ranks: RankPool) -> None:
    weights = [torch.roll(torch.eye(4), k, 0).double() * 0.5 + torch.eye(4).double() * 0.5 for k in (1, 2, 3)]

    def fn(c: Communicator) -> list[Tensor]:
        blocks = [own(rows_of(4, dtype=torch.float32, seed=k), c) for k in range(3)]
        handles = [c.mix(block, w, async_op=True) for block, w in zip(blocks, weights, strict=True)]
        for handle in reversed(handles):
            handle.wait()
        return blocks

    for layout in ((1, 4), (2, 2), (4, 1)):
        per_rank = on_layout(ranks, layout, fn)
        for k in range(3):
            mixed = torch.cat([blocks[k] for blocks in per_rank])
            assert mixed.dtype == torch.float32
            expected = weights[k] @ rows_of(4, dtype=torch.float32, seed=k).double()
            torch.testing.assert_close(mixed.double(), expected, rtol=1e-6, atol=1e-6)


def test_bytes_of_mixing_do_not_depend_on_the_layout(ranks: RankPool) -> None:
    """On a ring every replica sends its row twice, wherever its neighbours are."""
    ring = (torch.roll(torch.eye(6), 1, 0) + torch.roll(torch.eye(6), -1, 0) + torch.eye(6)).double() / 3

    def fn(c: Communicator) -> tuple[int, int]:
        block = own(rows_of(6), c)
        for _ in range(3):
            c.mix(block, ring)
        return c.traffic.bytes_sent, c.traffic.rounds

    for layout in ((1, 6), (2, 3), (3, 2), (6, 1)):
        assert on_layout(ranks, layout, fn) == [(3 * 2 * D * 8, 0)] * layout[0]


def test_bytes_of_uneven_mixing_are_not_lost(ranks: RankPool) -> None:
    """Where only some replicas send, the bytes of a rank's replicas sum up to what was sent, over many calls."""
    star = torch.eye(4).double()
    star[0] = 0.25  # everybody sends to replica 0

    def fn(c: Communicator) -> int:
        block = own(rows_of(4, d=1, dtype=torch.bfloat16), c)
        for _ in range(8):
            c.mix(block, star)
        return c.traffic.bytes_sent * c.replicas_per_rank

    total = 8 * 3 * 2
    for layout in ((1, 4), (2, 2), (4, 1)):
        assert sum(on_layout(ranks, layout, fn)) == total, layout


# ------------------------------------------------------------------------------------------------------------- exchange


@pytest.mark.parametrize("packed", [0, 150, 2**20])
@pytest.mark.parametrize("layout", [(1, 4), (2, 2), (4, 1)], ids=str)
def test_exchange_of_unequal_tensors_in_both_directions(ranks: RankPool, layout: tuple[int, int], packed: int) -> None:
    """Each edge has a shape and a dtype of its own; several exchanges are in flight and end in any order."""

    def message(i: int, j: int, k: int) -> Tensor:
        dtype = (torch.float64, torch.float32, torch.uint8, torch.int64)[(i + j + k) % 4]
        return torch.full((i + 1, 2 * j + k + 1), 100 * k + 10 * i + j).to(dtype)

    def fn(c: Communicator) -> int:
        c._packed = packed
        pending: list[tuple[Handle, dict[tuple[int, int], Tensor], int]] = []
        for k in range(4):
            edges = [(i, j) for i in range(4) for j in range(4) if (i + 2 * j + k) % 3]
            sends = {(i, j): message(i, j, k) for i, j in edges if i in c.local_replicas}
            receives = {(i, j): torch.zeros_like(message(i, j, k)) for i, j in edges if j in c.local_replicas}
            pending.append((c.exchange(sends, receives, async_op=True), receives, k))
        checked = 0
        for handle, receives, k in reversed(pending):
            handle.wait()
            for (i, j), buffer in receives.items():
                assert torch.equal(buffer, message(i, j, k)), (i, j, k)
                checked += 1
        return checked

    everything = sum((i + 2 * j + k) % 3 > 0 for i in range(4) for j in range(4) for k in range(4))
    assert sum(on_layout(ranks, layout, fn)) == everything


def test_exchange_between_some_ranks_leaves_the_others_alone(ranks: RankPool) -> None:
    """Ranks without a message need not call; what they send later still arrives."""

    def fn(c: Communicator) -> Tensor:
        received = torch.zeros(3)
        if c.rank in (0, 1):  # three times between these two alone
            for _ in range(3):
                other = 1 - c.rank
                c.exchange({(c.rank, other): torch.ones(3)}, {(other, c.rank): torch.zeros(3)})
        right, left = (c.rank + 1) % 3, (c.rank - 1) % 3
        c.exchange({(c.rank, right): torch.full((3,), float(c.rank))}, {(left, c.rank): received})
        return received

    results = on_layout(ranks, (3, 1), fn)
    assert [r.tolist() for r in results] == [[float((k - 1) % 3)] * 3 for k in range(3)]


def test_exchange_of_one_direction(ranks: RankPool) -> None:
    def fn(c: Communicator) -> tuple[list[float], int]:
        buffer = torch.zeros(1000)
        if c.rank == 0:
            c.exchange({(0, 1): torch.ones(1000)}, {})
        else:
            c.exchange({}, {(0, 1): buffer})
        return buffer.unique().tolist(), c.traffic.bytes_sent

    assert on_layout(ranks, (2, 1), fn) == [([0.0], 4000), ([1.0], 0)]


def test_exchange_with_itself_costs_nothing() -> None:
    c, buffer = Communicator(2), torch.zeros(3)
    c.exchange({(1, 1): torch.ones(3)}, {(1, 1): buffer})
    assert buffer.tolist() == [1, 1, 1]
    assert c.traffic.bytes_sent == 0


def test_exchange_amid_collectives(ranks: RankPool) -> None:
    """Messages of an exchange under way are not mixed up with means that are made meanwhile."""

    def fn(c: Communicator) -> tuple[Tensor, Tensor]:
        other = 1 - c.rank
        buffer, block = torch.zeros(5), torch.full((1, 5), float(c.rank))
        handle = c.exchange({(c.rank, other): torch.full((5,), 7.0 + c.rank)}, {(other, c.rank): buffer}, async_op=True)
        c.mean(block)
        handle.wait()
        return buffer, block

    for rank, (buffer, block) in enumerate(on_layout(ranks, (2, 1), fn)):
        assert buffer.tolist() == [7.0 + 1 - rank] * 5
        assert block.tolist() == [[0.5] * 5]


# ----------------------------------------------------------------------------------- broadcast, gather, any, own groups


@pytest.mark.parametrize("layout", [(1, 3), (2, 1), (2, 2), (3, 2)])
def test_broadcast_from_every_replica(ranks: RankPool, layout: tuple[int, int]) -> None:
    n = layout[0] * layout[1]

    def fn(c: Communicator) -> list[Tensor]:
        blocks = [own(rows_of(n), c) for _ in range(n)]
        for source, block in enumerate(blocks):
            c.broadcast(block, source, async_op=source % 2 == 0).wait()
        return blocks

    for blocks in on_layout(ranks, layout, fn):
        for source, block in enumerate(blocks):
            assert torch.equal(block, rows_of(n)[source].expand_as(block))


def test_gather_and_any(ranks: RankPool) -> None:
    def fn(c: Communicator) -> Any:
        told = c.any(*(c.rank == who for who in range(3)))
        return c.gather({"rank": c.rank, "list": [None] * c.rank}), told, c.any(False), c.traffic.bytes_sent

    for gathered, told, nobody, sent in on_layout(ranks, (3, 1), fn):
        assert gathered == [{"rank": r, "list": [None] * r} for r in range(3)]
        assert told == [True] * 3
        assert nobody == [False]
        assert sent == 0
    alone = Communicator(2)
    assert (alone.gather("x"), alone.any(True, False)) == (["x"], [True, False])


def test_own_groups_do_not_meet_the_default_group(ranks: RankPool) -> None:
    """A collective of somebody else's on the default group, amid ours, changes nothing."""

    def fn(c: Communicator) -> tuple[float, float]:
        block, other = torch.full((1, 4), float(c.rank)), torch.full((4,), 10.0 + c.rank)
        if c.rank == 0:
            handle, work = c.mean(block, async_op=True), dist.all_reduce(other, async_op=True)
        else:
            work, handle = dist.all_reduce(other, async_op=True), c.mean(block, async_op=True)
        handle.wait()
        work.wait()
        return block[0, 0].item(), other[0].item()

    assert on_layout(ranks, (2, 1), fn) == [(0.5, 21.0)] * 2


def test_two_communicators_do_not_meet(ranks: RankPool) -> None:
    def fn(first: Communicator) -> tuple[float, float]:
        second = Communicator(1, timeout=timedelta(seconds=20))
        a, b = torch.full((1, 2), float(first.rank)), torch.full((1, 2), 10.0 * first.rank)
        order = [(first, a), (second, b)] if first.rank == 0 else [(second, b), (first, a)]
        for handle in [c.mean(block, async_op=True) for c, block in order]:
            handle.wait()
        second.close()
        return a[0, 0].item(), b[0, 0].item()

    assert on_layout(ranks, (2, 1), fn) == [(0.5, 5.0)] * 2


def test_close_gives_groups_back(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> tuple[int, int, bool]:
        def count() -> int:
            return len(dist.distributed_c10d._world.pg_map)

        before = count()
        c = Communicator(1)
        c.mean(torch.ones(1, 2), 2)
        during = count()
        c.close()
        c.close()  # again does nothing
        after = count()
        block = torch.full((1, 1), float(rank))
        dist.all_reduce(block)  # the default group works on
        return during - before, after - before, block.item() == 6

    for made, left, works in ranks.run(4, fn, timeout=40):
        assert made == 2  # all ranks, and this rank's pair
        assert left == 0
        assert works


def test_close_after_the_default_group_has_gone(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> bool:
        c = Communicator(1)
        dist.destroy_process_group()
        c.close()
        return dist.is_initialized()

    assert ranks.run(2, fn, timeout=30) == [False, False]


def test_rounds_are_the_algorithms_and_seconds_are_measured(ranks: RankPool) -> None:
    def fn(c: Communicator) -> tuple[int, float, float]:
        at_start = c.traffic.seconds_blocked
        dist.barrier()
        if c.rank == 1:
            time.sleep(0.2)
        c.mean(torch.zeros(1, 1))
        return c.traffic.rounds, at_start, c.traffic.seconds_blocked

    fast, slow = on_layout(ranks, (2, 1), fn)
    assert fast[0] == slow[0] == 0
    assert fast[1] == slow[1] == 0  # nobody has waited for anything to train
    assert fast[2] > 0.1  # waited for the other; a slow machine only makes it longer
    assert slow[2] > 0


# ------------------------------------------------------------------------------------------------------------- failures

OPERATIONS: dict[str, Callable[[Communicator], Any]] = {
    "averaging": lambda c: c.mean(torch.zeros(1, 4)),
    "async": lambda c: c.mean(torch.zeros(1, 4), async_op=True).wait(),
    "average": lambda c: c.average(torch.zeros(1, 4)),
    "broadcast": lambda c: c.broadcast(torch.zeros(1, 4), source=2),
    "gather": lambda c: c.gather(c.rank),
    "agreement": lambda c: c.any(False),
    "mix": lambda c: c.mix(torch.zeros(1, 4), torch.full((3, 3), 1 / 3)),
    "exchange": lambda c: c.exchange({(c.rank, 2): torch.zeros(4)}, {(2, c.rank): torch.zeros(4)}),
}


def attempt(c: Communicator, operation: str) -> str:
    try:
        OPERATIONS[operation](c)
    except CommunicationError as error:
        return str(error)
    return "no error"


@pytest.mark.parametrize("operation", ["averaging", "exchange"])
def test_a_rank_that_does_not_come(ranks: RankPool, operation: str) -> None:
    """The others learn within the timeout, each naming itself; the rank that stayed away goes on."""

    def fn(rank: int, world_size: int) -> str:
        c = Communicator(1, timeout=timedelta(seconds=1))
        if rank == 2:
            time.sleep(2)
            return "away"
        return attempt(c, operation)

    first, second, third = ranks.run(3, fn, timeout=20)
    assert third == "away"
    for rank, text in enumerate((first, second)):
        assert text.startswith(f"Rank {rank}: "), text
        assert "2" in re.search(r"with rank\(s\) ([\d, ]+) failed", text)[1], text  # type: ignore[index]
        assert "timeout 1 s" in text


def test_a_rank_that_dies(ranks: RankPool) -> None:
    """Whatever the others do with it fails, and says where."""

    def fn(rank: int, world_size: int) -> dict[str, str]:
        communicators = {operation: Communicator(1, timeout=timedelta(seconds=2)) for operation in OPERATIONS}
        if rank == 2:
            os._exit(3)
        return {operation: attempt(c, operation) for operation, c in communicators.items()}

    results = ranks.run(3, fn, timeout=60, expect_dead={2})
    assert results[2] is None
    for rank in (0, 1):
        for operation, text in results[rank].items():
            name = {"async": "averaging", "average": "averaging", "mix": "exchange"}.get(operation, operation)
            assert text.startswith(f"Rank {rank}: {name} with rank(s) "), (operation, text)
            assert "2" in re.search(r"with rank\(s\) ([\d, ]+) failed", text)[1], text  # type: ignore[index]


def test_a_rank_that_raises(ranks: RankPool) -> None:
    """Its own error comes first, and the errors of the others point to it."""

    def fn(rank: int, world_size: int) -> None:
        c = Communicator(1, timeout=timedelta(seconds=15))
        if rank == 1:
            raise ZeroDivisionError("the first error")
        c.mean(torch.zeros(1, 4))

    with pytest.raises(RankError) as caught:
        ranks.run(2, fn, timeout=30)
    assert "the first error" in caught.value.errors[1]
    assert "CommunicationError: Rank 0: averaging with rank(s) 1 failed" in caught.value.errors[0]


def test_a_rank_that_is_missing_at_set_up(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> str:
        if rank == 1:
            time.sleep(2.5)
            return "away"
        try:
            Communicator(1, timeout=timedelta(seconds=0.6))
        except CommunicationError as error:
            return str(error)
        return "no error"

    here, _ = ranks.run(2, fn, timeout=20)
    assert here.startswith("Rank 0: set up of process groups with rank(s) 1 failed"), here


def test_a_failed_handle_does_not_pretend_to_have_finished(ranks: RankPool) -> None:
    def fn(rank: int, world_size: int) -> list[bool]:
        c = Communicator(1, timeout=timedelta(seconds=0.6))
        if rank == 1:
            time.sleep(1.5)
            return []
        handle = c.mean(torch.zeros(1, 4), async_op=True)
        failed = []
        for _ in range(2):
            try:
                handle.wait()
                failed.append(False)
            except CommunicationError:
                failed.append(True)
        return failed

    assert ranks.run(2, fn, timeout=20)[0] == [True, True]


# --------------------------------------------------------------------------------------------------------------- gossip


@pytest.mark.parametrize("piece", [2, 3, 100])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gossip_is_the_same_to_the_last_bit_in_every_layout(ranks: RankPool, piece: int, dtype: torch.dtype) -> None:
    """However rows are cut into pieces, and also over several blocks."""
    n = 4
    weights = torch.tensor([[0.4, 0.3, 0.0, 0.3], [0.3, 0.4, 0.3, 0.0], [0.0, 0.3, 0.4, 0.3], [0.3, 0.0, 0.3, 0.4]]).double()

    def fn(c: Communicator) -> tuple[list[Tensor], Tensor]:
        c._piece = piece
        blocks = [own(rows_of(n, dtype=dtype, seed=k), c) for k in range(2)]
        hood = Neighbourhood.of_matrix(c.local_replicas, weights)
        for _ in range(3):
            moved = c.gossip(blocks, hood, factor=0.7, measure=True)
        assert c.shared == c.started == 3
        assert moved is not None
        return blocks, moved

    results = {layout: on_layout(ranks, layout, fn) for layout in [(1, 4), (2, 2), (4, 1)]}
    first = [torch.cat([blocks[k] for blocks, _ in results[1, 4]]) for k in range(2)]
    for ranks_of in results.values():
        for k in range(2):
            assert torch.equal(torch.cat([blocks[k] for blocks, _ in ranks_of]), first[k])
        torch.testing.assert_close(torch.cat([moved for _, moved in ranks_of]), results[1, 4][0][1], rtol=1e-6, atol=0)
    if dtype == torch.float32:
        step = torch.eye(n, dtype=torch.float64) + 0.7 * (weights - torch.eye(n, dtype=torch.float64))
        expected = step @ step @ step @ rows_of(n, seed=0)
        torch.testing.assert_close(first[0].double(), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("piece", [3, 2**22])
@pytest.mark.parametrize(("layout", "group"), [((4, 1), 2), ((6, 1), 3), ((8, 1), 2), ((4, 2), 4), ((2, 2), 2)], ids=str)
def test_a_mean_in_two_levels_is_the_mean(ranks: RankPool, layout: tuple[int, int], group: int, piece: int) -> None:
    """Where it has been told of blocks, whatever is left over of slices; blocks of one rank have no level of their own."""
    n = layout[0] * layout[1]

    def fn(c: Communicator) -> tuple[Tensor, Tensor, list[str]]:
        levels.PIECE, calls = piece, []
        names = ["all_reduce", "all_to_all_single", "all_gather"]
        real = {name: getattr(dist, name) for name in names}
        c.prepare(group)
        c.process_group(n)
        try:
            for name in names:
                setattr(dist, name, lambda *args, name=name, **kwargs: (calls.append(name), real[name](*args, **kwargs))[1])
            blocks = [own(rows_of(n, d=10, seed=k), c) for k in range(2)]
            c.mean(blocks[0])
            c.mean(blocks[1], async_op=True).wait()
            return blocks[0], blocks[1], calls
        finally:
            levels.PIECE = 2**22
            for name, function in real.items():
                setattr(dist, name, function)

    results = on_layout(ranks, layout, fn)
    for k in range(2):
        torch.testing.assert_close(
            torch.cat([r[k] for r in results]), grouped_mean(rows_of(n, d=10, seed=k), n), rtol=0, atol=1e-12
        )
    for _, _, calls in results:
        assert len({tuple(calls) for *_, calls in results}) == 1
        assert ("all_to_all_single" in calls) == (group > layout[1])


@pytest.mark.parametrize("packed", [0, 2**20])
@pytest.mark.parametrize("layout", [(4, 2), (2, 4), (8, 1)], ids=str)
@pytest.mark.parametrize("topology", ["ring", "torus", "exponential"])
def test_messages_of_a_pair_need_no_tags(ranks: RankPool, topology: str, layout: tuple[int, int], packed: int) -> None:
    """NCCL has none: it takes the messages between two ranks in the order of the calls on either side."""
    graph, blocks = make(topology, 8), [rows_of(8, seed=k) for k in range(2)]

    def fn(c: Communicator) -> tuple[Tensor, list[list[Tensor]], tuple[Edge, ...]]:
        c._packed, operation = packed, dist.P2POp
        dist.P2POp = lambda op, tensor, peer, group, tag: operation(op, tensor, peer, group, 0)  # type: ignore[misc, assignment]
        try:
            rows = [own(block, c) for block in blocks]
            hood = Neighbourhood.of(c.local_replicas, lambda i: graph.weights(i, 0), lambda j: graph.listeners(j, 0))
            received = [[row.clone() for row in of] for of in c.share(rows, hood).wait()]
            c.gossip(rows[:1], hood)
            return rows[0], received, hood.incoming
        finally:
            dist.P2POp = operation  # type: ignore[misc]

    results = on_layout(ranks, layout, fn)
    torch.testing.assert_close(torch.cat([mixed for mixed, _, _ in results]), graph.matrix(0) @ blocks[0])
    for _, received, incoming in results:
        for block, rows in zip(blocks, received, strict=True):
            assert all(torch.equal(row, block[source]) for row, (source, _) in zip(rows, incoming, strict=True))


def test_notices_spread_with_messages_and_the_least_one_wins(ranks: RankPool) -> None:
    chain = {0: [1], 1: [0, 2], 2: [1, 3], 3: [2]}

    def fn(c: Communicator) -> list[int]:
        heard = []
        hood = Neighbourhood.of(
            c.local_replicas, lambda i: {i: 1 - 0.3 * len(chain[i]), **dict.fromkeys(chain[i], 0.3)}, chain.__getitem__
        )
        if c.rank == 0:
            c.notice = 70
        if c.rank == 3:
            c.notice = 80
        for _ in range(4):
            c.share([torch.zeros(1, 3)], hood).wait()
            heard.append(c.notice)
        return heard

    nothing = NO_NOTICE
    assert on_layout(ranks, (4, 1), fn) == [
        [70, 70, 70, 70],
        [70, 70, 70, 70],
        [80, 70, 70, 70],
        [80, 80, 70, 70],
    ]
    assert nothing > 2**60


def test_rows_without_values_carry_notices(ranks: RankPool) -> None:
    def fn(c: Communicator) -> int:
        c.notice = 70 + c.rank
        hood = Neighbourhood.of_matrix(c.local_replicas, torch.full((2, 2), 0.5))
        c.gossip([torch.zeros(1, 0)], hood)
        return c.notice

    assert on_layout(ranks, (2, 1), fn) == [70, 70]


@pytest.mark.parametrize(("packed", "messages"), [(8 * D + 14, 1), (8 * D + 13, 3)], ids=["short", "long"])
def test_short_messages_between_two_ranks_travel_as_one(ranks: RankPool, packed: int, messages: int) -> None:
    """Two rows of other types and the notice: in one message, or in three where they are longer together."""
    blocks = [rows_of(4), rows_of(4, dtype=torch.bfloat16, seed=1)[:, :3]]

    def fn(c: Communicator) -> tuple[list[int], list[Tensor], list[list[Tensor]], int]:
        c._packed, real, sizes = packed, dist.batch_isend_irecv, []

        def batch(operations: list[Any]) -> Any:
            sizes.extend(o.tensor.nbytes for o in operations if o.op is dist.isend)
            return real(operations)

        graph, dist.batch_isend_irecv = make("one_peer_exponential", 4), batch
        hood = Neighbourhood.of(c.local_replicas, lambda i: graph.weights(i, 0), lambda j: graph.listeners(j, 0))
        try:
            c.notice = 70 + c.rank
            rows = [own(block, c) for block in blocks]
            received = c.share(rows, hood).wait()
            return sizes, rows, received, c.notice
        finally:
            dist.batch_isend_irecv = real

    graph = make("one_peer_exponential", 4)
    for rank, (sizes, rows, received, notice) in enumerate(on_layout(ranks, (4, 1), fn)):
        (neighbour,) = graph.neighbors(rank, 0)
        assert len(sizes) == messages
        assert sum(sizes) == 8 * D + 2 * 3 + 8  # the rows, and eight bytes of notice
        assert notice == 70 + min(rank, neighbour)
        for block, (mine,), (theirs,) in zip(blocks, rows, received, strict=True):
            assert torch.equal(mine, block[rank])
            assert torch.equal(theirs, block[neighbour])


def test_rows_of_all_are_gathered(ranks: RankPool) -> None:
    def fn(c: Communicator) -> tuple[Tensor, int]:
        return c.gather_rows(own(rows_of(4), c)), c.traffic.bytes_sent

    for layout in [(1, 4), (2, 2), (4, 1)]:
        for rows, sent in on_layout(ranks, layout, fn):
            assert torch.equal(rows, rows_of(4))
            assert sent == 3 * D * 8
