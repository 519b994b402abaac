"""What `benchmarks.time_to_accuracy` computes from measurements, and that all its contenders train. How fast, no test says."""

from __future__ import annotations

import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from torch import nn

from benchmarks import contenders, network, time_to_accuracy
from benchmarks.contenders import ALONE, DDP, LOCAL, ONE_PEER_OVERLAPPED, OURS, PEERS, POWER_SGD, Contender
from benchmarks.contenders.case import Case, Store, attempt, messages
from benchmarks.contenders.measure import Link, Message, curve, speed
from benchmarks.contenders.task import Workload, wide_network
from benchmarks.report import Report
from benchmarks.time_to_accuracy import MIDDLE, SLOW, Settings, bars, records, table

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="benchmarks fork their processes")


def _network() -> nn.Module:
    return nn.Sequential(nn.Flatten(), nn.Linear(256, 16), nn.ReLU(), nn.Linear(16, 10))


TINY = Workload("tiny", _network, batch=8, lr=0.1, steps=32, warmup=4, every=16, num_train=640, num_test=200)
BY_NAME = {c.name: c for c in (*PEERS, *OURS)}
HIERARCHICAL = next(c for c in OURS if c.blocks > 1)
POST_LOCAL = next(c for c in OURS if c.post_local)
CHOCO = next(c for c in OURS if c.name == "CHOCO sign, H = 8")


# -------------------------------------------------------------------------------------------------------------- contenders
def _curves(names: list[str]) -> dict[str, list[float]]:
    return {name: curve(None, TINY, 2, BY_NAME[name], seed=3, timeout=60)["accuracy"] for name in names}


@needs_fork
@pytest.mark.slow
def test_every_contender_trains_and_the_same_methods_agree() -> None:
    found = _curves([c.name for c in BY_NAME.values() if c.installed])
    assert all(len(curve) == 2 and curve[-1] > 0.15 for curve in found.values())  # guessing is right in a tenth
    same = [c for c in BY_NAME.values() if c.learns_as]
    assert len(same) == 3 and all(found[c.name] == found[c.learns_as] for c in same if c.installed)
    assert len({tuple(curve) for curve in found.values()}) > 8


@needs_fork
def test_speed_of_loopback_counts_whole_cycles() -> None:
    found = speed(None, TINY, 2, LOCAL, window=0.01, timeout=60)
    assert found["steps"] % 8 == 0 and found["seconds"] > 0
    d = sum(p.numel() for p in _network().parameters())
    assert found["traffic"] == pytest.approx(4 * d / 8, rel=0.01)  # 2 (n - 1) / n d values in a round; rows are aligned
    assert found["sent"] is None  # all share the interface


@needs_fork
@pytest.mark.skipif(bool(network.unavailable()), reason=network.unavailable())
def test_interface_has_sent_what_is_counted() -> None:
    workload = replace(TINY, network=lambda: wide_network(100))
    with Link("1000mbit").open(2) as net:
        found = speed(net, workload, 2, LOCAL, window=0.01, timeout=60)
    assert found["sent"] == pytest.approx(found["traffic"], rel=0.05)


def test_cycles() -> None:
    assert [c.cycle(4) for c in (DDP, LOCAL, HIERARCHICAL, ONE_PEER_OVERLAPPED)] == [1, 8, 16, 2]
    assert ONE_PEER_OVERLAPPED.cycle(8) == 3


def test_somebody_elses_failure_is_noted_and_ours_is_raised() -> None:
    def fail() -> dict[str, Any]:
        raise RuntimeError("Rank 0 failed:\n  a line\nValueError: the reason")

    assert attempt(POWER_SGD, fail) == {"failed": "does not run: ValueError: the reason"}
    assert attempt(replace(POWER_SGD, needs="a_module_that_nobody_has"), fail) == {"failed": "not installed"}
    for contender in (DDP, LOCAL):
        with pytest.raises(RuntimeError, match="the reason"):
            attempt(contender, fail)


# ---------------------------------------------------------------------------------------------------- what follows from it
def _case(link: Link, seconds: dict[str, float], steps: dict[str, int], sent: float = 1e6, **options: Any) -> Case:
    """Return a case of four ranks in which contenders need so many seconds for a step, and so many steps to learn."""
    chosen = [c for c in (*PEERS, *OURS) if c.name in steps]
    case = Case(time_to_accuracy.WIDE, 4, link, chosen, repeats=2, **options)
    for name, each in seconds.items():
        case.speeds[name] = [{"seconds": each, "traffic": sent, "sent": sent}] * 2
        case.compute[name] = [seconds[ALONE.name]] * 2
    for name, learned in steps.items():
        grid = list(range(100, 1100, 100))
        accuracy = [0.9 if step >= learned else 0.5 for step in grid]
        case.curves[name] = [{"steps": grid, "accuracy": accuracy}] * 3
        case.finals[name] = [accuracy[-1]] * 3
    return case


