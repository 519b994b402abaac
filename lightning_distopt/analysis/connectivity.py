"""Curves of low loss between two models: Bezier curves and polygonal chains, for any module."""

from __future__ import annotations

import dataclasses
import itertools
import math
import os
import pathlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, get_args

import numpy as np
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lightning_distopt.analysis.batch_norm import Statistics
from lightning_distopt.analysis.interpolation import barrier, between, between_buffers
from lightning_distopt.analysis.objective import Objective, gradients
from lightning_distopt.analysis.points import Objectives, Place, Point, by_name, measure_points, read_point
from lightning_distopt.analysis.result import Result
from lightning_distopt.figures import BLUE, ORANGE, between_models, tidy
from lightning_distopt.options import check_choice, check_positive, check_whole

if TYPE_CHECKING:
    from matplotlib.figure import Figure

Curve = Literal["bezier", "chain"]


@dataclass
class Path(Result):
    r"""A curve between two models, and what was measured on it and on the straight line beside it.

    $$ \bar L = \frac{\int_0^1 L(\varphi(t)) \, \|\varphi'(t)\| \, dt}{\int_0^1 \|\varphi'(t)\| \, dt}, \qquad
       \max_t L(\varphi(t)) - \big( (1 - t) \, L(x_0) + t \, L(x_1) \big) $$

    are the integral and the barrier in `numbers()`; the first by the trapezoidal rule over the pieces between points.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> f = Objective(net, lambda net, x: (net.weight.norm() - 1) ** 2, [torch.zeros(1, 2)])
        >>> x_0, x_1 = torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0])
        >>> path = connect(f, x_0, x_1, curve="chain", steps=10, points=5, progress=False)
        >>> path.t, path.values.shape, path.point(0)
        (array([0.  , 0.25, 0.5 , 0.75, 1.  ]), (1, 1, 5), array([1., 0.], dtype=float32))

    Args:
        t: `[points]`, from 0 to 1.
        data: names of the data; "" if it has none.
        metrics: names of what was measured; the first is "loss".
        values: `[data, metrics, points]`, along the curve.
        straight: `[data, metrics, points]`, along the straight line from `x_0` to `x_1`.
        arc: `[points]`, the length of the curve up to `t`.
        nodes: `[bends + 2, d]`, `x_0`, the bends and `x_1`. They go into `.npz` files only.
        curve: "bezier" or "chain".
        training_t: `[steps]`, where on the curve each step of training was.
        training_loss: `[steps]`, of the batches there, before the step.
        models: names of both ends, if they have any.
    """

    t: np.ndarray
    data: list[str]
    metrics: list[str]
    values: np.ndarray
    straight: np.ndarray
    arc: np.ndarray
    nodes: np.ndarray
    curve: str
    training_t: np.ndarray
    training_loss: np.ndarray
    models: list[str] = dataclasses.field(default_factory=list)

    def point(self, t: float) -> np.ndarray:
        """Return the parameters `[d]` at `t` on the curve.

        Raises:
            ValueError: if it was read from a `.json` file, which has no models.
        """
        if len(self.nodes) == 0:
            raise ValueError("A path from a `.json` file is without its models: save it as `.npz`.")
        return on_curve(torch.from_numpy(self.nodes), t, self.curve).numpy()  # type: ignore[arg-type]

    def numbers(self) -> dict[str, float]:
        """Return the largest, least, mean and integral value of each kind, barriers of losses, and the same of the line."""
        found = {"length": float(self.arc[-1])}
        for prefix, series, arc in (("", self.values, self.arc), ("straight_", self.straight, self.t)):
            pieces = np.diff(arc) if arc[-1] > 0 else np.diff(self.t)
            for (k, data), (i, metric) in itertools.product(enumerate(self.data), enumerate(self.metrics)):
                values = series[k, i]
                name = "/".join(filter(None, (data, prefix + metric)))
                integral = pieces @ (values[1:] + values[:-1]) / 2 / pieces.sum()
                kinds = {"max": values.max(), "min": values.min(), "mean": values.mean(), "integral": integral}
                if metric == "loss":
                    kinds["barrier"] = barrier(self.t, values)
                found |= {f"{name}_{kind}": float(value) for kind, value in kinds.items()}
        return found

    def figure(self) -> Figure:
        """Return a picture of everything along `t`, on the curve and on the straight line."""
        from matplotlib.figure import Figure

        figure = Figure(figsize=(0.6 + 3.6 * len(self.metrics), 3.6), layout="constrained")
        title = {"bezier": "Bezier curve", "chain": "chain"}[self.curve]
        panels = figure.subplots(1, len(self.metrics), squeeze=False)[0]
        for k, (axes, metric) in enumerate(zip(panels, self.metrics, strict=True)):
            for series, label, color in ((self.straight, "straight line", ORANGE), (self.values, title, BLUE)):
                for data, values, style in zip(self.data, series[:, k], itertools.cycle(("-", "--", ":"))):
                    axes.plot(self.t, values, style, color=color, label=", ".join(filter(None, (label, data))))
            axes.set(xlabel=between_models("t", self.models), ylabel=metric)
            tidy(axes)
        handles, labels = panels[0].get_legend_handles_labels()
        figure.legend(handles, labels, loc="outside upper center", ncols=2, frameon=False, fontsize=8)
        return figure

    def save(self, path: str | os.PathLike[str]) -> pathlib.Path:
        """Write it to a file, see `Result.save`; a `.json` file is without the models."""
        slim = pathlib.Path(path).suffix == ".json"
        return Result.save(dataclasses.replace(self, nodes=self.nodes[:0]) if slim else self, path)


