"""Servers that bad clients can't mislead: medians, trimmed means, and dropping who has learned nothing."""

from __future__ import annotations

import inspect
import re
import warnings
from typing import Any

import numpy as np
import pytest
import torch
from torch.utils.data import DataLoader, TensorDataset

from lightning_distopt import CoordinateMedian, DropWorst, FedAvg, FedDF, FedProx, OneBit, Scaffold, TrimmedMean
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.federated import Aggregator, Federation, cohorts
from lightning_distopt.federated.wrapper import Wrapper
from tests.conformance.problems import Augmented, SmallNet
from tests.federated.problem import fit_net, fit_quadratic, run
from tests.federated.test_strategy import same, stop_and_resume


class Norm(torch.nn.Module):
    """Parameters of odd sizes, and buffers of several kinds."""

    def __init__(self) -> None:
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(3, 5, dtype=torch.float64))
        self.register_buffer("mean", torch.zeros(2, 2, dtype=torch.float64))
        self.register_buffer("scale", torch.ones((), dtype=torch.float64))
        self.register_buffer("short", torch.ones(3))
        self.register_buffer("count", torch.zeros((), dtype=torch.int64))


def values(k: int) -> tuple[np.ndarray, np.ndarray]:
    """Return what client `k` sends: a model, and running statistics; the last of them are far off."""
    rng = np.random.default_rng(k)
    far = 1e6 if k >= 5 else 1.0
    return far * rng.normal(size=15), far * rng.normal(size=8)


def one_round(rank: int, world_size: int, aggregator: Any, clients: int, piece: int, hosts: int) -> Any:
    """Let clients send `values`; some of the first `hosts` ranks have all of them."""
    server = Federation(aggregator, clients=10, fraction=1.0)
    communicator = Communicator()
    communicator._piece = piece
    server.setup(Replicas(Norm(), first_replica=rank), communicator)
    chosen = list(range(clients))
    server.begin_round(cohorts.plan(0, chosen, [1] * 10, world_size, 1), samples=list(range(1, 11)), steps=[1] * 10)
    for k in chosen:
        if k % min(hosts, world_size) == rank:
            client, (y, statistics) = server.receive(k), values(k)
            client.model[0][:15] = torch.from_numpy(y)
            mean, scale, short, count = server.replicas.buffers(0)
            mean.copy_(torch.from_numpy(statistics[:4]).view(2, 2))
            scale.fill_(statistics[4])
            short.copy_(torch.from_numpy(statistics[5:]))
            count.fill_(k)
            server.send(client, torch.zeros(()))
    before = communicator.traffic.bytes_sent
    server.finish_round()
    buffers = torch.cat([b.reshape(-1).double() for b in server.buffers])
    return server.model[0][:15].clone(), buffers, communicator.traffic.bytes_sent - before


