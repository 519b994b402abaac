"""`benchmarks.plan`: it finds the constants that made the measurements, and predicts those it has not seen."""

from __future__ import annotations

import json
import sys
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from benchmarks import plan
from benchmarks.plan import Measurement, fit, split
from lightning_distopt.plan import Cluster, Costs, Method, Workload, bytes_per_step, time_per_step

pytestmark = pytest.mark.skipif(sys.platform != "linux", reason="benchmarks run on Linux")

TRUE = Costs(0.9, 1e-3, 4e-4, 3e-9, 5e-10, 0.5, {"sign": 1e-9, "qsgd": 2e-9, "top_k": 3e-9})
START = Costs(compressing={"sign": 2.3e-10, "qsgd": 5e-10, "top_k": 5e-10, "random_k": 7e-10})

STRATEGIES: list[dict[str, Any]] = [
    {"strategy": "ddp"},
    {"strategy": "local_sgd", "sync_period": 8},
    {"strategy": "dpsgd", "topology": "one_peer_exponential", "overlap": True},
    {"strategy": "dpsgd", "topology": "ring", "overlap": False},
    *({"strategy": "choco", "topology": "ring", "compressor": c, "overlap": True} for c in ("sign", "qsgd:4", "top_k:0.01")),
    {"strategy": "ef_sign:any", "compressor": "sign"},
]


def records(noise: float = 0.0, cores: int | None = None) -> list[dict[str, Any]]:
    """Return what would be measured if `TRUE` were true."""
    random, made = np.random.default_rng(0), []
    for n in (2, 4, 8):
        for rate in (10, 100, 1000, None):
            for d, compute in ((1_000, 1), (1_000_000, 5), (25_000_000, 400)):
                for strategy in STRATEGIES:
                    record = {"sync_period": 1, "topology": None, "compressor": None, "overlap": False, **strategy}
                    record |= {"replicas": n, "rate_mbit": rate, "across_mbit": None, "parameters": d, "compute_ms": compute}
                    measurement = Measurement.of({**record, "step_ms": 1, "cores": cores})
                    assert measurement is not None
                    time = measurement.predicted(TRUE) * random.lognormal(0, noise)
                    sent = bytes_per_step(measurement.method, measurement.cluster, measurement.workload)
                    made.append({**record, "cores": cores, "step_ms": 1e3 * time, "bytes_per_step": sent})
    return made


def measurements(made: list[dict[str, Any]]) -> list[Measurement]:
    return [m for record in made if (m := Measurement.of(record)) is not None]


def worst(of: list[Measurement], costs: Costs) -> float:
    return max(abs(m.predicted(costs) / m.seconds - 1) for m in of)


def flat(costs: Costs) -> dict[str, float]:
    values = asdict(costs)
    return {**values.pop("compressing"), **values}


@pytest.mark.parametrize("cores", [None, 2])
def test_the_constants_are_found(cores):
    rest, held_out, rate = split(measurements(records(cores=cores)), None)
    assert (rate, len(rest), len(held_out)) == (100, 144, 144)
    assert worst(held_out, START) > 0.5
    costs, stayed = fit(rest, START)
    assert worst(held_out, costs) < 0.01
    assert flat(costs) == pytest.approx({**flat(TRUE), "random_k": START.compressing["random_k"]}, rel=0.02)
    assert stayed == ["compressing random_k"]


def test_noise_is_averaged_out():
    rest, held_out, _ = split(measurements(records(noise=0.05)), 1000)
    costs, _ = fit(rest, START)
    exact = [replace(m, seconds=m.predicted(TRUE)) for m in held_out]
    assert worst(exact, costs) < 0.06
    assert worst(rest, costs) < 0.25  # the noise itself


def test_what_nothing_depends_on_stays():
    only = [record for record in records() if record["strategy"] == "local_sgd" and record["rate_mbit"] in (10, 1000)]
    costs, stayed = fit(measurements(only), START)
    assert set(stayed) == {"backward", "sending", *(f"compressing {name}" for name in START.compressing)}
    assert flat(costs)["backward"] == pytest.approx(START.backward)
    assert costs.efficiency == pytest.approx(TRUE.efficiency, rel=0.01)


def test_shares_stay_below_one():
    made = [{**record, "step_ms": 0.5 * record["step_ms"]} for record in records()[::7]]
    costs, _ = fit(measurements(made), START)
    assert costs.efficiency <= 1 and costs.backward <= 1


