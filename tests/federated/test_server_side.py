"""Aggregators whose server, or whose clients, do more than average: what they become in special cases, and what they keep."""

from __future__ import annotations

from types import SimpleNamespace

import lightning as L
import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import FedAdagrad, FedAdam, FedAvg, FedAvgM, FedNova, FedProx, FedYogi, MimeLite, Scaffold
from lightning_distopt.federated import cohorts, make
from tests.conformance.problems import Quadratic
from tests.federated.problem import (
    BATCH,
    EPOCHS,
    ETAS,
    FRACTION,
    SIZES,
    data,
    fit_net,
    fit_quadratic,
    mean_gradient,
    parts,
    problem,
    run,
    start,
)
from tests.federated.test_strategy import same
from tests.oracles import federated as oracle


def samples(bad=()):
    """The samples of the quadratics; those of bad clients are no numbers."""
    a, c = (torch.from_numpy(values) for values in data())
    for k in bad:
        c[parts()[k]] = torch.nan
    return TensorDataset(a, c)


OPTIONS = {"clients": len(SIZES), "fraction": FRACTION, "local_epochs": EPOCHS, "partition": parts()}


# ------------------------------------------------------------------------------------------------------------- special cases
@pytest.mark.parametrize("downlink", [None, "top_k:0.3"])
def test_without_its_term_is_fedavg_bit_for_bit(downlink):
    aggregators = FedAvg(), FedAvgM(0.0), FedProx(0.0), MimeLite(0.0)
    plain, *others = (
        fit_net(0, 1, aggregator, "plain", rounds=2, strategy={"downlink": downlink}) for aggregator in aggregators
    )
    for other in others:
        assert torch.equal(plain["models"], other["models"])
        assert (plain["losses"], plain["up"], plain["down"]) == (other["losses"], other["up"], other["down"])


def test_a_server_without_momentum_does_not_round():
    x, average = torch.randn(1000), torch.randn(1000)
    assert not torch.equal(x - (x - average), average)
    aggregator = FedAvgM(0.0)
    aggregator.setup(SimpleNamespace(model=(x,)))
    aggregator.finish_round((average,))
    assert torch.equal(x, average)


class Scalar(L.LightningModule):
    """1/2 (w - c)^2 from w = 0, in steps of 1/2."""

    def __init__(self) -> None:
        super().__init__()
        self.w = torch.nn.Parameter(torch.zeros(1, dtype=torch.float64))

    def training_step(self, batch, batch_idx):
        return 0.5 * (self.w - batch[0]).pow(2).mean()

    def configure_optimizers(self):
        return torch.optim.SGD(self.parameters(), lr=0.5)


def fit_scalar(aggregator, rounds=3):
    """Two clients, of one sample each, go half of the way to 2 and to 4, and so on average half of the way to 3."""
    targets = DataLoader(TensorDataset(torch.tensor([[2.0], [4.0]], dtype=torch.float64)), 1)
    strategy = {"aggregator": aggregator, "clients": 2, "fraction": 1.0, "partition": [[0], [1]]}
    return run(0, 1, Scalar(), targets, strategy, rounds)["models"].flatten().tolist()


def test_momentum_of_the_server_by_hand():
    # 0 -> 1.5:     v = 0 - 1.5 = -1.5
    # 1.5 -> 2.25:  v = 0.9 (-1.5) + 1.5 - 2.25 = -2.1,  x = 1.5 + 2.1
    # 3.6 -> 3.3:   v = 0.9 (-2.1) + 3.6 - 3.3 = -1.59,  x = 3.6 + 1.59
    assert fit_scalar(FedAvgM(0.9)) == pytest.approx([1.5, 3.6, 5.19], abs=1e-14)


def test_adaptive_servers_by_hand():
    # Delta = 1.5, m = 0.5 * 1.5, and with tau = 2: v = 4 + 2.25, 0.5 * 4 + 0.5 * 2.25, 4 - 0.5 * 2.25
    first = {
        FedAdagrad(0.1, 0.5, 2.0): 0.1 * 0.75 / (2.5 + 2),
        FedAdam(0.1, 0.5, 0.5, 2.0): 0.1 * 0.75 / (3.125**0.5 + 2),
        FedYogi(0.1, 0.5, 0.5, 2.0): 0.1 * 0.75 / (2.875**0.5 + 2),
        FedYogi(0.1, 0.5, 0.5, 1.0): 0.1 * 0.75 / (2.125**0.5 + 1),  # v = 1 + 0.5 * 2.25: the square is larger
    }
    for aggregator, step in first.items():
        assert fit_scalar(aggregator, 1) == pytest.approx([step], abs=1e-15), aggregator


