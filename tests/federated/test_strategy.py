"""Rounds of clients inside one Trainer: layouts over ranks, resumes, counters, clients that fail."""

from __future__ import annotations

import lightning as L
import pytest
import torch

from lightning_distopt.federated import cohorts
from tests.federated.problem import EPOCHS, SIZES, fit_net, fit_quadratic, problem


def same(one, other, atol=1e-10):
    torch.testing.assert_close(one["models"], other["models"], rtol=0, atol=atol)
    torch.testing.assert_close(one["buffers"], other["buffers"], rtol=0, atol=atol)
    torch.testing.assert_close(one["losses"], other["losses"], rtol=0, atol=atol)
    for name in ("up", "down", "rounds", "dropped"):
        assert one[name] == other[name]


@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5}], ids=str)
def test_does_not_depend_on_the_number_of_ranks(ranks, options):
    one, *others = [ranks.run(world_size, fit_net, **dict(options)) for world_size in (1, 2, 4)]
    for run in others:
        for result in run:
            same(one[0], result)


def test_counts_the_steps_of_the_longest_rank(ranks):
    steps, chosen = problem().steps, problem().cohorts
    alone = ranks.run(1, fit_quadratic)[0]
    assert alone["global_step"] == sum(steps[k] for S in chosen for k in S)
    first, second = ranks.run(2, fit_quadratic)
    assert first["global_step"] == second["global_step"] < alone["global_step"]
    assert EPOCHS * len(SIZES) // 2 < first["global_step"]


class Stop(Exception):
    pass


class SaveAndFail(L.Callback):
    """Saves a checkpoint after so many batches, which are turns, and fails: training has no time to end properly."""

    def __init__(self, turns: int, path: str) -> None:
        self.left, self.path = turns, path

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)
            raise Stop


def stop_and_resume(rank, world_size, turns, folder, **options):
    """Rounds of six clients, each of whom has a turn of its own."""
    path, before = f"{folder}/stopped.ckpt", cohorts.STEPS_PER_TURN
    cohorts.STEPS_PER_TURN = 1
    try:
        with pytest.raises(Stop):
            fit_net(rank, world_size, callbacks=[SaveAndFail(turns, path)], **options)
        torch.manual_seed(99)
        return fit_net(rank, world_size, ckpt_path=path, **options)
    finally:
        cohorts.STEPS_PER_TURN = before


@pytest.mark.parametrize("policy", [{}, {"optimizer_state": "keep", "buffers": "local", "uplink": "top_k:0.3"}], ids=str)
@pytest.mark.parametrize(("world_size", "turns"), [(1, 2), (1, 6), (1, 11), (2, 3), (2, 4)])
def test_resumes_exactly_after_and_inside_a_round(ranks, tmp_path, world_size, turns, policy):
    whole = ranks.run(world_size, fit_net, strategy=policy)
    rest = ranks.run(world_size, stop_and_resume, turns, str(tmp_path), strategy=policy)
    for a, b in zip(whole, rest, strict=True):
        assert len(b["models"]) == 3 - turns * world_size // 6
        assert torch.equal(a["models"][-1], b["models"][-1])
        assert all(torch.equal(x, y) for x, y in zip(a["buffers"], b["buffers"], strict=True))
        assert a["losses"][-1] == b["losses"][-1]
        assert (a["up"], a["down"], a["global_step"]) == (b["up"], b["down"], b["global_step"])
