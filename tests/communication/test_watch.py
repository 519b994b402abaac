"""Who is at fault: a rank with an error of its own, one that is gone, one that is slow, or nobody."""

from __future__ import annotations

import gc
import os
import pickle
import threading
import time
import weakref
from datetime import timedelta
from pathlib import Path
from typing import Any

import pytest
import torch.distributed as dist

from lightning_distopt.communication import CommunicationError, Failure, Watch, first_line
from tests.pool import RankPool


def watch_of(rank: int, world_size: int) -> Watch:
    """Return a watch that decides fast."""
    store = dist.distributed_c10d._get_default_store()
    watch = Watch(store, rank, world_size, timedelta(seconds=9), interval=0.1, patience=1.0)
    watch.position = lambda: (7, 40 + rank)
    return watch


def both(watch: Watch, folder: str, name: str) -> None:
    """Wait until all ranks have come here, without a collective."""
    (Path(folder) / f"{name}{watch.rank}").touch()
    while len(list(Path(folder).glob(f"{name}*"))) < watch.world_size:
        time.sleep(0.01)


def fault(rank: int, world_size: int, folder: str, kind: str) -> Any:
    watch = watch_of(rank, world_size)
    try:
        both(watch, folder, "start")
        if rank == 1:
            if kind == "raises":
                watch.report(ValueError("something is wrong\nand more"))
                (Path(folder) / "reported").touch()
            if kind == "dies":
                time.sleep(0.5)  # so that its last sign of life tells where it is
                (Path(folder) / "reported").touch()
                os._exit(3)
            if kind == "is slow":
                time.sleep(4)
                with pytest.raises(CommunicationError) as late, watch.guard("averaging", range(world_size)):
                    raise AssertionError("is not reached")
                return str(late.value)
            return None
        while kind != "is slow" and not (Path(folder) / "reported").exists():
            time.sleep(0.01)
        with pytest.raises(CommunicationError) as caught, watch.guard("averaging", range(world_size)):
            raise RuntimeError("connection closed by somebody\nand a long explanation")
        with pytest.raises(CommunicationError) as later, watch.guard("agreement", range(world_size)):
            raise AssertionError("is not reached")
        return str(caught.value), str(later.value), watch.failure
    finally:
        watch.stop(failed=True)


@pytest.mark.parametrize(
    ("kind", "what"),
    [
        ("raises", "raised ValueError: something is wrong"),
        ("dies", "shows no sign of life for 1 s"),
        ("is slow", "is alive, but slower than the timeout"),
    ],
)
def test_the_rank_at_fault_is_named(ranks: RankPool, tmp_path: Path, kind: str, what: str) -> None:
    results = ranks.run(3, fault, str(tmp_path), kind, timeout=30, expect_dead={1} if kind == "dies" else ())
    for rank in (0, 2):
        first, later, failure = results[rank]
        others = "1, 2" if rank == 0 else "0, 1"
        assert first == (
            f"Rank {rank}: averaging with rank(s) {others} failed in round 7 (timeout 9 s): rank 1 {what} "
            "(in round 7, after 41 steps). (connection closed by somebody)"
        )
        assert later == f"Rank {rank}: no agreement in round 7, for rank 1 {what} (in round 7, after 41 steps)."
        assert failure == Failure((1,), what, "in round 7, after 41 steps")
    if kind == "is slow":
        assert results[1] == f"Rank 1: no averaging in round 7, for this rank {what} (in round 7, after 41 steps)."


@pytest.mark.parametrize(
    ("ranks_at_fault", "rank", "who"),
    [
        ((1,), 1, "this rank"),
        ((1,), 0, "rank 1"),
        ((1, 2), 1, "this rank and rank 2"),
        ((0, 1, 2), 1, "this rank and ranks 0, 2"),
    ],
)
def test_a_rank_at_fault_is_told_that_it_is_this_rank(ranks_at_fault: tuple[int, ...], rank: int, who: str) -> None:
    assert Failure(ranks_at_fault, "is late", "in round 2").seen_by(rank) == f"{who} is late (in round 2)"


def test_before_there_is_a_connection_no_round_is_named() -> None:
    watch = Watch(None, 1, 3, timedelta(seconds=8))
    assert watch.explain("communication", range(3), RuntimeError("1/3 clients joined.")) == (
        "Rank 1: communication with rank(s) 0, 2 failed while connecting (timeout 8 s): not all of them have started in time, "
        "or they can't reach one another; look for the first error on the other ranks. (1/3 clients joined.)"
    )


def both_raise(rank: int, world_size: int, folder: str) -> str:
    watch = watch_of(rank, world_size)
    if rank == 0:
        watch.report(ValueError("mine"))
    both(watch, folder, "reported")
    while watch.failure is None:  # it stands in the store
        time.sleep(0.01)
    watch.stop(failed=True)
    return watch._read("left/1") if rank == 0 else ""