@pytest.mark.parametrize("aggregator", [FedAdagrad(2e6, 0.0, 1e6), FedYogi(2e6, 0.0, 0.99, 1e6)], ids=repr)
def test_a_server_that_hardly_adapts_is_fedavg(aggregator):
    plain, other = fit_quadratic(0, 1), fit_quadratic(0, 1, aggregator)
    torch.testing.assert_close(plain["models"], other["models"], rtol=0, atol=1e-9)


def test_steps_in_units_of_their_own_size_are_signs():
    x_0, x_1 = torch.from_numpy(start()), fit_quadratic(0, 1, FedAdam(0.01, 0.0, 0.0, 1e-12), etas=[0.2])["models"][0]
    signs = (fit_quadratic(0, 1, etas=[0.2])["models"][0] - x_0).sign()
    torch.testing.assert_close(x_1 - x_0, 0.01 * signs, rtol=0, atol=1e-10)


class Watched(FedProx):
    """Keeps what the proximal term adds, at the first and the fifth step of each client, and what autograd says of it."""

    def setup(self, server):
        super().setup(server)
        self.seen = []

    def transform_gradients(self, client):
        before = client.gradients[0].clone()
        super().transform_gradients(client)
        if client.step in (0, 4):
            w = client.model[0].detach().clone().requires_grad_()
            (0.5 * self.mu * (w - self.server.sent[0]).square().sum()).backward()
            self.seen.append((client.step, client.gradients[0] - before, w.grad))


def test_the_proximal_term_is_the_gradient_of_a_squared_distance():
    watched = Watched(0.7)
    fit_quadratic(0, 1, watched, etas=[0.2])
    assert {step for step, *_ in watched.seen} == {0, 4}
    for step, added, expected in watched.seen:
        torch.testing.assert_close(added, expected, rtol=0, atol=1e-14)
        assert (expected.norm() > 0.01) == (step == 4)


@pytest.mark.parametrize("world_size", [1, 2])
def test_one_full_step_of_everyone_is_minibatch_sgd(ranks, world_size):
    strategy = {**OPTIONS, "fraction": 1.0, "local_epochs": 1}
    module = Quadratic(ETAS, "plain").double()
    result = ranks.run(world_size, run, module, DataLoader(samples(), max(SIZES)), strategy, len(ETAS))[0]
    x = start()
    for eta, model in zip(ETAS, result["models"], strict=True):
        x = x - eta * mean_gradient(range(sum(SIZES)), x)  # of sum_k n_k / n f_k
        np.testing.assert_allclose(model.numpy(), x, rtol=0, atol=1e-12)


@pytest.mark.parametrize("optimizer", ["plain", "sgd"])
def test_normalised_averages_of_equal_steps_are_fedavg(optimizer):
    strategy = {"local_epochs": 1, "local_steps": 3}
    plain, nova = (fit_quadratic(0, 1, a, optimizer, strategy=dict(strategy)) for a in (FedAvg(), FedNova()))
    torch.testing.assert_close(plain["models"], nova["models"], rtol=0, atol=1e-13)


@pytest.mark.parametrize("option", [1, 2])
def test_clients_with_the_same_data_have_nothing_to_correct(option):
    dataset = TensorDataset(*(values[:4] for values in samples().tensors))
    results = []
    for aggregator in (FedAvg(), Scaffold(option)):
        strategy = {"aggregator": aggregator, "clients": 3, "fraction": 1.0, "local_epochs": 2, "partition": [range(4)] * 3}
        results.append(run(0, 1, Quadratic(ETAS, "plain").double(), DataLoader(dataset, 2), strategy, len(ETAS)))
    torch.testing.assert_close(results[0]["models"], results[1]["models"], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ what they keep
class Variates(L.Callback):
    """Keeps Scaffold's `c`, and the `c_k` of this rank's clients, after every round."""

    def __init__(self) -> None:
        self.rounds = []

    def on_train_epoch_end(self, trainer, module) -> None:
        federation = trainer.strategy.algorithm
        own = {k: state["own"]["c"][0] for k, state in federation.states.state_dict().items()}
        self.rounds.append((federation.aggregator.state_dict()["c"][0], own))


def fit_and_look(rank, world_size, **options):
    variates = Variates()
    fit_quadratic(rank, world_size, callbacks=[variates], **options)
    return variates.rounds


@pytest.mark.parametrize("option", [1, 2])
def test_control_variates_stay_and_have_their_mean_at_the_server(ranks, option):
    ranked = ranks.run(2, fit_and_look, aggregator=Scaffold(option))
    before, seen = {}, set()
    for t, (S, *rounds) in enumerate(zip(problem().cohorts, *ranked, strict=True)):
        (c, even), (same_c, odd) = rounds
        now = even | odd
        seen |= set(S)
        assert set(now) == seen
        assert all(k % 2 == 0 for k in even) and all(k % 2 == 1 for k in odd)
        assert torch.equal(c, same_c)
        torch.testing.assert_close(c, sum(now.values()) / len(SIZES), rtol=0, atol=1e-14)
        assert c.norm() > 0.1
        changed = {k for k in before if not torch.equal(before[k], now[k])}
        assert changed <= set(S)
        assert bool(changed) == (t > 0 and (option == 1 or ETAS[t] > 0))
        before = now
    assert len(problem().cohorts[0]) < len(seen)


class TwoRates(Quadratic):
    """Weights and biases have learning rates of their own; that of the biases is zero at times."""

    def configure_optimizers(self):
        optimizer = torch.optim.SGD([{"params": [self.weight], "lr": 0.2}, {"params": [self.bias], "lr": 0.05}])
        schedules = [lambda t: 1.0, lambda t: t % 2]
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, schedules)
        return {"optimizer": optimizer, "lr_scheduler": schedule}


