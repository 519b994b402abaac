"""Measuring a model away from its weights: at points of a line, a grid or a path, alone or shared among ranks."""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, get_args

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_distopt.analysis.batch_norm import batch_norm_statistics
from lightning_distopt.analysis.objective import Objective
from lightning_distopt.options import check_choice

Objectives = Objective | Mapping[str, Objective]
"""One objective, or several of the same parameters by name, such as those on training and test data."""

Shard = Literal["data", "points"]


@dataclass
class Place:
    """Where something is measured.

    Attributes:
        vector: `[d]`, the parameters that are variables.
        rest: buffers and frozen parameters by name; those that are not there are the module's own.
    """

    vector: Tensor
    rest: dict[str, Tensor] = field(default_factory=dict)


Point = Place | Tensor | Mapping[str, Any] | str | os.PathLike[str]
"""A place, a vector `[d]` of parameters, a state dict of the module, a checkpoint with one under "state_dict", or its file."""


def read_point(objective: Objective, point: Point, name: str = "the model") -> Place:
    """Return a model as a place in the space of an objective's parameters.

    Example:
        >>> net = torch.nn.Linear(2, 1)
        >>> f = Objective(net, lambda net, x: net(x).mean(), [torch.ones(4, 2)])
        >>> read_point(f, net.state_dict()).vector.equal(f.vector())
        True

    Args:
        objective: of a module with the same architecture.
        point: vector, state dict, checkpoint, or the path of a file with one of the two; a place is returned as it is.
        name: what an error calls it.

    Raises:
        ValueError: if its architecture is another one, with the first parameter or buffer that differs; if there is no such
            file; or if it is none of these.
    """
    if isinstance(point, Place):
        return point
    if isinstance(point, str | os.PathLike):
        point = read_checkpoint(point)
    if not isinstance(point, Tensor | Mapping):
        raise ValueError(
            f"{name[0].upper()}{name[1:]} must be a vector, a state dict, a checkpoint or the path of one; got "
            f"{type(point).__name__}."
        )
    if isinstance(point, Tensor):
        if list(point.shape) != [objective.dim]:
            raise ValueError(f"The vector of {name} must have the shape [{objective.dim}]; got {list(point.shape)}.")
        with torch.inference_mode(False):
            return Place(point.detach().to(objective.device, objective.dtype, copy=True))
    state = state_of(point, objective.module, name)
    own = {**dict(objective.module.named_parameters()), **dict(objective.module.named_buffers())}  # tied ones once
    with torch.inference_mode(False):
        there = {k: state[k].detach().to(value.device, value.dtype, copy=True) for k, value in own.items() if k in state}
        vector = objective.flatten([there[k] for k in objective.parameters])
    return Place(vector, {key: value for key, value in there.items() if key not in objective.parameters})


def state_of(point: Mapping[str, Any], module: nn.Module, name: str = "the model") -> Mapping[str, Tensor]:
    """Return the state dict that a checkpoint holds, or itself.

    Args:
        point: state dict or checkpoint.
        module: that it is to fit.
        name: what an error calls it.

    Raises:
        ValueError: if it does not fit, with the first parameter or buffer that differs.
    """
    state: Mapping[str, Tensor] = point["state_dict"] if isinstance(point.get("state_dict"), Mapping) else point
    expected = module.state_dict()
    for key in [*expected, *(key for key in state if key not in expected)]:
        here, there = (f"of shape {list(x[key].shape)}" if key in x else "missing" for x in (expected, state))
        if here != there:
            raise ValueError(f"The architecture of {name} is another one: {key!r} is {there} there and {here} in the module.")
    return state


def read_checkpoint(path: str | os.PathLike[str]) -> Mapping[str, Any]:
    """Return what a file holds, a checkpoint or a state dict, on the CPU.

    Raises:
        ValueError: if there is no such file, or it holds something else.
    """
    name = repr(os.fspath(path))
    if not os.path.isfile(path):
        raise ValueError(f"There is no checkpoint {name}.")
    try:
        found = torch.load(path, map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            f"{name} can't be read as a checkpoint of tensors and plain values: save its state dict by itself, with "
            "`torch.save(checkpoint['state_dict'], ...)`, if you trust it."
        ) from error
    if not isinstance(found, Mapping):
        raise ValueError(f"{name} holds {type(found).__name__}, not a checkpoint or a state dict.")
    return found


def read_state(source: str | os.PathLike[str] | Mapping[str, Any], module: nn.Module) -> dict[str, Tensor]:
    """Return the state dict that a file, a checkpoint or a mapping holds, on the CPU and by itself, if it fits a module.

    Raises:
        ValueError: if it can't be read or does not fit.
    """
    if isinstance(source, Mapping):
        return {name: value.detach().to("cpu", copy=True) for name, value in state_of(source, module).items()}
    return dict(state_of(read_checkpoint(source), module, repr(os.fspath(source))))


def called(source: str | os.PathLike[str] | Mapping[str, Any]) -> str:
    """Return what pictures call a model: its file's name without the ending, if it comes from a file.

    Example:
        >>> called("runs/large.ckpt"), called({})
        ('large', 'the other model')
    """
    return "the other model" if isinstance(source, Mapping) else Path(source).stem


