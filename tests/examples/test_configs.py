"""Every example configuration trains, shortened."""

from __future__ import annotations

import os
import signal
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch

from lightning_distopt.cli import _CLI, main
from lightning_distopt.models import ImageClassifier

CONFIGS = Path(__file__).parents[2] / "examples" / "configs"
SHORT = [
    "--trainer.max_epochs=2",
    "--trainer.limit_train_batches=8",
    "--trainer.limit_val_batches=1",
    "--trainer.num_sanity_val_steps=0",
    "--trainer.logger=false",
    "--trainer.enable_checkpointing=false",
    "--trainer.enable_progress_bar=false",
    "--trainer.enable_model_summary=false",
]
SAVES = "--trainer.enable_checkpointing=true"
ONE_CLIENT = ["--trainer.strategy.clients=4", "--trainer.strategy.fraction=0.25"]  # takes part in a round
# overrides, and rounds in 16 steps
CASES = {
    "communication_monitor.yaml": ([], 2),
    "compressed_gossip.yaml": ([], 16),
    "connectivity.yaml": (["--trainer.callbacks.every=8 steps"], 2),
    "consensus_control.yaml": ([], 16),
    "custom_schedule.yaml": (["--trainer.strategy.sync_period.steps=7"], 4),  # H = 1, 2, 4, 8
    "federated.yaml": (["--trainer.strategy.local_epochs=1", *ONE_CLIENT], 2),
    "gossip.yaml": ([], 16),
    "hessian.yaml": (["--trainer.callbacks.k=1", "--trainer.callbacks.trace=0", "--trainer.callbacks.samples=16"], 2),
    "landscape.yaml": (["--trainer.callbacks.points=3", "--trainer.callbacks.samples=32"], 2),
    "local_sgd.yaml": (["--trainer.strategy.sync_period.steps=6"], 5),  # H = 1, 1, 2, 4, 8
    "post_local_sgd.yaml": (["--model.schedule=[1]", "--trainer.strategy.sync_period=4"], 8 + 2),
    "exact_resume.yaml": ([SAVES], 2),
    "heterogeneous_data.yaml": ([], 16),
    "hierarchical_local_sgd.yaml": ([], 4),
    "multi_node.yaml": ([], 4),
    "own_topology.yaml": ([], 16),
    "push_sum.yaml": ([], 16),
    "quasi_global_momentum.yaml": ([], 16),
    "nonfinite_replica.yaml": ([], 2),
    "simulate_replicas.yaml": ([], 4),
    "stop_and_go.yaml": ([SAVES], 2),
    "dynamic_pruning.yaml": ([], 4),
    "weight_masking.yaml": ([], 4),
    "training_features.yaml": ([SAVES, "--trainer.limit_train_batches=16"], 4),
}

REPLICAS = {"simulate_replicas.yaml": 16, "heterogeneous_data.yaml": 16, "quasi_global_momentum.yaml": 16}
REPLICAS |= {"federated.yaml": 1, "gossip.yaml": 8, "compressed_gossip.yaml": 8, "own_topology.yaml": 8, "push_sum.yaml": 8}


@pytest.fixture(autouse=True)
def _environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    """Run in an empty folder, and drop what training leaves in the environment."""
    monkeypatch.chdir(tmp_path)
    before = dict(os.environ)
    yield
    os.environ.clear()
    os.environ.update(before)


def test_every_config_is_tested():
    assert {path.name for path in CONFIGS.glob("*.yaml")} == set(CASES)


@pytest.mark.parametrize("name", CASES)
def test_config_trains_in_one_process(name):
    overrides, rounds = CASES[name]
    trained = _CLI(["fit", f"--config={CONFIGS / name}", *SHORT, *overrides])
    assert trained.trainer.strategy.num_replicas == REPLICAS.get(name, 4)
    assert trained.trainer.global_step == 16
    assert trained.trainer.strategy.traffic.rounds == rounds
    assert 0 <= trained.trainer.callback_metrics["val_accuracy"] <= 1


def test_exact_resume():
    command = ["fit", f"--config={CONFIGS / 'exact_resume.yaml'}", *SHORT, SAVES, "--trainer.callbacks.every_n_train_steps=5"]
    never_stopped = _CLI(command).model
    # From step 15, the last but one, in the middle of a round. With another seed, which would show in what isn't restored.
    resumed = _CLI([*command, "--ckpt_path=outputs/exact_resume/latest.ckpt", "--seed_everything=1"]).model
    assert equal(never_stopped, resumed)


def test_stop_and_go(monkeypatch):
    command = ["fit", f"--config={CONFIGS / 'stop_and_go.yaml'}", *SHORT, SAVES]
    never_stopped = _CLI(command).model

    def terminate(module, batch, batch_idx):
        if module.global_step == 10:
            os.kill(os.getpid(), signal.SIGTERM)

    with monkeypatch.context() as patch, pytest.raises(SystemExit):
        patch.setattr(ImageClassifier, "on_train_batch_start", terminate)
        _CLI(command)
    resumed = _CLI([*command, "--ckpt_path=outputs/stop_and_go/interrupted.ckpt", "--seed_everything=1"]).model
    assert equal(never_stopped, resumed)


def equal(module, other):
    return all(torch.equal(a, b) for a, b in zip(module.parameters(), other.parameters(), strict=True))


@pytest.mark.launch
def test_config_trains_in_processes():
    processes = ["--trainer.devices=4", "--trainer.strategy.replicas_per_device=1"]
    processes += ["--trainer.strategy.start_method=fork", "--trainer.max_epochs=1"]
    trained = _CLI(["fit", f"--config={CONFIGS / 'local_sgd.yaml'}", *SHORT, *processes])
    assert trained.trainer.strategy.num_replicas == 4
    assert 0 <= trained.trainer.callback_metrics["val_accuracy"] <= 1


def test_config_serves_validate_and_test(capfd):
    # An unknown key of `fit` would be refused: the file holds what all subcommands share.
    for command in ("validate", "test"):
        limit = f"--trainer.limit_{command.removesuffix('idate')}_batches=1"
        main([command, f"--config={CONFIGS / 'local_sgd.yaml'}", limit, "--trainer.logger=false"])
        assert f"{command.removesuffix('idate')}_accuracy" in capfd.readouterr().out
