"""Files of results: whole again, whatever their numbers are, and told from others."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lightning_distopt.analysis.result import Result, Results


@dataclass
class Curve(Result):
    loss: np.ndarray
    extra: np.ndarray | None
    values: dict[str, list[float]]
    top: float | None
    name: str = "NaN?"

    def numbers(self) -> dict[str, float]:
        return {"last": float(self.loss[-1])}


def curve(last: float = np.inf) -> Curve:
    return Curve(np.array([1.0, np.nan, last]), None, {"a": [float("nan"), -np.inf, 2.0]}, float("nan"))


@pytest.mark.parametrize("kind", ["npz", "json"])
def test_numbers_that_are_not_finite(kind: str, tmp_path: Path) -> None:
    found = Curve.load(curve().save(tmp_path / f"curve.{kind}"))
    np.testing.assert_equal(vars(found), vars(curve()))
    assert found.loss.dtype == np.float64


def test_json_is_what_anything_can_read(tmp_path: Path) -> None:
    def refuse(name: str) -> Any:
        raise AssertionError(name)

    text = curve().save(tmp_path / "curve.json").read_text()
    assert json.loads(text, parse_constant=refuse)["loss"] == [1.0, "NaN", "Infinity"]
    (tmp_path / "old.json").write_text(text.replace('"NaN"', "NaN").replace('"Infinity"', "Infinity"))
    np.testing.assert_equal(vars(Curve.load(tmp_path / "old.json")), vars(curve()))  # as it was written once


@pytest.mark.parametrize("text", ["[]", "3", "{}", '{"loss": [1]}', '"loss"'])
def test_other_files(text: str, tmp_path: Path) -> None:
    (tmp_path / "other.json").write_text(text)
    with pytest.raises(ValueError, match=r"other.json' is no file that Curve\.save has written"):
        Curve.load(tmp_path / "other.json")


def test_a_file_that_is_older_than_a_field(tmp_path: Path) -> None:
    state = json.loads(curve().save(tmp_path / "curve.json").read_text())
    (tmp_path / "old.json").write_text(json.dumps({key: value for key, value in state.items() if key != "name"}))
    np.testing.assert_equal(vars(Curve.load(tmp_path / "old.json")), vars(curve()))


def test_several_results(tmp_path: Path) -> None:
    found = Results({"train": curve(1.0), "val": curve(2.0)})
    assert found.numbers() == {"train/last": 1.0, "val/last": 2.0}
    assert found.save(tmp_path / "curve.npz") == [tmp_path / "curve_train.npz", tmp_path / "curve_val.npz"]
    assert Curve.load(tmp_path / "curve_val.npz").numbers() == {"last": 2.0}
    one = Results({"train": curve(3.0)})
    assert one.numbers() == {"last": 3.0} and one.save(tmp_path / "one.json") == [tmp_path / "one.json"]