def test_a_record_is_read_as_it_is_meant():
    record = {"replicas": 4, "rate_mbit": 1000, "parameters": 1000, "compute_ms": 20, "step_ms": 30}
    assert Measurement.of({**record, "strategy": "dpsgd"}) == Measurement(
        Method("dpsgd", topology="one_peer_exponential", overlap=True), Cluster(4, 1e9), Workload(1000, 0.02), 0.03
    )
    options = {"across_mbit": 50, "block_period": 4, "sync_period": 2, "cores": 2, "latency_ms": 1, "bytes_per_step": 7}
    assert Measurement.of({**record, **options, "strategy": "hierarchical"}) == Measurement(
        Method("local_sgd", 2, block_period=4), Cluster(4, 1e9, 1e-3, 2, 5e7, cores=0.5), Workload(1000, 0.02), 0.03, 7
    )
    choco = Measurement.of({**record, "strategy": "choco", "overlap": False})
    assert choco is not None and choco.method == Method("choco", 1, "ring", "sign", False)
    every_step = Measurement.of({**record, "strategy": "local_sgd"})
    assert every_step is not None and every_step.method == Method("local_sgd", average="parameters")
    ddp = Measurement.of({**record, "strategy": "ddp: DDP", "bytes_per_step": None, "block_period": None})
    assert ddp is not None and ddp.method == Method("local_sgd")
    assert Measurement.of({**record, "strategy": "powersgd"}) is None


@pytest.mark.parametrize(
    ("of", "rate", "sentence"),
    [
        ([2, 4], 77, "Nothing was measured at 77 Mbit/s: --rate is one of 10, 100, 1000."),
        ([8], None, "Nothing is left to fit on"),
    ],
)
def test_what_can_not_be_held_out(of, rate, sentence):
    chosen = [m for m in measurements(records()) if m.cluster.replicas in of]
    with pytest.raises(SystemExit, match=sentence):
        split(chosen, rate)


def test_the_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [record for record in records(noise=0.01) if record["parameters"] < 25_000_000]
    peer = {**made[0], "strategy": "ddp_powersgd"}
    (tmp_path / "a.json").write_text(json.dumps(made[::2]))
    (tmp_path / "b.json").write_text(json.dumps({"records": [*made[1::2], peer, peer]}))
    files = [str(tmp_path / name) for name in ("a.json", "b.json")]
    options = ["--costs", str(tmp_path / "costs.json"), "--figure", str(tmp_path / "figures" / "plan.png")]
    plan.main([*files, *options, "--json", str(tmp_path / "result.json")])
    text = capsys.readouterr().out
    assert "Fitted on 96 settings; held out 96: n = 8, and 100 Mbit/s" in text
    assert "Left out, as there is no cost model: 2 of ddp_powersgd" in text
    assert "choco sign ring overlapped, n = 8, 10 Mbit/s, d = 1e+06" in text
    assert "OFF" not in text
    assert Costs.read(tmp_path / "costs.json").efficiency == pytest.approx(TRUE.efficiency, rel=0.02)
    assert (tmp_path / "figures" / "plan.png").read_bytes().startswith(b"\x89PNG")
    bars = {bar["name"]: bar for bar in json.loads((tmp_path / "result.json").read_text())["bars"]}
    assert bars["plan: worst error, held out"]["holds"] and bars["plan: worst error, held out"]["limit"] == 0.2
    (sent,) = [f for f in json.loads((tmp_path / "result.json").read_text())["figures"] if "bytes" in f["name"]]
    assert (sent["value"], sent["interval"]) == (1, [1, 1])


def test_a_prediction_that_is_off_misses_the_bar(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    made = [record for record in records() if record["parameters"] < 25_000_000]
    for record in made:
        if record["replicas"] == 8:
            record["step_ms"] *= 1.5
            record["bytes_per_step"] *= 2
    (tmp_path / "a.json").write_text(json.dumps(made))
    plan.main([str(tmp_path / "a.json"), "--costs", str(tmp_path / "c.json"), "--figure", str(tmp_path / "plan.png")])
    text = capsys.readouterr().out
    assert text.count("OFF") == sum(record["replicas"] == 8 for record in made)
    assert text.count("MISSED") == 1 and "1.000  [0.500, 1.000]" in text


def test_only_strategies_without_a_model(tmp_path: Path) -> None:
    (tmp_path / "a.json").write_text(json.dumps([{**records()[0], "strategy": "torchft"}]))
    with pytest.raises(SystemExit, match="no measurements"):
        plan.main([str(tmp_path / "a.json"), "--costs", str(tmp_path / "c.json")])


def test_predictions_are_those_of_the_model() -> None:
    m = measurements(records())[0]
    assert m.predicted(TRUE) == time_per_step(m.method, m.cluster, m.workload, TRUE)