def test_control_variates_follow_each_parameters_learning_rate(ranks):
    etas = [np.array([0.2] * 6 + [0.05 * (t % 2)] * 2) for t in range(5)]
    strategy = {**OPTIONS, "aggregator": Scaffold()}
    result = ranks.run(2, run, TwoRates(ETAS).double(), DataLoader(samples(), BATCH), strategy, 5)[0]
    np.testing.assert_allclose(result["models"].numpy(), oracle.scaffold(start(), problem(etas=etas)), rtol=0, atol=1e-10)


@pytest.mark.parametrize(
    ("aggregator", "optimizer", "expected"),
    [
        (FedNova(), "plain", oracle.fed_nova),
        (Scaffold(), "plain", oracle.scaffold),
        (MimeLite(0.8), "plain", lambda x, p: oracle.mime_lite(x, p, 0.8)),
        (FedAvgM(0.9), "plain", lambda x, p: oracle.fed_avg_m(x, p, 0.9)),
    ],
    ids=lambda value: "" if callable(value) else str(value),
)
def test_goes_on_with_the_clients_that_are_left(ranks, aggregator, optimizer, expected):
    bad, known = problem().cohorts[0][1], problem()
    known.cohorts = [[k for k in S if k != bad] for S in known.cohorts]
    strategy = {**OPTIONS, "aggregator": aggregator}
    module = Quadratic(ETAS, optimizer).double()
    result = ranks.run(2, run, module, DataLoader(samples([bad]), BATCH), strategy, len(ETAS))[0]
    assert result["dropped"] == [[bad] if bad in S else [] for S in problem().cohorts]
    np.testing.assert_allclose(result["models"].numpy(), expected(start(), known), rtol=0, atol=1e-10)


KEEPING = [FedAvgM(), FedAdagrad(), FedAdam(), FedYogi(), FedNova(), Scaffold(), Scaffold(1), MimeLite()]


class Save(L.Callback):
    """Saves a checkpoint after so many turns, and lets training go on."""

    def __init__(self, turns: int, path: str) -> None:
        self.left, self.path = turns, path

    def on_train_batch_end(self, trainer, module, *args) -> None:
        self.left -= 1
        if self.left == 0:
            trainer.save_checkpoint(self.path)


def save_and_resume(rank, world_size, path, **options):
    """Two rounds of six clients, each of whom has a turn of its own, and the rest of them once more."""
    before, cohorts.STEPS_PER_TURN = cohorts.STEPS_PER_TURN, 1
    try:
        whole = fit_net(rank, world_size, callbacks=[Save(4, path)], rounds=2, **options)
        torch.manual_seed(99)
        return whole, fit_net(rank, world_size, ckpt_path=path, rounds=2, **options)
    finally:
        cohorts.STEPS_PER_TURN = before


@pytest.mark.parametrize("aggregator", KEEPING, ids=repr)
def test_resumes_exactly_inside_the_second_round(ranks, tmp_path, aggregator):
    path = str(tmp_path / "inside.ckpt")
    for a, b in ranks.run(2, save_and_resume, path, aggregator=aggregator, optimizer="plain"):
        assert len(b["models"]) == 1
        assert torch.equal(a["models"][1:], b["models"])
        assert a["losses"][1:] == b["losses"]
        assert (a["up"], a["down"], a["global_step"]) == (b["up"], b["down"], b["global_step"])


@pytest.mark.parametrize("aggregator", [Scaffold(1), MimeLite()], ids=repr)
def test_full_gradients_do_not_depend_on_the_number_of_ranks(ranks, aggregator):
    options = {"batch_size": 4, "gradient_clip_val": 0.5, "rounds": 2}
    one, two = (ranks.run(world_size, fit_net, aggregator, "plain", **dict(options)) for world_size in (1, 2))
    same(one[0], two[0])
    same(one[0], two[1])


