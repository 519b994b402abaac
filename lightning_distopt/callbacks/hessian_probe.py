"""The curvature of the loss while training goes on."""

from __future__ import annotations

import importlib.util
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import lightning.pytorch as pl
import numpy as np

from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.operators import CurvatureOperator, Derivatives, Kind
from lightning_distopt.analysis.result import Result
from lightning_distopt.analysis.spectrum import Engine, Spectrum, hessian_spectrum
from lightning_distopt.callbacks.probe import Probe

if TYPE_CHECKING:
    from matplotlib.figure import Figure

_COLORS = ("#0072B2", "#D55E00")
_PACKAGES = {"lobpcg": "scipy", "pyhessian": "pyhessian"}
_LEAST_TRACE = 6  # products that Hutch++ takes at least
_NAMES = ("top", "bottom", "trace")


@dataclass
class Spectra(Result):
    """The spectra on several data, by their names; with one alone its numbers have no prefix."""

    spectra: dict[str, Spectrum]

    def numbers(self) -> dict[str, float]:
        """Return the numbers of all, as `<data>/<name>`."""
        return {
            f"{data}/{name}" if len(self.spectra) > 1 else name: value
            for data, spectrum in self.spectra.items()
            for name, value in spectrum.numbers().items()
        }


@dataclass
class CurvatureHistory(Result):
    """The ends of the spectrum over training, and the trace.

    Attributes:
        steps: `[n]`, optimizer steps.
        values: for each data, `[n]` for each of `top`, `bottom` and `trace` that is known.
    """

    steps: np.ndarray
    values: dict[str, dict[str, list[float]]]

    def figure(self) -> Figure:
        """Return the largest and the smallest eigenvalue over steps; below them the trace, where it is known."""
        from matplotlib.figure import Figure

        panels = [("eigenvalue", {"top": "-", "bottom": "--"}), ("trace", {"trace": "-"})]
        panels = [(label, styles) for label, styles in panels if any(styles.keys() & found for found in self.values.values())]
        figure = Figure(figsize=(6.4, 0.6 + 2.6 * len(panels)), layout="constrained")
        rows = figure.subplots(len(panels), 1, sharex=True, squeeze=False)[:, 0]
        for axes, (label, styles) in zip(rows, panels, strict=True):
            for (data, found), color in zip(self.values.items(), _COLORS, strict=False):
                for name in [name for name in styles if name in found]:
                    style: dict[str, Any] = {
                        "color": color,
                        "linestyle": styles[name],
                        "marker": ".",
                        "label": f"{name}, {data}",
                    }
                    axes.plot(self.steps, found[name], **style)
            axes.set_ylabel(label)
            axes.legend(frameon=False)
            axes.grid(alpha=0.3, linewidth=0.5)
            axes.spines[["top", "right"]].set_visible(False)
        rows[-1].set_xlabel("optimizer step")
        return figure


