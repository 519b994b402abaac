"""The picture of a federation's rounds."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from typing import Any

from lightning_distopt.figures import BLUE, ORANGE, tidy


def draw_clients(
    history: Sequence[Mapping[str, Any]],
    measure: str,
    monitor: str,
    target: float | None,
    rounds_to_target: int | None,
    path: str | os.PathLike[str],
) -> None:
    """Draw what `ClientMonitor` has noted, as far as there is something to draw.

    Args:
        history: of the rounds.
        measure: what was measured on the clients' data.
        monitor: name of the validation metric.
        target: of it, or None.
        rounds_to_target: when it came to the target, or None.
        path: of the PNG file.
    """
    from matplotlib.figure import Figure
    from matplotlib.ticker import MaxNLocator

    loss = [entry for entry in history if "train_loss" in entry]
    tried = [entry for entry in history if "on_clients" in entry]
    validated = [entry for entry in history if monitor in entry]
    panels = [bool(loss), bool(tried), bool(validated), bool(validated)]
    figure = Figure(figsize=(3.6 * max(1, sum(panels)), 3.2), layout="constrained")
    axes = iter(figure.subplots(1, max(1, sum(panels)), squeeze=False)[0])

    def column(entries: Sequence[Mapping[str, Any]], name: str) -> list[float]:
        return [entry[name] for entry in entries]

    if loss:
        panel, rounds = next(axes), column(loss, "round")
        panel.plot(rounds, column(loss, "train_loss"), color=BLUE, label="mean over clients")
        low, high = column(loss, "train_loss_min"), column(loss, "train_loss_max")
        panel.fill_between(rounds, low, high, color=BLUE, alpha=0.2, linewidth=0, label="least to largest")
        panel.set(xlabel="round", ylabel="train loss of clients")
        panel.legend(frameon=False)
    if tried:
        panel, rounds, name = next(axes), column(tried, "round"), f"client_{measure}"
        means, deviations = column(tried, name), column(tried, f"{name}_std")
        panel.plot(rounds, means, color=BLUE, marker=".", label="mean over clients")
        low, high = ([m + sign * d for m, d in zip(means, deviations, strict=True)] for sign in (-1, 1))
        panel.fill_between(rounds, low, high, color=BLUE, alpha=0.2, linewidth=0, label="standard deviation")
        panel.plot(rounds, column(tried, f"{name}_worst_decile"), color=ORANGE, marker=".", label="worst tenth")
        panel.set(xlabel="round", ylabel=f"{measure} on clients' data")
        panel.legend(frameon=False)
    if validated:
        megabytes = [(entry["bytes_up"] + entry["bytes_down"]) / 1e6 for entry in validated]
        for x, label in ((column(validated, "round"), "round"), (megabytes, "MB up and down")):
            panel = next(axes)
            panel.plot(x, column(validated, monitor), color=BLUE, marker=".")
            if target is not None:
                panel.axhline(target, color="grey", linewidth=0.8, linestyle="--")
            reached = [place for place, entry in zip(x, validated, strict=True) if entry["round"] == rounds_to_target]
            for place in reached:
                panel.axvline(place, color=ORANGE, linewidth=0.8, linestyle="--")
            panel.set(xlabel=label, ylabel=monitor)
    for panel in figure.axes:
        tidy(panel)
        if panel.get_xlabel() == "round":
            panel.xaxis.set_major_locator(MaxNLocator(integer=True))
    figure.savefig(path, format="png", dpi=150)
