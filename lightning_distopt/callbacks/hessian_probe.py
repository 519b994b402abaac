"""The curvature of the loss while training goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from typing import Any

import lightning.pytorch as pl

from lightning_distopt.analysis.history import History
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.operators import CurvatureOperator, Derivatives, Kind
from lightning_distopt.analysis.result import Results
from lightning_distopt.analysis.spectrum import Engine, Spectrum, check_spectrum, hessian_spectrum
from lightning_distopt.callbacks.probe import Probe
from lightning_distopt.callbacks.series import SeriesProbe

_PANELS = {"eigenvalue": ("top", "bottom"), "trace": ("trace",)}


class HessianProbe(SeriesProbe[Results[Spectrum]]):
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
        **options: see `Probe`: `data`, `samples`, `model`, `loss_fn`, `parameters`, `seed`, `save`, `check`, `progress`,
            `name`.

    Raises:
        ValueError: for options that are unknown or make no sense; when training starts, if there is no second derivative.
        ModuleNotFoundError: if the engine is not installed.
        MisconfigurationException: when training starts, see `Probe`.

    Reference:
        Lin: Optimization for deep learning in distributed and heterogeneous systems, figures 2.5(a) and 11.10.
        Yao et al.: PyHessian: Neural networks through the lens of the Hessian. 2020.
    """

    name = "hessian"
    series_label = "over_training"

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
        if self.metrics is not None:
            raise ValueError("HessianProbe measures the curvature of the loss, and nothing of `metrics`: leave them out.")
        check_spectrum(k, trace, density, engine, kind, derivatives, per_layer, tol)
        self.kind, self.derivatives, self.outputs = kind, derivatives, outputs
        self.engine, self.per_layer = engine, per_layer
        self._options = {"k": k, "trace": trace, "density": density, "tol": tol}

    def check_objectives(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> None:
        """Make one product, which tells whether there are second derivatives."""
        objective = next(iter(objectives.values()))
        for pattern in [] if isinstance(self.per_layer, bool) else self.per_layer:
            objective.restricted([pattern])
        CurvatureOperator(objective, self.kind, self.derivatives, outputs=self.outputs).matvec(objective.gradient())

    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> Results[Spectrum]:
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
        return Results({name: hessian_spectrum(objective, **options) for name, objective in objectives.items()})

    def series(self) -> History:
        """Return all that has been measured; the picture shows the ends of the spectrum, and below them the trace."""
        history = super().series()
        prefixes = [f"{data}/" for data in self.data] if len(self.data) > 1 else [""]
        panels = {
            label: [prefix + name for prefix in prefixes for name in names if prefix + name in history.values]
            for label, names in _PANELS.items()
        }
        return dataclasses.replace(history, panels={label: names for label, names in panels.items() if names})

    _write = Probe._write  # every measurement, besides the series
