"""The network: how it is built, and how processes get into it."""

from __future__ import annotations

import contextlib
import functools
import itertools
import json
import multiprocessing
import os
import re
import shutil
import subprocess
import sys
import traceback
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any, NoReturn

from benchmarks.harness import Team, Turns, die_with
from benchmarks.network import limits, namespaces
from benchmarks.network.counters import Counters, read

INTERFACE = "eth0"
"""Name of the interface of every rank."""

_BUILD_TIMEOUT = 60.0
_CONGESTION_CONTROL = Path("/proc/sys/net/ipv4/tcp_congestion_control")


class NetworkError(RuntimeError):
    """A network could not be built; the text says why."""


@dataclass(frozen=True)
class _Plan:
    """What the switch process builds."""

    ranks: int
    clusters: int
    rate: str | None
    across: str | None
    delay: str | None

    def cluster(self, rank: int) -> int:
        return rank * self.clusters // self.ranks

    def address(self, rank: int) -> str:
        """Return a rank's address, in the range that is set aside for benchmarks (RFC 2544)."""
        return f"198.18.{self.cluster(rank)}.{rank + 1}"

    def limit(self, device: str, rank: int, direction: str) -> list[str]:
        """Return the lines for `tc` that limit what a rank sends ("dst") or receives ("src")."""
        lines, parent = [], "root"
        if self.delay is not None and direction == "dst":
            lines, parent = [f"qdisc add dev {device} root handle 1: netem delay {self.delay} limit 1000000"], "parent 1:"
        if self.across is not None and self.rate is not None:
            match = f"ip {direction} 198.18.{self.cluster(rank)}.0/24"
            lines += limits.two_rates(device, parent, self.rate, self.across, match)
        elif self.rate is not None:
            lines += limits.one_rate(device, parent, self.rate)
        return lines

    @property
    def largest(self) -> int:
        """Return the bytes of the largest packet that TCP makes: what the slowest link takes at once."""
        rates = [limits.bits_per_second(rate) for rate in (self.rate, self.across) if rate is not None]
        return min([limits.burst(bits) for bits in rates], default=65536)


