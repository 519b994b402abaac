"""What went through an interface, as the kernel counts it."""

from __future__ import annotations

from pathlib import Path
from typing import NamedTuple

HEADERS = 14 + 20 + 32
"""Bytes of the headers of a packet: Ethernet, IPv4, TCP with time stamps."""


class Counters(NamedTuple):
    """Bytes and packets that an interface has sent and received.

    Linux hands a link of this kind large packets, which a network card would cut into frames. It counts such a packet as
    one, with its headers once. Hence bytes less 66 for each packet are the payload to the byte, however large packets
    are; only packets that set up connections or report losses have some more of headers, and those that ask for an
    address are 24 bytes shorter.

    Example:
        >>> before, after = Counters(0, 0, 1000, 10), Counters(65226, 1, 1528, 18)
        >>> (after - before).payload_sent
        65160
    """

    bytes_sent: int
    packets_sent: int
    bytes_received: int
    packets_received: int

    def __sub__(self, other: Counters) -> Counters:
        return Counters(*(a - b for a, b in zip(self, other, strict=True)))

    @property
    def payload_sent(self) -> int:
        """Bytes sent less protocol headers."""
        return self.bytes_sent - HEADERS * self.packets_sent

    @property
    def payload_received(self) -> int:
        """Bytes received less protocol headers."""
        return self.bytes_received - HEADERS * self.packets_received


def read(process: str = "/proc/self") -> dict[str, Counters]:
    """Return the counters of all interfaces in the network namespace of a process, by name: a rank's is `eth0`.

    Args:
        process: its folder.
    """
    found = {}
    for line in Path(process, "net", "dev").read_text().splitlines()[2:]:
        name, _, values = line.partition(":")
        received, received_packets, *rest = map(int, values.split())
        found[name.strip()] = Counters(rest[6], rest[7], received, received_packets)
    return found
