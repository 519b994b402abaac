"""The picture of a sparse network's training."""

from __future__ import annotations

import os

from lightning_distopt.figures import BLUE, ORANGE, tidy
from lightning_distopt.sparsity.statistics import SparsityHistory

_NAMES = 32


def draw_sparsity(history: SparsityHistory, path: str | os.PathLike[str]) -> None:
    """Draw the sparsity of each layer over training as a heat-map, and below it the weights that came back and went.

    Args:
        history: with one record at least.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure

    names, steps = list(history.sizes), history.steps
    total = sum(history.sizes.values())
    figure = Figure(figsize=(7.2, 2.6 + 0.16 * min(len(names), _NAMES)), layout="constrained")
    upper, lower = figure.subplots(2, 1, sharex=True, height_ratios=[0.16 * min(len(names), _NAMES) + 0.4, 1.6])

    # A record is what holds until the next one.
    width = steps[-1] - steps[-2] if len(steps) > 1 else 1
    edges = [*steps, steps[-1] + max(1, width)]
    rows = [list(row) for row in zip(*history.sparsity, strict=True)]
    image = upper.pcolormesh(edges, range(len(names) + 1), rows, cmap="viridis", vmin=0, vmax=1, rasterized=True)
    every = -(-len(names) // _NAMES)
    upper.set_yticks([k + 0.5 for k in range(0, len(names), every)], names[::every], fontsize=6)
    upper.invert_yaxis()
    figure.colorbar(image, ax=upper, label="sparsity", pad=0.01)

    for values, label, color in ((history.killed, "pruned", ORANGE), (history.regrown, "regrown", BLUE)):
        lower.plot(steps, [100 * n / total for n in values], color=color, marker=".", markersize=3, label=label)
    lower.set_yscale("symlog", linthresh=0.01)
    lower.set_ylim(bottom=0)
    lower.set(xlabel="optimizer step", ylabel="% of weights")
    lower.legend(frameon=False)
    tidy(lower)
    figure.savefig(path, format="png", dpi=150)