class Network:
    """Ranks with a port each at one switch.

    Example:
        >>> with Network(2, rate="100mbit") as net:  # doctest: +SKIP
        ...     net.run(lambda rank: os.environ["MASTER_ADDR"])
        ['198.18.0.1', '198.18.0.1']

    Args:
        ranks: number of ranks, at most 250.
        rate: of every port, in each direction, such as "100mbit"; by default there is no limit. With several clusters, it
            is that between ranks of the same cluster.
        clusters: number of groups of consecutive ranks, all of the same size.
        across: rate of every port, in each direction, for all it exchanges with ranks of other clusters.
        delay: that every packet takes on its way, such as "5ms". It needs a kernel with `netem`.

    Attributes:
        limits: for each rank the rates at which it may send and receive (bit/s), as `tc` reports them; with clusters the
            one inside comes first.
        addresses: of the ranks.
        devices: ranks of a cluster.

    Raises:
        ValueError: if the arguments do not fit together.
        NetworkError: if this machine cannot do it.
    """

    def __init__(
        self,
        ranks: int,
        rate: str | None = None,
        *,
        clusters: int = 1,
        across: str | None = None,
        delay: str | None = None,
    ) -> None:
        if not 1 <= ranks <= 250:
            raise ValueError(f"A network has 1 to 250 ranks, not {ranks}.")
        if clusters < 1 or ranks % clusters:
            raise ValueError(f"{ranks} ranks cannot be divided into {clusters} clusters of the same size.")
        if across is not None and (rate is None or clusters == 1):
            raise ValueError("across= is the rate between clusters: give clusters= and the rate= inside of them too.")
        for each in (rate, across):
            if each is not None:
                limits.bits_per_second(each)
        if reason := _missing_commands():
            raise NetworkError(reason)
        self.ranks, self.clusters, self.devices = ranks, clusters, ranks // clusters
        self._plan = _Plan(ranks, clusters, rate, across, delay)
        self.addresses = [self._plan.address(rank) for rank in range(ranks)]
        self._ports = itertools.count(29500)
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        self._switch = context.Process(target=_be_switch, args=(self._plan, theirs, os.getpid()), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # Python 3.12 about fork: what it runs needs no locks
            self._switch.start()
        theirs.close()
        try:
            reply = ours.recv() if ours.poll(_BUILD_TIMEOUT) else f"The network was not ready after {_BUILD_TIMEOUT:g} s."
        except EOFError:
            reply = "The process that builds the network has died."
        finally:
            ours.close()
        if isinstance(reply, str):
            self.close()
            raise NetworkError(reply)
        self._user, self._files, self.limits = reply

    def run(self, body: Callable[..., Any], *args: Any, timeout: float = 60.0) -> list[Any]:
        """Run `body(rank, *args)` in a new process for each rank, all at the same time, and return what it returns.

        Args:
            body: any function; forked processes know all that this one knows.
            *args: more arguments of `body`.
            timeout: seconds after which it counts as hung.

        Raises:
            RuntimeError: if it raised or died on some rank.
            TimeoutError: if it has not returned on some rank.
        """

        def once(turns: Turns) -> None:
            turns.wait()
            turns.report_value(body(turns.index, *args))
            turns.wait()  # until all are done: somebody may still need this one's connections

        with self.team("the network", once) as team:
            return [lap.value for lap in team.turn(timeout)]

    def team(self, name: str, body: Callable[[Turns], None], on: Sequence[int] | None = None) -> Team:
        """Return a team of one process for each rank; teams that take turns share the ranks' links.

        Args:
            name, body, on: as for `harness.Team`.
        """
        return Team(name, body, self.ranks, on, enter=functools.partial(self._enter, next(self._ports), os.getpid()))

    @contextlib.contextmanager
    def lifted(self) -> Iterator[None]:
        """Lift all limits inside the body, for what is not to be measured; nothing may be under way at its end."""
        self._change(limited=False)
        try:
            yield
        finally:
            self._change(limited=True)

    def _change(self, limited: bool) -> None:
        """Set the limits of all ports, or remove them, from a process that goes where the ports are."""
        if self._plan.rate is None and self._plan.delay is None:
            return
        context = multiprocessing.get_context("fork")
        ours, theirs = context.Pipe()
        process = context.Process(target=self._change_from_inside, args=(limited, theirs), daemon=True)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore", DeprecationWarning)  # as in `__init__`
            process.start()
        theirs.close()
        try:
            problem = ours.recv() if ours.poll(_BUILD_TIMEOUT) else f"it took more than {_BUILD_TIMEOUT:g} s"
        except EOFError:
            problem = "the process that was to do it has died"
        finally:
            ours.close()
            process.kill()
            process.join()
        if problem:
            raise NetworkError(f"The limits of the network could not be changed: {problem}")

    def _change_from_inside(self, limited: bool, pipe: Connection) -> NoReturn:
        switch = f"/proc/{self._switch.pid}"
        try:
            files = [f"{switch}/fd/{file}" for file in self._files]
            open_files = [os.open(file, os.O_RDONLY) for file in (f"{switch}/ns/net", *files)]
            if self._user:
                namespaces.enter(f"{switch}/ns/user")
            for rank, file in enumerate(open_files[1:]):
                namespaces.enter(f"/proc/self/fd/{file}")
                _run("tc", *(self._plan.limit(INTERFACE, rank, "dst") if limited else [f"qdisc del dev {INTERFACE} root"]))
            namespaces.enter(f"/proc/self/fd/{open_files[0]}")
            for rank in range(self.ranks):
                port = f"port{rank}"
                if lines := self._plan.limit(port, rank, "src"):
                    _run("tc", *(lines if limited else [f"qdisc del dev {port} root"]))
            pipe.send("")
        except Exception:
            pipe.send(traceback.format_exc())
        os._exit(0)

    def counters(self) -> list[Counters]:
        """Return what each rank has sent and received so far."""
        ports = read(f"/proc/{self._switch.pid}")
        ends = [ports[f"port{rank}"] for rank in range(self.ranks)]
        return [Counters(*end[2:], *end[:2]) for end in ends]  # what the rank sends, its port receives

    def close(self) -> None:
        """End the switch, and with it all connections between ranks."""
        self._switch.kill()
        self._switch.join()

    def __enter__(self) -> Network:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _enter(self, port: int, parent: int, turns: Turns) -> None:
        """Take this process, which has just been forked, to the place of its rank."""
        switch = f"/proc/{self._switch.pid}"
        file = f"{switch}/fd/{self._files[turns.index]}"
        if self._user:
            namespaces.enter(f"{switch}/ns/user")
        namespaces.enter(file)
        die_with(parent)
        main, rank = self.addresses[0], turns.index
        os.environ.update(
            MASTER_ADDR=main,
            MASTER_PORT=str(port),
            RANK=str(rank),
            WORLD_SIZE=str(self.ranks),
            LOCAL_RANK=str(rank % self.devices),
            NODE_RANK=str(rank // self.devices),
            GLOO_SOCKET_IFNAME=INTERFACE,
        )
        turns.store = f"tcp://{main}:{port}"


def _missing_commands() -> str:
    if sys.platform != "linux":
        return "Networks of limited rate need Linux."
    missing = [name for name in ("ip", "tc") if shutil.which(name, path=_PATH) is None]
    return f"Networks of limited rate need the command {missing[0]}: install the package iproute2." if missing else ""


_PATH = os.pathsep.join([os.environ.get("PATH", os.defpath), "/usr/sbin", "/sbin"])  # which ordinary users often lack


@functools.cache
def unavailable() -> str:
    """Return why networks cannot be built on this machine, in a sentence; nothing if they can."""
    try:
        Network(1, "1gbit").close()
        Network(2, "1gbit", clusters=2, across="100mbit").close()
    except NetworkError as error:
        return str(error)
    return ""


# ------------------------------------------------------------------------------------------- inside of the switch process
def _be_switch(plan: _Plan, pipe: Connection, parent: int) -> NoReturn:
    """Build the network, tell of it, and keep it alive."""
    try:
        try:
            user = namespaces.isolate()
        except OSError as error:
            raise NetworkError(f"Networks of limited rate need root or the right to make user namespaces ({error}).") from None
        die_with(parent)
        pipe.send((user, *_build(plan)))
    except NetworkError as error:
        pipe.send(str(error))
    except BaseException:
        pipe.send(f"The network could not be built:\n{traceback.format_exc()}")
    else:
        pipe.close()
        namespaces.wait_forever()
    os._exit(0)


def _build(plan: _Plan) -> tuple[list[int], list[tuple[list[int], list[int]]]]:
    """Build it in this network namespace and new ones. Returns the open files of the new ones, and all limits."""
    home = _this_namespace()
    if plan.delay is not None:
        try:
            _run("tc", f"qdisc add dev lo root netem delay {plan.delay}")
        except NetworkError as error:
            raise NetworkError(f"delay= needs a kernel with netem, and a time such as '5ms'. {error}") from None
    _run("ip", "link set lo up", "link add name bridge type bridge", "link set bridge up")
    files, sent = [], []
    for rank in range(plan.ranks):
        namespaces.unshare(namespaces.NEW_NET)
        files.append(_this_namespace())
        _run(
            "ip",
            "link set lo up",
            f"link add name {INTERFACE} type veth peer name port{rank} netns /proc/self/fd/{home}",
            f"address add {plan.address(rank)}/16 dev {INTERFACE}",
            f"link set {INTERFACE} gso_max_size {plan.largest} up",
            keep=home,
        )
        _run("tc", *plan.limit(INTERFACE, rank, "dst"))
        sent.append(_limits(INTERFACE))
    namespaces.enter(f"/proc/self/fd/{home}")
    ports = [f"port{rank}" for rank in range(plan.ranks)]
    _run("ip", *(f"link set {port} master bridge up" for port in ports))
    _run("tc", *(line for rank, port in enumerate(ports) for line in plan.limit(port, rank, "src")))
    return files, list(zip(sent, map(_limits, ports), strict=True))


def _this_namespace() -> int:
    """Open the network namespace that this process is in; on its links there is TCP over IPv4 alone, with Reno.

    Every kernel lets a namespace have Reno. BBR, which some have instead, measures how fast a link is: after limits are set
    again it sends at the old speed for a while, and loses a second of the first transfers.
    """
    off = Path("/proc/sys/net/ipv6/conf/default/disable_ipv6")
    if off.exists():  # it would announce itself
        off.write_text("1")
    _CONGESTION_CONTROL.write_text("reno")
    return os.open("/proc/self/ns/net", os.O_RDONLY | os.O_CLOEXEC)


def _run(command: str, *lines: str, keep: int | None = None) -> None:
    """Let `ip` or `tc` execute lines, with a file kept open."""
    text = "\n".join(lines) + "\n"
    _output([command, "-batch", "-"], text, () if keep is None else (keep,))


def _limits(device: str) -> list[int]:
    """Return the rates (bit/s) that `tc` reports for a device."""
    found = []
    for discipline in json.loads(_output(["tc", "-j", "qdisc", "show", "dev", device])):
        if discipline["kind"] == "tbf":
            found.append(8 * discipline["options"]["rate"])
        elif discipline["kind"] == "htb":  # its classes know no JSON
            classes = _output(["tc", "class", "show", "dev", device]).lower()
            found += [limits.bits_per_second(rate) for rate in re.findall(r" rate (\S+)", classes)]
    return found


def _output(command: list[str], text: str = "", keep: Sequence[int] = ()) -> str:
    done = subprocess.run(
        command,
        input=text,
        capture_output=True,
        text=True,
        timeout=_BUILD_TIMEOUT / 2,
        pass_fds=keep,
        env={**os.environ, "PATH": _PATH},
    )
    if done.returncode:
        raise NetworkError(f"Networks of limited rate cannot be built here: {' '.join(command)}: {done.stderr.strip()}\n{text}")
    return done.stdout
