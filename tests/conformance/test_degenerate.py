"""Battery 4: degenerate cases hold exactly; 6: features of real training; n in {1, 2, 3, 4}."""

from __future__ import annotations

import copy
import warnings

import lightning as L
import pytest
import torch
from torch.utils.data import DataLoader

from lightning_distopt import LocalSGDStrategy
from tests.conformance.cases import CASES
from tests.conformance.problems import LAYOUTS, QUIET, Augmented, SmallNet, all_rows, fit, fit_net, fit_quadratic
from tests.helpers import exhaustive

BY_NAME = {case.name: case for case in CASES}
ETAS = [0.2] * 5 + [0.1] * 4 + [0.0] + [0.05] * 4


class Row:
    """A row that is not in the table."""

    def __init__(self, *args, **kwargs):
        self.strategy = lambda **options: LocalSGDStrategy(*args, **kwargs, **options)
        self.callbacks = list


def same(first, second, atol=0.0):
    torch.testing.assert_close(first["rows"], second["rows"], rtol=0, atol=atol)


def test_parameter_averaging_every_step_is_minibatch_sgd_for_sgd_with_momentum():
    parameters = fit_quadratic(0, 1, 4, BY_NAME["parameter_averaging_every_step"], ETAS)
    same(parameters, fit_quadratic(0, 1, 4, BY_NAME["minibatch_sgd"], ETAS), atol=1e-12)


def test_parameter_averaging_every_step_is_not_minibatch_sgd_for_adam():
    parameters = fit_quadratic(0, 1, 4, BY_NAME["parameter_averaging_every_step"], ETAS, optimizer="adam")
    gradients = fit_quadratic(0, 1, 4, BY_NAME["minibatch_sgd"], ETAS, optimizer="adam")
    assert (parameters["rows"] - gradients["rows"]).abs().max() > 1e-3


def test_one_block_round_is_local_sgd():
    same(fit_net(0, 1, 4, Row(3, block_size=2, block_period=1)), fit_net(0, 1, 4, Row(3)))


def test_blocks_of_one_are_local_sgd_with_the_product_of_periods():
    same(fit_net(0, 1, 4, Row(2, block_size=1, block_period=3)), fit_net(0, 1, 4, Row(6)))


def test_a_single_block_is_local_sgd():
    same(fit_net(0, 1, 4, Row(2, block_size=4, block_period=3)), fit_net(0, 1, 4, Row(2)))


def blocks_by_default(rank, world_size, m):
    strategies = []
    row = Row(2, block_period=3)
    make = row.strategy
    row.strategy = lambda **options: strategies.append(make(**options)) or strategies[0]
    result = fit_net(rank, world_size, m, row, max_epochs=1)
    return strategies[0].algorithm.block_size, result["traffic"]["rounds"]


def test_blocks_follow_nodes_by_default(ranks):
    # All ranks of the pool are on one node: its replicas are a block, whatever the layout.
    for m, world_size in LAYOUTS[4]:
        assert ranks.run(world_size, blocks_by_default, m) == [(4, 3)] * world_size


def test_a_period_beyond_training_leaves_replicas_independent():
    rows = fit_net(0, 1, 2, Row(1000))["rows"]
    alone = fit_net(0, 1, 2, Row(500, buffers="local"))["rows"]
    torch.testing.assert_close(rows, alone, rtol=0, atol=0)
    assert (rows[-1][0] != rows[-1][1]).any()


def test_switch_at_zero_is_local_sgd_and_beyond_the_end_minibatch_sgd():
    from lightning_distopt import PostLocalSwitch

    never = fit_net(0, 1, 4, Row(3), callbacks=(PostLocalSwitch(at=10**6),))
    same(never, fit_net(0, 1, 4, Row(1)))
    same(fit_net(0, 1, 4, Row(3), callbacks=(PostLocalSwitch(at=0),)), fit_net(0, 1, 4, Row(3)))


