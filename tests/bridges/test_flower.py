"""The Flower apps, called as Flower calls them, and the example with real processes."""

from __future__ import annotations

import importlib.util
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest
import torch
from packaging.version import Version
from torch.utils.data import DataLoader

pytest.importorskip("flwr", reason="Flower is an extra: pip install 'lightning-distopt[flower]'")

from flwr.app import ArrayRecord, Context, Error, Message, RecordDict

from lightning_distopt import FedProx, Scaffold
from lightning_distopt.bridges import flower
from lightning_distopt.bridges.flower import FlowerEngine, client_app, server_app
from tests.bridges.test_remote import K, net
from tests.conformance.problems import QUIET, SmallNet
from tests.federated.problem import SEED
from tests.helpers import fresh_environment

ROOT = Path(__file__).parents[2]


@pytest.fixture(autouse=True)
def _identity(monkeypatch):
    """Recent versions of Flower say who a process is before they call an app."""
    if importlib.util.find_spec("flwr.supercore.task_identity") is not None:
        identity = importlib.import_module("flwr.supercore.task_identity").TaskIdentity
        for name in ("_task_id", "_run_id", "_node_id"):
            monkeypatch.setattr(identity, name, 1)


class Loopback:
    """Flower's `Grid` without processes: bytes go to the app of each node and come back."""

    def __init__(self, app, numbers, silent=(), failing=()):
        self.app, self.silent, self.failing = app, silent, failing
        self.contexts = {node: context(node, number) for node, number in numbers.items()}

    def get_node_ids(self):
        return list(self.contexts)

    def send_and_receive(self, messages, *, timeout=None):
        for message in messages:
            node = message.metadata.dst_node_id
            kind = message.metadata.message_type, node
            if kind in self.failing:
                yield Message(Error(0, "out of memory"), reply_to=message)
            elif kind not in self.silent:
                yield self.app(message, self.contexts[node])


def context(node, number):
    config = {} if number is None else {"partition-id": number}
    return Context(run_id=1, node_id=node, node_config=config, state=RecordDict(), run_config={})


NODES = {100 + k: (k + 1) % K for k in range(K)}
"""Nodes have numbers of their own, in another order than clients."""


@pytest.mark.parametrize("aggregator", [FedProx(mu=0.3), Scaffold(option=1)], ids=repr)
def test_is_federated_averaging_in_one_process(aggregator, tmp_path):
    problem = net(aggregator, optimizer="plain", fraction=0.75)
    client = client_app(problem.module, problem.loader, **problem.options)
    path = tmp_path / "trained.ckpt"
    trainer = {**QUIET, "enable_checkpointing": False}
    server = server_app(problem.module, 2, trainer, checkpoint=str(path), seed=SEED, **problem.options)
    server(Loopback(client, NODES), context(1, None))

    module = problem.module()
    module.load_state_dict(torch.load(path, weights_only=True)["state_dict"])
    expected = problem.here(2)
    trained = torch.cat([p.detach().reshape(-1) for p in module.parameters() if p.requires_grad])
    torch.testing.assert_close(trained, expected["models"][-1], rtol=0, atol=1e-10)
    torch.testing.assert_close(list(module.buffers()), expected["buffers"], rtol=0, atol=1e-10)


def test_messages_hold_arrays_and_text():
    tree = {"round": 3, "rate": 0.1, "none": None, "pair": (0.9, 0.999), "model": {"a": torch.ones(2, 3).double()}}
    records = flower._records(tree)
    assert isinstance(records["arrays"], ArrayRecord)
    assert [array.stype for array in records["arrays"].values()] == ["numpy.ndarray"]
    back = flower._tree(records)
    assert torch.equal(back["model"].pop("a"), tree["model"].pop("a"))
    assert back == tree


def engine(numbers, silent=(), clients=K, timeout=1.0, **options):
    problem = net("fedavg", **options)
    return FlowerEngine(
        Loopback(client_app(problem.module, problem.loader, **problem.options), numbers, silent), clients, timeout
    )


HELLO = {"seed": SEED, "rounds": 2}


def test_says_who_has_not_come():
    with pytest.raises(RuntimeError, match=r"Of 4 clients 2 have come within 0\.3 s: start the others\."):
        engine({1: 0, 2: 1}, timeout=0.3).introduce(HELLO)
    with pytest.raises(RuntimeError, match="Two Flower nodes are client 1: give each a `partition-id` of its own"):
        engine({1: 0, 2: 1, 3: 1, 4: 2}).introduce(HELLO)
    with pytest.raises(RuntimeError, match="The Flower node 2 can't be a client: it has not answered within 1 s"):
        engine({1: 0, 2: 1, 3: 2, 4: 3}, {("query", 2)}).introduce(HELLO)
    with pytest.raises(ValueError, match="--node-config 'partition-id=0'"):
        engine({1: None, 2: 1, 3: 2, 4: 3}).introduce(HELLO)


def test_clients_that_fail_or_do_not_answer_drop_out():
    problem = net("fedavg")
    client = client_app(problem.module, problem.loader, **problem.options)
    server = server_app(problem.module, 1, {**QUIET, "enable_checkpointing": False}, timeout=5, **problem.options)
    grid = Loopback(client, NODES, {("train", 101)}, {("train", 103)})
    with (
        pytest.warns(UserWarning, match="Round 0 goes on without client 2: it has not answered within 5 s"),
        pytest.warns(UserWarning, match=r"Round 0 goes on without client 0: it has failed \(out of memory\)"),
    ):
        server(grid, context(1, None))


def test_refuses_what_has_no_meaning():
    with pytest.raises(TypeError, match="`partition` divides data among clients"):
        client_app(SmallNet, DataLoader, partition="iid")
    with pytest.raises(ValueError, match="`rounds` must be a whole number"):
        server_app(SmallNet, 0)
    with pytest.raises(ValueError, match="`max_epochs` is `rounds`"):
        server_app(SmallNet, 3, {"max_epochs": 4})
    with pytest.raises(ValueError, match="The server is one process"):
        server_app(SmallNet, 3, {"devices": 2})


RECENT = Version(version("flwr")) >= Version("1.41")


@pytest.mark.skipif(not RECENT, reason="the example uses the command line of Flower 1.41")
@pytest.mark.slow
@pytest.mark.launch
@pytest.mark.timeout(420)
def test_the_example_trains_two_clients_on_loopback(tmp_path):
    command = [sys.executable, str(ROOT / "examples" / "flower_two_clients.py")]
    done = subprocess.run(command, cwd=tmp_path, env=fresh_environment(ROOT), capture_output=True, text=True, timeout=400)
    assert done.returncode == 0, done.stdout + done.stderr
    assert done.stdout.strip().endswith("in one process the same comes out: True")