def own_rest(objective: Objective) -> dict[str, Tensor]:
    """Return copies of the module's own buffers and frozen parameters, by name, as far as they go into a state dict."""
    return read_point(objective, objective.module.state_dict()).rest


def by_name(objectives: Objectives) -> dict[str, Objective]:
    """Return objectives by name; one by itself has the name "".

    Raises:
        ValueError: if there is none, or their parameters or modes are not the same.
    """
    named = {"": objectives} if isinstance(objectives, Objective) else dict(objectives)
    if not named:
        raise ValueError("There is no objective to measure.")
    first, *others = ({name: p.shape for name, p in objective.parameters.items()} for objective in named.values())
    if any(list(other.items()) != list(first.items()) for other in others):
        raise ValueError(f"The objectives {', '.join(map(repr, named))} must be functions of the same parameters.")
    if len({objective.mode for objective in named.values()}) > 1:
        raise ValueError(
            f"The objectives {', '.join(map(repr, named))} must have the same `mode`, since they are measured together."
        )
    return named


def measure_points(
    objectives: Mapping[str, Objective],
    place: Callable[[int], Place],
    count: int,
    reestimate: bool = False,
    shard: Shard = "data",
    progress: bool = True,
    title: str = "Points",
) -> tuple[np.ndarray, list[str]]:
    """Return losses and metrics of objectives at points; what is not finite is kept.

    Args:
        objectives: by name.
        place: where the `k`-th point is, the same on every rank.
        count: of the points.
        reestimate: whether running statistics are estimated anew at every point, on the data of the first objective.
        shard: what ranks share: "data": each evaluates every point on its own batches; "points": each evaluates some points,
            on all data, which all must have, and one message gathers what they found.
        progress: whether to show a progress bar.
        title: of the bar.

    Returns:
        Values `[data, metrics, points]` in float64, and the names of the metrics, of which the first is "loss".

    Raises:
        ValueError: for another `shard`, or "points" where ranks have different data.
    """
    check_choice("shard", shard, get_args(Shard))
    shared = next(iter(objectives.values()))
    ranks = round(shared.sum_over_ranks(torch.ones(1)).item()) if shard == "points" else 1
    rank, metrics = 0, list[str]()
    if ranks > 1:
        rank = dist.get_rank()
        alone = {name: _on_this_rank(objective, name, ranks) for name, objective in objectives.items()}
        objectives = {name: objective for name, (objective, _) in alone.items()}
        metrics = list(dict.fromkeys(metric for _, names in alone.values() for metric in names))
    statistics = next(iter(objectives.values()))
    rows: dict[int, dict[str, dict[str, float]]] = {}
    problem: Exception | None = None
    try:
        with ExitStack() as sessions:
            for objective in objectives.values():
                sessions.enter_context(objective.session())
            for k in tqdm(range(rank, count, ranks), desc=title, leave=False, disable=not progress):
                with torch.no_grad():
                    at = place(k)
                rest = at.rest
                if reestimate:
                    rest = {**rest, **batch_norm_statistics(statistics, at.vector, rest)}
                rows[k] = {name: objective.measure(at.vector, rest) for name, objective in objectives.items()}
                metrics = metrics or list(dict.fromkeys(metric for values in rows[k].values() for metric in values))
    except Exception as error:
        if ranks == 1:
            raise
        problem = error
    total = torch.zeros(len(objectives), len(metrics), count, dtype=torch.float64)
    for k, row in rows.items():
        for i, name in enumerate(objectives):
            total[i, :, k] = torch.tensor([row[name].get(metric, float("nan")) for metric in metrics], dtype=torch.float64)
    if ranks > 1:
        total = shared.total(total.reshape(-1), problem).view_as(total)  # each is zero but on one rank
    return total.numpy(), metrics


def _on_this_rank(objective: Objective, name: str, ranks: int) -> tuple[Objective, list[str]]:
    """Return the objective on this rank's batches alone, if they are those of every rank, and its metrics. Collective."""
    data = f"the data {name!r}" if name else "the data"
    advice = "so they can't share points: use `shard='data'`."
    if objective.agreed(not objective.batches):
        raise ValueError(f"Not every rank has a batch of {data}, {advice}")
    sizes = iter(objective.sizes)
    alone = Objective(
        objective.module,
        objective.loss_fn,
        objective.batches,
        parameters=lambda name, parameter: name in objective.parameters,
        metrics=objective.metrics,
        size_of=lambda batch: next(sizes),
        mode=objective.mode,
        seed=objective.seed,
        check=False,
    )
    found: dict[str, float] = {"loss": 0.0}
    problem: Exception | None = None
    try:
        found = alone.measure()
    except Exception as error:
        problem = error
    own = found["loss"]
    mean = float(objective.total(torch.tensor([own], dtype=torch.float64), problem)) / ranks
    if objective.agreed(abs(own - mean) > 1e-5 * abs(mean)):
        raise ValueError(f"Ranks have different parts of {data} (loss {own:.6g} here, mean {mean:.6g}), {advice}")
    return alone, list(found)
