"""Battery 3: stopped in the middle of a round, saved, resumed: bit-identical to never having stopped."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from torch.utils.data import DataLoader

from tests.conformance.cases import CASES
from tests.conformance.problems import LAYOUTS, Augmented, all_rows, fit_net
from tests.helpers import exhaustive

FOUR = [case for case in CASES if 4 in case.sizes]
EACH = [
    ((case, layout) if k % len(LAYOUTS[4]) == turn else exhaustive(case, layout))
    for k, case in enumerate(FOUR)
    for turn, layout in enumerate(LAYOUTS[4])
]
"""All cases in all layouts; in `make test` each in one of them, by turns."""


def resumed_run(rank, world_size, m, case, folder, stop, trigger, **options):
    """Train to the end; train again, but stop after `stop` steps and go on in a new Trainer from the checkpoint."""
    whole = fit_net(rank, world_size, m, case, **options)
    saver = ModelCheckpoint(**{"dirpath": folder, "filename": "stopped", "save_top_k": -1, **trigger})
    fit_net(rank, world_size, m, case, callbacks=(saver,), enable_checkpointing=True, max_steps=stop, **options)
    rest = fit_net(rank, world_size, m, case, ckpt_path=f"{folder}/stopped.ckpt", **options)
    return whole, rest


def check(ranks, case, layout, folder, stop, trigger, **options):
    m, world_size = layout
    results = ranks.run(world_size, resumed_run, m, case, str(folder), stop, trigger, timeout=90, **options)
    whole, rest = [all_rows([pair[k] for pair in results]) for k in (0, 1)]
    assert 0 < len(rest) < len(whole)
    torch.testing.assert_close(rest, whole[-len(rest) :], rtol=0, atol=0)
    for before, after in results:
        assert after["global_step"] == before["global_step"]
        torch.testing.assert_close(after["state"], before["state"], rtol=0, atol=0)
        for count in ("bytes_sent", "rounds"):
            assert after["traffic"][count] == before["traffic"][count]
    return len(whole), len(rest)


@pytest.mark.parametrize(("case", "layout"), EACH, ids=str)
def test_resume_in_the_middle_of_a_round_and_of_an_epoch(ranks, tmp_path, case, layout):
    # 70 images, 4 replicas, batches of 3: 6 steps an epoch; step 10 is in the middle of the second.
    whole, rest = check(ranks, case, layout, tmp_path, stop=10, trigger={"every_n_train_steps": 10})
    assert (whole, rest) == (18, 8)


@pytest.mark.parametrize(
    "trigger", [{"every_n_train_steps": 12}, {"every_n_epochs": 2, "save_on_train_epoch_end": True}], ids=str
)
def test_resume_at_the_end_of_an_epoch(ranks, tmp_path, trigger):
    case = next(case for case in CASES if case.name == "local_sgd")
    whole, rest = check(ranks, case, (1, 4), tmp_path, stop=12, trigger=trigger)
    assert (whole, rest) == (18, 6)


def test_resume_with_workers_accumulation_and_adam(ranks, tmp_path):
    case = next(case for case in CASES if case.name == "local_sgd")
    options = {"num_workers": 2, "accumulate_grad_batches": 2, "optimizer": "adamw", "max_epochs": 3}
    options["strategy"] = {"buffers": "average", "optimizer_state": "average"}
    check(ranks, case, (2, 2), tmp_path, stop=4, trigger={"every_n_train_steps": 4}, **options)


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
@pytest.mark.parametrize("evaluate", ["average", "local"])
def test_resume_from_a_checkpoint_that_validation_triggered(ranks, tmp_path, layout, evaluate):
    """Saved while the module shows something else: the average, on isolated random streams."""
    case = next(case for case in CASES if case.name == "local_sgd")
    options = {"strategy": {"evaluate": evaluate}, "val_loader": DataLoader(Augmented(), batch_size=10, shuffle=True)}
    trigger = {"monitor": "val_loss", "mode": "max", "enable_version_counter": False}
    # 6 steps an epoch, validation after each 4 batches: steps 4, 10 and 16; training stops at the second.
    m, world_size = layout
    whole, rest = check(ranks, case, (m, world_size), tmp_path, stop=10, trigger=trigger, val_check_interval=4, **options)
    assert (whole, rest) == (18, 8)


def resumed_with_another_seed(rank, world_size, m, case, folder, trigger, **options):
    """What is not restored shows where the resumed program has another seed."""
    whole = fit_net(rank, world_size, m, case, early=True, **options)
    saver = ModelCheckpoint(dirpath=folder, filename="stopped", save_top_k=-1, **trigger)
    fit_net(rank, world_size, m, case, early=True, callbacks=(saver,), enable_checkpointing=True, max_steps=12, **options)
    rest = fit_net(rank, world_size, m, case, early=True, ckpt_path=f"{folder}/stopped.ckpt", seed=8, **options)
    return whole["rows"], rest["rows"]


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
@pytest.mark.parametrize("partition", ["reshuffle", "fixed"])
@pytest.mark.parametrize("trigger", [{"every_n_train_steps": 10}, {"every_n_epochs": 2}], ids=str)
def test_resume_where_the_optimizer_asks_for_the_length_of_training(ranks, tmp_path, layout, partition, trigger):
    case = next(case for case in CASES if case.name == "local_sgd")
    m, world_size = layout
    options = {"strategy": {"partition": partition}}
    results = ranks.run(world_size, resumed_with_another_seed, m, case, str(tmp_path), trigger, timeout=90, **options)
    for whole, rest in results:
        assert len(rest) == (8 if "every_n_train_steps" in trigger else 6)
        torch.testing.assert_close(rest, whole[-len(rest) :], rtol=0, atol=0)


def resume_elsewhere(rank, world_size, m, case, path):
    result = fit_net(rank, world_size, m, case, ckpt_path=path, max_epochs=2)
    return result["rows"], result["global_step"]


def test_resume_with_another_number_of_replicas_starts_from_the_average(ranks, tmp_path):
    case = next(case for case in CASES if case.name == "local_sgd")
    saver = ModelCheckpoint(dirpath=tmp_path, filename="four", every_n_train_steps=6)
    ranks.run(4, fit_net, 1, case, max_epochs=1, callbacks=(saver,), enable_checkpointing=True)
    average = torch.load(tmp_path / "four.ckpt", weights_only=True)["state_dict"]
    names = [name for name in average if "norm.running" not in name and "num_batches" not in name]
    results = ranks.run(2, resume_elsewhere, 1, case, str(tmp_path / "four.ckpt"))
    rows = torch.cat([rows for rows, _ in results], dim=1)
    assert len(rows) > 0
    start = torch.cat([average[name].flatten() for name in names if "frozen" not in name and name != "tied.weight"])
    # After one step of learning rate 0.07 or less every replica is still near the average it started from.
    assert (rows[0] - start).abs().max() < 0.5
    assert (rows[0][0] != rows[0][1]).any()


def test_augmented_data_is_random():
    data = Augmented()
    assert not torch.equal(data[0][0], data[0][0])
