"""What pictures have in common, and what is said where they can't be drawn."""

from __future__ import annotations

import os
import textwrap
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from lightning_distopt.files import check_file

if TYPE_CHECKING:
    from matplotlib.axes import Axes

BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK = "#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000"
COLORS = (BLUE, ORANGE, GREEN, PURPLE, AMBER, SKY, BLACK)
"""Those of Okabe and Ito, which colour-blind readers can tell apart."""


def tidy(axes: Axes) -> None:
    """Leave axes open above and to the right, on a light grid."""
    axes.spines[["top", "right"]].set_visible(False)
    axes.grid(alpha=0.3, linewidth=0.5)


def draw_curves(axes: Axes, x: np.ndarray, curves: np.ndarray, color: str, label: str = "", style: str = "-") -> None:
    """Draw the mean of curves `[n, points]` and the band they lie in, which the title says; crosses where one is no number."""
    good = np.isfinite(curves).all(axis=0)
    low, mean, high = np.full((3, len(x)), np.nan)
    shown = curves[:, good]
    low[good], mean[good], high[good] = shown.min(axis=0), shown.mean(axis=0), shown.max(axis=0)
    axes.plot(x, mean, style, color=color, marker=".", label=label)
    if len(curves) > 1:
        axes.fill_between(x, low, high, color=color, alpha=0.2, linewidth=0)
        axes.set_title(f"mean of {len(curves)} lines, in a band from min to max", fontsize=8)
    if not good.all():
        axes.plot(x[~good], np.ones((~good).sum()), "x", color=color, transform=axes.get_xaxis_transform(), clip_on=False)


def dress(axes: Axes, xlabel: str, ylabel: str, logarithmic: bool = False) -> None:
    """Label axes in the manner of all pictures; values that are positive and far apart may be drawn in a logarithmic scale."""
    lines = [line for line in axes.lines if line.get_transform().contains_branch(axes.transData)]  # not the crosses
    values = np.concatenate([np.asarray(line.get_ydata(), dtype=float) for line in lines])
    values = values[np.isfinite(values)]
    if logarithmic and len(values) and values.max() > 30 * values.min() > 0:
        axes.set_yscale("log")
    axes.set(xlabel=xlabel, ylabel=ylabel)
    tidy(axes)


def between_models(what: str, models: Sequence[str]) -> str:
    """Return a label for an axis that leads from one model to another, or to several, at 0 and at 1.

    Example:
        >>> between_models("position", ["large", "post_local"]), between_models("t", [])
        ('position (0: large, 1: post_local)', 't (0: x_0, 1: x_1)')
        >>> between_models("position", ["large", "small", "post_local"])
        'position (0: large, 1: the others)'

    Args:
        what: is on the axis.
        models: their names, the first at 0; empty, if they have none.
    """
    first, *others = models or ["x_0", "x_1"]
    return textwrap.fill(f"{what} (0: {first}, 1: {others[0] if len(others) == 1 else 'the others'})", 44)


def lacking(error: ModuleNotFoundError, what: str = "No figure") -> str:
    """Return a sentence on what there is not, because a package is missing.

    Example:
        >>> lacking(ModuleNotFoundError(name="matplotlib"))
        "No figure without matplotlib: pip install 'lightning-distopt[plot]'"

    Args:
        error: that says which.
        what: there is not.
    """
    return f"{what} without {error.name}: pip install 'lightning-distopt[plot]'"


def write_file(path: str | os.PathLike[str], write: Callable[[Path], Any]) -> None:
    """Let a command write a file, and print which, or the package that is missing to draw it.

    Example:
        >>> import tempfile
        >>> with tempfile.TemporaryDirectory() as folder:
        ...     write_file(f"{folder}/new/graph.png", lambda path: path.touch())
        Written: .../new/graph.png

    Args:
        path: of the file, whose folder is made where there is none.
        write: gets the path.

    Raises:
        ValueError: if no file can have that path.
    """
    path = Path(check_file("output", path))
    path.parent.mkdir(parents=True, exist_ok=True)
    try:
        write(path)
    except ModuleNotFoundError as error:
        print(lacking(error))
    else:
        print(f"Written: {path}")