def test_time_to_accuracy_counts_the_dense_steps_as_those_of_ddp() -> None:
    seconds = {ALONE.name: 0.1, DDP.name: 3.0, POST_LOCAL.name: 0.5, POWER_SGD.name: 0.2}
    case = _case(MIDDLE, seconds, {DDP.name: 400, POST_LOCAL.name: 500, POWER_SGD.name: 2000})
    warmup = case.workload.warmup
    assert case.target == pytest.approx(0.895)
    assert case.times(DDP) == pytest.approx([1200.0] * 2)
    assert case.times(POST_LOCAL) == pytest.approx([3.0 * warmup + 0.5 * (500 - warmup)] * 2)
    assert case.axis(POWER_SGD, 100, 0) == pytest.approx(2 * 3.0 + 98 * 0.2)
    assert case.times(POWER_SGD) is None and case.steps(POWER_SGD) is None
    assert case.bytes_to_target(POST_LOCAL) == pytest.approx(500e6)
    assert "not reached" in table(case)


def test_who_misses_the_accuracy_is_trained_longer(monkeypatch: pytest.MonkeyPatch) -> None:
    """DDP ends at 80 %; one learns as much in as many steps, one in twice as many, one never, and one fails."""
    ends = {DDP.name: {10: 0.8}, LOCAL.name: {10: 0.796}, CHOCO.name: {10: 0.7, 20: 0.81}, POST_LOCAL.name: {10: 0.6, 20: 0.7}}
    trained: list[tuple[str, int, int]] = []

    def curve(net: None, workload: Workload, n: int, c: Contender, seed: int, timeout: float) -> dict[str, Any]:
        trained.append((c.name, workload.steps, seed))
        if c.name == POWER_SGD.name:
            raise RuntimeError("no")
        spread = 0.003 * (1 - 2 * seed) if c is LOCAL else 0.0  # below the goal with the second seed, above it in the mean
        return {"steps": [workload.steps], "accuracy": [ends[c.name][workload.steps] + spread]}

    monkeypatch.setattr("benchmarks.contenders.case.curve", curve)
    torchft = next(c for c in PEERS if c.learns_as == LOCAL.name)
    everybody = (DDP, POWER_SGD, replace(torchft, needs=None), LOCAL, POST_LOCAL, CHOCO)
    case = Case(replace(TINY, steps=10), 4, MIDDLE, everybody, repeats=1)
    case.speeds = {c.name: [{"seconds": 1.0, "traffic": 1, "sent": 1}] for c in everybody}
    case.train(Store(None), everybody, seeds=2, timeout=1)
    assert {name: steps for name, steps, seed in trained if seed == 1} == {
        DDP.name: 10,
        POWER_SGD.name: 10,
        LOCAL.name: 10,
        CHOCO.name: 20,
        POST_LOCAL.name: 20,
    }
    assert [case.steps(c) for c in (DDP, torchft, LOCAL, CHOCO, POST_LOCAL)] == [10, 10, 10, 20, None]
    assert case.finals[CHOCO.name] == [0.7] * 2 and case.failure(POWER_SGD) is not None


def test_expected_time_of_a_step() -> None:
    seconds = {ALONE.name: 0.2, DDP.name: 1.0, LOCAL.name: 0.6, HIERARCHICAL.name: 0.4, ONE_PEER_OVERLAPPED.name: 0.6}
    case = _case(
        replace(MIDDLE, across="10mbit"), seconds, dict.fromkeys([n for n in seconds if n != ALONE.name], 100), sent=4e6
    )
    size = 4 * case.parameters
    case.bare = {Message("all", size): [1.6] * 2, Message("blocks", size): [0.4] * 2}
    case.bare[Message("one_peer_exponential", 4_000_000)] = [0.5] * 2
    assert case.over_expected(LOCAL) == pytest.approx([0.6 / (0.2 + 1.6 / 8)] * 2)
    assert case.over_expected(HIERARCHICAL) == pytest.approx([0.4 / (0.2 + (1.6 + 3 * 0.4) / 16)] * 2)
    assert case.over_expected(ONE_PEER_OVERLAPPED) == pytest.approx([0.6 / 0.5] * 2)


@pytest.mark.parametrize(("name", "size"), [("EF-sign", 100), ("CHOCO sign", 150), ("CHOCO sign, H = 8", 1200)])
def test_size_of_messages(name: str, size: int) -> None:
    [(message, often)] = messages(BY_NAME[name], n=4, parameters=1000, sent=300.0)
    assert message.size == size and often == 1 / BY_NAME[name].sync_period


def _bars(*cases: Case) -> dict[str, tuple[float, bool]]:
    report = Report("time_to_accuracy")
    bars(cases, report)
    return {bar["name"].rpartition(": ")[2]: (bar["value"], bar["holds"]) for bar in report.bars}