def test_a_host_that_raised_is_told_that_others_have_left(ranks: RankPool, tmp_path: Path) -> None:
    """Else it would wait for them until its patience ends: it is not gone only because it is at fault."""
    assert ranks.run(2, both_raise, str(tmp_path), timeout=30)[0] == "1"


def healthy(rank: int, world_size: int, folder: str) -> tuple[Any, str]:
    """All are alive and all have failed: nobody is to blame."""
    watch = watch_of(rank, world_size)
    try:
        both(watch, folder, "start")
        text = watch.explain("averaging", range(world_size), RuntimeError("no route to host"))
        both(watch, folder, "end")
        return watch.failure, text
    finally:
        watch.stop()


def test_nobody_is_blamed_where_all_are_alive(ranks: RankPool, tmp_path: Path) -> None:
    for failure, text in ranks.run(2, healthy, str(tmp_path), timeout=30):
        assert failure is None
        assert "one of them has ended, or is slower than the timeout" in text


def first_one_wins(rank: int, world_size: int, folder: str) -> Any:
    watch = watch_of(rank, world_size)
    try:
        both(watch, folder, "start")
        if rank == 1:
            watch.report(ValueError("cause"))
            (Path(folder) / "reported").touch()
        while not (Path(folder) / "reported").exists():
            time.sleep(0.01)
        watch.report(KeyError("consequence"))
        both(watch, folder, "end")
        return watch.failure
    finally:
        watch.stop()


def test_the_first_error_counts(ranks: RankPool, tmp_path: Path) -> None:
    cause = Failure((1,), "raised ValueError: cause", "in round 7, after 41 steps")
    assert ranks.run(3, first_one_wins, str(tmp_path), timeout=30) == [cause] * 3


def one_after_the_other(rank: int, world_size: int, folder: str) -> list[Any]:
    found = []
    for number in range(2):
        watch = watch_of(rank, world_size)
        both(watch, folder, f"start-{number}-")
        if rank == 0 and number == 0:
            watch.report(ValueError("in the first training"))
        both(watch, folder, f"end-{number}-")
        found.append(watch.diagnose() if number == 0 else watch.failure)
        watch.stop()
    return found


def with_a_bug(rank: int, world_size: int, folder: str) -> Any:
    """The thread of rank 1 fails by itself: that is not the store."""
    watch = watch_of(rank, world_size)
    hook, raised = threading.excepthook, []
    threading.excepthook = lambda arguments: raised.append(arguments.exc_type)
    try:
        both(watch, folder, "start")
        if rank == 1:
            thread = watch._thread
            assert thread is not None
            watch.position = lambda: (1 // 0, 0)
            failure = watch.diagnose()
            thread.join(10)
        both(watch, folder, "end")
        return (failure, raised) if rank == 1 else None
    finally:
        threading.excepthook = hook
        watch.stop()


def test_an_error_of_the_watch_is_not_taken_for_one_of_the_store(ranks: RankPool, tmp_path: Path) -> None:
    assert ranks.run(2, with_a_bug, str(tmp_path), timeout=30)[1] == (None, [ZeroDivisionError])


def test_each_training_has_its_own(ranks: RankPool, tmp_path: Path) -> None:
    for first, second in ranks.run(2, one_after_the_other, str(tmp_path), timeout=30):
        assert first is not None
        assert second is None


def test_a_watch_goes_to_a_spawned_process_as_a_new_one() -> None:
    assert pickle.loads(pickle.dumps(Watch())).world_size == 1


def test_an_error_of_another_kind_passes() -> None:
    with pytest.raises(KeyError), Watch().guard("averaging", []):
        raise KeyError("of the body")


def test_the_first_line_of_an_error() -> None:
    assert first_line(ValueError("\n one\ntwo")) == "one"
    assert first_line(RuntimeError()) == "RuntimeError"  # says nothing else
    assert len(first_line(RuntimeError("x" * 1000))) == 300


def test_a_failure_holds_nothing() -> None:
    """Else the group of the operation, and its connections, would last until garbage is collected, and others wait so long."""

    class Handle:
        pass

    handles: list[weakref.ref[Handle]] = []

    def kept() -> Handle:
        handle = Handle()
        handles.append(weakref.ref(handle))
        return handle

    def operation() -> None:
        handle = kept()
        raise RuntimeError(f"connection closed by peer of {handle}")

    def average() -> None:
        group = kept()
        with Watch().guard("averaging", [1]):
            operation()
        del group

    gc.disable()
    try:
        try:
            average()
        except CommunicationError as error:
            assert "connection closed by peer" in str(error.__cause__)
            assert handles[1]() is None, "what the operation held, while the error is handled"
        assert handles[0]() is None, "what its caller held, after that"
    finally:
        gc.enable()