@pytest.mark.parametrize("clients", [1, 2, 7, 8])
@pytest.mark.parametrize("aggregator", [CoordinateMedian(), TrimmedMean(0.25), TrimmedMean(0.0)], ids=repr)
def test_each_coordinate_for_itself_on_any_number_of_ranks(ranks, aggregator, clients):
    def combine(rows: list[np.ndarray]) -> np.ndarray:
        if isinstance(aggregator, CoordinateMedian):
            return np.median(rows, axis=0)
        b = int(aggregator.fraction * clients)
        return np.array([np.mean(sorted(column)[b : clients - b]) for column in np.array(rows).T])

    models, statistics = zip(*map(values, range(clients)), strict=True)
    first = None
    for world_size, piece, hosts in [(1, 10**6, 1), (1, 10, 1), (2, 10, 2), (4, 40, 4), (4, 40, 2)]:
        for model, buffers, _ in ranks.run(world_size, one_round, aggregator, clients, piece, hosts):
            np.testing.assert_allclose(model, combine(models), rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(buffers[:5], combine(statistics)[:5], rtol=1e-12, atol=1e-12)
            np.testing.assert_allclose(buffers[5:8], combine(statistics)[5:], rtol=1e-6, atol=1e-6)
            assert buffers[8] == clients - 1  # counts go on from the largest
            first = first if first is not None else model
            assert torch.equal(model, first)


def test_the_traffic_of_pieces_is_counted(ranks):
    """Besides what an average costs, each of two ranks sends the rows of its four clients to the other."""
    plain, robust = (
        [sent for _, _, sent in ranks.run(2, one_round, aggregator, 8, 40, 2)] for aggregator in (FedAvg(), CoordinateMedian())
    )
    padded = 16  # values of a block with one parameter of 15
    assert [b - a for a, b in zip(plain, robust, strict=True)] == [4 * (padded * 8 + 5 * 8 + 3 * 4)] * 2


def test_half_of_the_clients_cannot_move_the_median_far():
    for aggregator in (CoordinateMedian(), TrimmedMean(0.4)):
        robust, _, _ = one_round(0, 1, aggregator, 8, 10**6, 1)  # three of eight are far off
        assert robust.abs().max() < 5
    average, _, _ = one_round(0, 1, FedAvg(), 8, 10**6, 1)
    assert average.abs().max() > 1e4


@pytest.mark.parametrize("fraction", [-0.1, 0.5, 1, float("nan"), True, "0.1"])
def test_trimmed_mean_refuses_other_fractions(fraction):
    with pytest.raises(ValueError, match=r"`fraction`, the share of values that is left out at either end"):
        TrimmedMean(fraction)


def test_trimmed_mean_counts_exactly():
    """0.29 of 100 values are 29, though 0.29 * 100 < 29 in floating point."""
    rows = torch.arange(100.0, dtype=torch.float64)[:, None].expand(100, 2).clone()
    rows[28], rows[71] = -1e9, 1e9
    torch.testing.assert_close(TrimmedMean(0.29).reduce(rows), torch.full((2,), 49.5, dtype=torch.float64))


@pytest.mark.parametrize("aggregator", [TrimmedMean(0.2), DropWorst("coordinate_median", 0.0, 0.0)], ids=repr)
def test_a_net_trains_the_same_on_any_number_of_ranks(ranks, aggregator):
    options = {"validation": validation()} if isinstance(aggregator, DropWorst) else {}
    one, *others = [ranks.run(world_size, fit_net, aggregator, **options) for world_size in (1, 2, 4)]
    for results in others:
        for result in results:
            same(one[0], result)


@pytest.mark.parametrize(("world_size", "turns"), [(1, 2), (2, 4)])
def test_resumes_inside_a_round(ranks, tmp_path, world_size, turns):
    options = {"aggregator": DropWorst("coordinate_median", chance=0.3), "validation": validation()}
    whole = ranks.run(world_size, fit_net, **options)
    rest = ranks.run(world_size, stop_and_resume, turns, str(tmp_path), **options)
    for a, b in zip(whole, rest, strict=True):
        assert torch.equal(a["models"][-1], b["models"][-1])
        assert a["dropped"][-1] == b["dropped"][-1]
    assert any(whole[0]["dropped"])


# ---------------------------------------------------------------------------------------------------------- drop-worst
def validation(size: int = 30) -> DataLoader[Any]:
    """Return batches of images without noise, so that every pass sees the same."""
    data = Augmented(size)
    return DataLoader(TensorDataset(data.x, data.y), 16)


class Majority(Federation):
    """A server whose validation data has four classes and 40 samples; a model is its own logits."""

    def validation_batches(self):  # type: ignore[override]
        yield torch.zeros(28), torch.arange(28) % 4
        yield torch.zeros(12), torch.arange(12) % 4


class Constant(torch.nn.Module):
    """Says the same of every sample: is right about a quarter of them, or, with `knows`, about more."""

    def __init__(self) -> None:
        super().__init__()
        self.knows = torch.nn.Parameter(torch.zeros(4, dtype=torch.float64))

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        assert not self.training and not torch.is_grad_enabled()
        labels = torch.arange(len(x)) % 4
        logits = torch.zeros(len(x), 4, dtype=torch.float64)
        logits[:, 0] = 0.5  # so class 0, unless it knows better
        logits[torch.arange(len(x)), labels] += self.knows.detach().flatten()[labels]
        return logits


def a_round(aggregator: Aggregator, knowledge: dict[int, list[float]], **options: Any) -> Majority:
    """Let clients send what they know about each class."""
    server = Majority(aggregator, clients=6, fraction=1.0, **options)
    server.setup(Replicas(Constant()), Communicator())
    plan = cohorts.plan(0, list(knowledge), [1] * 6, 1, 1)
    server.begin_round(plan, samples=[1, 2, 3, 4, 5, 6], steps=[1] * 6)
    for k, known in knowledge.items():
        client = server.receive(k)
        aggregator.begin_client(client)
        client.model[0][:4] = torch.tensor(known, dtype=torch.float64)
        before = client.model[0].clone()
        server.send(client, torch.tensor(0.1 * k))
        assert (
            torch.equal(client.model[0].nan_to_num(), before.nan_to_num()) and server.module.training
        )  # it was shown, and put back
    server.finish_round()
    return server


GUESSES, HALF, ALL = [0.0] * 4, [0.0, 1.0, 0.0, 0.0], [1.0] * 4


def test_drops_who_guesses_and_weighs_the_others_anew():
    with pytest.warns(UserWarning, match="Round 0 goes on without client 0, 3: the accuracy on the validation data"):
        server = a_round(DropWorst(), {0: GUESSES, 1: HALF, 2: ALL, 3: GUESSES})
    assert server.dropped == [0, 3] and list(server.losses) == [1, 2]
    expected = (2 * torch.tensor(HALF) + 3 * torch.tensor(ALL)) / 5
    torch.testing.assert_close(server.model[0][:4], expected.double())


def test_tells_dropped_clients_from_those_that_are_not_finite():
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        server = a_round(DropWorst(), {0: GUESSES, 1: ALL, 2: [float("nan")] * 4})
    messages = [str(w.message) for w in caught]
    assert len(messages) == 2 and server.dropped == [0, 2]
    assert re.match(r"Round 0 goes on without client 0: the accuracy .* at most 0.27, .*`DropWorst`", messages[0])
    assert "without client 2: the loss, parameters or buffers are not finite" in messages[1]


@pytest.mark.parametrize(
    ("options", "dropped"),
    [
        ({}, [0]),  # 10 of 40 are of class 0: 0.25 <= 0.25 + 0.02, and half of them 0.5
        ({"chance": 0.2, "margin": 0.0}, []),
        ({"chance": 0.25, "margin": 0.0}, [0]),
        ({"chance": 0.25, "margin": 0.3}, [0, 1]),
        ({"margin": 0.75}, [0, 1, 2]),
    ],
    ids=str,
)
def test_chance_and_margin(options, dropped):
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        server = a_round(DropWorst(**options), {0: GUESSES, 1: HALF, 2: ALL})
    assert server.dropped == dropped
    if len(dropped) == 3:
        assert torch.equal(server.model[0], torch.zeros_like(server.model[0]))  # nobody is left: the model stays


def test_whoever_is_dropped_keeps_no_new_state_and_adds_to_no_sum():
    aggregator = DropWorst(Scaffold())
    server = Majority(aggregator, clients=2, fraction=1.0)
    optimized = Replicas(Constant())
    optimized.attach_optimizers([torch.optim.SGD(optimized.module.parameters(), lr=0.1)])
    server.setup(optimized, Communicator())
    server.begin_round(cohorts.plan(0, [0, 1], [1, 1], 1, 1, stay=True), [1, 1], [1, 1])
    for k, known in ((0, GUESSES), (1, ALL)):
        client = server.receive(k)
        aggregator.begin_client(client)
        client.model[0][:4] = torch.tensor(known, dtype=torch.float64)
        client.step = 1
        server.send(client, torch.zeros(()))
    assert list(server.states) == [1]
    with pytest.warns(UserWarning, match="without client 0"):
        server.finish_round()
    (c,), mine = aggregator.aggregator._c, server.states.get(1)["own"]["c"][0]
    assert mine.abs().max() > 0
    torch.testing.assert_close(c, mine / 2)  # the mean of the c_k, of which one is zero


@pytest.mark.parametrize("inner", [FedProx(0.1), Scaffold()], ids=repr)
def test_without_anything_to_drop_it_is_the_other_aggregator(ranks, inner):
    options = {"validation": validation(), "optimizer": "plain", "rounds": 2}
    plain = ranks.run(2, fit_net, inner, **options)
    wrapped = ranks.run(2, fit_net, DropWorst(inner, chance=0.0, margin=0.0), **options)
    for a, b in zip(plain, wrapped, strict=True):
        assert b["dropped"] == [[], []]  # nobody is right about nothing at all
        assert torch.equal(a["models"], b["models"])
        assert (a["up"], a["down"]) == (b["up"], b["down"])


def test_needs_validation_data(ranks):
    with pytest.raises(Exception, match="validation"):
        fit_net(0, 1, DropWorst())


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"chance": 1.0}, "`chance` is an accuracy"),
        ({"chance": -0.1}, "`chance` is an accuracy"),
        ({"chance": True}, "`chance` is an accuracy"),
        ({"margin": -0.1}, "`margin` is an accuracy"),
        ({"margin": None}, "`margin` is an accuracy"),
        ({"aggregator": "fedagv"}, "did you mean 'fedavg'"),
    ],
    ids=str,
)
def test_drop_worst_refuses_options(options, message):
    with pytest.raises(ValueError, match=message):
        DropWorst(**options)


