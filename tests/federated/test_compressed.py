"""Compression of what clients and server send: error feedback, bytes, layouts, resumes; and clients of one bit a weight."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from lightning_distopt import DropWorst, FedAvgM, FederatedStrategy, OneBit, Scaffold
from lightning_distopt.communication import Communicator, Replicas
from lightning_distopt.compression import QSGD, qsgd
from lightning_distopt.federated import FedAvg, Federation, cohorts
from tests.federated.problem import fit_net, fit_quadratic, problem, start
from tests.federated.test_strategy import same, stop_and_resume
from tests.oracles import compressors
from tests.oracles import federated as oracle

BOTH = {"uplink": "top_k:0.3", "downlink": "sign"}
D = 8  # values of the quadratics' parameters, [3, 2] and [2], in float64


def fit_with_known_rounding(rank, world_size, **options):
    """Train with QSGD whose `u` is 100.5 / 256 for every value."""
    before = qsgd.random_bytes, qsgd.hash64
    qsgd.random_bytes = lambda sources, n, _: torch.full((len(sources), n), 100, dtype=torch.uint8)
    qsgd.hash64 = lambda *_: 2**63
    try:
        return fit_quadratic(rank, world_size, **options)
    finally:
        qsgd.random_bytes, qsgd.hash64 = before


def rounded(x):
    """QSGD of 4 bits: it rounds values with their signs, so that `1 - u` is what the magnitude of a negative one sees."""
    u = 100.5 / 256
    return compressors.qsgd(7, np.where(x >= 0, u, 1 - u), scaled=True)(x)


@pytest.mark.parametrize("world_size", [1, 2])
def test_qsgd_both_ways_equals_the_equations(ranks, world_size):
    Q = compressors.per_tensor(rounded, [6, 2])
    expected = oracle.compressed(start(), problem(), up=Q, down=Q)
    for result in ranks.run(world_size, fit_with_known_rounding, strategy={"uplink": "qsgd:4", "downlink": "qsgd:4"}):
        np.testing.assert_allclose(result["models"].numpy(), expected, rtol=0, atol=1e-5)  # its norms are float32


def test_identity_is_no_compression(ranks):
    plain = ranks.run(1, fit_net)[0]
    for policy in ({"uplink": "identity"}, {"downlink": "identity"}, {"uplink": "identity", "downlink": "identity"}):
        same(plain, ranks.run(1, fit_net, strategy=policy)[0], atol=1e-12)


@pytest.mark.parametrize("aggregator", ["fedavg", FedAvgM(0.5), "coordinate_median", "one_bit"], ids=str)
def test_does_not_depend_on_the_number_of_ranks(ranks, aggregator):
    policy = {"downlink": "sign"} if aggregator == "one_bit" else BOTH
    one, *others = [ranks.run(world_size, fit_net, aggregator, strategy=policy) for world_size in (1, 2, 4)]
    for run in others:
        for result in run:
            same(one[0], result)


@pytest.mark.parametrize(("world_size", "turns"), [(1, 2), (1, 6), (2, 4)])
@pytest.mark.parametrize("aggregator", ["fedavg", "one_bit"])
def test_resumes_exactly(ranks, tmp_path, world_size, turns, aggregator):
    policy = {"downlink": "sign"} if aggregator == "one_bit" else BOTH
    whole = ranks.run(world_size, fit_net, aggregator, strategy=policy)
    rest = ranks.run(world_size, stop_and_resume, turns, str(tmp_path), aggregator=aggregator, strategy=policy)
    for a, b in zip(whole, rest, strict=True):
        assert torch.equal(a["models"][-1], b["models"][-1])
        assert (a["up"], a["down"]) == (b["up"], b["down"])


# ------------------------------------------------------------------------------------------------------------ one client
class Pair(torch.nn.Module):
    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(1)
        self.weight = torch.nn.Parameter(torch.randn(3, 5, generator=generator, dtype=torch.float64))
        self.bias = torch.nn.Parameter(torch.randn(3, generator=generator, dtype=torch.float64))


def federation(aggregator, **options):
    """Return a federation of four clients in this process, with two of them in its first round."""
    server = Federation(aggregator, clients=4, fraction=0.5, **options)
    server.setup(Replicas(Pair()), Communicator())
    server.begin_round(cohorts.plan(0, [0, 2], [1] * 4, ranks=1, turns=1), samples=[1] * 4, steps=[1] * 4)
    return server


def drift(model: tuple[torch.Tensor, ...], seed: int) -> torch.Tensor:
    """Let a model have been trained, however; returns how."""
    step = torch.randn(model[0].shape, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    step[15] = step[19:] = 0.0  # between parameters, which optimizers do not see
    model[0].add_(step)
    return step


@pytest.mark.parametrize(
    "uplink", ["top_k:0.1", "sign", "qsgd:3", QSGD(2, unbiased=True), "low_rank:1", "random_k:0.2"], ids=str
)
def test_what_arrives_and_the_error_are_what_was_sent(uplink):
    server, owed = federation(FedAvg(), uplink=uplink), torch.zeros(24, dtype=torch.float64)
    for _ in range(3):
        client = server.receive(2)
        v = drift(client.model, 3) + owed
        server.send(client, torch.zeros(()))
        (owed,) = server.states.get(2)["error_of_uplink"]
        assert owed.abs().max() > 1e-3
        arrived = client.model[0] - server.sent[0]
        torch.testing.assert_close(arrived + owed, v, rtol=0, atol=1e-12)  # Q(v) + e = v


def test_the_server_keeps_what_it_has_not_sent():
    """With a single value for each tensor in a message, all of a step arrives in the end, once no client moves any more."""
    server = federation(FedAvg(), downlink="top_k:0.01")
    client = server.receive(0)
    drift(client.model, 5)
    server.send(client, torch.zeros(()))
    server.finish_round()
    target = [x.clone() for x in server.model]
    for t in range(1, 16):
        assert not torch.equal(server.sent[0], target[0])
        server.begin_round(cohorts.plan(t, [1, 3], [1] * 4, ranks=1, turns=1), [1] * 4, [1] * 4)
        for k in (1, 3):
            server.send(server.receive(k), torch.zeros(()))
        server.finish_round()
        torch.testing.assert_close(server.model[0], target[0], rtol=0, atol=1e-12)
    torch.testing.assert_close(server.sent[0], target[0], rtol=0, atol=1e-12)


# ------------------------------------------------------------------------------------------------------------ bytes
def test_bytes_without_compression(ranks):
    result = ranks.run(1, fit_quadratic)[0]
    assert result["up"] == result["down"] == sum(map(len, problem().cohorts)) * D * 8


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("top_k:0.4", (2 + 1) * 12),  # two of six values and one of two: four bytes for the place, eight for the value
        ("sign", (8 + 1) + (8 + 1)),  # magnitude and up to eight signs
        ("qsgd:4", (4 + 3) + (4 + 1)),  # norm, and half a byte for each value
    ],
)
def test_bytes_of_messages_and_of_those_that_were_missed(ranks, name, message):
    chosen = problem().cohorts
    for world_size in (1, 2):
        result = ranks.run(world_size, fit_quadratic, strategy={"uplink": name, "downlink": name})[0]
        assert result["up"] == sum(map(len, chosen)) * message
        down, last = 0, {}
        for t, S in enumerate(chosen):
            for k in S:  # who comes for the first time gets the model; who was absent, its messages or the model
                down += min((t - last[k]) * message, D * 8) if k in last else D * 8
                last[k] = t
        assert result["down"] == down
    assert any(k in chosen[0] and k not in chosen[1] and k in chosen[2] for k in range(8))  # clients are absent, and come again


# ------------------------------------------------------------------------------------------------------------ one bit
def test_one_bit_is_sent_and_counted():
    seen = []

    class Look(FedAvg):
        def end_client(self, client):
            seen.append([y.clone() for y in client.model])

    server = federation(OneBit(Look()))
    for k in (0, 2):
        client = server.receive(k)
        server.aggregator.begin_client(client)
        drift(client.model, k)
        client.model[0][:2] = 0.0
        w = client.model[0][:15].clone()
        server.send(client, torch.zeros(()))
        sent = seen[-1][0]
        expected = w.abs().mean() * torch.where(w >= 0, 1.0, -1.0).double()
        torch.testing.assert_close(sent[:15], expected, rtol=0, atol=1e-15)
        assert sent[0] > 0  # the sign of zero
        assert len(sent.unique()) > 2  # the bias is as it was
    server.finish_round()
    assert server.communicator.traffic.bytes_up == 2 * (2 + 8 + 3 * 8)  # 15 bits, a scale, the bias
    assert server.communicator.traffic.bytes_down == 2 * 18 * 8
    mean = (seen[0][0][:15] + seen[1][0][:15]) / 2
    torch.testing.assert_close(server.model[0][:15], mean, rtol=0, atol=1e-15)
    assert len(mean.abs().unique()) > 1  # full precision again


def test_one_bit_takes_gradients_at_the_binary_model_and_steps_the_weights_behind_it():
    places = []

    class Look(FedAvg):
        transforms_gradients = True

        def transform_gradients(self, client):
            places.append(client.model[0].clone())

        def before_update(self, client):
            places.append(client.model[0].clone())

    server = federation(OneBit(Look()))
    client = server.receive(0)
    aggregator, weights = server.aggregator, client.model[0].clone()
    aggregator.begin_client(client)
    aggregator.before_gradient(client)
    assert len(client.model[0][:15].abs().unique()) == 1
    aggregator.transform_gradients(client)
    aggregator.before_update(client)
    assert all(torch.equal(place, weights) for place in [*places, client.model[0]]) and len(places) == 2


class Bias(torch.nn.Module):
    def __init__(self):
        super().__init__()
        self.bias = torch.nn.Parameter(torch.zeros(3))


def test_one_bit_refuses_what_it_cannot_have():
    with pytest.raises(ValueError, match=r"Scaffold.* send vectors of full precision"):
        OneBit(Scaffold())
    with pytest.raises(ValueError, match="leave out `uplink="):
        federation(OneBit(), uplink="sign")
    with pytest.raises(ValueError, match="the module trains none"):
        Federation(OneBit(), clients=4, fraction=0.5).setup(Replicas(Bias()), Communicator())
    with pytest.raises(ValueError, match="OneBit\\(DropWorst"):
        DropWorst(OneBit())


def test_warns_of_compressors_whose_error_may_grow():
    with pytest.warns(UserWarning, match="use the version with `unbiased=False`"):
        FederatedStrategy(uplink=QSGD(4, unbiased=True))