def test_bars() -> None:
    seconds = {ALONE.name: 0.1, DDP.name: 3.0, POWER_SGD.name: 0.3, CHOCO.name: 0.15, LOCAL.name: 0.5}
    case = _case(MIDDLE, seconds, {DDP.name: 400, POWER_SGD.name: 500, CHOCO.name: 600, LOCAL.name: 400})
    case.bare = {m: [0.4] * 2 for c in (CHOCO, LOCAL) for m, _ in case.messages(c)}
    found = _bars(case)
    assert found[f"time of DDP over {CHOCO.name}"] == (pytest.approx(1200 / 90), True)
    dense = 2 * 3.0 + 498 * 0.3
    assert found[f"time of {POWER_SGD.name} over {CHOCO.name}"] == (pytest.approx(dense / 90), True)
    assert found[f"{LOCAL.name}, step over expected"] == (pytest.approx(0.5 / 0.15), False)
    assert found[f"{CHOCO.name}, step over expected"] == (pytest.approx(1.5), False)

    slow = _case(SLOW, seconds, {DDP.name: 400, POWER_SGD.name: 500, CHOCO.name: 2000, LOCAL.name: 400})
    slow.bare = case.bare
    steps = _bars(slow)  # CHOCO is faster, but has not learned as much
    assert steps[f"steps of {LOCAL.name} over {POWER_SGD.name}"] == (pytest.approx(0.3 / 0.5), False)


def test_bars_where_nobody_here_learns_enough() -> None:
    case = _case(MIDDLE, {ALONE.name: 0.1, DDP.name: 3.0, LOCAL.name: 0.5}, {DDP.name: 400, LOCAL.name: 2000})
    case.bare = {case.messages(LOCAL)[0][0]: [0.4] * 2}
    assert _bars(case)[f"time of DDP over {LOCAL.name}"] == (0.0, False)


def test_records_have_all_that_a_cost_model_asks_for() -> None:
    case = _case(Link("1000mbit", "10mbit"), {ALONE.name: 0.1, DDP.name: 3.0, CHOCO.name: 0.15}, {DDP.name: 1, CHOCO.name: 1})
    ddp, choco = records([case])
    assert ddp["strategy"] == "ddp: DDP" and choco["strategy"].startswith("choco: ") and ddp["sync_period"] == 1
    assert (choco["rate_mbit"], choco["across_mbit"], choco["replicas"]) == (1000.0, 10.0, 4)
    assert (choco["sync_period"], choco["topology"], choco["compressor"], choco["overlap"]) == (8, "ring", "sign", True)
    assert choco["compute_ms"] == pytest.approx(100) and choco["step_ms"] == pytest.approx(150)
    assert choco["bytes_per_step"] == 1e6 and choco["parameters"] == case.parameters


# ----------------------------------------------------------------------------------------------------------------- command
@needs_fork
def test_command(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    monkeypatch.setattr(
        time_to_accuracy,
        "QUICK",
        Settings((TINY,), (2,), (Link(),), (DDP, CHOCO), seeds=1, repeats=2, window=0.01, direct=(), equal=(), timeout=60),
    )
    files = {name: tmp_path / name for name in ("json", "records", "figure", "partial")}
    arguments = ["--quick", *(text for name, path in files.items() for text in (f"--{name}", str(path)))]
    time_to_accuracy.cli(arguments)
    shown = capsys.readouterr().out
    assert f"**{CHOCO.name}**" in shown and "ms a step" in shown

    result = json.loads(files["json"].read_text())
    assert [bar["name"] for bar in result["bars"]] == [
        f"time_to_accuracy: tiny, n = 2, loopback: {CHOCO.name}, step over expected"
    ]
    [case] = result["cases"]
    assert case["curves"]["DDP"][0]["steps"] == [16, 32] and len(case["speeds"]["DDP"]) == 2
    assert [record["sync_period"] for record in json.loads(files["records"].read_text())] == [1, 8]
    assert files["figure"].read_bytes().startswith(b"\x89PNG")

    def refuse(*_: Any) -> Any:
        raise AssertionError("measured again")

    monkeypatch.setattr(contenders.measure, "_team", refuse)
    time_to_accuracy.cli(arguments)  # goes on from what has been measured, which is everything
    assert capsys.readouterr().out.splitlines()[:8] == shown.splitlines()[:8]


def test_store_measures_what_it_has_not(tmp_path: Path) -> None:
    calls: list[int] = []

    def measure() -> int:
        calls.append(1)
        return 7

    make: Callable[[], Store] = lambda: Store(tmp_path / "partial")  # noqa: E731
    assert make().get(("a", 1), measure) == make().get(("a", 1), measure) == 7
    assert make().get(("a", 2), measure) == 7 and len(calls) == 2
    assert isinstance(DDP, Contender) and np.isfinite(time_to_accuracy.MARGIN)
