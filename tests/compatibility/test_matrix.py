"""Every cell of the table is proven: a feature works, or is refused with the sentence on the page.

That it works means, for each row:

- a simulation equals the processes, replica by replica, with the same data, learning rates, validations, metrics and files;
- rounds come after every `H` optimizer steps; replicas agree after one, and differ before it;
- where all replicas see the same data, the run is that of a single device;
- what should have no effect on the numbers has none;
- and what the feature itself is about: the checks at the end.
"""

from __future__ import annotations

import json
import math
import subprocess
import sys
import textwrap
from collections.abc import Callable
from itertools import pairwise
from pathlib import Path
from typing import Any

import pytest
import torch
from lightning.pytorch import callbacks

from tests.compatibility.__main__ import PAGE, page
from tests.compatibility.matrix import FINDER_RESTORES, LAYOUTS, NOTEBOOKS, PERIODS, PLAIN, ROWS, Row, combine
from tests.compatibility.problem import SIZE, Net, OddFirst, execute, samples
from tests.helpers import exhaustive, fresh_environment, skip_if_workers_may_hang
from tests.pool import RankPool

SHARE = -(-SIZE // 2)
LAYOUTS_DIFFER = {"max_time", "checkpoint_time"}
"""Time flags act at rounds of several processes, but at every step of one."""
Runs = dict[tuple[str, int], list[dict[str, Any]]]
"""The results of all ranks, by layout and period."""


def in_turn(rank: int, world: int, row: Row, folder: str, m: int) -> list[dict[str, Any]]:
    return [execute(rank, world, row, f"{folder}/{period}", m, period) for period in PERIODS]


def alone(rank: int, world: int, row: Row, folder: str) -> dict[str, Any]:
    return execute(rank, world, row, folder, share=SHARE)


def alike(rank: int, world: int, row: Row, folder: str, m: int) -> dict[str, Any]:
    return execute(rank, world, row, folder, m, PERIODS[0], SHARE)


def run(ranks: RankPool, row: Row, folder: Path) -> Runs:
    runs: Runs = {}
    for layout, (m, world) in LAYOUTS.items():
        by_rank = ranks.run(world, in_turn, row, str(folder / layout), m)
        for k, period in enumerate(PERIODS):
            runs[layout, period] = [result[k] for result in by_rank]
    return runs


def replicas(results: list[dict[str, Any]]) -> torch.Tensor:
    """Return `[batches, n, d]`."""
    return torch.cat([result["rows"] for result in results], dim=1)


def ordered(results: list[dict[str, Any]]) -> list[list[int]]:
    """Return the samples that each replica has seen, in order."""
    return [result["seen"][row] for result in results for row in sorted(result["seen"])]


def dealt(results: list[dict[str, Any]]) -> list[int]:
    """Return the samples in the order in which they were dealt out to two replicas."""
    return [k for pair in zip(*ordered(results), strict=True) for k in pair]


def close(one: Any, other: Any, tolerance: float) -> None:
    torch.testing.assert_close(one, other, rtol=0, atol=tolerance)


def files_of(result: dict[str, Any]) -> dict[str, Any]:
    return {name: file["state_dict"] for name, file in result["files"].items()}


# ---------------------------------------------------------------------------------------------------- what holds for all


def is_refused(row: Row, sentence: str, results: list[dict[str, Any]]) -> None:
    for result in results:
        assert sentence in result["error"], result["error"]
        assert row.refused_late or not result["seen"], "training had started"


def has_trained(row: Row, period: int, results: list[dict[str, Any]]) -> None:
    rows = replicas(results)
    assert torch.isfinite(rows).all()
    first = results[0]
    for result in results:
        for key in ("steps", "rates", "validations", "rounds", "global_step", "epochs", "optimizers", "best"):
            assert result[key] == first[key], key
        assert result["state"].keys() == first["state"].keys()
        assert all(torch.equal(value, first["state"][key]) for key, value in result["state"].items())
    assert first["rounds"] == first["steps"][-1] // period
    assert first["global_step"] == first["steps"][-1] * first["optimizers"]
    last = replicas([{"rows": result["start"].unsqueeze(0)} for result in results])[0]
    for step, now in zip(first["steps"], rows, strict=True):
        if step % period:  # no optimizer has stepped since the round, or replicas differ
            assert torch.equal(now, last) or not torch.equal(now[0], now[1]), f"after step {step} of H = {period}"
        else:
            assert torch.equal(now[0], now[1]), f"after step {step} of H = {period}"
            last = now
    assert not torch.equal(rows[-1][0], first["start"][0]), "nothing was trained"


def is_equal(row: Row, simulation: list[dict[str, Any]], processes: list[dict[str, Any]]) -> None:
    one, other = simulation[0], processes[0]
    close(replicas(simulation), replicas(processes), row.tolerance)
    close(one["state"], other["state"], row.tolerance)
    for key in ("steps", "rounds", "bytes", "global_step", "epochs"):
        assert one[key] == other[key], key
    close(one["rates"], other["rates"], 1e-12)
    close(one["best"], other["best"], row.metric_tolerance)
    assert len(one["validations"]) == len(other["validations"])
    if row.validates_alike:
        close(one["validations"], other["validations"], row.metric_tolerance)
        ours = {"loss": 0.0, "own": 0.0}  # of the rank itself
        close({**one["metrics"], **ours}, {**other["metrics"], **ours}, row.metric_tolerance)
    assert one["seen"] == {k: result["seen"][0] for k, result in enumerate(processes)}
    close(files_of(one), files_of(other), row.tolerance)


def is_that_of_a_single_device(row: Row, results: list[dict[str, Any]], single: dict[str, Any]) -> None:
    assert not single["error"], single["error"]
    for result in results:
        assert not result["error"], result["error"]
        for key in ("steps", "rates", "global_step", "epochs"):
            assert result[key] == single[key], key
        assert len(result["validations"]) == len(single["validations"])
        if row.single == "numbers":
            assert result["seen"][0] == single["seen"][0]
            for replica in range(result["rows"].shape[1]):
                close(result["rows"][:, replica], single["rows"][:, 0], row.tolerance)
            if row.validates_alike:
                close(result["validations"], single["validations"], row.metric_tolerance)
    assert results[0]["files"].keys() == single["files"].keys()


@pytest.fixture(scope="module")
def plain(ranks: RankPool, tmp_path_factory: pytest.TempPathFactory) -> Runs:
    return run(ranks, PLAIN, tmp_path_factory.mktemp("plain"))


def proves(ranks: RankPool, row: Row, folder: Path, plain: Runs) -> Runs:
    skip_if_workers_may_hang(row.loader)
    runs = run(ranks, row, folder / "own")
    for (layout, period), results in runs.items():
        sentence = row.sentence(layout, period)
        if sentence:
            is_refused(row, sentence, results)
            continue
        for result in results:
            assert not result["error"], f"{layout}, H = {period}: {result['error']}"
        has_trained(row, period, results)
        if row.plain:
            close(replicas(results), replicas(plain[layout, period]), row.tolerance)
            assert results[0]["rates"] == plain[layout, period][0]["rates"]
    for period in PERIODS:
        if not any(row.sentence(layout, period) for layout in LAYOUTS) and row.key not in LAYOUTS_DIFFER:
            is_equal(row, runs["simulation", period], runs["processes", period])
    layout = next((layout for layout in LAYOUTS if not row.sentence(layout, PERIODS[0])), None)
    known = row.plain and row is not PLAIN  # equal to the plain run, which is proven to be that of a single device
    if row.single != "nothing" and layout is not None and not known:
        m, world = LAYOUTS[layout]
        (single,) = ranks.run(1, alone, row, str(folder / "single"))
        results = ranks.run(world, alike, row, str(folder / "alike"), m)
        is_that_of_a_single_device(row, results, single)
    return runs


@pytest.mark.parametrize("row", [row for row in ROWS if row.entry == "fit"], ids=str)
def test_row(ranks: RankPool, row: Row, tmp_path: Path, plain: Runs) -> None:
    if row.key == "weight_averaging" and not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("This Lightning has no such callback")
    runs = proves(ranks, row, tmp_path, plain)
    if row.key == "rate_finder" and FINDER_RESTORES:
        assert runs["simulation", 3][0]["rates"][0] != plain["simulation", 3][0]["rates"][0], "no rate was suggested"
    if row.key in CHECKS:
        CHECKS[row.key](runs)


def gossiping(rank: int, world: int, row: Row, folder: str, m: int) -> dict[str, Any]:
    return execute(rank, world, row, folder, m, PERIODS[0], gossip=True)


GOSSIPED = [row for row in ROWS if row.entry == "fit" and row.key not in LAYOUTS_DIFFER]
FIRST = list({row.group: row for row in reversed(GOSSIPED)}.values())
"""One of each group, for `make test`."""


@pytest.mark.parametrize("row", [row if row in FIRST else exhaustive(row) for row in GOSSIPED], ids=str)
def test_row_with_gossip(ranks: RankPool, row: Row, tmp_path: Path) -> None:
    """CHOCO works in the same cells, with the same numbers in both layouts, and is refused in the others."""
    if row.key == "weight_averaging" and not hasattr(callbacks, "WeightAveraging"):
        pytest.skip("This Lightning has no such callback")
    runs = {}
    for layout, (m, world) in LAYOUTS.items():
        runs[layout] = ranks.run(world, gossiping, row, str(tmp_path / layout), m)
        sentence = row.sentence(layout, PERIODS[0])
        if sentence:
            is_refused(row, sentence, runs[layout])
            continue
        for result in runs[layout]:
            assert not result["error"], f"{layout}: {result['error']}"
            for key in ("steps", "rates", "validations", "rounds", "global_step", "epochs", "best"):
                assert result[key] == runs[layout][0][key], key
        assert runs[layout][0]["rounds"] == runs[layout][0]["steps"][-1] // PERIODS[0]
    if not any(row.sentence(layout, PERIODS[0]) for layout in LAYOUTS):
        is_equal(row, runs["simulation"], runs["processes"])


# ------------------------------------------------------------------------------------------------ what a row is about

CHECKS: dict[str, Callable[[Runs], None]] = {}


def about(*keys: str) -> Callable[[Callable[[Runs], None]], Callable[[Runs], None]]:
    def register(check: Callable[[Runs], None]) -> Callable[[Runs], None]:
        CHECKS.update(dict.fromkeys(keys, check))
        return check

    return register


def worked(runs: Runs) -> dict[tuple[str, int], list[dict[str, Any]]]:
    return {cell: results for cell, results in runs.items() if not results[0]["error"]}


def mean_at(results: list[dict[str, Any]], step: int) -> torch.Tensor:
    """The average model after the `step`-th batch, flat."""
    return replicas(results)[step - 1].mean(dim=0)


def flat(state: dict[str, torch.Tensor]) -> torch.Tensor:
    return torch.cat([value.flatten() for value in state.values()])


@about("fp16_mixed")
def check_skipped(runs: Runs) -> None:
    for results in worked(runs).values():
        rows = replicas(results)
        still = [torch.equal(now, before) for before, now in pairwise(rows)]
        assert still[0], "no step was skipped"
        assert not any(still[8:])


@about("accumulate")
def check_accumulation(runs: Runs) -> None:
    for results in runs.values():
        assert results[0]["steps"] == [0, 0, 1, 1, 1, 2, 2, 3, 3, 3, 4, 4, 4, 5, 5, 6]


@about("accumulation_scheduler")
def check_accumulation_scheduler(runs: Runs) -> None:
    for results in runs.values():
        assert results[0]["steps"] == [0, 1, 1, 2, 2, 3, 3, 4, 4, 4, 5, 5, 5, 6, 6, 7]


@about("clip_norm", "clip_value")
def check_clipping(runs: Runs) -> None:
    for (layout, _), results in runs.items():
        norms, largest = zip(*results[0]["clipped"], strict=True)
        assert len(norms) == 16 * LAYOUTS[layout][0]
        assert any(math.isclose(v, bound, rel_tol=1e-4) for v, bound in [(max(norms), 0.1), (max(largest), 0.01)])
        assert max(norms) < 0.1 + 1e-6 or max(largest) < 0.01 + 1e-12


@about("epoch_scheduler")
def check_epochs(runs: Runs) -> None:
    for results in runs.values():
        assert {round(rate, 9) for (rate,) in results[0]["rates"]} == {0.1, 0.07, 0.049}


@about("one_cycle")
def check_cycle(runs: Runs) -> None:
    for results in runs.values():
        rates = [rate for (rate,) in results[0]["rates"]]
        assert max(rates) == pytest.approx(0.1, rel=0.02)  # the peak, and then down to the end of training
        assert rates[-2] < 1e-6


@about("max_time")
def check_time(runs: Runs) -> None:
    for (layout, period), results in runs.items():
        assert results[0]["steps"][-1] == (period if layout == "processes" else 1)


@about("overfit")
def check_overfit(runs: Runs) -> None:
    for results in runs.values():
        first, second = ordered(results)
        assert first == first[:6] * 2
        assert second == second[:6] * 2
        assert set(first).isdisjoint(second)


def validates(count: int) -> Callable[[Runs], None]:
    def check(runs: Runs) -> None:
        for results in runs.values():
            assert len(results[0]["validations"]) == count

    return check


CHECKS.update(
    val_check_int=validates(4),
    val_check_float=validates(4),
    val_check_steps=validates(3),
    no_validation=validates(0),
    sanity=validates(2),
)


@about("fast_dev_run")
def check_fast_dev_run(runs: Runs) -> None:
    validates(1)(runs)
    for results in runs.values():
        assert results[0]["steps"] == [1, 2]


@about("min_epochs", "early_stopping")
def check_stopping(runs: Runs) -> None:
    for results in runs.values():
        assert results[0]["steps"][-1] == 16  # two of three epochs


@about("checkpoint_monitor")
def check_best(runs: Runs) -> None:
    for results in runs.values():
        (file,) = results[0]["files"].values()
        module = Net().double()
        module.load_state_dict(file["state_dict"])
        x, y, _ = samples(12).tensors
        loss = torch.nn.functional.cross_entropy(module(x.double()), y)
        assert loss.item() == pytest.approx(min(results[0]["validations"]), abs=1e-6)  # images are stored as float32
        step = 8 * (1 + results[0]["validations"].index(min(results[0]["validations"])))
        close(flat(file["state_dict"]), mean_at(results, step), 1e-12)


def saves(steps: Callable[[str, int], list[int]]) -> Callable[[Runs], None]:
    def check(runs: Runs) -> None:
        for (layout, period), results in runs.items():
            found = {file["global_step"]: file["state_dict"] for file in results[0]["files"].values()}
            assert sorted(found) == steps(layout, period)
            for step, state in found.items():
                close(flat(state), mean_at(results, step), 1e-12)

    return check


CHECKS.update(
    checkpoint_steps=saves(lambda layout, period: [5, 10, 15]),
    checkpoint_last=saves(lambda layout, period: [16]),
    checkpoint_time=saves(lambda layout, period: list(range(period, 17, period) if layout == "processes" else range(1, 17))),
)


@about("rate_finder", "rate_finder_only")
def check_rate_finder(runs: Runs) -> None:
    torch.manual_seed(7)
    initial = torch.cat([p.detach().double().flatten() for p in Net().parameters()])
    for results in runs.values():
        for replica in replicas([{"rows": result["start"].unsqueeze(0)} for result in results])[0]:
            close(replica, initial, 0)


@about("compile", "compile_layer")
def check_compiled(runs: Runs) -> None:
    graphs = {cell: results[0]["graphs"] for cell, results in runs.items()}
    assert min(graphs.values()) > 0
    assert graphs["simulation", 3] == graphs["processes", 3], "each replica was compiled for itself"


@about("uneven", "shuffle")
def check_all_seen(runs: Runs) -> None:
    for results in runs.values():
        order = dealt(results)
        assert len(order) == 2 * (SIZE + 1)
        assert set(order[: SIZE + 1]) == set(order[SIZE + 1 :]) == set(range(SIZE))


@about("weighted")
def check_weighted(runs: Runs) -> None:
    for results in runs.values():
        order = dealt(results)
        assert len(order) == 2 * (SIZE + 1)
        assert order[: SIZE + 1] != order[SIZE + 1 :]
        assert len(set(order[: SIZE + 1])) < SIZE  # drawn with replacement


@about("sampler")
def check_sampler(runs: Runs) -> None:
    order = OddFirst(SIZE).order
    order = order[: len(order) + len(order) % 2] + order[: len(order) % 2]
    for results in runs.values():
        assert dealt(results) == order * 2


@about("batch_sampler")
def check_batch_sampler(runs: Runs) -> None:
    order = OddFirst(SIZE).order
    for results in runs.values():
        first, second = ordered(results)
        assert first[:6] == [*order[:3], *order[6:9]]
        assert second[:6] == [*order[3:6], *order[9:12]]


@about("distributed_sampler", "own_division")
def check_own_division(runs: Runs) -> None:
    for results in worked(runs).values():
        for rank, seen in enumerate(ordered(results)):
            assert seen[:23] == list(range(rank, SIZE, 2))[:23]


@about("iterable")
def check_iterable(runs: Runs) -> None:
    for (_, period), results in worked(runs).items():
        assert results[0]["epochs"] == 2
        _, second = ordered(results)
        assert set(second) == set(range(1, SIZE, 2)[:19])  # the shorter one is used up ...
        steps = results[0]["steps"][-1] // 2
        assert 7 <= steps <= 7 + period + 1  # ... and ends the epoch soon after


@about("sized_iterable")
def check_sized_iterable(runs: Runs) -> None:
    for results in worked(runs).values():
        assert results[0]["steps"][-1] == 2 * 7


# ------------------------------------------------------------------------------------------- what is not about training


@pytest.mark.parametrize("row", [row for row in ROWS if row.entry != "fit"], ids=str)
def test_entry_point(ranks: RankPool, row: Row, tmp_path: Path) -> None:
    (single,) = ranks.run(1, alone, row, str(tmp_path / "single"))
    assert not single["error"], single["error"]
    for layout, (m, world) in LAYOUTS.items():
        by_rank = ranks.run(world, in_turn, row, str(tmp_path / layout), m)
        for k in range(len(PERIODS)):
            results = [result[k] for result in by_rank]
            assert not any(result["error"] for result in results), results[0]["error"]
            if row.entry == "predict":
                parts = [torch.cat(result["output"]) for result in results]
                together = torch.stack(parts, dim=1).flatten(0, 1)  # rank r has samples r, r + world, ...
                close(together, torch.cat(single["output"]), 1e-12)
            else:
                for result in results:
                    close(result["output"], single["output"], 1e-12)


MIXES = [
    ("accumulate", "clip_norm", "adamw", "schedulers", "tied", "shuffle", "metric", "val_check_int"),
    ("max_steps", "clip_value", "one_cycle", "batch_norm", "frozen", "channels_last", "workers", "bf16_mixed"),
    ("accumulation_scheduler", "plateau_epoch", "checkpointing", "precision_32", "weighted", "checkpoint_last"),
]


@pytest.mark.parametrize("keys", MIXES, ids="+".join)
def test_features_together(ranks: RankPool, keys: tuple[str, ...], tmp_path: Path, plain: Runs) -> None:
    row = combine([row for row in ROWS if row.key in keys])
    proves(ranks, row, tmp_path, plain)


def test_features_that_contradict_each_other() -> None:
    rows = {row.key: row for row in ROWS}
    with pytest.raises(ValueError, match="gradient_clip_val"):
        combine([rows["clip_norm"], rows["clip_value"]])
    with pytest.raises(ValueError, match="precision"):
        combine([rows["fp16_mixed"], rows["bf16_true"]])
    with pytest.raises(ValueError, match="not about training"):
        combine([rows["clip_norm"], rows["predict"]])


@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA device: Lightning has fp16-mixed there only")
def test_fp16_mixed_on_a_gpu(tmp_path: Path) -> None:
    row = Row("Precision", "fp16", "", trainer={"precision": "16-mixed"})
    refused = next(row for row in ROWS if row.key == "fp16_mixed").sentence("simulation", 3)
    result = execute(0, 1, row, str(tmp_path), m=1, period=3, accelerator="gpu")
    assert not result["error"], result["error"]
    assert torch.isfinite(result["rows"]).all()
    is_refused(row, refused, [execute(0, 1, row, str(tmp_path), m=2, period=3, accelerator="gpu")])


NOTEBOOK = textwrap.dedent(
    """
    import json, sys, warnings
    sys.ps1 = ">>> "
    warnings.filterwarnings("ignore")
    import lightning as L
    from lightning.pytorch.demos.boring_classes import BoringModel
    from lightning_distopt import LocalSGDStrategy

    quiet = dict(accelerator="cpu", max_steps=8, limit_val_batches=0, logger=False, enable_checkpointing=False,
                 enable_progress_bar=False, enable_model_summary=False)

    def train(**options):
        module = BoringModel()
        before = module.layer.weight.detach().clone()
        try:
            trainer = L.Trainer(**options, **quiet)
        except L.pytorch.utilities.exceptions.MisconfigurationException as error:
            return str(error)
        trainer.fit(module)
        return "works" if not before.equal(module.layer.weight) else "nothing was trained"

    found = {"simulation": train(devices=1, strategy=LocalSGDStrategy(3, replicas_per_device=2))}
    for name in sys.argv[1:]:
        found[name] = train(devices=2, strategy=name)
    print(json.dumps(found))
    """
)


@pytest.mark.launch
def test_notebooks(tmp_path: Path) -> None:
    """A process in which Lightning takes itself to be in a notebook."""
    command = [sys.executable, "-c", NOTEBOOK, *(row.key for row in NOTEBOOKS)]
    environment = fresh_environment(PAGE.parents[1])
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=120, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["simulation"] == "works"
    for row in NOTEBOOKS:
        assert row.refused.get("processes", "works") in found[row.key]


# ------------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_up_to_date() -> None:
    assert PAGE.read_text() == page(), "run `python -m tests.compatibility`"


def test_every_check_belongs_to_a_row() -> None:
    assert set(CHECKS) | LAYOUTS_DIFFER <= {row.key for row in ROWS}
