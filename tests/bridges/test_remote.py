"""Clients elsewhere give what `FederatedStrategy` gives in one process, whatever carries the messages."""

from __future__ import annotations

import json
import warnings

import lightning as L
import numpy as np
import pytest
import torch
from lightning.pytorch.utilities.exceptions import MisconfigurationException
from torch.utils.data import DataLoader, Subset, TensorDataset

from lightning_distopt import (
    DropWorst,
    FedAdam,
    FedAvgM,
    FedDF,
    FederatedStrategy,
    FedNova,
    FedProx,
    MimeLite,
    OneBit,
    Scaffold,
)
from lightning_distopt.bridges.messages import decode, encode
from lightning_distopt.bridges.remote import RemoteClient, RemoteStrategy, check_options
from lightning_distopt.communication.messages import unpack
from tests.conformance.problems import QUIET, Augmented, Quadratic, SmallNet
from tests.federated.problem import BATCH, EPOCHS, ETAS, SEED, SIZES, History, data, parts

K = 4


class Wire:
    """Carries messages inside the process, but as text and arrays.

    The clients of `lost` do not answer, the answers of those of `late` do not arrive, and `spoil` changes what does.
    """

    def __init__(self, clients, lost=(), late=(), spoil=lambda round_, k, answer: None):
        self.clients, self.lost, self.late, self.spoil = clients, lost, late, spoil
        self.kept, self.cohorts = {}, []

    def introduce(self, message):
        return {client.number: carried(client.introduce(carried(message))) for client in self.clients}

    def exchange(self, messages):
        self.cohorts.append(sorted(messages))
        answers = {}
        for k, message in messages.items():
            if (message["round"], k) in self.lost:
                answers[k] = "its machine is on fire"
                continue
            answer, self.kept[k] = self.clients[k].train(carried(message), self.kept.get(k, b""))
            answers[k] = carried(answer)
            self.spoil(message["round"], k, answers[k])
            if (message["round"], k) in self.late:
                answers[k] = "its answer has come too late"
        return answers


def carried(message):
    text, arrays = encode(message)
    assert all(type(array) is np.ndarray and array.dtype != object for array in arrays.values())
    json.loads(text)
    return decode(text, arrays)


class Problem:
    """A module, the data of `K` clients, and the options that all have."""

    def __init__(self, module, dataset, shares, shuffle, options, trainer=None):
        self.module, self.dataset, self.shares, self.shuffle = module, dataset, shares, shuffle
        self.options, self.trainer = options, trainer or {}

    def loader(self, k):
        return DataLoader(Subset(self.dataset, self.shares[k]), BATCH, shuffle=self.shuffle)

    def clients(self, options=None, module=None):
        options = self.options if options is None else options
        return [
            RemoteClient(k, module or self.module, self.loader, self.trainer, options) for k in range(self.options["clients"])
        ]

    def fit(self, strategy, loader, rounds, validation=None):
        history = History()
        L.seed_everything(SEED, verbose=False)
        options = {**QUIET, "enable_checkpointing": False, "max_epochs": rounds, **self.trainer}
        trainer = L.Trainer(accelerator="cpu", devices=1, strategy=strategy, callbacks=[history], **options)
        module = self.module()
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            trainer.fit(module, loader, validation)
        return {
            "models": torch.stack(history.models),
            "buffers": [b.clone() for b in module.buffers()],
            "losses": history.losses,
            "dropped": history.dropped,
            "global_step": trainer.global_step,
            "up": strategy.traffic.bytes_up,
            "state": strategy.aggregator.state_dict(),
        }

    def here(self, rounds=3):
        strategy = FederatedStrategy(partition=self.shares, **self.options)
        return self.fit(strategy, DataLoader(self.dataset, BATCH, shuffle=self.shuffle), rounds)

    def elsewhere(self, rounds=3, lost=(), **options):
        wire = Wire(self.clients(), lost, **options)
        result = self.fit(RemoteStrategy(wire, **self.options), DataLoader([0]), rounds)
        return result, wire


def quadratic(aggregator, **options):
    a, c = data()
    shares = parts()
    shared = {"aggregator": aggregator, "clients": len(SIZES), "fraction": 0.5, "local_epochs": EPOCHS, **options}
    dataset = TensorDataset(torch.from_numpy(a), torch.from_numpy(c))
    return Problem(lambda: Quadratic(ETAS, "plain").double(), dataset, shares, False, shared)


def net(aggregator, trainer=None, optimizer="sgd", **options):
    shares = [list(range(k, 40, K)) + list(range(40 + 3 * k, 41 + 4 * k)) for k in range(K)]
    shared = {"aggregator": aggregator, "clients": K, "fraction": 1.0, **options}
    return Problem(lambda: SmallNet(optimizer).double(), Augmented(), shares, True, shared, trainer)