class Regression(SmallNet):
    def validation_step(self, batch: Any, batch_idx: int) -> None:
        pass


class Flat(Regression):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        logits = super().forward(x)
        return logits if self.training else logits[:, 0]


@pytest.mark.parametrize(
    ("module", "labels", "message"),
    [
        (Regression, torch.rand(30, dtype=torch.float64), "one whole number for each sample"),
        (Regression, torch.zeros(30, 3, dtype=torch.int64), "one whole number for each sample"),
        (Flat, torch.arange(30) % 3, r"`forward` returns \(10,\) for 10 samples"),
    ],
)
def test_validation_data_that_does_not_fit(module, labels, message):
    loader = DataLoader(TensorDataset(Augmented(30).x, labels), 10)
    trained: list[int] = []
    network = module("plain").double()
    network.register_forward_hook(lambda *_: trained.append(network.training))
    strategy = {"aggregator": DropWorst(), "clients": 4, "fraction": 0.5}
    with pytest.raises(ValueError, match=message):
        run(0, 1, network, DataLoader(Augmented(), 3), strategy, 1, validation=loader)
    assert not any(trained)  # no client has begun


# ------------------------------------------------------------------------------------------------------------ wrappers
def test_a_wrapper_passes_everything_on():
    """Every hook of the template, also one that comes later, and whatever a federation asks of an aggregator."""
    hooks = [name for name, value in vars(Aggregator).items() if callable(value) and not name.startswith("_")]
    assert set(hooks) <= set(vars(Wrapper))
    traits = [name for name, value in vars(Aggregator).items() if not callable(value) and not name.startswith("_")]
    assert {"needs_models", "stateful", "transforms_gradients", "vectors_up", "vectors_down"} <= set(traits)

    class Odd(Aggregator):
        def __init__(self) -> None:
            for name in traits:
                setattr(self, name, "odd")

    for outer in (Wrapper(Odd()), Wrapper(Wrapper(Odd()))):
        assert all(getattr(outer, name) == "odd" for name in traits)
    outer, calls = Wrapper(Odd()), []
    for hook in hooks:
        signature = inspect.signature(getattr(Aggregator, hook))
        values = tuple(object() for _ in list(signature.parameters)[1:])
        setattr(outer.aggregator, hook, lambda *of, hook=hook: calls.append((hook, of)) or hook)
        result = getattr(outer, hook)(*values)
        assert calls == [(hook, values)]
        assert result == (None if signature.return_annotation == "None" else hook)
        calls.clear()
    outer.sums = {"x": ()}
    assert outer.aggregator.sums is outer.sums == {"x": ()}


