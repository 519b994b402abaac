"""Ranks in network namespaces: what they reach, how fast, what is counted, and that nothing is left of them."""

from __future__ import annotations

import ctypes
import encodings.idna  # noqa: F401  # which `socket` imports when it needs it: another user may not be able to read it then
import errno
import inspect
import json
import multiprocessing
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import lightning.pytorch as pl
import pytest
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.utils.data import DataLoader, TensorDataset

from benchmarks import harness
from benchmarks.harness import Turns
from benchmarks.network import Counters, Network, NetworkError, limits, namespaces, network, read, unavailable
from lightning_distopt import GossipStrategy, LocalSGDStrategy
from lightning_distopt.algorithms import CHOCO
from lightning_distopt.strategies import ReplicaStrategy

REASON = unavailable()
needs_network = pytest.mark.skipif(bool(REASON), reason=REASON)
FORK = multiprocessing.get_context("fork")


def tc(*arguments: str) -> str:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    command = ["tc", *arguments, "dev", "eth0"]
    return subprocess.run(command, capture_output=True, text=True, check=True, env={"PATH": path}).stdout


def transfer(rank: int, addresses: list[str], sender: int, receiver: int, size: int) -> float:
    """Send `size` bytes from one rank to another. Returns the seconds for which the receiver has waited."""
    port, begin = 4000 + 10 * sender + receiver, time.perf_counter()
    if rank == receiver:
        with socket.create_server((addresses[receiver], port)) as server:
            connection, _ = server.accept()
            with connection:
                connection.settimeout(30)
                begin, left = time.perf_counter(), size
                while left:
                    left -= len(connection.recv(2**16))
                connection.sendall(b"!")
    elif rank == sender:
        while time.perf_counter() < begin + 30:
            try:
                connection = socket.create_connection((addresses[receiver], port), timeout=30)
                break
            except ConnectionRefusedError:  # it does not listen yet
                time.sleep(0.01)
        with connection:
            connection.sendall(bytes(size))
            assert connection.recv(1) == b"!"
    return time.perf_counter() - begin


# --------------------------------------------------------------------------------------------------------------- limits
@needs_network
def test_a_port_has_the_rate_that_was_asked_for_in_both_directions() -> None:
    with Network(3, "25.6mbit") as net:
        assert net.limits == [([25_600_000], [25_600_000])] * 3
        for text in net.run(lambda rank: tc("-j", "qdisc", "show")):
            (discipline,) = json.loads(text)
            assert discipline["kind"] == "tbf"
            assert discipline["options"]["rate"] == 25_600_000 / 8
            assert discipline["options"]["burst"] == limits.burst(25_600_000) == 3200  # bytes of a millisecond
            assert discipline["options"]["lat"] == pytest.approx(100_000, rel=0.01)  # microseconds


@needs_network
def test_packets_take_the_class_of_where_they_go() -> None:
    def body(rank: int) -> tuple[str, list[int]]:
        transfer(rank, net.addresses, sender=0, receiver=1, size=300_000)
        transfer(rank, net.addresses, sender=0, receiver=2, size=100_000)
        transfer(rank, net.addresses, sender=0, receiver=3, size=50_000)
        text = tc("-s", "class", "show")
        return tc("filter", "show"), [int(sent) for sent in re.findall(r"Sent (\d+) bytes", text)]

    with Network(4, "1gbit", clusters=2, across="10mbit") as net:
        assert net.limits == [([10**9, 10**7], [10**9, 10**7])] * 4
        found = net.run(body)
    _, (inside, across) = found[0]
    # With headers, and on a busy machine what is sent twice; nothing that belongs to the other class.
    assert 300_000 < inside < 400_000 and 150_000 < across < 200_000
    for rank, (_, sent) in enumerate(found[1:], 1):  # confirmations only, and a few packets that ask for addresses
        used, other = sent if rank == 1 else reversed(sent)
        assert 500 < used < 30_000 and other < 500
    assert ["c6120000/ffffff00" in text for text, _ in found] == [True, True, False, False]  # 198.18.0.0/24
    assert ["c6120100/ffffff00" in text for text, _ in found] == [False, False, True, True]


