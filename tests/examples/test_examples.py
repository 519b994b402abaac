"""Every example runs, and ends in the result that it checks itself."""

from __future__ import annotations

import logging
import os
import re
import runpy
import sys
from collections.abc import Iterator
from pathlib import Path

import matplotlib.image
import pytest

EXAMPLES = Path(__file__).parents[2] / "examples"
LAST_LINES = {
    "communication_monitor.py": "of the time went into waiting",
    "compressed_gossip.py": "of the test digits are right",
    "connectivity.py": "on the curve",
    "consensus_control.py": "times closer together",
    "custom_schedule.py": "of the test digits are right",
    "dynamic_pruning.py": "of the validation digits are right",
    "exact_resume.py": "parameters of each of 4 replicas are bit-identical after every step: True",
    "federated.py": "of the test digits are right",
    "gossip.py": "of the validation digits are right",
    "heterogeneous_data.py": "of the test digits are right",
    "hessian.py": "are those of its 10 x 10 Hessian: True",
    "hierarchical_local_sgd.py": "of the test digits are right",
    "landscape.py": "at the end it is the model itself: True",
    "local_sgd.py": "of the validation digits are right",
    "multi_node.py": "of the test digits are right",
    "nonfinite_replica.py": "of the test digits are right",
    "quasi_global_momentum.py": "MB sent by each",
    "own_topology.py": "of the test digits are right",
    "post_local_sgd.py": "of the test digits are right",
    "push_sum.py": "of the test digits are right",
    "simulate_replicas.py": "of the test digits right after 36 rounds",
    "stop_and_go.py": "bit-identical to a run without a signal: True",
    "text_classification.py": "sentences from other files are right",
    "toy_average_consensus.py": "momentum is sooner at 1/100 on 2 for the first time, on 0 for good",
    "toy_fed_df.py": "more right than FedAvg, whose average it starts from",
    "toy_rosenbrock.py": "f is 647 times as large after 200 steps",
    "toy_two_replicas.py": "takes the replicas 9.7 times as far apart",
    "training_features.py": "after reloading",
    "weight_masking.py": "with the same logits to the bit: True",
}

ELSEWHERE = {"flower_two_clients.py"}  # tests/bridges/test_flower.py


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, without options, and drop what training leaves in the environment and the loggers."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "argv", ["example"])
    logger = logging.getLogger("lightning.pytorch")
    before, level = dict(os.environ), logger.level
    yield
    logger.setLevel(level)
    os.environ.clear()
    os.environ.update(before)


def test_every_example_is_tested():
    assert {path.name for path in EXAMPLES.glob("*.py")} == set(LAST_LINES) | ELSEWHERE


def test_the_page_lists_every_example():
    linked = re.findall(r"\]\(((?!\.\.)[^)]+)\)", (EXAMPLES / "README.md").read_text())
    files = [path for pattern in ("*.py", "*.ipynb", "configs/*.yaml") for path in EXAMPLES.glob(pattern)]
    assert sorted(linked) == sorted(str(path.relative_to(EXAMPLES)) for path in files)


# In this process: starting another one would cost more than the example.
@pytest.mark.slow
@pytest.mark.parametrize("name", LAST_LINES)
def test_example(name, capfd, tmp_path):
    runpy.run_path(str(EXAMPLES / name), run_name="__main__")
    assert LAST_LINES[name] in capfd.readouterr().out.strip().splitlines()[-1]
    if name.startswith("toy_"):
        height, width, _ = matplotlib.image.imread(tmp_path / "outputs" / f"{Path(name).stem}.png").shape
        assert min(height, width) > 500