def test_a_wrapped_aggregator_does_what_it_does_alone(ranks):
    alone, wrapped = (ranks.run(2, fit_quadratic, aggregator)[0] for aggregator in (Scaffold(), Wrapper(Scaffold())))
    assert torch.equal(alone["models"], wrapped["models"])
    assert alone["up"] == wrapped["up"] and alone["down"] == wrapped["down"]


def test_sees_through_wrappers_what_a_client_sends():
    inside = FedDF(torch.zeros(3, 2), aggregator=OneBit(DropWorst()))
    assert inside.changes_model_at_end and inside.needs_data_of_both
    for aggregator in ("one_bit", FedDF(torch.zeros(3, 2), aggregator="one_bit"), inside):
        with pytest.raises(ValueError, match=r"`DropWorst` has to see what a client sends, .* `OneBit\(DropWorst\(...\)\)`"):
            DropWorst(aggregator)


def test_one_bit_clients_are_judged_by_what_they_send():
    """The module is right where weights are above 0.5: the full-precision ones are, the binary ones are not."""

    class Square(Constant):
        def __init__(self) -> None:
            super().__init__()
            self.knows = torch.nn.Parameter(torch.zeros(2, 2, dtype=torch.float64))

    server = Majority(OneBit(DropWorst()), clients=2, fraction=0.5)
    server.setup(Replicas(Square()), Communicator())
    server.begin_round(cohorts.plan(0, [1], [1, 1], 1, 1), [1, 1], [1, 1])
    client = server.receive(1)
    client.model[0][:4] = torch.tensor([0.0, 0.9, 0.9, 0.1], dtype=torch.float64)  # B: 0.475 each
    server.send(client, torch.zeros(()))
    with pytest.warns(UserWarning, match="without client 1"):
        server.finish_round()
