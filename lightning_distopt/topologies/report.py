"""`lightning-distopt topology`: what a topology costs and how fast replicas agree on it, as text and as a figure."""

from __future__ import annotations

import ast
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lightning_distopt.figures import BLUE, COLORS, ORANGE, tidy, write_file
from lightning_distopt.topologies.make import make
from lightning_distopt.topologies.static import BinaryTree, Grid, SocialNetwork, Star, Torus
from lightning_distopt.topologies.topology import Topology

__all__ = ["consensus_curve", "steps_to_agree", "topology"]

_TOLERANCE = 1e-3
_MATCHINGS_DRAWN = 3


def topology(name: str, replicas: int = 8, parameters: int = 1_000_000, steps: int = 50, output: str = "topology.png") -> None:
    """Show what a topology costs, how fast replicas agree on it, and how it looks.

    Prints degree, spectral gap, contraction, period and bytes, and draws the graph beside the consensus distance over gossip
    steps, where replicas start from uniform numbers in [0, 10].

    Example:
        >>> topology("ring", replicas=16)  # doctest: +SKIP

    Args:
        name: A topology, such as `ring`, `torus:4` or `random_matching:7`; `lightning-distopt topologies` lists them. Or edges,
            such as `[[0, 1], [1, 2]]`, or a matrix.
        replicas: How many there are, at least 2.
        parameters: Of the model, in float32: what a message holds.
        steps: Gossip steps to draw.
        output: The figure, a PNG file.

    Raises:
        ValueError: If there is no such topology, or not with so many replicas.
    """
    if replicas < 2:
        raise ValueError(f"--replicas must be at least 2, so that there is something to agree on; got {replicas}.")
    if steps < 1 or parameters < 1:
        raise ValueError(f"--steps and --parameters must be at least 1; got {steps} and {parameters}.")
    chosen = make(_read(name), replicas)
    print(_text(chosen, parameters))
    write_file(output, lambda path: _draw(chosen, steps, path))


def _read(name: str) -> Any:
    """Return edges or a matrix from how they are written in Python or JSON; anything else as it is."""
    try:
        return ast.literal_eval(name.strip()) if name.lstrip().startswith(("[", "(")) else name
    except (ValueError, SyntaxError):
        raise ValueError(f"Edges are written as '[[0, 1], [1, 2]]', and a matrix as its rows; got {name!r}.") from None


def consensus_curve(topology: Topology, steps: int) -> list[float]:
    r"""Return the consensus distance after `0, 1, ..., steps` gossip steps of the thesis's average consensus problem.

    $$ X_{t+1} = W_t X_t, \qquad \Xi_t = \sqrt{\tfrac1n \sum_i (x_i - \bar x)^2}, \qquad x_i \sim U[0, 10] $$

    The root mean square over 100 such problems, the same ones in every call.

    Example:
        >>> from lightning_distopt.topologies import OnePeerExponential
        >>> consensus_curve(OnePeerExponential(4), 2)
        [2.5, 1.4, 0.0]

    Args:
        topology: with doubly stochastic matrices.
        steps: gossip steps.
    """
    x = _start(topology)
    curve = [_distance(x)]
    for t in range(steps):
        x = topology.matrix(t) @ x
        curve.append(_distance(x))
    return curve


def steps_to_agree(topology: Topology, tolerance: float = _TOLERANCE) -> int:
    """Return after how many gossip steps the consensus distance is `tolerance` times that of the start.

    Example:
        >>> from lightning_distopt.topologies import OnePeerExponential, Ring
        >>> steps_to_agree(Ring(16)), steps_to_agree(OnePeerExponential(16))
        (112, 4)

    Args:
        topology: with doubly stochastic matrices on which replicas come to agree.
        tolerance: a small positive number.
    """
    x = _start(topology)
    target = tolerance * _distance(x)
    done = 0
    if topology.period is not None:
        product = topology.matrix(0)
        for t in range(1, topology.period):
            product = topology.matrix(t) @ product
        powers = [product]  # of a whole period: P, P^2, P^4, ..., for a long ring takes a hundred thousand steps
        while _distance(powers[-1] @ x) > target:
            powers.append(powers[-1] @ powers[-1])
        for k, power in reversed(list(enumerate(powers))):
            if _distance(power @ x) > target:
                x = power @ x
                done += 2**k * topology.period
    while _distance(x) > target:
        x = topology.matrix(done) @ x
        done += 1
    return done