def with_nan(problem, k):
    """Give a client data that is not finite."""
    problem.dataset.x[problem.shares[k]] = float("nan")
    return problem


def same(one, other):
    torch.testing.assert_close(one["models"], other["models"], rtol=0, atol=1e-10)
    torch.testing.assert_close(one["buffers"], other["buffers"], rtol=0, atol=1e-10)
    torch.testing.assert_close(one["losses"], other["losses"], rtol=0, atol=1e-10)
    assert one["dropped"] == other["dropped"]
    assert one["global_step"] == other["global_step"]
    assert one["up"] == other["up"]


AGGREGATORS = {
    "fedavg": "fedavg",
    "fedprox": FedProx(mu=0.3),
    "fedavgm": FedAvgM(),
    "fedadam": FedAdam(server_lr=0.1),
    "fednova": FedNova(),
    "mimelite": MimeLite(),
    "scaffold": Scaffold(),
    "scaffold of option 1": Scaffold(option=1),
    "coordinate_median": "coordinate_median",
    "one_bit": "one_bit",
}


@pytest.mark.parametrize("name", AGGREGATORS)
def test_is_federated_averaging_in_one_process(name):
    problem = quadratic(AGGREGATORS[name])
    result, wire = problem.elsewhere()
    same(result, problem.here())
    assert all(len(chosen) == len(SIZES) // 2 for chosen in wire.cohorts)


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"aggregator": FedProx(mu=0.3), "optimizer": "adamw", "weighting": "uniform", "local_steps": 3},
        {"optimizer_state": "keep", "buffers": "local", "fraction": 0.5},
        {"trainer": {"accumulate_grad_batches": 2, "gradient_clip_val": 0.5, "limit_train_batches": 3}},
    ],
    ids=str,
)
def test_is_the_same_for_modules_with_all_that_real_ones_have(options):
    problem = net(**{"aggregator": "fedavg", **options})
    same(problem.elsewhere()[0], problem.here())


def test_the_server_distils_what_clients_elsewhere_have_learned():
    unlabelled = torch.randn(16, 1, 6, 6, dtype=torch.float64, generator=torch.Generator().manual_seed(2))
    problem = net(FedDF(unlabelled, steps=3, batch_size=8))
    same(problem.elsewhere(2)[0], problem.here(2))


def test_a_client_without_a_finite_model_drops_out_and_one_that_is_lost_likewise():
    spoilt = with_nan(net("fedavg"), 2)
    one, other = spoilt.elsewhere(1)[0], spoilt.here(1)
    same(one, other)
    lost = net("fedavg").elsewhere(1, lost={(0, 2)})[0]
    assert lost["dropped"] == one["dropped"] == [[2]]
    torch.testing.assert_close(lost["models"], one["models"], rtol=0, atol=1e-10)


@pytest.mark.parametrize("part", ["loss", "model", "buffers", "sums"])
def test_nothing_is_taken_from_an_answer_that_is_not_finite(part):
    def spoil(round_, k, answer):
        if (round_, k) == (1, 2):
            if part == "loss":
                answer["loss"] = float("nan")
            else:
                tensors = answer["sums"]["c"] if part == "sums" else answer[part].values()
                next(x for x in tensors if x.is_floating_point()).view(-1)[0] = float("inf")

    problem = net(Scaffold(), optimizer="plain")
    spoilt = problem.elsewhere(spoil=spoil)[0]
    lost = problem.elsewhere(late={(1, 2)})[0]
    assert spoilt["dropped"] == lost["dropped"] == [[], [2], []]
    assert torch.equal(spoilt["models"], lost["models"])
    assert all(map(torch.equal, spoilt["buffers"], lost["buffers"]))
    assert all(map(torch.equal, spoilt["state"]["c"], lost["state"]["c"]))


@pytest.mark.parametrize("late", [{(0, 0)}, {(1, 0)}, {(2, 0)}, {(0, 1), (1, 1)}], ids=str)
def test_control_variates_keep_their_mean_at_the_server_where_answers_are_lost(late):
    """And a client whose answer was lost is one that has not taken part."""
    problem = quadratic(Scaffold(), clients=2, fraction=1.0)
    problem.shares = problem.shares[:2]
    result, wire = problem.elsewhere(late=late)
    torch.testing.assert_close(result["models"], problem.elsewhere(lost=late)[0]["models"], rtol=0, atol=0)
    following = [unpack(torch.frombuffer(bytearray(wire.kept[k]), dtype=torch.uint8)) for k in range(2)]
    of_clients = [
        (before if (round_, k) in late else after).get("own", {}).get("c", [0.0])[0]
        for k, (round_, before, after) in enumerate(following)
    ]
    torch.testing.assert_close(sum(of_clients) / 2, result["state"]["c"][0], rtol=0, atol=1e-12)