@needs_network
def test_congestion_control_does_not_depend_on_the_machine() -> None:
    with Network(2, "1gbit") as net:
        assert net.run(lambda rank: Path("/proc/sys/net/ipv4/tcp_congestion_control").read_text().strip()) == ["reno"] * 2


@needs_network
def test_no_limit_unless_asked_for() -> None:
    with Network(2) as net:
        assert net.limits == [([], [])] * 2


@needs_network
@pytest.mark.parametrize("options", [{"rate": "1mbit"}, {"rate": "1gbit", "clusters": 2, "across": "1mbit"}], ids=str)
def test_a_limit_limits(options: dict[str, Any]) -> None:
    size = 60_000
    with Network(2, **options) as net:
        seconds = net.run(transfer, net.addresses, 0, 1, size)[1]
    assert seconds > size * 8 / 1e6 / 3  # the other side depends on the machine


@needs_network
@pytest.mark.parametrize("options", [{"rate": "2mbit"}, {"rate": "1gbit", "clusters": 2, "across": "2mbit"}], ids=str)
def test_limits_are_lifted_for_a_while(options: dict[str, Any]) -> None:
    with Network(2, **options) as net:
        before = net.run(lambda rank: tc("qdisc", "show"))
        with net.lifted():
            assert all(" tbf " not in text and " htb " not in text for text in net.run(lambda rank: tc("qdisc", "show")))
            net.run(transfer, net.addresses, 0, 1, 250_000)
        assert net.run(lambda rank: tc("qdisc", "show")) == before
        assert net.run(transfer, net.addresses, 0, 1, 250_000)[1] > 1 / 3


@pytest.mark.parametrize("rate", ["", "100", "fast", "0mbit", "-1mbit", "1e3mbit", "100mbps"])
def test_what_is_no_rate(rate: str) -> None:
    with pytest.raises(ValueError, match="as in '100mbit'"):
        Network(2, rate)


@pytest.mark.parametrize(
    ("options", "sentence"),
    [
        ({"ranks": 0}, "1 to 250 ranks"),
        ({"ranks": 251}, "1 to 250 ranks"),
        ({"ranks": 4, "clusters": 3}, "4 ranks cannot be divided into 3"),
        ({"ranks": 4, "clusters": 0}, "4 ranks cannot be divided into 0"),
        ({"ranks": 4, "across": "1mbit", "clusters": 2}, "give clusters= and the rate="),
        ({"ranks": 4, "across": "1mbit", "rate": "1mbit"}, "give clusters= and the rate="),
    ],
    ids=str,
)
def test_arguments_that_do_not_fit(options: dict[str, Any], sentence: str) -> None:
    with pytest.raises(ValueError, match=re.escape(sentence)):
        Network(**options)


# ------------------------------------------------------------------------------------------------------ where one can run
def test_what_is_missing_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse() -> bool:
        raise PermissionError(errno.EPERM, "unshare: Operation not permitted")

    sentence = network.unavailable.__wrapped__  # without what it has found out before
    with monkeypatch.context() as patch:
        patch.setattr(sys, "platform", "darwin")
        assert sentence() == "Networks of limited rate need Linux."
    if sys.platform != "linux":
        return
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "which", lambda name, path: None if name == "tc" else name)
        assert sentence() == "Networks of limited rate need the command tc: install the package iproute2."
    if network._missing_commands():
        return
    monkeypatch.setattr(namespaces, "isolate", refuse)
    assert sentence().startswith("Networks of limited rate need root or the right to make user namespaces (")


@needs_network
def test_delay_needs_netem() -> None:
    try:
        net = Network(2, "100mbit", delay="5ms")
    except NetworkError as error:
        assert str(error).startswith("delay= needs a kernel with netem")
        return
    with net:
        assert net.limits == [([10**8], [10**8])] * 2
        kinds = [d["kind"] for d in json.loads(net.run(lambda rank: tc("-j", "qdisc", "show"))[0])]
        assert sorted(kinds) == ["netem", "tbf"]