def _start(topology: Topology) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    x = 10 * torch.rand(topology.num_replicas, 100, generator=generator, dtype=torch.float64)
    return x - x.mean(dim=0)


def _distance(x: Tensor) -> float:
    return float((x - x.mean(dim=0)).square().mean().sqrt())


def _bound(topology: Topology, steps: int) -> list[float]:
    """Return the share of the consensus distance that is left after each step, by `contraction`: whole periods count."""
    period = topology.period or 1
    return [math.sqrt(1 - topology.contraction) ** (t // period * period) for t in range(steps + 1)]


# ---------------------------------------------------------------------------------------------------------------- text


def _text(topology: Topology, parameters: int) -> str:
    n = topology.num_replicas
    mean, busiest = topology.bytes_per_step(4 * parameters)
    degree, largest = topology.bytes_per_step(1)
    if topology.static:
        period = "1, static"
    else:
        period = f"{topology.period} steps" if topology.period is not None else "none, drawn anew for every step"
    exact = topology.contraction == 1
    unit = "of the squared consensus distance per step, at least"
    if exact:
        unit = "a step averages exactly" if topology.static else f"{topology.period} steps average exactly"
    elif topology.period is None:
        unit = "of the squared consensus distance per step, in expectation"
    elif not topology.static:
        unit = f"of the squared consensus distance per step, over {topology.period} steps"
    source = max(range(n), key=topology.steps_to_reach_all)
    lines = [
        ("degree", f"{degree:.4g} messages sent per step; busiest replica {largest:.4g}, in one step {topology.max_degree}"),
        ("period", f"{period}; {'symmetric' if topology.symmetric else 'directed'}"),
        ("spectral gap", f"{topology.spectral_gap:.4g}" if topology.static else "none: varies over time"),
        ("contraction", f"{topology.contraction:.4g} ({unit})"),
        ("reaches all", f"{topology.steps_to_reach_all(source)} steps bring what any replica knows to all"),
        ("agreement", f"{steps_to_agree(topology):,} steps take the consensus distance to 1/1000 of the start"),
        ("bytes per step", f"{_bytes(mean)} mean, {_bytes(busiest)} busiest, for {parameters:,} parameters in float32"),
        ("all-reduce", f"{_bytes(8 * parameters * (n - 1) / n)} by each replica, for comparison"),
    ]
    return "\n".join([repr(topology), *(f"  {name:16}{value}" for name, value in lines)])


def _bytes(count: float) -> str:
    power = min(3, int(math.log10(max(count, 1)) / 3))
    return f"{count / 1000**power:.4g} {('B', 'kB', 'MB', 'GB')[power]}"


# -------------------------------------------------------------------------------------------------------------- figure


def _draw(topology: Topology, steps: int, path: Path) -> None:
    from matplotlib.figure import Figure
    from matplotlib.ticker import LogLocator, MaxNLocator

    figure = Figure(figsize=(10, 4.8), layout="constrained")
    left, right = figure.subplots(1, 2, width_ratios=(1, 1.15))
    _draw_graph(topology, left)

    curve = consensus_curve(topology, steps)
    kind = "bound, in expectation" if topology.period is None else "bound by the contraction"
    left_over = [value for value in curve if value > 1e-6 * curve[0]]
    bottom = min(left_over[-1], _TOLERANCE * curve[0]) / 3
    exact = next((t for t, value in enumerate(curve) if value < 1e-12 * curve[0]), steps + 1)
    label = (
        "measured" if exact > steps or topology.contraction < 1 else f"measured: exact after {exact} step{'s' * (exact > 1)}"
    )
    right.axhline(_TOLERANCE * curve[0], color="#777777", linewidth=1.2, linestyle=":", label="1/1000 of the start")
    for values, style in (
        ([curve[0] * share for share in _bound(topology, steps)], {"linestyle": "--", "color": ORANGE, "label": kind}),
        (curve, {"marker": "o" if steps <= 60 else None, "markersize": 3.2, "color": BLUE, "label": label}),
    ):
        right.plot([max(value, bottom / 10) for value in values], linewidth=1.6, **style)  # a logarithm has no zero
    right.set(yscale="log", xlabel="gossip step", ylabel="consensus distance", title="Average consensus, $x_i \\sim U[0, 10]$")
    right.set_ylim(bottom, 2 * curve[0])
    right.set_xlim(0, min(steps, max(8, 2 * exact)))
    right.yaxis.set_major_locator(LogLocator(numticks=10))
    right.xaxis.set_major_locator(MaxNLocator(integer=True))
    tidy(right)
    right.legend(frameon=False, loc="best")
    figure.savefig(path, format="png", dpi=150)


def _draw_graph(topology: Topology, axes: Any) -> None:
    import networkx as nx

    n = topology.num_replicas
    positions = _positions(topology)
    shown = range(topology.period if topology.period is not None else _MATCHINGS_DRAWN)
    crowded = n > 40
    nodes = nx.empty_graph(n)
    size = 420 if n <= 20 else 120 if not crowded else max(4, 6000 / n)
    for t in shown:
        color = COLORS[t % len(COLORS)] if len(shown) > 1 else "#7f8c9a"
        edges: Any = nx.DiGraph() if not topology.symmetric else nx.Graph()
        edges.add_nodes_from(range(n))
        edges.add_edges_from((i, j) for i in range(n) for j in topology.listeners(i, t))
        style: dict[str, Any] = {"edge_color": color, "alpha": 0.85, "width": 0.6 if crowded else 1.4}
        if not topology.symmetric and not crowded:
            style |= {"arrows": True, "arrowstyle": "-|>", "arrowsize": 9}
        else:
            style["arrows"] = False  # lines are drawn much faster than arrows
        inside = [edge for edge in edges.edges() if not _around(topology, edge)]
        nx.draw_networkx_edges(edges, positions, edgelist=inside, ax=axes, node_size=size, **style)
        for i, j in edges.edges():
            if _around(topology, (i, j)):  # half a step out of the picture, at both ends
                for (x, y), (x_other, y_other) in ((positions[i], positions[j]), (positions[j], positions[i])):
                    out = [x + 0.55 * _sign(x - x_other)], [y + 0.55 * _sign(y - y_other)]
                    axes.plot([x, *out[0]], [y, *out[1]], ":", color=color, linewidth=1.4, zorder=0)
    nx.draw_networkx_nodes(nodes, positions, ax=axes, node_size=size, node_color="white", edgecolors="#222222", linewidths=1.1)
    if not crowded:
        nx.draw_networkx_labels(nodes, positions, ax=axes, font_size=9 if n <= 20 else 6)
    axes.set_axis_off()
    axes.margins(0.12)
    axes.set_aspect("equal", adjustable="datalim")
    if len(shown) > 1:
        from matplotlib.lines import Line2D

        lines = [Line2D([], [], color=COLORS[t % len(COLORS)], linewidth=2, label=str(t)) for t in shown]
        more = "step" if topology.period is None else f"step mod {topology.period}"
        axes.legend(
            handles=lines, title=more, loc="upper center", bbox_to_anchor=(0.5, 0.0), ncols=len(shown), frameon=False,
            handlelength=1.2, columnspacing=1.2,
        )  # fmt: skip
    axes.set_title(repr(topology))


def _around(topology: Topology, edge: tuple[int, int]) -> bool:
    """Return whether an edge of a torus joins opposite sides."""
    distance = abs(edge[0] - edge[1])
    return isinstance(topology, Torus) and distance not in (1, topology.columns)


def _sign(value: float) -> int:
    return (value > 0) - (value < 0)


def _positions(topology: Topology) -> dict[int, tuple[float, float]]:
    """Return where to draw each replica: by what it is, or clockwise on a circle from the top on."""
    n = topology.num_replicas
    if isinstance(topology, Torus | Grid):
        return {i: (float(i % topology.columns), -float(i // topology.columns)) for i in range(n)}
    if isinstance(topology, BinaryTree):
        levels = [(i + 1).bit_length() - 1 for i in range(n)]
        height = 2 ** levels[-1]
        return {i: ((i + 1.5 - 2**k) * height / 2**k, -k * height / 4) for i, k in enumerate(levels)}
    if isinstance(topology, SocialNetwork):
        return {i: (0.0, -i / 17) if i < 18 else (1.0, -(i - 18) / 13) for i in range(n)}
    circle = range(1, n) if isinstance(topology, Star) else range(n)
    angles = {i: 2 * math.pi * k / len(circle) for k, i in enumerate(circle)}
    return {0: (0.0, 0.0), **{i: (math.sin(angle), math.cos(angle)) for i, angle in angles.items()}}
