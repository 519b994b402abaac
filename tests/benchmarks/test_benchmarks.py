"""The harness's statistics, and that every benchmark runs and writes valid JSON. How fast anything is, no test says."""

from __future__ import annotations

import importlib.util
import itertools
import json
import os
import sys
import time
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from types import ModuleType
from typing import Any

import numpy as np
import pytest
from torch import nn

from benchmarks import (
    algorithm_memory,
    compression,
    curvature,
    faults,
    federated,
    gossip_round,
    gossip_scaling,
    harness,
    heterogeneous_step,
    memory,
    round_cost,
    simulation,
    sparsity,
    step_overhead,
    straggler,
)
from benchmarks.harness import Clocks, Lap, Team, Turns, interleave
from benchmarks.report import Estimate, Report, estimate, ratio
from lightning_distopt.models import CifarResNet

needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="benchmarks fork their processes")


# ---------------------------------------------------------------------------------------------------------- statistics
def test_estimate_is_the_median_inside_its_interval() -> None:
    samples = np.random.default_rng(1).lognormal(0.0, 0.1, 40)
    value, low, high = estimate(list(samples))
    assert value == np.median(samples)
    assert samples.min() <= low < value < high <= samples.max()
    assert estimate(list(samples)) == (value, low, high)  # no run of the bootstrap differs from another


def test_interval_covers_the_truth_about_as_often_as_it_says() -> None:
    random = np.random.default_rng(2)
    hits = 0
    for _ in range(200):
        _, low, high = estimate(list(random.normal(1.0, 0.2, 25)), resamples=300)
        hits += low <= 1.0 <= high
    assert 0.90 <= hits / 200 <= 1.0


def test_ratio_of_pairs_cancels_what_both_sides_share() -> None:
    load = np.random.default_rng(3).uniform(1.0, 5.0, 30)
    assert ratio(list(1.1 * load), list(load)) == pytest.approx((1.1, 1.1, 1.1))
    assert ratio([2.0, 2.0, 50.0], [1.0, 1.0, 1.0]).value == 2.0  # one disturbed turn of three


def test_estimate_of_one_sample() -> None:
    assert estimate([3.0]) == (3.0, 3.0, 3.0)


@pytest.mark.parametrize(
    ("value", "options", "holds"),
    [
        (Estimate(1.02, 1.0, 1.2), {}, True),
        (Estimate(1.06, 1.0, 1.2), {}, False),
        (Estimate(1.02, 1.0, 1.2), {"interval_below": 1.1}, False),
        (Estimate(1.02, 1.0, 1.09), {"interval_below": 1.1}, True),
        (Estimate(1.06, 1.0, 1.2), {"at_least": True}, True),
        (Estimate(1.02, 1.0, 1.2), {"at_least": True}, False),
    ],
)
def test_bar(value: Estimate, options: dict[str, Any], holds: bool) -> None:
    report = Report("some")
    report.bar("a bar", value, 1.05, **options)
    assert report.bars == [
        {"name": "a bar", "value": value.value, "interval": [value.low, value.high], "limit": 1.05, "holds": holds}
    ]
    assert ("holds" if holds else "MISSED") in report.table()


# ----------------------------------------------------------------------------------------------------------- processes
def _times(turns: Turns, seconds: float) -> None:
    while True:
        turns.wait()
        start = harness.now()
        time.sleep(seconds)
        turns.report(start, harness.now(), turns.index)


@needs_fork
def test_teams_take_turns() -> None:
    teams = {name: Team(name, partial(_times, seconds=0.01), size=2) for name in ("a", "b")}
    laps = interleave("turns", teams, pairs=3)
    assert [len(turns) for turns in laps.values()] == [3, 3]
    order = [lap for pair in zip(*laps.values(), strict=True) for lap in pair]
    for first, second in itertools.pairwise(order):  # A B A B: nobody starts before the other team is done
        assert max(lap.end.wall for lap in first) <= min(lap.start.wall for lap in second)
    assert [lap.value for lap in order[0]] == [0, 1]
    assert all(t >= 0.01 for turns in laps.values() for t in harness.makespan(turns))


