"""The demonstration, with little data: what it prints, draws and writes."""

from __future__ import annotations

import json
import os
from pathlib import Path

import matplotlib.image
import pytest

from lightning_distopt.demo import demo


@pytest.mark.launch
@pytest.mark.slow
def test_demo(tmp_path, capfd):
    environment = dict(os.environ)
    # 2 epochs of 8 steps; the learning rate decays after the first
    results = demo(output=str(tmp_path / "new"), epochs=2, batch_size=16, num_train=512, num_test=100)
    assert dict(os.environ) == environment
    written = json.loads((tmp_path / "new" / "demo.json").read_text())
    assert written["results"] == results
    assert written["settings"]["milestones"] == [1]
    minibatch, local, post_local, hierarchical = results
    assert [result["rounds"] for result in results] == [16, 2, 8, 4]
    for result in results:
        assert [point["epoch"] for point in result["curve"]] == [1, 2]
        assert all(0 <= point["accuracy"] <= 100 for point in result["curve"])
        assert result["curve"][-1]["bytes_sent"] == result["bytes_sent"]
        assert 0 < result["seconds_blocked"] < result["seconds"]
    assert minibatch["curve"][0]["accuracy"] == post_local["curve"][0]["accuracy"]  # the same so far
    assert minibatch["bytes_sent"] == pytest.approx(16 * 1.5 * 4 * 77_754, rel=0.01)
    assert local["bytes_sent"] == pytest.approx(minibatch["bytes_sent"] / 8, rel=0.01)
    assert post_local["bytes_sent"] == pytest.approx(minibatch["bytes_sent"] / 2, rel=0.01)
    assert hierarchical["bytes_sent"] == pytest.approx((3 * 1.0 + 1.5) * 4 * 77_754, rel=0.01)
    assert minibatch["consensus_distance"] == 0
    assert all(result["consensus_distance"] > 0 for result in (local, post_local, hierarchical))

    image = matplotlib.image.imread(tmp_path / "new" / "demo.png")
    assert image.shape[:2] == (690, 1500)
    assert image[..., :3].std() > 0.05  # something is drawn

    text = capfd.readouterr().out
    table = text[text.index("test accuracy  rounds") :]
    for result in results:
        (line,) = [line for line in table.splitlines() if line.startswith(result["name"])]
        assert f"{result['test_accuracy']:.1f} %" in line
        assert f" {result['rounds']} " in line
        assert f" {result['bytes_sent'] / 1e6:.1f} " in line


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"replicas": 3}, "even number"),
        ({"replicas": 2}, "at least 4"),
        ({"epochs": 1}, "at least 2"),
        ({"num_train": 100}, "one training batch"),
        ({"batch_size": 0}, "one training batch"),
    ],
)
def test_options_out_of_range(options, sentence, tmp_path):
    with pytest.raises(ValueError, match=sentence):
        demo(output=str(tmp_path / "new"), **options)
    assert not (tmp_path / "new").exists()


def test_the_picture_in_the_readme_is_that_of_the_whole_demonstration():
    """And its caption says what came out."""
    root = Path(__file__).parent.parent
    made = json.loads((root / "docs" / "results" / "demo.json").read_text())
    assert (made["settings"]["epochs"], made["settings"]["num_train"]) == (6, 20_480)  # of `make demo`; 4 and 4,096 are quick
    minibatch, local, post_local, _ = made["results"]
    assert local["bytes_sent"] == pytest.approx(minibatch["bytes_sent"] / 8, rel=0.01)
    assert post_local["bytes_sent"] == pytest.approx(minibatch["bytes_sent"] / 2, rel=0.1)
    assert abs(post_local["test_accuracy"] - minibatch["test_accuracy"]) < 0.1
    lower = round(minibatch["test_accuracy"] - local["test_accuracy"], 1)
    assert f"ends {lower} points lower; post-local SGD sends half and ends level" in (root / "README.md").read_text()