def coefficients(t: float, bends: int, curve: Curve = "bezier") -> list[float]:
    r"""Return the weights of the nodes of a curve at `t`: none is negative, and their sum is one.

    $$ c_i(t) = \binom{n+1}{i} (1 - t)^{n+1-i} \, t^i, \quad i = 0, \dots, n + 1 $$

    for a Bezier curve. On a chain, `t` goes linearly from `i / (n + 1)` at one node to `(i + 1) / (n + 1)` at the next.

    Example:
        >>> coefficients(0.5, 1), coefficients(0.5, 2, "chain")
        ([0.25, 0.5, 0.25], [0.0, 0.5, 0.5, 0.0])

    Args:
        t: in [0, 1].
        bends: `n`.
        curve: "bezier" or "chain".

    Reference:
        Garipov et al.: Loss surfaces, mode connectivity, and fast ensembling of DNNs. NeurIPS 2018, equations 2 and 3, which
        have one bend.
    """
    last = bends + 1
    if curve == "bezier":
        return [math.comb(last, i) * (1 - t) ** (last - i) * t**i for i in range(last + 1)]
    return [max(0.0, 1 - abs(last * t - i)) for i in range(last + 1)]


def on_curve(nodes: Sequence[Tensor] | Tensor, t: float, curve: Curve = "bezier") -> Tensor:
    r"""Return a point of a curve; its ends are the first and the last node, bit for bit.

    $$ \varphi(t) = \sum_i c_i(t) \, x_i $$

    Example:
        >>> on_curve([torch.tensor([0.0, 0.0]), torch.tensor([1.0, 2.0]), torch.tensor([2.0, 0.0])], 0.5)
        tensor([1., 1.])

    Args:
        nodes: `x_0`, the bends and the other end, `[d]` each.
        t: in [0, 1].
        curve: "bezier" or "chain".
    """
    point: Tensor | None = None
    for c, x in zip(coefficients(t, len(nodes) - 2, curve), nodes, strict=True):
        if c > 0:
            point = c * x if point is None else point.add_(x, alpha=c)
    assert point is not None
    return point


def sgd(bends: Iterable[nn.Parameter], lr: float) -> torch.optim.Optimizer:
    """Return SGD with a momentum of 0.9, which bends are trained by unless another optimizer is given."""
    return torch.optim.SGD(bends, lr=lr, momentum=0.9)


