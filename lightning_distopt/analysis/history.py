"""Numbers over training."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import TYPE_CHECKING

import numpy as np

from lightning_distopt.analysis.result import Result
from lightning_distopt.figures import BLUE, COLORS, tidy

if TYPE_CHECKING:
    from matplotlib.figure import Figure


@dataclass
class History(Result):
    """Numbers that were measured again and again.

    Example:
        >>> History(np.array([0, 8]), {"top": [2.0, 1.5], "bottom": [-1.0, -0.5]}).numbers()
        {'top': 1.5, 'bottom': -0.5}

    Args:
        step: `[measurements]`, the optimizer steps at which they were.
        values: by name, one for each measurement, NaN where there was none.
        panels: names by the panel of the picture that they are drawn in, with a colour for each data of names such as
            "train/top". By default each number has a panel of its own.
    """

    step: np.ndarray
    values: dict[str, list[float]]
    panels: dict[str, list[str]] = field(default_factory=dict)

    def numbers(self) -> dict[str, float]:
        """Return the last ones."""
        return {name: values[-1] for name, values in self.values.items()}

    def figure(self) -> Figure:
        """Return a picture of the numbers by steps."""
        return self._together() if self.panels else self._one_by_one()

    def _one_by_one(self) -> Figure:
        from matplotlib.figure import Figure

        columns = min(3, len(self.values))
        lines = -(-len(self.values) // columns)
        figure = Figure(figsize=(0.4 + 3.2 * columns, 0.3 + 2.0 * lines), layout="constrained")
        panels = figure.subplots(lines, columns, squeeze=False).flat
        for axes, (name, values) in zip(panels, self.values.items(), strict=False):
            finite = [math.isfinite(value) for value in values]
            axes.plot(self.step[finite], np.array(values)[finite], color=BLUE, marker=".", markersize=3, linewidth=1)
            axes.set_title(name.replace("_", " "), fontsize=9)
            tidy(axes)
        for axes in figure.axes[len(self.values) :]:
            axes.set_visible(False)
        figure.supxlabel("optimizer step", fontsize=9)
        return figure

    def _together(self) -> Figure:
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 0.6 + 2.6 * len(self.panels)), layout="constrained")
        rows = figure.subplots(len(self.panels), 1, sharex=True, squeeze=False)[:, 0]
        of_data = list(dict.fromkeys(name.rpartition("/")[0] for names in self.panels.values() for name in names))
        for axes, (label, names) in zip(rows, self.panels.items(), strict=True):
            kinds = list(dict.fromkeys(name.rpartition("/")[2] for name in names))
            for name in names:
                data, _, kind = name.rpartition("/")
                color, style = COLORS[of_data.index(data) % len(COLORS)], ("-", "--", ":")[kinds.index(kind) % 3]
                text = ", ".join(filter(None, (kind, data)))
                axes.plot(self.step, self.values[name], style, color=color, marker=".", label=text)
            axes.set_ylabel(label)
            axes.legend(frameon=False)
            tidy(axes)
        rows[-1].set_xlabel("optimizer step")
        return figure