@needs_network
@pytest.mark.skipif(
    sys.platform != "linux" or os.geteuid() != 0, reason="for root only: all other tests run as an ordinary user"
)
def test_an_ordinary_user_can_do_it() -> None:
    def ordinary(pipe: Connection) -> None:
        os.setgid(65534)
        os.setuid(65534)
        ctypes.CDLL(None).prctl(4, 1)  # PR_SET_DUMPABLE: a process that starts as an ordinary user is
        try:
            with Network(2, "100mbit") as net:
                pipe.send((net.limits, net.run(transfer, net.addresses, 0, 1, 1000)))
        except NetworkError as error:
            pipe.send(str(error))

    ours, theirs = FORK.Pipe()
    process = FORK.Process(target=ordinary, args=(theirs,))
    process.start()
    theirs.close()
    assert ours.poll(60)
    reply = ours.recv()
    process.join()
    if isinstance(reply, str):
        assert reply.startswith("Networks of limited rate need root or the right to make user namespaces")
        pytest.skip(reply)
    assert reply[0] == [([10**8], [10**8])] * 2 and len(reply[1]) == 2


# ---------------------------------------------------------------------------------------------------------- connections
@pytest.fixture(scope="module")
def net() -> Iterator[Network]:
    """A network of four ranks that is fast, but whose queues are those of a limited one."""
    if REASON:
        pytest.skip(REASON)
    with Network(4, "1gbit") as net:
        yield net


def test_ranks_reach_each_other_and_nothing_else(net: Network) -> None:
    def body(rank: int, port: int) -> tuple[list[str], list[int | None]]:
        def problem(address: str, port: int) -> int | None:
            try:
                socket.create_connection((address, port), timeout=10).close()
            except OSError as error:
                return error.errno
            return None

        for receiver in range(4):
            if receiver != rank:
                transfer(rank, net.addresses, min(rank, receiver), max(rank, receiver), 10)
        return sorted(read()), [problem("127.0.0.1", port), problem("192.0.2.1", 80)]

    with socket.create_server(("127.0.0.1", 0)) as server:
        found = net.run(body, server.getsockname()[1])
    assert found == [(["eth0", "lo"], [errno.ECONNREFUSED, errno.ENETUNREACH])] * 4


def test_run_gives_what_bodies_return_in_the_order_of_ranks(net: Network) -> None:
    def body(rank: int, factor: int) -> tuple[int, dict[str, str]]:
        names = ("RANK", "LOCAL_RANK", "NODE_RANK", "WORLD_SIZE", "MASTER_ADDR", "GLOO_SOCKET_IFNAME")
        return factor * rank, {name: os.environ[name] for name in names}

    found = net.run(body, 10)
    assert [value for value, _ in found] == [0, 10, 20, 30]
    assert found[3][1] == {
        "RANK": "3",
        "LOCAL_RANK": "3",
        "NODE_RANK": "0",
        "WORLD_SIZE": "4",
        "MASTER_ADDR": net.addresses[0],
        "GLOO_SOCKET_IFNAME": "eth0",
    }
    assert os.environ.get("GLOO_SOCKET_IFNAME") != "eth0"


def test_teams_take_turns_on_the_same_links(net: Network) -> None:
    def body(turns: Turns) -> None:
        turns.connect()
        while True:
            turns.wait()
            start, total = harness.now(), torch.ones(1)
            dist.all_reduce(total)
            turns.report(start, harness.now(), (total.item(), os.readlink("/proc/self/ns/net")))

    laps = harness.interleave("turns", {name: net.team(name, body) for name in "AB"}, pairs=2)
    values = {name: [[lap.value for lap in turn] for turn in turns] for name, turns in laps.items()}
    assert values["A"] == values["B"] and values["A"][0] == values["A"][1]
    assert [total for total, _ in values["A"][0]] == [4.0] * 4
    assert len({place for _, place in values["A"][0]}) == 4


# -------------------------------------------------------------------------------------------------------------- failure
def alive(process: int) -> bool:
    """Whether a process exists and is more than an entry that waits to be read."""
    try:
        return Path(f"/proc/{process}/stat").read_text().rpartition(")")[2].split()[0] not in "ZX"
    except (FileNotFoundError, ProcessLookupError):
        return False


def namespaces_in_use() -> set[str]:
    found = set()
    for file in Path("/proc").glob("[0-9]*/ns/net"):
        try:
            found.add(os.readlink(file))
        except OSError:  # another user's, or just gone
            continue
    return found


def links() -> set[str]:
    path = os.pathsep.join([os.environ["PATH"], "/usr/sbin", "/sbin"])
    done = subprocess.run(["ip", "-j", "link"], capture_output=True, check=True, env={"PATH": path})
    return {link["ifname"] for link in json.loads(done.stdout)}