def connect(
    objectives: Objectives,
    x_0: Point,
    x_1: Point,
    bends: int = 1,
    curve: Curve = "bezier",
    steps: int = 1000,
    lr: float = 0.03,
    optimizer: Callable[..., torch.optim.Optimizer] = sgd,
    points: int = 21,
    batch_norm: Statistics = "reestimate",
    seed: int = 0,
    progress: bool = True,
) -> Path:
    r"""Train a curve between two models so that the loss along it is low, and measure it there.

    $$ \min_{x_1, \dots, x_n} \; \mathbb{E}_{t \sim U[0, 1]} \, L(\varphi(t)) $$

    The ends stay as they are; the bends start on the straight line between them. Every step draws one `t` and takes the next
    batch, in an order that is shuffled anew each time all have been gone through. The learning rate stays for half of the
    steps, then falls linearly, to a hundredth at nine tenths of them. Over several ranks `t` is the same, each takes a batch
    of its own, and one message `[d]` averages the gradients at `phi(t)`, from which all get those of the bends.

    Nothing is assumed of the module, and it is left undisturbed. While the curve is trained, batch norm takes the statistics
    of each batch, whatever the mode of the objective, since no others belong to a point that nobody has been at; all other
    layers are in that mode. Buffers beside it are mixed linearly from those of the ends, if these are more than vectors.

    Example:
        >>> net = nn.Linear(2, 1, bias=False)
        >>> f = Objective(net, lambda net, x: (net.weight.norm() - 1) ** 2, [torch.zeros(1, 2)])  # low on a circle
        >>> path = connect(f, torch.tensor([1.0, 0.0]), torch.tensor([0.0, 1.0]), steps=200, lr=0.1, progress=False)
        >>> found = path.numbers()
        >>> found["loss_barrier"] < 0.01 < 0.08 < found["straight_loss_barrier"]
        True

    Args:
        objectives: of the same parameters; on the first, which has the training data, the curve is trained.
        x_0: one end: a vector `[d]`, a state dict, a checkpoint or the path of one.
        x_1: the other.
        bends: `n`.
        curve: "bezier", or "chain" for a polygonal one.
        steps: of training.
        lr: learning rate.
        optimizer: called with `(bends, lr=lr)`; one whose steps need no closure. By default SGD with a momentum of 0.9.
        points: at how many equidistant `t` it is measured, the ends among them.
        batch_norm: whether running statistics are estimated anew for every point that is measured, from the training data
            ("reestimate"), or are mixed like other buffers ("interpolate").
        seed: of `t` and of the order of batches.
        progress: whether to show progress bars.

    Returns:
        The curve, with what was measured on it and on the straight line.

    Raises:
        ValueError: for options that make no sense, ends of another architecture, or a loss that is not finite.

    Reference:
        Garipov et al.: Loss surfaces, mode connectivity, and fast ensembling of DNNs. NeurIPS 2018, section 3. Zhao et al.:
        Masking as an efficient alternative to finetuning for pretrained language models. EMNLP 2020 (three bends).
    """
    check_options(bends, curve, steps, lr, points, batch_norm)
    named = by_name(objectives)
    f = next(iter(named.values()))
    with torch.inference_mode(False), torch.no_grad():
        first, last = read_ends(f, x_0, x_1)
        # On the straight line, in equal distances: either curve runs along it with constant speed.
        nodes = [on_curve([first.vector, last.vector], i / (bends + 1), "chain") for i in range(bends + 2)]
        rest = between_buffers(first.rest, last.rest, 0)
        nodes[1:-1], training_t, training_loss = _train(f, nodes, rest, curve, steps, lr, optimizer, seed, progress)

        def place(k: int) -> Place:  # those of the curve, then those of the straight line between its ends
            if k >= points:
                return between(first, last, float(t[k - points + 1]))
            return Place(on_curve(nodes, t[k], curve), between_buffers(first.rest, last.rest, float(t[k])))

        t, anew = np.arange(points) / (points - 1), batch_norm == "reestimate"
        found, metrics = measure_points(named, place, 2 * points - 2, anew, "data", progress, "Measuring the path")
        values, inner = found[..., :points], found[..., points:]
        straight = np.concatenate([values[..., :1], inner, values[..., -1:]], axis=-1)
        arc = np.zeros(points)
        for k in range(1, points):
            arc[k] = arc[k - 1] + float((place(k).vector - place(k - 1).vector).double().norm())
        kept = torch.stack(nodes).cpu()
        kept = kept if kept.dtype in (torch.float32, torch.float64) else kept.float()
    return Path(t, list(named), metrics, values, straight, arc, kept.numpy(), curve, training_t, training_loss)


def check_options(bends: int, curve: str, steps: int, lr: float, points: int, batch_norm: str) -> None:
    """Raise a `ValueError` for options of `connect` that make no sense."""
    for name, value, least in (("bends", bends, 1), ("steps", steps, 0), ("points", points, 2)):
        check_whole(name, value, least)
    check_positive("lr", lr)
    check_choice("curve", curve, get_args(Curve))
    check_choice("batch_norm", batch_norm, get_args(Statistics))