def test_sends_what_it_says(ranks):
    plain, *others = (fit_quadratic(0, 1, aggregator, etas=ETAS[:1]) for aggregator in (FedAvg(), Scaffold(), MimeLite()))
    for other in others:
        assert (other["up"], other["down"]) == (2 * plain["up"], 2 * plain["down"])


# ----------------------------------------------------------------------------------------------------------------- bad input
@pytest.mark.parametrize("kind", [FedAvgM, FedAdagrad, FedAdam, FedYogi, FedNova, Scaffold, MimeLite])
def test_has_a_name(kind):
    assert type(make(kind.__name__.lower())) is kind


@pytest.mark.parametrize(
    ("made", "message"),
    [
        (lambda: FedAvgM(1.0), "`beta` must be at least 0 and below 1; got 1.0"),
        (lambda: FedAdagrad(server_lr=0), "`server_lr` must be a number above 0; got 0"),
        (lambda: FedAdam(beta2=-0.1), "`beta2` must be at least 0"),
        (lambda: FedYogi(tau=float("inf")), "`tau` must be a number above 0"),
        (lambda: Scaffold(3), "`option` is 1, .* or 2"),
        (lambda: Scaffold(server_lr=True), "`server_lr` must be a number above 0; got True"),
        (lambda: MimeLite("0.9"), "`beta` must be at least 0"),
    ],
)
def test_refuses_options_out_of_range(made, message):
    with pytest.raises(ValueError, match=message):
        made()


def never(*args):
    raise AssertionError("training has started")


@pytest.mark.parametrize(
    ("aggregator", "optimizer", "message"),
    [
        (FedNova(), "adamw", r"no formula says: use `torch\.optim\.SGD`, or FedAvg"),
        (Scaffold(), "adamw", r"which AdamW would change: use .*momentum=0.*, or `Scaffold\(option=1\)`"),
        (Scaffold(), "sgd", "which the momentum of SGD would change"),
        (MimeLite(), "sgd", "which the momentum of SGD would change: use .*momentum=0.*, or FedAvg"),
        (MimeLite(), "adamw", "which AdamW would change"),
    ],
)
def test_refuses_optimizers_before_training(aggregator, optimizer, message):
    stop = L.pytorch.callbacks.LambdaCallback(on_train_start=never)
    with pytest.raises(ValueError, match=message):
        fit_net(0, 1, aggregator, optimizer, callbacks=[stop])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda o: o.param_groups[0].update(nesterov=True), "leave `nesterov` out"),
        (lambda o: o.param_groups[0].update(dampening=0.1), "leave `dampening` out"),
        (lambda o: o.param_groups[1].update(momentum=0.5), "the same `momentum`, .* got 0.5, 0.9"),
        (lambda o: [group.update(momentum=1.0) for group in o.param_groups], "below 1; got 1.0"),
        (lambda o: None, "use `optimizer_state='reset'`, or `momentum=0`"),
    ],
)
def test_normalised_averages_need_to_know_the_steps(change, message):
    class Other(TwoRates):
        def configure_optimizers(self):
            optimizer = torch.optim.SGD([{"params": [self.weight]}, {"params": [self.bias]}], lr=0.1, momentum=0.9)
            change(optimizer)
            return optimizer

    strategy = {**OPTIONS, "aggregator": FedNova(), "optimizer_state": "keep"}
    with pytest.raises(ValueError, match=message):
        run(0, 1, Other(ETAS).double(), DataLoader(samples(), BATCH), strategy, 1)


def test_control_variates_from_gradients_take_any_optimizer():
    result = fit_net(0, 1, Scaffold(1), "adamw", rounds=2)
    assert result["models"].isfinite().all()
    assert not torch.equal(result["models"], fit_net(0, 1, FedAvg(), "adamw", rounds=2)["models"])


@pytest.mark.parametrize("aggregator", [MimeLite(0.8), Scaffold(1)], ids=repr)
def test_drops_clients_whose_full_gradient_is_not_finite(aggregator):
    """The sample that is not finite is seen by the full pass alone."""
    bad, dataset = problem().cohorts[0][1], samples()
    dataset.tensors[1][parts()[bad][-1]] = torch.nan
    strategy = {**OPTIONS, "local_epochs": 1, "local_steps": 1, "aggregator": aggregator}
    result = run(0, 1, Quadratic(ETAS, "plain").double(), DataLoader(dataset, 1), strategy, 3)
    assert result["dropped"] == [[bad] if bad in S else [] for S in problem().cohorts[:3]]
    assert result["models"].isfinite().all()