def gone(processes: list[int], places: list[str]) -> bool:
    """Wait for the end of processes and of their namespaces: the kernel needs a moment."""
    deadline = time.monotonic() + 30
    while time.monotonic() < deadline:
        if not any(map(alive, processes)) and not namespaces_in_use() & set(places):
            return True
        time.sleep(0.02)
    return False


def whereabouts(rank: int) -> tuple[int, str]:
    return os.getpid(), os.readlink("/proc/self/ns/net")


def raises(rank: int) -> None:
    if rank == 1:
        raise ValueError("the reason")
    time.sleep(600)


def dies(rank: int) -> None:
    if rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    time.sleep(600)


def hangs(rank: int) -> None:
    if rank != 1:
        time.sleep(600)


@needs_network
@pytest.mark.parametrize(
    ("body", "error", "text"),
    [
        (raises, RuntimeError, "^Rank 1 of the network failed:\n(.*\n)+ValueError: the reason"),
        (dies, RuntimeError, "^Rank 1 of the network died with exit code -9"),
        (hangs, TimeoutError, r"^Ranks 0, 2 of the network had not ended the turn after 3 s"),
    ],
    ids=["raises", "dies", "hangs"],
)
def test_failure_names_the_rank_and_leaves_nothing(body: Callable[[int], None], error: type[Exception], text: str) -> None:
    before, children = links(), set(multiprocessing.active_children())
    with Network(3) as net:
        places = net.run(whereabouts)
        switch = net._switch.pid
        with pytest.raises(error, match=text):
            net.run(body, timeout=3 if body is hangs else 60)
        assert set(multiprocessing.active_children()) - children == {net._switch}
        again = net.run(whereabouts)  # the network is as it was
        assert [place for _, place in again] == [place for _, place in places]
        inside = os.readlink(f"/proc/{switch}/ns/net")
        assert inside in namespaces_in_use() and links() == before
    assert gone([switch, *(pid for pid, _ in places + again)], [inside, *(place for _, place in places)])
    assert links() == before and set(multiprocessing.active_children()) == children


@needs_network
def test_nothing_is_left_of_a_conductor_that_is_killed() -> None:
    def conduct(pipe: Connection) -> None:
        def body(rank: int) -> None:
            pipe.send((*whereabouts(rank), "rank"))
            time.sleep(600)

        with Network(2, "100mbit") as net:
            pipe.send((net._switch.pid, os.readlink(f"/proc/{net._switch.pid}/ns/net"), "switch"))
            net.run(body, timeout=600)

    before = links()
    ours, theirs = FORK.Pipe()
    conductor = FORK.Process(target=conduct, args=(theirs,))
    conductor.start()
    theirs.close()
    found = []
    while len(found) < 3:
        assert ours.poll(60)
        found.append(ours.recv())
    assert [kind for *_, kind in found] == ["switch", "rank", "rank"]
    processes, places = [pid for pid, *_ in found], [place for _, place, _ in found]
    assert all(map(alive, processes)) and set(places) <= namespaces_in_use() and len(set(places)) == 3
    conductor.kill()
    conductor.join()
    assert gone(processes, places) and links() == before


# -------------------------------------------------------------------------------------------------------------- counting
def test_counters_less_headers_are_the_payload(net: Network) -> None:
    def body(rank: int) -> tuple[Counters, Counters]:
        before = read()["eth0"]
        transfer(rank, net.addresses, 2, 3, 5_000_000)
        return before, read()["eth0"]

    before = net.counters()
    own = net.run(body)
    passed = [now - then for now, then in zip(net.counters(), before, strict=True)]
    sent, received = passed[2].payload_sent, passed[3].payload_received
    assert abs(sent - received) <= 4 * 24  # who asks for an address sends 42 bytes, 24 fewer than the headers of TCP
    assert 5_000_000 - 4 * 24 <= sent < 5_010_000
    assert passed[0].bytes_sent < 1000 and passed[1].bytes_received < 1000
    for (first, last), seen in zip(own, net.counters(), strict=True):  # a rank reads the same as the other end of its cable
        assert first.bytes_sent <= last.bytes_sent <= seen.bytes_sent < last.bytes_sent + 1000