def test_times_of_a_turn() -> None:
    first = Lap(Clocks(wall=10.0, own=5.0, cpu=1.0), Clocks(wall=12.0, own=6.0, cpu=1.5))
    second = Lap(Clocks(wall=11.0, own=7.0, cpu=2.0), Clocks(wall=14.0, own=9.0, cpu=2.25))
    turns = [[first, second], [second]]
    assert harness.makespan(turns) == [4.0, 3.0]  # on the wall, from the first start to the last end
    assert harness.own_seconds(turns) == [1.5, 2.0]  # the mean over processes
    assert harness.cpu_seconds(turns) == [0.75, 0.25]  # the sum over processes


def test_the_clock_is_read_between_two_equal_readings_of_the_queue(monkeypatch: pytest.MonkeyPatch) -> None:
    queued = iter([1.0, 3.0, 3.0])  # the process waited two seconds for a core while the clock was read first
    walls = iter([10.0, 12.0])
    monkeypatch.setattr(harness, "_queued", lambda: next(queued))
    monkeypatch.setattr("benchmarks.harness.time.perf_counter", lambda: next(walls))
    assert harness.now()[:2] == (12.0, 9.0)


def test_clocks_go_forward() -> None:
    start, end = harness.now(), harness.now()
    assert start.wall <= end.wall
    assert start.cpu <= end.cpu
    assert end.own - start.own <= end.wall - start.wall + 1e-9


@needs_fork
def test_failure_in_a_process_is_shown_and_all_end() -> None:
    def fail(turns: Turns) -> None:
        turns.wait()
        if turns.index == 1:
            raise ValueError("the reason")
        turns.report_value(os.getpid())
        turns.wait()

    with Team("failing", fail, size=2) as team, pytest.raises(RuntimeError, match="the reason"):
        team.turn()
    assert not any(process.is_alive() for process in team._processes)


