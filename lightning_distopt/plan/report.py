"""`lightning-distopt plan`: what a step of each strategy takes on a user's cluster, as text and as a figure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from lightning_distopt.figures import AMBER, BLACK, BLUE, GREEN, ORANGE, PURPLE, SKY, tidy, write_file
from lightning_distopt.plan.costs import Costs
from lightning_distopt.plan.model import bytes_per_step, enough, time_per_round, time_per_step
from lightning_distopt.plan.settings import Cluster, Method, Workload

__all__ = ["Row", "methods", "plan", "rows"]

TOLERANCE = 0.05
"""Share of the computing that communication may take and hardly matters."""

_ALIKE = 1.02  # times that are called equal
_ALL_REDUCE = Method("local_sgd")
_LARGEST = 10_000
_COLORS = (BLACK, ORANGE, AMBER, BLUE, SKY, GREEN, PURPLE)
_COMPRESSORS = {"sign": "signs", "qsgd:4": "4 bits", "top_k:0.01": "top 1 %"}
_GRAPHS = {"one_peer_exponential": "one peer", "ring": "ring"}


def plan(
    replicas: int = 8,
    parameters: float = 25e6,
    step: float = 100.0,
    bandwidth: float = 1000.0,
    latency: float = 0.1,
    clusters: int = 1,
    across: float | None = None,
    across_latency: float | None = None,
    bytes_per_parameter: int = 4,
    output: str = "plan.png",
) -> None:
    """Show what a training step takes on a cluster with each strategy, and which to choose.

    Prints for each strategy the bytes that a replica sends per step, the time of a round's communication, the expected time of
    a step, its speed relative to an all-reduce at every step, and the number of local steps from which communication hardly
    matters. Draws the time of a step over the number of replicas and over the bandwidth.

    Example:
        >>> plan(replicas=64, step=50, bandwidth=100)  # doctest: +SKIP

    Args:
        replicas: How many there are.
        parameters: How many of the model are trained, such as `25e6`.
        step: Time that a replica computes in a step, without communication, in ms.
        bandwidth: Of a replica's port, in Mbit/s.
        latency: Of a message, in ms.
        clusters: Groups of replicas of the same size, with slower links between them.
        across: Rate at which a replica reaches other clusters, in Mbit/s.
        across_latency: Of a message between clusters, in ms.
        bytes_per_parameter: 2, 4 or 8, as parameters are kept.
        output: The figure, a PNG file.

    Raises:
        ValueError: If one of these is out of range.
    """
    if not (math.isfinite(parameters) and parameters == int(parameters)):
        raise ValueError(f"`parameters` must be a whole number, at least 1; got {parameters!r}.")
    # In the units of the options, which are not those of `Cluster` and `Workload`.
    for name, unit, value in (("step", "ms", step), ("bandwidth", "Mbit/s", bandwidth), ("across", "Mbit/s", across)):
        if value is not None and not value > 0:
            raise ValueError(f"`{name}` must be above 0 {unit}; got {value:g}.")
    for name, value in (("latency", latency), ("across_latency", across_latency)):
        if value is not None and not 0 <= value < math.inf:
            raise ValueError(f"`{name}` must be 0 ms or more, and finite; got {value:g}.")
    mega = None if across is None else 1e6 * across
    milli = None if across_latency is None else across_latency / 1000
    cluster = Cluster(replicas, 1e6 * bandwidth, latency / 1000, clusters, mega, milli)
    workload = Workload(int(parameters), step / 1000, bytes_per_parameter)
    costs = Costs.read()
    table = rows(cluster, workload, costs)
    print(_text(table, cluster, workload))
    write_file(output, lambda path: _draw(cluster, workload, costs, path))


def methods(clusters: int = 1) -> dict[str, Method]:
    """Return the methods to compare by what they are called; hierarchical ones where there are clusters.

    Example:
        >>> list(methods())[:3]
        ['all-reduce at every step (DDP)', 'local SGD, H = 2', 'local SGD, H = 4']

    Args:
        clusters: groups of replicas.
    """
    chosen = {"all-reduce at every step (DDP)": _ALL_REDUCE}
    chosen |= {f"local SGD, H = {H}": Method("local_sgd", H) for H in (2, 4, 8, 16, 32, 64)}
    if clusters > 1:
        chosen["DDP in clusters, all every 16 steps"] = Method("local_sgd", 1, block_period=16)
        chosen["H = 4 in clusters, all every 16 steps"] = Method("local_sgd", 4, block_period=4)
    for graph, name in _GRAPHS.items():
        for overlap in (False, True):
            chosen[f"D-PSGD, {name}{', overlapped' * overlap}"] = Method("dpsgd", topology=graph, overlap=overlap)
    for compressor, name in _COMPRESSORS.items():
        for overlap in (False, True):
            label = f"CHOCO, {name}, ring{', overlapped' * overlap}"
            chosen[label] = Method("choco", topology="ring", compressor=compressor, overlap=overlap)
    chosen["EF-sign, all-gather"] = Method("ef_sign", compressor="sign")
    return chosen


class Row(NamedTuple):
    """A method on a cluster.

    Args:
        name, method: which.
        sent: bytes that a replica sends per step, in the mean.
        round: seconds of communication in a round.
        step: expected seconds of a step.
        speed: steps per second, relative to an all-reduce at every step.
        enough: local steps from which communication hardly matters; None where the method can't make any.
    """

    name: str
    method: Method
    sent: float
    round: float
    step: float
    speed: float
    enough: int | None


def rows(cluster: Cluster, workload: Workload, costs: Costs) -> list[Row]:
    """Return what each of the methods takes.

    Example:
        >>> table = rows(Cluster(8, bandwidth=1e9), Workload(25_000_000, step_seconds=0.1), Costs.read())
        >>> table[1].name, table[1].sent  # half an all-reduce of 100 MB
        ('local SGD, H = 2', 87500000.0)

    Args:
        cluster: the replicas.
        workload: what they train.
        costs: the constants.
    """
    reference = time_per_step(_ALL_REDUCE, cluster, workload, costs)
    table = []
    for name, method in methods(cluster.clusters).items():
        method = replace(method, block_size=cluster.group) if method.blocks else method
        step = time_per_step(method, cluster, workload, costs)
        sent, seconds = bytes_per_step(method, cluster, workload), time_per_round(method, cluster, workload, costs)
        steps = enough(method, cluster, workload, costs, TOLERANCE)
        table.append(Row(name, method, sent, seconds, step, reference / step, steps))
    return table


# ------------------------------------------------------------------------------------------------------------------- text


def _text(table: Sequence[Row], cluster: Cluster, workload: Workload) -> str:
    links = f"{_rate(cluster.bandwidth)}, {_seconds(cluster.latency)}"
    if cluster.clusters > 1:
        across = f"{_rate(cluster.bandwidth_between(True))}, {_seconds(cluster.latency_between(True))}"
        links = f"{cluster.clusters} clusters of {cluster.group}: {links} inside, {across} across"
    model = f"{workload.parameters:,} parameters ({_bytes(workload.row_bytes)})"
    lines = [
        f"{cluster.replicas:,} replica{'s' * (cluster.replicas > 1)}; {links}",
        f"{model}; {_seconds(workload.step_seconds)} of computing a step",
        "",
    ]
    width = max(len(row.name) for row in table) + 2
    lines.append(f"  {'':{width}}{'sent a step':>11}{'round':>11}{'step':>11}{'speed':>9}{'H for 5 %':>12}")
    for row in table:
        steps = "-" if row.enough is None else f"{row.enough:,}"
        speed = f"{row.speed:.3g}x" if row.speed < 1000 else f"{row.speed:,.0f}x"
        times = f"{_bytes(row.sent):>11}{_seconds(row.round):>11}{_seconds(row.step):>11}"
        lines.append(f"  {row.name:{width}}{times}{speed:>9}{steps:>12}")
    return "\n".join([*lines, "", *_advice(table, workload), "", _LEFT_OUT])


_LEFT_OUT = """\
Speed is steps per second relative to the first line; H for 5 % is the number of local steps from which a step takes
at most 5 % more than its computing. Not in it is accuracy: fewer rounds, sparser graphs and compression may need more
steps to the same (docs/results). Nor are replicas that are slower than others, and other traffic on the links."""


def _advice(table: Sequence[Row], workload: Workload) -> list[str]:
    """Return what to choose, with local steps and without; of what takes about as long, the plainest."""
    reference = table[0]
    times = reference.step / workload.step_seconds
    if reference.enough == 1:
        return [
            "Communication hardly matters here: use Lightning's DDP.",
            f"With an all-reduce at every step, a step takes {times:.3f} times its computing.",
        ]
    lines = [f"With an all-reduce at every step, a step takes {times:.3g} times its computing."]
    with_local_steps = [(row, row.enough) for row in table if row.enough is not None and not row.method.blocks]
    every_step = [row for row in table if row.method.sync_period == 1 and not row.method.blocks]
    fastest, _ = _plainest([(row, row.step) for row in every_step])
    soonest, H = _plainest(with_local_steps)
    averaging = f"from H = {reference.enough:,} on" if reference.enough is not None else "with no H"
    lines.append(f"With local SGD communication stops mattering {averaging}.")
    if H != 1 and soonest is not reference:
        lines.append(f"It does so soonest with {soonest.name}, from H = {H:,} on:")
        lines.append(f"    {replace(soonest.method, sync_period=H).code}")
    if fastest is reference:
        lines.append("With a round at every step nothing is faster.")
    else:
        hidden = " and hides communication" if fastest.enough == 1 else ""
        lines.append(f"With a round at every step, {fastest.name} is the fastest{hidden} ({fastest.speed:.3g}x):")
        lines.append(f"    {fastest.method.code}")
    if blocks := [(row, row.step) for row in table if row.method.blocks]:
        inside, _ = _plainest(blocks)
        lines.append(f"Where clusters average among themselves, {inside.name} is the fastest ({inside.speed:.3g}x):")
        lines.append(f"    {inside.method.code}")
    return lines


def _plainest(values: Sequence[tuple[Row, float]]) -> tuple[Row, Any]:
    """Return the first row whose value is about the least, and the value."""
    least = min(value for _, value in values)
    return next((row, value) for row, value in values if value <= _ALIKE * least)


def _bytes(count: float) -> str:
    power = min(4, int(math.log10(max(count, 1)) / 3))
    return f"{count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB', 'TB')[power]}"


def _seconds(seconds: float) -> str:
    for factor, unit in ((1, "s"), (1e3, "ms")):
        if seconds * factor >= {"s": 0.9995, "ms": 0.0995}[unit]:
            return f"{seconds * factor:,.0f} {unit}" if seconds * factor >= 999.5 else f"{seconds * factor:.3g} {unit}"
    return f"{1e6 * seconds:.3g} us" if seconds else "0 s"


def _rate(bandwidth: float) -> str:
    return f"{bandwidth / 1e6:,.6g} Mbit/s"


# ----------------------------------------------------------------------------------------------------------------- figure


def _draw(cluster: Cluster, workload: Workload, costs: Costs, path: Path) -> None:
    from matplotlib.figure import Figure

    several = cluster.clusters > 1
    lines = {
        "all-reduce at every step": _ALL_REDUCE,
        "local SGD, H = 16": Method("local_sgd", 16),
        "D-PSGD, ring": Method("dpsgd", topology="ring"),
        "D-PSGD, one peer, overlapped": Method("dpsgd", topology="one_peer_exponential", overlap=True),
        "CHOCO, signs, ring, overlapped": Method("choco", topology="ring", compressor="sign", overlap=True),
        "EF-sign, all-gather": Method("ef_sign", compressor="sign"),
    }
    if several:
        lines["DDP in clusters, all every 16 steps"] = Method("local_sgd", 1, block_period=16)
    k, largest = cluster.clusters, max(_LARGEST, cluster.replicas)
    sizes = sorted({k * max(1, round(n / k)) for n in np.geomspace(2, largest, 33)} - {1})
    own = cluster.bandwidth_between(several) / 1e6
    rates = [float(rate) for rate in np.geomspace(min(1.0, own), max(1e4, own), 51)] if math.isfinite(own) else [1.0, 1e4]
    over_rate = [replace(cluster, across=1e6 * r) if several else replace(cluster, bandwidth=1e6 * r) for r in rates]

    figure = Figure(figsize=(10, 5), layout="constrained")
    left, right = figure.subplots(1, 2, sharey=True)
    over_n = [replace(cluster, replicas=n) for n in sizes]
    for axes, x, clusters, at in ((left, sizes, over_n, cluster.replicas), (right, rates, over_rate, own)):
        axes.axhline(workload.step_seconds, color="#777777", linewidth=1.2, linestyle=":", label="computing alone")
        axes.axvline(at, color="#bbbbbb", linewidth=1.0, zorder=0, label="this cluster")
        for color, (name, method) in zip(_COLORS, lines.items(), strict=False):
            times = [time_per_step(method, each, workload, costs) for each in clusters]
            axes.plot(x, times, color=color, linewidth=1.8, linestyle="--" if method.overlap else "-", label=name)
        axes.set(xscale="log", yscale="log", xlim=(x[0], x[-1]))
        axes.xaxis.set_major_formatter("{x:,.0f}")
        axes.yaxis.set_major_formatter(lambda seconds, _: f"{seconds:,.12g}")
        tidy(axes)
    across = f" inside, {_rate(cluster.bandwidth_between(True))} across" * several
    kind = "between clusters" if several else "of a replica's port"
    left.set(xlabel="replicas", ylabel="time of a step [s]", title=f"Links of {_rate(cluster.bandwidth)}{across}")
    right.set(xlabel=f"bandwidth {kind} [Mbit/s]", title=f"{cluster.replicas:,} replicas" + f" in {k} clusters" * several)
    figure.suptitle(f"{_bytes(workload.row_bytes)} of parameters, {_seconds(workload.step_seconds)} of computing a step")
    figure.legend(*left.get_legend_handles_labels(), loc="outside lower center", ncols=3, frameon=False)
    figure.savefig(path, format="png", dpi=150)
