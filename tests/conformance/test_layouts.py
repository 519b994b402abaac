"""Battery 2: a simulation equals the real multi-process run, and mixed layouts, with everything random that there is."""

from __future__ import annotations

import pytest
import torch
from lightning.pytorch.callbacks import Callback

from tests.conformance.cases import CASES
from tests.conformance.problems import LAYOUTS, all_rows, fit_net

FOUR = [case for case in CASES if 4 in case.sizes]


def compare(ranks, case, layouts, **options):
    runs = [ranks.run(world_size, fit_net, m, case, **options) for m, world_size in layouts]
    for run in runs[1:]:
        torch.testing.assert_close(all_rows(run), all_rows(runs[0]), rtol=0, atol=1e-10)
        for result in run:
            assert result["global_step"] == runs[0][0]["global_step"]
            torch.testing.assert_close(result["state"], runs[0][0]["state"], rtol=0, atol=1e-10)
    return runs


@pytest.mark.parametrize("case", FOUR, ids=str)
def test_simulation_equals_processes(ranks, case):
    runs = compare(ranks, case, LAYOUTS[4])
    rows = all_rows(runs[0])
    assert (rows.std(dim=1).amax(dim=1) > 0).any() == case.diverges


@pytest.mark.parametrize("buffers", ["average", "recalibrate"])
@pytest.mark.parametrize("optimizer_state", ["average", "reset"])
def test_policies_are_the_same_in_every_layout(ranks, buffers, optimizer_state):
    case = next(case for case in CASES if case.name == "local_sgd")
    compare(ranks, case, LAYOUTS[4], strategy={"buffers": buffers, "optimizer_state": optimizer_state})


def test_workers_accumulation_and_clipping_are_the_same_in_every_layout(ranks):
    case = next(case for case in CASES if case.name == "local_sgd")
    options = {"num_workers": 1, "accumulate_grad_batches": 4, "gradient_clip_val": 0.5, "optimizer": "adamw"}
    compare(ranks, case, LAYOUTS[4][::2], **options)


class Loaders(Callback):
    """Counts the loaders that the strategy holds on to."""

    def __init__(self):
        self.held = []

    def on_train_epoch_end(self, trainer, *args):
        self.held.append(len(trainer.strategy._loaders))


def reloading(rank, world_size, m, case):
    loaders = Loaders()
    result = fit_net(rank, world_size, m, case, callbacks=(loaders,), reload_dataloaders_every_n_epochs=1)
    return result["rows"], loaders.held


def test_loaders_made_anew_each_epoch_replace_the_old(ranks):
    case = next(case for case in CASES if case.name == "local_sgd")
    runs = [ranks.run(world_size, reloading, m, case) for m, world_size in LAYOUTS[4]]
    rows = [torch.cat([rows for rows, _ in run], dim=1) for run in runs]
    for other in rows[1:]:
        torch.testing.assert_close(other, rows[0], rtol=0, atol=1e-10)
    assert len(rows[0]) == 18
    assert all(held == [1, 1, 1] for _, held in runs[0])  # one process: a loader of all its rows


def test_replicas_draw_different_noise(ranks):
    """Same start, same data, same order: dropout and augmentation alone make replicas differ."""
    case = next(case for case in CASES if case.name == "local_sgd")
    same = [list(range(12))] * 3
    rows = all_rows(ranks.run(3, fit_net, 1, case, max_epochs=1, strategy={"partition": same}))[0]
    distances = torch.pdist(rows)
    assert (distances > 1e-4).all()