def read_ends(f: Objective, x_0: Point, x_1: Point, names: Sequence[str] = ("`x_0`", "`x_1`")) -> list[Place]:
    """Return copies of both ends, with the same buffers; raise a `ValueError` that names one which does not fit."""
    ends = [read_point(f, x, name) for x, name in zip((x_0, x_1), names, strict=True)]
    for end, name in zip(ends, names, strict=True):
        if not bool(torch.isfinite(end.vector).all()):
            raise ValueError(f"{name} has values that are not finite: no curve leads there.")
    own: dict[str, Tensor] = {**dict(f.module.named_parameters()), **dict(f.module.named_buffers())}
    names = list(dict.fromkeys(name for end in ends for name in end.rest))
    first, last = ({name: end.rest.get(name, own[name]).detach().clone() for name in names} for end in ends)
    for name in names:
        if isinstance(own[name], nn.Parameter) and not torch.equal(first[name], last[name]):
            raise ValueError(
                f"The ends have other values of {name!r}, which is no variable of the objective: let `parameters` choose it, "
                "and let it require a gradient."
            )
    return [Place(end.vector.clone(), rest) for end, rest in zip(ends, (first, last), strict=True)]


def _train(
    f: Objective,
    nodes: Sequence[Tensor],
    rest: Mapping[str, Tensor],
    curve: Curve,
    steps: int,
    lr: float,
    make_optimizer: Callable[..., torch.optim.Optimizer],
    seed: int,
    progress: bool,
) -> tuple[list[Tensor], np.ndarray, np.ndarray]:
    """Return bends, trained from those among the nodes, and each step's `t` and loss. Collective."""
    ts, losses = np.zeros(steps), np.zeros(steps)
    generator = torch.Generator().manual_seed(seed)
    batches = _shuffled(list(zip(f.sizes, f.batches, strict=True)), seed + 1)
    with f.session():
        for child in f.module.modules():
            if isinstance(child, nn.modules.batchnorm._BatchNorm):
                child.training = True  # the session puts it back
        bends = [nn.Parameter(x.clone()) for x in nodes[1:-1]]
        optimizer = make_optimizer(bends, lr=lr)
        schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda k: _rate(k / max(1, steps)))
        for k in tqdm(range(steps), desc="Training the path", leave=False, disable=not progress):
            t = float(torch.rand((), generator=generator, dtype=torch.float64))
            size, batch = next(batches)
            message = torch.zeros(f.dim + 2, dtype=f.wide, device=f.device)
            problem: Exception | None = None
            try:
                if size:
                    w = on_curve([nodes[0], *(bend.detach() for bend in bends), nodes[-1]], t, curve).requires_grad_()
                    loss = f.batch_loss(batch, {**f.tensors(w), **rest})
                    (slope,) = gradients(loss, [w])
                    if slope is not None:
                        message[:-2].add_(slope, alpha=size)
                    message[-2].add_(loss.detach(), alpha=size)
                    message[-1] = size
            except Exception as error:
                problem = error
            message = f.total(message, problem)
            g, mean = message[:-2] / message[-1], float(message[-2] / message[-1])
            if not (math.isfinite(mean) and bool(torch.isfinite(g).all())):  # the same on every rank
                raise ValueError(f"The loss on the path is not finite in step {k + 1}: make `lr` smaller than {lr:g}.")
            # d L(phi(t)) / d x_i = c_i(t) grad L(phi(t))
            for c, bend in zip(coefficients(t, len(bends), curve)[1:-1], bends, strict=True):
                bend.grad = (c * g).to(bend.dtype)
            optimizer.step()
            schedule.step()
            ts[k], losses[k] = t, mean
    return [bend.detach() for bend in bends], ts, losses


def _rate(done: float) -> float:
    """Return the factor of the learning rate after a part of the steps, as in the experiments of Garipov et al."""
    return 1.0 if done <= 0.5 else max(0.01, 1 - 0.99 * (done - 0.5) / 0.4)


def _shuffled(items: Sequence[tuple[int, Any]], seed: int) -> Iterator[tuple[int, Any]]:
    """Give sizes and batches without end, in a random order and then in another; sizes of zero where there is none."""
    generator = torch.Generator().manual_seed(seed)
    while True:
        yield from [items[k] for k in torch.randperm(len(items), generator=generator).tolist()] or [(0, None)]
