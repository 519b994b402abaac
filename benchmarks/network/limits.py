"""Rates of links as `tc` sets them: `tbf` for a port with one rate, `htb` where the rate depends on the peer."""

from __future__ import annotations

import re

FRAME = 1514
"""Bytes of a full Ethernet frame: the headers of the link, and 1500 more."""

_UNITS = {"bit": 1, "kbit": 10**3, "mbit": 10**6, "gbit": 10**9}


def bits_per_second(rate: str) -> int:
    """Return what a rate such as "100mbit" means.

    Example:
        >>> bits_per_second("2.5gbit")
        2500000000

    Raises:
        ValueError: if it is none.
    """
    match = re.fullmatch(r"(\d+(?:\.\d+)?)(bit|kbit|mbit|gbit)", rate)
    bits = round(float(match[1]) * _UNITS[match[2]]) if match else 0
    if not bits:
        raise ValueError(f"{rate!r} is not a rate: write a positive number and one of {', '.join(_UNITS)}, as in '100mbit'.")
    return bits


def burst(bits: int) -> int:
    """Return the bytes that a link takes at once after a pause: those of a millisecond, and no fewer than two frames.

    A message gets ahead of its rate by so much, so it must be little. Far less than a millisecond would make a link
    slower than its rate, since a waiting packet is sent when a timer fires.

    Example:
        >>> burst(10**8), burst(10**6)
        (12500, 3028)
    """
    return max(bits // 8000, 2 * FRAME)


def one_rate(device: str, parent: str, rate: str) -> list[str]:
    """Return lines for `tc -batch` that limit all that leaves a device.

    Args:
        device: the interface.
        parent: where the limit is attached: "root", or "parent" with a handle.
        rate: of the link.
    """
    bits = bits_per_second(rate)
    return [f"qdisc add dev {device} {parent} handle 10: tbf rate {bits}bit burst {burst(bits)} latency 100ms"]


def two_rates(device: str, parent: str, inside: str, across: str, match: str) -> list[str]:
    """Return lines for `tc -batch` that limit what leaves a device, by its address.

    Args:
        device: the interface.
        parent: where the limit is attached: "root", or "parent" with a handle.
        inside: the rate of packets that match.
        across: the rate of all others.
        match: in the words of the filter `u32`, such as "ip dst 198.18.0.0/24".
    """
    lines = [f"qdisc add dev {device} {parent} handle 10: htb default 2"]
    for number, rate in ((1, inside), (2, across)):
        bits = bits_per_second(rate)
        b = burst(bits)
        lines += [
            f"class add dev {device} parent 10: classid 10:{number} htb rate {bits}bit burst {b} cburst {b} quantum {FRAME}",
            f"qdisc add dev {device} parent 10:{number} handle {10 + number}: bfifo limit {bits // 80 + b}",  # 100 ms
        ]
    return [*lines, f"filter add dev {device} parent 10: protocol ip prio 1 u32 match {match} flowid 10:1"]
