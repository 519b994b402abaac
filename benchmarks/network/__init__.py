"""Ranks that talk over links of limited rate, on one machine.

Every rank runs in a network namespace of its own, whose only way out is a virtual cable to a bridge in another one, the
switch. Both ends of the cable are limited, as the two directions of a port of a real switch are: `tbf` where a port has
one rate, `htb` with `u32` filters where a rank reaches the ranks of its cluster at another rate than the others.
Processes, memory and cores are the machine's, TCP is the kernel's: nothing but the links is emulated.

    with Network(4, rate="100mbit") as net:
        before = net.counters()
        results = net.run(body, timeout=60)          # body(rank) in four processes, each in its namespace
        print([after - b for after, b in zip(net.counters(), before)])

    with Network(4, clusters=2, rate="10gbit", across="100mbit") as net:
        laps = interleave("text", {"A": net.team("A", a), "B": net.team("B", b)}, pairs=20)    # as elsewhere in here

In `body` the environment says what PyTorch and Lightning need to train in a process that is already running: a cluster is
a node to Lightning, so the Trainer is given `devices=net.devices, num_nodes=net.clusters`.

It needs Linux with the commands `ip` and `tc` (the package iproute2), and root, or else the right to make user
namespaces, as ordinary users have on most systems. `unavailable()` says what is missing.

Nothing has a name in the file system, and no interface is ever seen outside: namespaces, links and limits live as long
as the processes inside, which the kernel kills when the process that has started them ends. So there is nothing to clean
up, whatever happens.
"""

from benchmarks.network.counters import Counters, read
from benchmarks.network.network import Network, NetworkError, unavailable

__all__ = ["Counters", "Network", "NetworkError", "read", "unavailable"]