@pytest.mark.parametrize("case", [case for case in CASES if case.exact], ids=str)
def test_equal_replicas_stay_equal(case):
    """Same data for all and nothing random: averaging changes nothing, so every algorithm is single-device SGD."""

    class Still(SmallNet):
        def __init__(self):
            super().__init__()
            self.dropout = torch.nn.Identity()

    data = torch.utils.data.TensorDataset(Augmented().x[:18], Augmented().y[:18])
    rows = []
    for row, m in ((case, 4), (Row(1), 1)):
        torch.manual_seed(1)
        loader = DataLoader(data, batch_size=3)
        strategy = {"partition": [range(18)] * 4} if m == 4 else {}
        result = fit(0, 1, m, row, Still(), loader, strategy=strategy, precision="64-true", max_epochs=2)
        rows.append(result["rows"])
    torch.testing.assert_close(rows[0], rows[1].expand_as(rows[0]), rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", [case for case in CASES if not (case.refuses_one or case.acts_alone)], ids=str)
def test_one_replica_is_the_single_device_run_bit_for_bit(case):
    warnings.filterwarnings("ignore")
    states = []
    for strategy in (case.strategy(), "auto"):
        L.seed_everything(7, verbose=False)
        module = SmallNet()
        trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, max_epochs=2, enable_checkpointing=False, **QUIET)
        data = Augmented(dtype=torch.float32)
        trainer.fit(module, DataLoader(data, batch_size=3, shuffle=True), DataLoader(data, batch_size=10))
        states.append(copy.deepcopy(module.state_dict()))
        states.append({key: value.clone() for key, value in trainer.callback_metrics.items()})
        states.append({"draw": torch.rand(3)})
    for ours, theirs in zip(states[:3], states[3:], strict=True):
        torch.testing.assert_close(ours, theirs, rtol=0, atol=0)


@pytest.mark.parametrize("case", [case for case in CASES if case.refuses_one], ids=str)
@pytest.mark.parametrize("n", [1, 3])
def test_replicas_that_do_not_make_blocks_are_refused(ranks, case, n):
    with pytest.raises(AssertionError, match=case.refuses_one):
        ranks.run(n, fit_net, 1, case, max_epochs=1)


@pytest.mark.parametrize(
    ("case", "n"),
    [
        (case, n) if n == max(case.sizes) else exhaustive(case, n)
        for case in CASES
        for n in sorted({1, *case.sizes})
        if n > 1 or not case.refuses_one
    ],
    ids=str,
)
def test_features_of_real_training(ranks, case, n):
    """bf16, accumulation with a remainder, clipping by value, uneven data, validation: finite, in step, and the same count."""
    data = Augmented(20, torch.float32)
    results = ranks.run(
        n,
        fit_net,
        1,
        case,
        precision="bf16-mixed",
        accumulate_grad_batches=2,
        gradient_clip_val=0.1,
        gradient_clip_algorithm="value",
        max_epochs=2,
        val_loader=DataLoader(data, batch_size=5),
    )
    assert len({result["global_step"] for result in results}) == 1
    assert len({round(result["metrics"]["val_loss"], 6) for result in results}) == 1
    assert torch.isfinite(all_rows(results)).all()
    for result in results[1:]:
        torch.testing.assert_close(result["state"], results[0]["state"], rtol=0, atol=0)


def unused(rank, world_size, m, case, **options):
    class Unused(SmallNet):
        def __init__(self):
            super().__init__()
            self.never = torch.nn.Linear(3, 3)

    torch.manual_seed(1)
    loader = DataLoader(Augmented(), batch_size=3)
    return fit(rank, world_size, m, case, Unused(), loader, precision="64-true", max_epochs=1, **options)


@pytest.mark.parametrize("layout", LAYOUTS[4], ids=str)
def test_unused_parameters_train_locally(ranks, layout):
    m, world_size = layout
    results = ranks.run(world_size, unused, m, BY_NAME["local_sgd"])
    assert torch.isfinite(all_rows(results)).all()


def test_unused_parameters_with_averaged_gradients_need_the_option_of_ddp(ranks):
    results = ranks.run(2, unused, 1, BY_NAME["minibatch_sgd"], strategy={"ddp_kwargs": {"find_unused_parameters": True}})
    simulated = unused(0, 1, 2, BY_NAME["minibatch_sgd"])
    torch.testing.assert_close(all_rows(results), simulated["rows"], rtol=0, atol=1e-10)
