"""The curvature of a loss in one call: extreme eigenvalues, trace and density, of the whole or of layers."""

from __future__ import annotations

import importlib.util
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np

from lightning_distopt.analysis.density import spectral_density
from lightning_distopt.analysis.lanczos import Eigenpairs, Which, lanczos
from lightning_distopt.analysis.lobpcg import lobpcg
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.operators import CurvatureOperator, Derivatives, Kind, check_curvature
from lightning_distopt.analysis.result import Result
from lightning_distopt.analysis.trace import TraceEstimate, estimate_trace
from lightning_distopt.figures import BLUE, ORANGE, tidy
from lightning_distopt.options import check_choice, check_part, check_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Engine = Literal["lanczos", "lobpcg", "pyhessian"]

_STEPS = 80  # products for each probe of a density
_LEAST_TRACE = 6  # products that Hutch++ takes at least
_PACKAGES = {"lobpcg": "scipy", "pyhessian": "pyhessian"}


@dataclass
class Spectrum(Result):
    """What is known of the eigenvalues of a curvature matrix.

    Example:
        >>> import torch
        >>> net, x = torch.nn.Linear(3, 1, bias=False).double(), torch.diag(torch.tensor([3.0, 2.0, 1.0])).double()
        >>> _ = torch.nn.init.zeros_(net.weight)
        >>> f = Objective(net, lambda net, x: net(x).square().sum() / 2, [x])
        >>> found = hessian_spectrum(f, k=2, which="BE", progress=False)
        >>> {name: round(value, 6) for name, value in found.numbers().items()}
        {'top': 9.0, 'bottom': 1.0, 'gradient_norm': 0.0}

    Attributes:
        eigenvalues: `[k]`, in falling order.
        residuals: `[k]`, norms of `H y - theta y`.
        errors: `[k]`, estimated bounds of the absolute errors.
        which: ends of the spectrum they are from, as in `lanczos`.
        converged: whether the errors are below the tolerance.
        trace: estimate, without bias; None if it was not asked for.
        trace_error: its standard error.
        trace_samples: those that it is the mean of.
        grid: `[points]` of the density; None if it was not asked for.
        density: `[points]`, with Gaussians of standard deviation `width`.
        nodes: of the quadrature.
        weights: of the nodes, which sum to one.
        width: as above.
        layers: for each, by name, its `top`, `bottom` and `trace`, as far as these were asked for.
        loss: where this is the curvature.
        gradient_norm: there.
        dim: number of parameters.
        samples: of the data.
        products: with the matrix or a layer's block of it, in total.
        kind: "hessian" or "gauss_newton".
        engine: of the eigenvalues.
    """

    eigenvalues: np.ndarray
    residuals: np.ndarray
    errors: np.ndarray
    which: str
    converged: bool
    trace: float | None
    trace_error: float | None
    trace_samples: np.ndarray | None
    grid: np.ndarray | None
    density: np.ndarray | None
    nodes: np.ndarray | None
    weights: np.ndarray | None
    width: float | None
    layers: dict[str, dict[str, float]]
    loss: float
    gradient_norm: float
    dim: int
    samples: int
    products: int
    kind: str
    engine: str

    def numbers(self) -> dict[str, float]:
        """Return `top` and `bottom`, `trace` and `trace_error`, as far as they are known, `gradient_norm`, and layers' own."""
        found = {**_ends(self.eigenvalues, self.which), "gradient_norm": self.gradient_norm}
        if self.trace is not None and self.trace_error is not None:
            found |= {"trace": self.trace, "trace_error": self.trace_error}
        return {**found, **{f"{name}/{key}": x for name, layer in self.layers.items() for key, x in layer.items()}}

    def figure(self) -> Figure:
        """Return the density on a logarithmic axis with the extreme eigenvalues marked, or these as bars."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(6.4, 3.6), layout="constrained")
        axes = figure.subplots()
        if self.grid is not None and self.density is not None:
            least = 1e-2 / self.dim / (self.width or 1.0)  # a part of one eigenvalue's peak
            axes.semilogy(self.grid, np.maximum(self.density, least), color=BLUE, label="density")
            axes.plot(self.eigenvalues, np.full(len(self.eigenvalues), least), "|", color=ORANGE, ms=14, label="eigenvalues")
            axes.set(xlabel="eigenvalue", ylabel="density", ylim=(least, None))
            axes.legend(frameon=False)
        else:
            axes.bar(np.arange(1, len(self.eigenvalues) + 1), self.eigenvalues, color=BLUE, yerr=self.errors, ecolor=ORANGE)
            axes.axhline(0, color="black", linewidth=0.6)
            axes.set(xlabel="number", ylabel="eigenvalue")
        tidy(axes)
        return figure


def hessian_spectrum(
    objective: Objective,
    k: int = 5,
    which: Which | None = None,
    trace: int = 0,
    density: int = 0,
    engine: Engine = "lanczos",
    kind: Kind = "hessian",
    derivatives: Derivatives = "double_backward",
    per_layer: bool | Sequence[str] = False,
    tol: float = 1e-3,
    max_products: int | None = None,
    seed: int = 0,
    keep_graph: bool = False,
    outputs: str = "",
    progress: bool = True,
) -> Spectrum:
    """Return eigenvalues of a loss's Hessian, or of its Gauss-Newton matrix, and if asked for its trace and density.

    Example:
        >>> import torch
        >>> net = torch.nn.Linear(3, 1, bias=False).double()
        >>> x, y = torch.eye(3).double() * torch.tensor([3.0, 2.0, 1.0]).double(), torch.zeros(3, 1).double()
        >>> f = Objective(net, lambda net, batch: ((net(batch[0]) - batch[1]) ** 2).sum() / 2, [(x, y)])
        >>> hessian_spectrum(f, k=2, progress=False).eigenvalues
        array([9., 4.])

    Args:
        objective: whose curvature it is, at the weights as they are.
        k: number of eigenvalues.
        which: "LA" (largest), "SA" (smallest), "BE" (both ends) or "LM" (largest magnitude); None: "LA", or with
            `engine="pyhessian"` "LM", which is all that it finds.
        trace: products to spend on it, 6 at least; 0: none. By Hutch++, with PyHessian by its own.
        density: products to spend on it, 80 for each random vector, whose memory are 80 vectors; 0: none.
        engine: "lanczos", the one to use; "lobpcg", for multiplicities; "pyhessian", power iteration.
        kind: "hessian" or "gauss_newton".
        derivatives: "double_backward", or "finite_differences" where a layer has no second derivative.
        per_layer: whether the same is found for the diagonal block of each layer by itself, or patterns of parameters' names,
            one for each block.
        tol: relative error of eigenvalues.
        max_products: for eigenvalues, after which the solver gives up: Lanczos and LOBPCG with a warning.
        seed: of all random vectors.
        keep_graph: whether graphs are kept for all products, at the cost of memory.
        outputs: for Gauss-Newton, see `CurvatureOperator`.
        progress: whether bars count products.

    Raises:
        ModuleNotFoundError: for an engine that is not installed.
        ValueError: for options that make no sense, if there is no second derivative, or values are not finite.
    """
    check_spectrum(k, trace, density, engine, kind, derivatives, per_layer, tol)
    if engine == "pyhessian" and which not in (None, "LM"):
        raise ValueError(f"PyHessian finds eigenvalues of largest magnitude only: use `which='LM'`, or Lanczos for {which!r}.")
    ends: Which = which or ("LM" if engine == "pyhessian" else "LA")
    blocks = {name: objective.restricted(patterns) for name, patterns in _layers(objective, per_layer).items()}

    def eigenvalues(operator: CurvatureOperator) -> Eigenpairs:
        if engine == "pyhessian":
            from lightning_distopt.analysis._pyhessian import power_iteration

            return power_iteration(operator, k, tol, seed, max_products, progress)
        if engine == "lobpcg":
            return lobpcg(operator, k, ends, tol, seed, max_products, progress=progress)  # type: ignore[arg-type]
        return lanczos(operator, k, ends, tol, seed, max_products, progress=progress)

    def traced(operator: CurvatureOperator) -> TraceEstimate:
        if engine == "pyhessian":
            from lightning_distopt.analysis._pyhessian import hutchinson

            return hutchinson(operator, trace, seed, progress)
        return estimate_trace(operator, trace, seed=seed, progress=progress)

    def of(part: Objective) -> CurvatureOperator:
        return CurvatureOperator(part, kind, derivatives, keep_graph, outputs)

    operator = of(objective)
    loss, gradient = objective.loss_and_gradient()
    try:
        found = eigenvalues(operator)
        total = traced(operator) if trace else None
        shape = (
            spectral_density(operator, min(density, _STEPS), max(1, density // _STEPS), seed=seed, progress=progress)
            if density
            else None
        )
    finally:
        operator.release()
    products, layers = operator.products, {}
    for name, block in blocks.items():
        part = of(block)
        try:
            layers[name] = _ends(eigenvalues(part).values, ends) | ({"trace": traced(part).mean} if trace else {})
        finally:
            part.release()
        products += part.products
    return Spectrum(
        eigenvalues=found.values,
        residuals=found.residuals,
        errors=found.errors,
        which=ends,
        converged=found.converged,
        trace=total.mean if total else None,
        trace_error=total.standard_error if total else None,
        trace_samples=total.samples if total else None,
        grid=shape.grid if shape else None,
        density=shape.values if shape else None,
        nodes=shape.nodes if shape else None,
        weights=shape.weights if shape else None,
        width=shape.width if shape else None,
        layers=layers,
        loss=loss,
        gradient_norm=float(gradient.norm()),
        dim=objective.dim,
        samples=objective.samples,
        products=products,
        kind=kind,
        engine=engine,
    )


def check_spectrum(
    k: int, trace: int, density: int, engine: str, kind: str, derivatives: str, per_layer: Any, tol: float
) -> None:
    """Raise an error for options of `hessian_spectrum` that make no sense, or an engine that is not installed."""
    check_whole("k", k)
    if check_whole("trace", trace, least=0) in range(1, _LEAST_TRACE):
        raise ValueError(f"`trace` must be 0, or {_LEAST_TRACE} products or more, such as 99; got {trace!r}.")
    check_whole("density", density, least=0)
    check_choice("engine", engine, get_args(Engine))
    check_curvature(kind, derivatives)
    if isinstance(per_layer, str) or not isinstance(per_layer, bool | Sequence):
        raise ValueError(f"`per_layer` must be True or a list of patterns; got {per_layer!r}.")
    check_part("tol", tol)
    if (package := _PACKAGES.get(engine)) is not None and importlib.util.find_spec(package) is None:
        raise ModuleNotFoundError(f"`engine={engine!r}` needs {package}: pip install 'lightning-distopt[hessian]'")


def _ends(values: np.ndarray, which: str) -> dict[str, float]:
    """Return the ends of the spectrum that are known from some of its eigenvalues, in falling order."""
    if which == "LM":  # the other end is somewhere between them
        return {"top": float(values[np.abs(values).argmax()])}
    ends = {"top": float(values[0])} if which in ("LA", "BE") else {}
    return ends | ({"bottom": float(values[-1])} if which == "SA" or (which == "BE" and len(values) > 1) else {})


def _layers(objective: Objective, per_layer: bool | Sequence[str]) -> dict[str, list[str]]:
    """Return names of parameters for each block: those of a module's own, or those that match a pattern."""
    if not isinstance(per_layer, bool):
        return {pattern: [pattern] for pattern in per_layer}
    layers: dict[str, list[str]] = {}
    for name in objective.parameters if per_layer else ():
        layers.setdefault(name.rpartition(".")[0] or name, []).append(name)
    return layers