@needs_fork
def test_hang_ends_at_the_time_limit(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(harness, "TIMEOUT", 0.2)
    with Team("hanging", partial(_times, seconds=60)) as team, pytest.raises(TimeoutError, match="hanging"):
        team.turn()
    assert not any(process.is_alive() for process in team._processes)


def test_clocks() -> None:
    start = harness.now()
    end = time.perf_counter() + 0.02
    while time.perf_counter() < end:
        pass
    lap = Lap(start, harness.now())
    wall, own, cpu = (b - a for a, b in zip(lap.start, lap.end, strict=True))
    assert 0 < own <= wall and 0 < cpu <= wall + 0.01


# ---------------------------------------------------------------------------------------------------------- benchmarks
def _small_model() -> nn.Module:
    return nn.Sequential(nn.Linear(50, 50), nn.Linear(50, 10))


def _tiny_encoder() -> dict[str, Any]:
    sizes = {"hidden_size": 8, "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 16}
    return {"model_type": "bert", "vocab_size": 30, **sizes}


_ENCODER_BARS = [
    "encoder, masked step over fine-tuning",
    "encoder, loading a checkpoint over switching masks",
    "encoder, checkpoint over mask file",
]

TINY: list[tuple[ModuleType, Any, Sequence[str]]] = [
    (
        step_overhead,
        step_overhead.Settings(pairs=2, share=0.01),
        [f"{w.name}, n = {n}" for w in step_overhead.WORKLOADS for n in (1, 2)],
    ),
    (
        round_cost,
        round_cost.Settings(pairs=2, references_every=1, model=_small_model),
        ["Communicator.mean", "LocalSGD.after_step"],
    ),
    (
        simulation,
        simulation.Settings(pairs=2, pairs_without_rounds=1, memory_pairs=1, replicas=2, steps=2, samples=640),
        ["replica step over single model", "speed over processes", "extra memory of 2 replicas (MiB)"],
    ),
    (memory, memory.Settings(pairs=1, width=64), ["training", "evaluation"]),
    (
        compression,
        compression.Settings(pairs=2, values=300_000),
        [
            "sign (GB/s)",
            "QSGD of 4 bits (GB/s)",
            "sampled top 1 % over torch.topk",
            "payloads of another size than the formula's",
        ],
    ),
    (
        curvature,
        curvature.Settings(
            seeds=2,
            paired_seeds=1,
            steps=(2,),
            product_pairs=2,
            grid_pairs=1,
            images=16,
            grid=3,
            ladder=(0.1, 0.01),
            most=3,
            network=partial(CifarResNet, 8, width=0.25),
        ),
        [
            "a product with kept graphs over rebuilt ones",
            "a product on two processes over one",
            "relative difference of the grids",
            *(["products of PyHessian over Lanczos"] if importlib.util.find_spec("pyhessian") else []),
        ],
    ),
    (
        gossip_round,
        gossip_round.Settings(pairs=2, references_every=1, model=_small_model),
        ["ring", "one_peer_exponential"],
    ),
    (
        gossip_scaling,
        gossip_scaling.Settings(pairs=2, rounds=2, numel=1000, processes=(2, 3)),
        ["bytes of a replica, most over least of n = 2 ... 1024"],
    ),
    (
        algorithm_memory,
        algorithm_memory.Settings(pairs=1, width=64, cases=algorithm_memory.CASES[5:6]),
        ["CHOCO, ring"],
    ),
    (
        heterogeneous_step,
        heterogeneous_step.Settings(pairs=2, steps=1, side=8, algorithms=("D-SGD", "QG-DSGDm")),
        ["QG-DSGDm over D-SGD", "bytes of QG-DSGDm over D-SGD"],
    ),
    (
        federated,
        federated.Settings(pairs=1, memory_pairs=1, clients=4, samples=(14,), many=8, flower=False),
        ["14 samples, over a hand-written loop", "memory above the base process (MiB)", "memory of 8 clients over 4"],
    ),
    (
        sparsity,
        sparsity.Settings(
            step_pairs=1,
            mask_pairs=2,
            encoder_pairs=1,
            batch=2,
            side=8,
            networks={"ResNet-20": sparsity.resnet20},
            pruned=_small_model,
            texts=2,
            tokens=4,
            encoder=_tiny_encoder(),
        ),
        [
            "ResNet-20, DPF step over dense",
            "exact mask update over kthvalue",
            "sampled mask update over kthvalue",
            "density error of the sampled one (points)",
            *(_ENCODER_BARS if importlib.util.find_spec("transformers") else []),
        ],
    ),
    (straggler, straggler.Settings(pairs=2, period=4, mark=3), ["device-bound", "compute-bound"]),
]


@needs_fork
@pytest.mark.parametrize(("module", "settings", "bars"), TINY, ids=lambda x: getattr(x, "__name__", ""))
def test_benchmark(
    module: Any, settings: Any, bars: Sequence[str], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any
) -> None:
    monkeypatch.setattr(module, "QUICK", settings)
    run: Callable[[Sequence[str]], None] = module.cli
    run(["--quick", "--json", str(tmp_path / "out.json")])

    result = json.loads((tmp_path / "out.json").read_text())
    name = module.__name__.rpartition(".")[2]
    assert result["benchmark"] == name and result["quick"] is True
    assert [bar["name"] for bar in result["bars"]] == [f"{name}: {bar}" for bar in bars]
    for bar in result["bars"]:
        assert list(bar) == ["name", "value", "interval", "limit", "holds"]
        assert isinstance(bar["holds"], bool) and np.isfinite(bar["limit"])
        low, high = bar["interval"]
        assert low <= bar["value"] <= high
    assert result["machine"]["cores"] >= 1
    assert set(result["versions"]) >= {"python", "torch", "torchvision", "lightning"}
    table = capsys.readouterr().out
    assert all(bar in table for bar in bars)


@needs_fork
def test_faults(tmp_path: Path, capsys: Any) -> None:
    number = next(k for k in itertools.count() if faults.draw(k)[1].kind == "raise")
    faults.cli(["--only", str(number), "--json", str(tmp_path / "out.json")])
    result = json.loads((tmp_path / "out.json").read_text())
    assert result["bars"] == [
        {"name": "faults: runs that ended wrongly", "value": 0.0, "interval": [0.0, 0.0], "limit": 0.0, "holds": True}
    ]
    assert "holds" in capsys.readouterr().out


def test_faults_are_drawn_from_all_there_are() -> None:
    drawn = [faults.draw(number) for number in range(200)]
    assert drawn == [faults.draw(number) for number in range(200)]
    assert len({(fault.kind, fault.place) for _, fault in drawn}) == len(faults.KINDS) * len(faults.PLACES)
    assert all(0 <= fault.rank < world_size for world_size, fault in drawn)
