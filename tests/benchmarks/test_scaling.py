"""The benchmark `scaling`: what it compares is comparable, and it runs."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
import torch.distributed as dist

from benchmarks import scaling
from benchmarks.report import Report
from benchmarks.scaling import METHODS, Measured, Method, Settings
from lightning_distopt.communication import Communicator, Replicas

D = 1600  # no padding
needs_fork = pytest.mark.skipif(sys.platform != "linux", reason="benchmarks fork their processes")
each_method = pytest.mark.parametrize("method", METHODS, ids=lambda method: method.name)


@each_method
@pytest.mark.parametrize("n", [2, 3, 4, 16])
def test_the_package_counts_the_bytes_of_the_bound(method: Method, n: int) -> None:
    algorithm, communicator = method.strategy().algorithm, Communicator(n)
    if method.topology is not None:
        algorithm.connect(method.graph(n))
    algorithm.setup(Replicas(scaling.Idle(D), n), communicator)
    for step in range(5):
        algorithm.before_step(step)
        algorithm.after_step(step)
    assert communicator.traffic.rounds == 5
    assert communicator.traffic.bytes_sent_max == 5 * method.bound(n, D)


@each_method
def test_bare_gloo_sends_the_bytes_of_the_bound_and_changes_nothing(method: Method, ranks: Any) -> None:
    def fn(rank: int, world_size: int) -> tuple[list[int], bool]:
        sent: list[int] = []
        post = dist.batch_isend_irecv

        def counting(operations: Any) -> Any:
            sent.append(sum(o.tensor.nbytes for o in operations if o.op is dist.isend))
            return post(operations)

        dist.batch_isend_irecv = counting
        try:
            block = torch.arange(float(D))[None]
            exchange = scaling.bare(method, rank, world_size, block)
            for _ in range(3):
                exchange()
        finally:
            dist.batch_isend_irecv = post
        return sent, torch.equal(block, torch.arange(float(D))[None])

    expected = [] if method.topology is None else [method.bound(4, D)] * 3
    assert ranks.run(4, fn) == [(expected, True)] * 4


def test_memory_counts_what_algorithms_keep() -> None:
    average, ring, one_peer, choco = METHODS
    base = 8 * scaling.BASE / 2**30
    row = 8 * 4 * 10**8 / 2**30
    assert average.memory(8, 10**8) == pytest.approx(base + 2 * row)
    assert ring.memory(8, 10**8) == pytest.approx(
        base + 6 * row
    )  # parameters, what is sent, two messages, two more of bare gloo
    assert one_peer.memory(8, 10**8) == pytest.approx(base + 4 * row)
    assert choco.memory(8, 10**8) == pytest.approx(base + (3 + 5 / 32) * row, rel=1e-6)


def test_least_step_depends_on_overlap() -> None:
    in_turn, overlapped = METHODS[:2]
    assert Measured(in_turn, 2, D, 2.0, {}, {}).least(3.0) == 5.0
    assert Measured(overlapped, 2, D, 2.0, {}, {}).least(3.0) == 3.0
    assert Measured(overlapped, 2, D, 2.0, {}, {}).least(1.0) == 2.0


@needs_fork
def test_what_does_not_fit_is_left_out_and_said() -> None:
    report = Report("scaling")
    settings = Settings(pairs=1, steps=1, processes=(2,), values=(D,), memory=0.01)
    assert scaling.run(report, settings) == [] and report.bars == []
    names = [figure["name"] for figure in report.figures[1:]]
    assert names == [f"{method.name}, n = 2, d = 1,600: left out, would take" for method in METHODS]
    assert all(figure["value"] > 0.01 and figure["unit"] == "GiB of 0.0" for figure in report.figures[1:])


@needs_fork
def test_runs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    monkeypatch.setattr(scaling, "QUICK", Settings(pairs=2, least=1, processes=(2, 3), values=(D,), steps=2))
    monkeypatch.setattr(scaling, "MILLION", D)  # where bars begin
    monkeypatch.setattr(scaling, "cores", lambda: [0, 1])
    files = {name: tmp_path / name for name in ("json", "records", "figure.png")}
    scaling.cli(["--quick", *(str(x) for name, file in files.items() for x in (f"--{name.split('.')[0]}", file))])

    result = json.loads(files["json"].read_text())
    assert result["benchmark"] == "scaling" and result["quick"] is True
    # Mixing needs a core of its own, so its bars are those of two processes.
    timed = [(method.name, n) for n in (2, 3) for method in METHODS if method.limit and (n == 2 or not method.topology)]
    assert [bar["name"] for bar in result["bars"]] == [
        *(f"scaling: {name}, n = {n}, d = 1,600: round over bare gloo" for name, n in timed),
        *(f"scaling: bytes of {method.name}, off the bound by" for method in METHODS),
    ]
    assert all(bar["holds"] for bar in result["bars"] if "bytes" in bar["name"])
    for bar in result["bars"]:
        low, high = bar["interval"]
        assert low <= bar["value"] <= high
    assert all(figure["value"] > 0 for figure in result["figures"])

    records = json.loads(files["records"].read_text())
    assert len(records) == 2 * len(METHODS)
    for record, (n, method) in zip(records, ((n, method) for n in (2, 3) for method in METHODS), strict=True):
        assert record.pop("compute_ms") > 0 and record.pop("step_ms") > 0
        assert record == {
            "strategy": method.key,
            "replicas": n,
            "rate_mbit": None,
            "across_mbit": None,
            "parameters": D,
            "sync_period": 1,
            "overlap": method.overlap,
            "compressor": method.compressor,
            "topology": method.topology,
            "bytes_per_step": method.bound(n, D),
            "cores": 2,
        }
    assert files["figure.png"].read_bytes().startswith(b"\x89PNG")
    assert "scaling: bytes of all-reduce" in capsys.readouterr().out