class Wide(pl.LightningModule):
    """A linear layer, with next to nothing to compute for the bytes of its parameters."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.layer = nn.Linear(width, width)

    def training_step(self, batch: list[Tensor], batch_idx: int) -> Tensor:
        return self.layer(batch[0]).square().mean()

    def configure_optimizers(self) -> torch.optim.Optimizer:
        return torch.optim.SGD(self.parameters(), lr=0.01)


class Count(pl.Callback):
    """Compares the strategy's count with the interface's, from the first step to the last."""

    def __init__(self, clusters: int) -> None:
        self.clusters = clusters
        self.counted: list[int] = []
        self.sent: list[Counters] = []
        self.across: list[int] = []  # to other clusters

    def on_train_batch_start(self, trainer: pl.Trainer, pl_module: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == 0:
            self._read(trainer)

    def on_train_batch_end(self, trainer: pl.Trainer, pl_module: Any, outputs: Any, batch: Any, batch_idx: int) -> None:
        if batch_idx == len(trainer.train_dataloader) - 1:
            self._read(trainer)

    def _read(self, trainer: pl.Trainer) -> None:
        dist.barrier()  # all that was sent has been received
        assert isinstance(trainer.strategy, ReplicaStrategy)
        self.counted.append(trainer.strategy.traffic.bytes_sent)
        self.sent.append(read()["eth0"])
        self.across.append(int(re.findall(r"Sent (\d+) bytes", tc("-s", "class", "show"))[-1]) if self.clusters > 1 else 0)


def train(rank: int, net: Network, strategy: Callable[[], ReplicaStrategy], width: int, steps: int) -> tuple[int, ...]:
    torch.manual_seed(rank)
    count = Count(net.clusters)
    trainer = harness.trainer(strategy(), net.devices, num_nodes=net.clusters, max_epochs=1, callbacks=[count])
    trainer.fit(Wide(width), DataLoader(TensorDataset(torch.randn(net.ranks * (steps + 1), width))))
    sent = count.sent[1] - count.sent[0]
    return count.counted[1] - count.counted[0], sent.payload_sent, trainer.node_rank, count.across[1] - count.across[0]


METHODS: dict[str, tuple[Callable[[], ReplicaStrategy], int, int]] = {
    "averages parameters": (lambda: LocalSGDStrategy(1, average="parameters"), 1024, 4),
    "averages gradients": (lambda: LocalSGDStrategy(1), 1024, 4),
    "D-PSGD, ring": (lambda: GossipStrategy("dpsgd", topology="ring"), 1024, 3),
    "D-SGD, one peer": (lambda: GossipStrategy(), 1024, 5),
    "CHOCO, sign": (lambda: GossipStrategy(CHOCO(gamma=0.1, compressor="sign")), 2048, 20),
}


SENDS_PARAMETERS = "init_sync" not in inspect.signature(DistributedDataParallel.__init__).parameters


@pytest.mark.parametrize("name", METHODS)
def test_traffic_is_what_the_interface_counts(net: Network, name: str) -> None:
    if name == "averages gradients" and SENDS_PARAMETERS:
        pytest.skip("this version of torch sends all parameters when DDP is made, which is set-up and not counted")
    for counted, payload, *_ in net.run(train, net, *METHODS[name], timeout=120):
        assert payload > 20e6
        assert counted == pytest.approx(payload, rel=0.02)


@needs_network
def test_traffic_of_blocks_that_follow_clusters() -> None:
    def strategy() -> ReplicaStrategy:
        return LocalSGDStrategy(1, block_period=2, average="parameters")

    with Network(4, "1gbit", clusters=2, across="500mbit") as net:
        results = net.run(train, net, strategy, 1024, 6, timeout=120)
    assert [node for _, _, node, _ in results] == [0, 0, 1, 1]
    for counted, payload, _, across in results:
        # In each of three rounds of all a rank sends half of its slice to its peer, and half of the sum; and confirmations.
        assert across == pytest.approx(4 * (1024 + 1) * 1024 * 3 * 0.5, rel=0.1)
        assert counted == 4 * (1024 + 1) * 1024 * (4 * 1.0 + 3 * 1.5)  # rounds of two replicas, and of all four
        assert counted == pytest.approx(payload, rel=0.02)
