"""A `Trainer` that measures trained models instead of training: curvature, landscapes and paths, at checkpoints."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import lightning.pytorch as pl
import torch

from lightning_distopt.analysis.connectivity import connect
from lightning_distopt.analysis.interpolation import interpolate
from lightning_distopt.analysis.landscape import landscape_1d, landscape_2d
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.analysis.planes import plane_of_three, random_plane, trajectory_plane
from lightning_distopt.analysis.points import read_state
from lightning_distopt.analysis.result import Result, Results
from lightning_distopt.analysis.spectrum import Spectrum, hessian_spectrum
from lightning_distopt.callbacks.probe import Probe
from lightning_distopt.figures import write_file
from lightning_distopt.files import check_folder

__all__ = ["ANALYSES", "Analyzer"]

Found = Results[Any]  # by the names that columns and files get; "" for one result alone
Measure = Callable[[Mapping[str, Objective], Mapping[str, Any], dict[str, Any]], Found]

ANALYSES = ("hessian", "landscape", "interpolate", "connect")
"""Methods of `Analyzer`."""


class Analyzer(pl.Trainer):
    """A `Trainer` that measures instead of training, on as many devices as it is given.

    Attributes:
        measured: what all analyses have in common: `ckpt`, `output`, `on`, and options of `Probe`.
    """

    measured: dict[str, Any]

    def hessian(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        k: int = 5,
        which: Literal["LA", "SA", "BE", "LM"] | None = None,
        trace: int = 0,
        density: int = 0,
        engine: Literal["lanczos", "lobpcg", "pyhessian"] = "lanczos",
        kind: Literal["hessian", "gauss_newton"] = "hessian",
        derivatives: Literal["double_backward", "finite_differences"] = "double_backward",
        per_layer: bool | list[str] = False,
        tol: float = 1e-3,
        max_products: int | None = None,
        keep_graph: bool = False,
        outputs: str = "",
    ) -> None:
        """Show eigenvalues of the loss's Hessian at each checkpoint, its trace and its density.

        Args:
            model: The module.
            datamodule: Its data.
            k: Number of eigenvalues.
            which: Ends of the spectrum: largest (LA), smallest (SA), both (BE) or largest magnitude (LM). By default both, if
                the engine can.
            trace: Products with the Hessian to spend on the trace, such as 99; 0 for none.
            density: Products to spend on the density, 80 for each random vector; 0 for none.
            engine: Of the eigenvalues.
            kind: The Hessian, or its Gauss-Newton part.
            derivatives: By a second backward pass, or by differences where a layer has none.
            per_layer: Whether each layer's block is measured too, or patterns of parameters' names, one for each block.
            tol: Relative error of eigenvalues.
            max_products: For eigenvalues, after which the engine gives up.
            keep_graph: Whether to keep graphs, which saves a third of the time and costs memory.
            outputs: For Gauss-Newton, the submodule whose output the loss is a function of.
        """
        ends = which or ("BE" if engine == "lanczos" and k > 1 else None)
        options: dict[str, Any] = {"k": k, "which": ends, "trace": trace, "density": density, "engine": engine, "kind": kind}
        options |= {"derivatives": derivatives, "per_layer": per_layer, "tol": tol, "max_products": max_products}
        options |= {"keep_graph": keep_graph, "outputs": outputs}

        def measure(objectives: Mapping[str, Objective], models: Mapping[str, Any], common: dict[str, Any]) -> Found:
            found = Found()
            for label, state in models.items():
                next(iter(objectives.values())).module.load_state_dict(state)
                for name, objective in objectives.items():
                    found[f"{label}_{name}"] = hessian_spectrum(objective, **options, **common)
            return found

        self._analyze("hessian", measure, model, datamodule)

    def landscape(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        dimensions: Literal[1, 2] = 1,
        trajectory: bool = False,
        directions: int = 10,
        radius: float | None = None,
        points: int = 21,
        batch_norm: Literal["keep", "reestimate"] = "keep",
    ) -> None:
        """Draw the loss around checkpoints, along random directions or in a plane.

        Args:
            model: The module.
            datamodule: Its data.
            dimensions: 1 for lines in random directions that all checkpoints share; 2 for a plane: a random one through one
                checkpoint, or that of three.
            trajectory: Whether the checkpoints are those of one training, in order, to be seen in their principal plane.
            directions: Number of lines.
            radius: How far to go: on lines in lengths of each filter, by default 1.
            points: On each line, or on each side of the grid; an odd number.
            batch_norm: Whether to keep running statistics, or to estimate them anew at every point.
        """
        given = self.measured["ckpt"]
        if trajectory and (dimensions == 1 or len(given) < 3):
            raise ValueError("`--trajectory` shows three checkpoints or more in a plane: use `--dimensions 2`, and list them.")
        if dimensions == 2 and not trajectory and len(given) not in (1, 3):
            raise ValueError(f"A plane goes through one checkpoint or three, or use `--trajectory true`; got {len(given)}.")

        def measure(objectives: Mapping[str, Objective], models: Mapping[str, Any], common: dict[str, Any]) -> Found:
            options: dict[str, Any] = {"points": points, "batch_norm": batch_norm, **common}
            if dimensions == 1:
                return Found({"": landscape_1d(objectives, models, directions, 1.0 if radius is None else radius, **options)})
            f, states = next(iter(objectives.values())), list(models.values())
            if trajectory:
                plane = trajectory_plane(f, states)
            elif len(states) == 1:
                plane = random_plane(f, states[0], seed=common["seed"])
            else:
                plane = plane_of_three(f, states, list(models))
            return Found({"": landscape_2d(objectives, plane, radius, **options)})

        self._analyze("landscape", measure, model, datamodule)

    def interpolate(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        points: int = 21,
        margin: float = 0.2,
        batch_norm: Literal["interpolate", "reestimate"] = "interpolate",
    ) -> None:
        """Draw the loss on the straight line from the first checkpoint to each other one.

        Args:
            model: The module.
            datamodule: Its data.
            points: On each line, both ends included.
            margin: How far to go on beyond both, cut to a multiple of the distance between points.
            batch_norm: Whether to interpolate running statistics like the weights, or to estimate them anew at every point.
        """
        if len(self.measured["ckpt"]) < 2:
            raise ValueError("A line has two ends: give two checkpoints or more, `--ckpt a.ckpt b.ckpt`.")

        def measure(objectives: Mapping[str, Objective], models: Mapping[str, Any], common: dict[str, Any]) -> Found:
            first, *others = models.values()
            options = {"points": points, "margin": margin, "batch_norm": batch_norm, "progress": common["progress"]}
            lines = interpolate(objectives, first, others, **options)
            return Found({"": dataclasses.replace(lines, models=list(models))})

        self._analyze("interpolate", measure, model, datamodule)

    def connect(
        self,
        model: pl.LightningModule,
        datamodule: pl.LightningDataModule | None = None,
        bends: int = 1,
        curve: Literal["bezier", "chain"] = "bezier",
        steps: int = 1000,
        lr: float = 0.03,
        points: int = 21,
        batch_norm: Literal["reestimate", "interpolate"] = "reestimate",
    ) -> None:
        """Train a curve of low loss between two checkpoints, and draw the loss along it.

        Args:
            model: The module.
            datamodule: Its data.
            bends: Points of the curve that are trained.
            curve: A Bezier curve, or a chain of straight lines.
            steps: Of training the curve.
            lr: Its learning rate.
            points: At how many the curve is measured.
            batch_norm: Whether to estimate running statistics anew at every point, or to interpolate them.
        """
        if len(self.measured["ckpt"]) != 2:
            raise ValueError(
                f"A curve has two ends: give two checkpoints, `--ckpt a.ckpt b.ckpt`; got {len(self.measured['ckpt'])}."
            )

        def measure(objectives: Mapping[str, Objective], models: Mapping[str, Any], common: dict[str, Any]) -> Found:
            options: dict[str, Any] = {"bends": bends, "curve": curve, "steps": steps, "lr": lr, "points": points}
            first, last = models.values()
            path = connect(objectives, first, last, batch_norm=batch_norm, **options, **common)
            return Found({"": dataclasses.replace(path, models=list(models))})

        self._analyze("connect", measure, model, datamodule)

    def _analyze(
        self, name: str, measure: Measure, model: pl.LightningModule, datamodule: pl.LightningDataModule | None
    ) -> None:
        self.callbacks.append(_Analysis(name, measure, self.measured))  # type: ignore[attr-defined]
        self.fit(model, datamodule=datamodule)


class _Analysis(Probe[Found]):
    """Measures where training would begin, and ends it there."""

    name = "analysis"

    def __init__(self, analysis: str, measure: Measure, common: dict[str, Any]) -> None:
        options = {key: value for key, value in common.items() if key not in ("ckpt", "output", "on")}
        super().__init__("start", ["train", "val"] if common["on"] == "both" else [common["on"]], save=[], **options)
        self.analysis, self.ckpt, self.output = analysis, common["ckpt"], check_folder("output", common["output"])
        self._run = measure
        self._models: dict[str, Mapping[str, torch.Tensor]] = {}

    def measure(self, trainer: pl.Trainer, objectives: Mapping[str, Objective]) -> Found:
        """Return what there is to find at the checkpoints."""
        common = {"seed": self.seed, "progress": self.progress and trainer.is_global_zero}
        return self._run(objectives, self._models, common)

    def on_fit_start(self, trainer: pl.Trainer, pl_module: pl.LightningModule) -> None:
        """Read the checkpoints, measure, and write."""
        trainer.should_stop = True
        self._models = {label: read_state(path, pl_module) for label, path in _labels(self.ckpt).items()}
        pl_module.load_state_dict(next(iter(self._models.values())))
        trainer.fit_loop.setup_data()
        self._batches = self._load(trainer)
        results = self.measure(trainer, self._objectives(trainer, self.check))
        if not trainer.is_global_zero:
            return
        print(_table({label or self.analysis: _numbers(result) for label, result in results.items()}))
        for label, result in results.items():
            name = f"{self.analysis}_{label}" if label else self.analysis
            for kind in ("npz", "json", "png"):
                write_file(self.output / f"{name}.{kind}", result.save)

    def on_train_start(self, *args: Any) -> None:
        """Nothing is left to do."""


def _labels(paths: Sequence[str]) -> dict[str, str]:
    """Name checkpoints by their files, and by as many of the folders around them as it takes to tell them apart."""
    parts = [(*path.relative_to(path.anchor).parent.parts, path.stem) for path in map(Path, paths)]
    depths = [1] * len(paths)
    while True:
        names = ["_".join(own[-depth:]) for own, depth in zip(parts, depths, strict=True)]
        longer = [k for k, name in enumerate(names) if names.count(name) > 1 and depths[k] < len(parts[k])]
        if not longer:
            break
        for k in longer:
            depths[k] += 1
    twice = [path for name, path in zip(names, paths, strict=True) if names.count(name) > 1]
    if twice:
        raise ValueError(f"{' and '.join(map(repr, twice))} have the same name: give each once, or rename one.")
    return dict(zip(names, paths, strict=True))


def _numbers(result: Result) -> dict[str, float]:
    if not isinstance(result, Spectrum):
        return result.numbers()
    return {"loss": result.loss, **result.numbers(), "products": result.products}


def _table(columns: Mapping[str, Mapping[str, float]]) -> str:
    """Write numbers by name, in a column for each result."""
    names = list(dict.fromkeys(name for numbers in columns.values() for name in numbers))
    rows = [["", *columns], *([name, *(_number(c.get(name)) for c in columns.values())] for name in names)]
    widths = [max(len(row[k]) for row in rows) for k in range(len(columns) + 1)]
    return "\n".join(
        "  ".join([row[0].ljust(widths[0]), *(cell.rjust(w) for cell, w in zip(row[1:], widths[1:], strict=True))]).rstrip()
        for row in rows
    )


def _number(value: float | None) -> str:
    return "-" if value is None else f"{value:.6g}"
