"""`make results`: what it runs, and how it compares runs with those of the pages."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path

import pytest

from benchmarks.results import __main__ as once_more
from benchmarks.results import sparsity
from benchmarks.results.common import once, write
from benchmarks.surroundings import surroundings


def _write(path: Path, cells: list[dict[str, object]], surrounded: bool = True) -> None:
    path.write_text(json.dumps({**surroundings(), "cells": cells} if surrounded else cells))


def test_runs_are_compared_one_by_one(tmp_path: Path) -> None:
    old = [{"method": m, "alpha": a, "seed": s, "accuracy": [0.1, 0.5 + s / 10]} for m in "ab" for a in (1, 10) for s in (0, 1)]
    new = [{**cell, "accuracy": [0.4, 0.51]} for cell in old if cell["seed"] == 0]
    new[0]["accuracy"] = [0.52]
    _write(tmp_path / "old.json", old, surrounded=False)
    _write(tmp_path / "new.json", new)
    assert once_more.compare(tmp_path / "old.json", tmp_path / "new.json") == "| 4 | +1.25 | +2.00 | a, 1 |"
    assert "no table yet" in once_more.compare(tmp_path / "none.json", tmp_path / "new.json")
    _write(tmp_path / "others.json", [{"method": "c", "seed": 0, "accuracy": [0.5]}])
    assert "none of which the page has" in once_more.compare(tmp_path / "others.json", tmp_path / "new.json")
    _write(tmp_path / "corpus.json", [{**old[0], "checksum": "of another corpus"}])
    assert "none of which the page has" in once_more.compare(tmp_path / "corpus.json", tmp_path / "new.json")


def test_a_cell_of_several_methods(tmp_path: Path) -> None:
    _write(tmp_path / "flat.json", [{"seed": 3, "accuracy": [0.2], "runs": {m: {"accuracy": [0.7]} for m in "ab"}}])
    assert sorted(key[0] for key in once_more.runs(tmp_path / "flat.json")) == ["a", "b"]


def test_the_page(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> None:
    calls = []

    def run(command: Sequence[str]) -> tuple[float, str]:
        calls.append(command[1])
        where = Path(command[-1])
        if command[1] == "benchmarks.results.consensus":
            return 60.0, "exit code 1"
        if command[1].startswith("benchmarks.results"):
            assert command[2:4] == ["--seeds", "2"]
            _write(where / "local_sgd.json", [{"method": "a", "seed": 0, "accuracy": [0.5]}])
        else:
            bar = {"name": "round", "value": 1.0, "interval": [0.9, 1.1], "limit": 1.05, "holds": True}
            where.write_text(json.dumps({"bars": [bar]}))
        return 60.0, ""

    monkeypatch.setattr(once_more, "run", run)
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "local_sgd.json", [{"method": "a", "seed": 0, "accuracy": [0.5]}])
    once_more.main(["local_sgd", "consensus", "round_cost", "--seeds", "2", "--output", str(tmp_path)])
    assert calls == ["benchmarks.results.local_sgd", "benchmarks.results.consensus", "benchmarks.round_cost"]
    text = (tmp_path / "once_more.md").read_text()
    assert "| [local_sgd](local_sgd.md) | 1 | +0.00 | +0.00 |  | 1 |" in text and "exit code 1" in text
    assert "| round | 1.000 | 0.900 - 1.100 | 1.05 | holds |" in text and surroundings()["versions"]["torch"] in text
    assert not once_more.PARTIAL.exists()
    with pytest.raises(SystemExit):
        once_more.main(["nonsense"])
    assert "no table or benchmark nonsense" in capsys.readouterr().err


def test_what_was_interrupted_goes_on(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    calls: list[str] = []

    def run(command: Sequence[str]) -> tuple[float, str]:
        calls.append(command[1])
        if calls == ["benchmarks.results.federated", "benchmarks.federated"]:
            raise KeyboardInterrupt
        if "--json" in command:
            bar = {"name": "round", "value": 1.0, "interval": [0.9, 1.1], "limit": 1.05, "holds": True}
            Path(command[-1]).write_text(json.dumps({"bars": [bar]}))
        else:
            assert command[2:5] == ["--seeds", "1", "--once"]
            _write(Path(command[-1]) / "federated.json", [{"method": "a", "seed": 0, "accuracy": [0.5]}])
        return 60.0, ""

    monkeypatch.setattr(once_more, "run", run)
    monkeypatch.chdir(tmp_path)
    _write(tmp_path / "federated.json", [{"method": "a", "seed": 0, "accuracy": [0.5]}])
    with pytest.raises(KeyboardInterrupt):
        once_more.main(["federated", "--output", str(tmp_path)])
    assert "| [federated](federated.md) | 1 | +0.00 | +0.00 |  | 1 |" in (tmp_path / "once_more.md").read_text()
    assert not once_more.begun("another commit", None) and not once_more.begun(surroundings()["commit"], 2)
    once_more.main(["federated", "--output", str(tmp_path)])
    assert calls == ["benchmarks.results.federated", "benchmarks.federated", "benchmarks.federated"]
    text = (tmp_path / "once_more.md").read_text()
    assert "| [federated](federated.md) | 1 | +0.00 | +0.00 |  | 1 |" in text and "| round | 1.000 |" in text


def test_each_method_once() -> None:
    grid = [[method, norm, s] for norm in "xy" for method in "ab" for s in (0.7, 0.9, 0.95)]
    assert once(grid, names=2) == [["a", "x", 0.9], ["b", "x", 0.9], ["a", "y", 0.9], ["b", "y", 0.9]]
    assert once(grid) == [["a", "y", 0.7], ["b", "y", 0.7]]
    assert [cell[0] for cell in once([[m, s] for m, s in sparsity.cells_of_table()])] == ["dense", *sparsity.table_of_methods()]


def test_every_module_that_it_runs_exists() -> None:
    folder = Path(once_more.__file__).parent
    assert all((folder / f"{name}.py").exists() for name in once_more.TABLES)
    assert all((folder.parent / f"{name}.py").exists() for name in once_more.BENCHMARKS)
    tables = {path.stem for path in folder.glob("*.py")} - {"__init__", "__main__", "common"}
    assert tables == set(once_more.TABLES)


def test_data_know_no_folder_of_the_machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("sys.argv", ["masking", "--full", "--output", "/a b/c", "--data=/d", "--seeds", "2", "--encoder", "/e"])
    write([], tmp_path / "masking.json")
    assert json.loads((tmp_path / "masking.json").read_text())["arguments"] == ["--full", "--seeds", "2"]