class HessianProbe(Probe[Spectra]):
    r"""Measure eigenvalues of the loss's Hessian now and then, and its trace and density if asked for.

    $$ H = \nabla^2 f(w), \qquad f(w) = \frac1N \sum_{i=1}^N \ell(w; \xi_i) $$

    It logs `hessian/top` and `hessian/bottom`, the largest and the smallest eigenvalue, `hessian/gradient_norm`,
    `hessian/trace` with its standard error `hessian/trace_error`, and with `per_layer` these of each layer's block, as
    `hessian/<layer>/top`. On several data names begin with theirs, such as `hessian/train/top`. Training ends with a picture of
    the eigenvalues over all of it. Training is bit-identical to training without the probe.

    Example:
        >>> trainer = pl.Trainer(callbacks=[HessianProbe(every=["start", "epoch"], data=["train", "val"], trace=99)])

    Args:
        every: moments to measure at, see `Probe`.
        k: number of eigenvalues: Lanczos finds the larger half of them at the upper end of the spectrum and the others at the
            lower end, LOBPCG all at the upper end, PyHessian those of largest magnitude.
        trace: products with the Hessian to spend on the trace; 0: none.
        density: products to spend on the density, 80 for each random vector; 0: none.
        engine: "lanczos", "lobpcg" or "pyhessian", see `hessian_spectrum`.
        kind: "hessian", or "gauss_newton".
        derivatives: "double_backward", or "finite_differences" where a layer has no second derivative.
        per_layer: whether each layer's block is measured by itself too, or patterns of parameters' names, one for each block.
        tol: relative error of eigenvalues.
        outputs: for Gauss-Newton, name of the submodule whose output the loss is a function of; "": the module itself.
        **options: see `Probe`: `data`, `samples`, `model`, `loss_fn`, `parameters`, `seed`, `save`, `check`, `progress`.

    Raises:
        ValueError: for options that are unknown or make no sense; when training starts, if there is no second derivative.
        ModuleNotFoundError: if the engine is not installed.
        MisconfigurationException: when training starts, see `Probe`.

    References:
        Lin: Optimization for deep learning in distributed and heterogeneous systems, figures 2.5(a) and 11.10.
        Yao et al.: PyHessian: Neural networks through the lens of the Hessian. 2020.
    """

    name = "hessian"

    def __init__(
        self,
        every: str | Sequence[str] = "epoch",
        k: int = 5,
        trace: int = 0,
        density: int = 0,
        engine: Engine = "lanczos",
        kind: Kind = "hessian",
        derivatives: Derivatives = "double_backward",
        per_layer: bool | Sequence[str] = False,
        tol: float = 1e-3,
        outputs: str = "",
        **options: Any,
    ) -> None:
        super().__init__(every, **options)
        if not _whole(k) or k < 1:
            raise ValueError(f"`k` must be a whole number of eigenvalues, at least 1; got {k!r}.")
        if not _whole(trace) or (trace != 0 and trace < _LEAST_TRACE):
            raise ValueError(f"`trace` must be 0, or {_LEAST_TRACE} products or more, such as 99; got {trace!r}.")
        if not _whole(density) or density < 0:
            raise ValueError(f"`density` must be 0, or a number of products such as 400; got {density!r}.")
        if isinstance(tol, bool) or not isinstance(tol, int | float) or not 0 < tol < 1:
            raise ValueError(f"`tol` must be a relative error between 0 and 1, such as 1e-3; got {tol!r}.")
        if isinstance(per_layer, str):
            raise ValueError(f"`per_layer` must be True or a list of patterns; got {per_layer!r}.")
        if engine not in ("lanczos", *_PACKAGES):
            raise ValueError(f"`engine` must be 'lanczos', 'lobpcg' or 'pyhessian'; got {engine!r}.")
        if (package := _PACKAGES.get(engine)) is not None and importlib.util.find_spec(package) is None:
            raise ModuleNotFoundError(f"`engine={engine!r}` needs {package}: pip install 'lightning-distopt[hessian]'")
        self.kind, self.derivatives, self.outputs = kind, derivatives, outputs
        self.engine, self.per_layer = engine, per_layer
        self._options = {"k": k, "trace": trace, "density": density, "tol": tol}

    @property
    def state_key(self) -> str:
        """Probes of the Hessian and of its Gauss-Newton part may be attached side by side."""
        return f"{super().state_key} of {self.kind}"

    def check_objectives(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> None:
        """Make one product, which tells whether there are second derivatives."""
        objective = next(iter(objectives.values()))
        for pattern in [] if isinstance(self.per_layer, bool) else self.per_layer:
            objective.restricted([pattern])
        CurvatureOperator(objective, self.kind, self.derivatives, outputs=self.outputs).matvec(objective.gradient())

    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> Spectra:
        """Return the spectra for the weights that the module has now."""
        options: dict[str, Any] = {
            **self._options,
            "which": "BE" if self.engine == "lanczos" and self._options["k"] > 1 else None,
            "engine": self.engine,
            "kind": self.kind,
            "derivatives": self.derivatives,
            "per_layer": self.per_layer,
            "outputs": self.outputs,
            "seed": self.seed,
            "progress": self.shows_progress(trainer),
        }
        return Spectra({name: hessian_spectrum(objective, **options) for name, objective in objectives.items()})

    def on_train_end(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Write the picture of the eigenvalues over training."""
        super().on_train_end(trainer, pl_module)
        if self.history and trainer.is_global_zero and not trainer.fast_dev_run:  # type: ignore[attr-defined]
            self._save(trainer, self.series(), "over_training")

    def series(self) -> CurvatureHistory:
        """Return the ends of the spectrum, and the trace, over all of training."""
        values: dict[str, dict[str, list[float]]] = {}
        for data in self.data:
            prefix = f"{data}/" if len(self.data) > 1 else ""
            known = [name for name in _NAMES if any(prefix + name in entry for entry in self.history)]
            values[data] = {name: [entry.get(prefix + name, float("nan")) for entry in self.history] for name in known}
        return CurvatureHistory(np.array([entry["step"] for entry in self.history]), values)

    def _write(self, trainer: pl.Trainer, result: Result) -> None:
        assert isinstance(result, Spectra)
        for name, spectrum in result.spectra.items():
            self._save(trainer, spectrum, name if len(result.spectra) > 1 else "")


def _whole(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