def test_says_why_a_client_is_missing():
    problem = net("fedavg")
    strategy = RemoteStrategy(Wire(problem.clients(), {(0, 1)}), **problem.options)
    trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_epochs=1, enable_checkpointing=False, **QUIET)
    with pytest.warns(UserWarning, match="Round 0 goes on without client 1: its machine is on fire"):
        trainer.fit(problem.module(), DataLoader([0]))
    assert trainer.callback_metrics["loss"].isfinite()  # what clients have logged


class Plateau(Quadratic):
    """Its learning rate follows what the server sees in validation."""

    def validation_step(self, batch, batch_idx):
        self.log("val_loss", 1.0)

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.2)
        schedule = torch.optim.lr_scheduler.ReduceLROnPlateau(optimizer, patience=0, factor=0.5)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": schedule, "monitor": "val_loss"}}


def test_clients_train_with_the_learning_rates_of_the_server():
    problem = quadratic("fedavg")
    problem.module = lambda: Plateau(ETAS).double()
    strategy = FederatedStrategy(partition=problem.shares, **problem.options)
    here = problem.fit(strategy, DataLoader(problem.dataset, BATCH), 3, DataLoader([0.0]))
    remote = RemoteStrategy(Wire(problem.clients()), **problem.options)
    same(problem.fit(remote, DataLoader([0]), 3, DataLoader([0.0])), here)


def refused(match, problem, clients, error=MisconfigurationException):
    with pytest.raises(error, match=match):
        problem.fit(RemoteStrategy(Wire(clients), **problem.options), DataLoader([0]), 1)


def test_needs_to_know_the_number_of_rounds():
    problem = net("fedavg")
    trainer = {"max_epochs": -1, "max_steps": 4}
    server = Problem(problem.module, problem.dataset, problem.shares, True, problem.options, trainer)
    refused("have to know the number of rounds: give the Trainer `max_epochs`", server, problem.clients())


def test_refuses_clients_that_are_not_those_of_this_server():
    problem = net("fedavg")
    refused("of whom 3 have come; number 3 is missing", problem, problem.clients()[:3])
    extra = RemoteClient(K, problem.module, problem.loader, None, problem.options)
    problem.shares.append([0])
    refused("number 4 is not one of them", problem, [*problem.clients(), extra])
    refused("Client 0 has other options than the server", problem, problem.clients({**problem.options, "local_epochs": 2}))

    def other_frozen():
        module = SmallNet().double()
        module.frozen.weight.data.add_(1)
        return module

    refused(
        "Client 0 has other parameters, or other values of what is not trained", problem, problem.clients(module=other_frozen)
    )


@pytest.mark.parametrize(
    ("options", "error", "match"),
    [
        ({"partition": "iid"}, TypeError, "`partition` divides data among clients"),
        ({"uplink": "sign"}, TypeError, "`uplink` and `downlink` can't be used"),
        ({"client": 3}, TypeError, "no option `client`: use aggregator, clients"),
        ({"clients": 3, "fraction": 0.1}, ValueError, "less than one"),
        ({"aggregator": "drop_worst"}, ValueError, "use no `DropWorst`"),
        ({"aggregator": OneBit(DropWorst())}, ValueError, "needs data of the server and of clients in one place"),
        ({"aggregator": FedDF("noise")}, ValueError, 'another `data` than "noise" for `FedDF`'),
    ],
    ids=str,
)
def test_refuses_options_before_anything_starts(options, error, match):
    with pytest.raises(error, match=match):
        check_options(options)


@pytest.mark.parametrize(
    ("trainer", "match"),
    [
        ({"strategy": "ddp"}, "`strategy` is made of the other options"),
        ({"max_epochs": 3}, "`max_epochs` is the server's number of rounds"),
        ({"devices": 2}, "trains on one device"),
    ],
    ids=str,
)
def test_refuses_options_of_a_trainer(trainer, match):
    with pytest.raises(ValueError, match=match):
        RemoteClient(0, SmallNet, DataLoader, trainer)


def test_messages_hold_nothing_but_arrays_and_text():
    with pytest.raises(TypeError, match="`a/1` is of type set"):
        encode({"a": [1, {2}]})
    alike = carried({"a": {"b": torch.tensor(0)}, "a/b": torch.tensor(1), 3: torch.tensor(2), "3": torch.tensor(3)})
    assert alike == {"a": {"b": 0}, "a/b": 1, 3: 2, "3": 3}
    tree = {"a": (True, None, [torch.ones(2, dtype=torch.bfloat16)]), "b": {3: float("inf")}}
    back = carried(tree)
    assert back["a"][2][0].dtype == torch.float32
    assert back["b"] == tree["b"]
    assert back["a"][:2] == tree["a"][:2]
