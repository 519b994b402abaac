"""What eigenvalues of the Hessian cost, in products with vectors, and what a product costs; ResNet-20 on deformed digits.

- Products for the five eigenvalues of largest magnitude, within a relative error of 1e-3 each: Lanczos, which stops by itself,
  against the power iteration of PyHessian at the loosest tolerance of a ladder with which it is as good. So PyHessian is told
  when to stop by one who knows the eigenvalues, and Lanczos is not; where Lanczos stops too early, its run counts as zero
  times better. Where no tolerance of the ladder is enough, the products of the tightest count. The ratio with a bar is that
  to PyHessian's own class, as one uses it; `engine="pyhessian"`, which does the same on the package's products and checks its
  result with one more for each eigenvalue, is beside it. The points are those of a short training, with the running statistics
  of batch norm; the eigenvalues that count as true are Lanczos's with a tolerance of 1e-9, in double precision. The processes
  of this part share the cores, as no time is measured. Without `pyhessian` there are figures of Lanczos only.
- A product with kept graphs over one that builds them anew, and the resident memory of the kept ones.
- A product on two processes with half of the batches each, over one on one process with all of them.
- The losses of a grid over a random plane, whose points two processes share, over the same on one, and whether they agree.

Times are the processes' own (see the harness), each process with one thread on one core, the sides in turns.
"""

from __future__ import annotations

import copy
import importlib.util
import sys
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import (
    Estimate,
    Report,
    Team,
    Turns,
    estimate,
    fix_malloc,
    interleave,
    main,
    memory,
    now,
    own_seconds,
    progress,
    ratio,
)
from lightning_distopt.analysis import CurvatureOperator, Objective, lanczos, landscape_2d
from lightning_distopt.data import load_deformed_digits
from lightning_distopt.models import resnet20

K, ERROR, CONVERGED = 5, 1e-3, 1e-9
LADDER = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
MOST = 200  # products of PyHessian for each eigenvalue, twice its default
PRODUCTS, KEPT, TWO_PROCESSES, AGREEMENT = 3.0, 0.7, 0.6, 1e-10


@dataclass(frozen=True)
class Settings:
    """Seeds of Lanczos, and of PyHessian too; steps of training before a measurement; pairs of products and of grids.

    Args:
        seeds: of Lanczos at every point.
        pairs_of_seeds: the first so many of them are PyHessian's too.
        steps: of training, batches of 64.
        product_pairs, grid_pairs: turns.
        images: that the loss is measured on, in two batches.
        grid: points on each side of the plane.
        network: without its options.
    """

    seeds: int
    pairs_of_seeds: int
    steps: Sequence[int]
    product_pairs: int
    grid_pairs: int
    images: int = 256
    grid: int = 5
    network: Callable[..., nn.Module] = resnet20


FULL = Settings(seeds=20, pairs_of_seeds=5, steps=(0, 50, 200, 600), product_pairs=25, grid_pairs=20)
QUICK = Settings(seeds=2, pairs_of_seeds=1, steps=(50,), product_pairs=6, grid_pairs=4, images=64, grid=3)


def run(report: Report, settings: Settings) -> None:
    """Measure everything."""
    times(report, settings)
    if not importlib.util.find_spec("pyhessian"):
        print("pyhessian is not installed: Lanczos is compared with nothing (pip install 'lightning-distopt[hessian]').")
    products(report, settings)


def mean_loss(module: nn.Module, batch: Any) -> Tensor:
    """Return the loss of a batch."""
    images, targets = batch
    return cross_entropy(module(images), targets)


def digits(most: int) -> tuple[Tensor, Tensor]:
    """Return images and classes."""
    arrays = load_deformed_digits()
    return arrays.train_images[:most].unsqueeze(1) / 255 - 0.5, arrays.train_targets[:most]


def batches(settings: Settings, dtype: torch.dtype = torch.float32) -> list[tuple[Tensor, Tensor]]:
    """Return what the loss is measured on."""
    images, targets = digits(settings.images)
    return list(zip(images.to(dtype).chunk(2), targets.chunk(2), strict=True))


# -------------------------------------------------------------------------------------------------------------- products
@dataclass
class Stop:
    """How a solver ended: products, and the largest relative error of an eigenvalue."""

    products: int
    error: float


def train(settings: Settings, steps: int, batch: int = 64) -> nn.Module:
    """Return the network after some steps of training."""
    torch.manual_seed(0)
    network = settings.network(in_channels=1)
    images, targets = digits(64 * batch)
    optimizer = torch.optim.SGD(network.parameters(), lr=0.05, momentum=0.9, weight_decay=1e-4)
    for step in range(steps):
        if step % 64 == 0:
            order = torch.randperm(len(images)).split(batch)
        rows = order[step % 64]
        optimizer.zero_grad()
        mean_loss(network, (images[rows], targets[rows])).backward()
        optimizer.step()
    return network.eval()


def own_class(network: nn.Module, data: Any, tol: float, seed: int) -> tuple[Sequence[float], int]:
    """Return eigenvalues by PyHessian's own class, and the products."""
    from pyhessian import hessian

    class Counted(hessian):  # type: ignore[misc]
        products = 0

        def dataloader_hv_product(self, v: Any) -> Any:
            self.products += 1
            return super().dataloader_hv_product(v)

    torch.manual_seed(seed)
    solver = Counted(copy.deepcopy(network), cross_entropy, dataloader=data, cuda=False)
    values, _ = solver.eigenvalues(maxIter=MOST, tol=tol, top_n=K)
    return values, solver.products


def engine(network: nn.Module, data: Any, tol: float, seed: int) -> tuple[Sequence[float], int]:
    """Return eigenvalues by the package's engine of that name, and the products."""
    from lightning_distopt.analysis._pyhessian import power_iteration

    operator = CurvatureOperator(Objective(network, mean_loss, data))
    found = power_iteration(operator, K, tol, seed, max_products=K * MOST, progress=False)
    return found.values, found.products


CONTENDERS = {"PyHessian": own_class, "its engine": engine}


def solve(turns: Turns, settings: Settings) -> None:
    """Find the eigenvalues at one point of training, with another seed in each turn."""
    network, data = train(settings, settings.steps[turns.index]), batches(settings)
    precise = Objective(copy.deepcopy(network).double(), mean_loss, batches(settings, torch.float64))
    operator = CurvatureOperator(Objective(network, mean_loss, data))
    true: np.ndarray | None = None

    def stop(values: Any, products: int) -> Stop:
        return Stop(products, float(np.max(np.abs(np.sort(values) - np.sort(true)) / np.abs(np.sort(true)))))

    def ladder(contender: Callable[..., Any], seed: int) -> Stop:
        ends: Iterator[Stop] = (stop(*contender(network, data, tol, seed)) for tol in LADDER)
        end = next(ends)
        while end.error > ERROR and (tighter := next(ends, None)):
            end = tighter
        return end

    for seed in count():
        turns.wait()
        if true is None:
            true = lanczos(CurvatureOperator(precise), K, "LM", CONVERGED, max_products=1000, progress=False).values
        found = lanczos(operator, K, "LM", ERROR, seed, progress=False)
        stops = {"Lanczos": stop(found.values, found.products)}
        if seed < settings.pairs_of_seeds and importlib.util.find_spec("pyhessian"):
            stops |= {name: ladder(contender, seed) for name, contender in CONTENDERS.items()}
        turns.report_value((true, stops))


def products(report: Report, settings: Settings) -> None:
    """Compare the products that solvers need."""
    with Team("eigenvalues", partial(solve, settings=settings), size=len(settings.steps)) as team:
        laps = []
        for k in range(settings.seeds):
            progress("eigenvalues", k, settings.seeds)
            laps.append(team.turn(timeout=6 * 3600))
        progress("eigenvalues", settings.seeds, settings.seeds)
    ratios: dict[str, list[float]] = {name: [] for name in CONTENDERS}
    for at, steps in enumerate(settings.steps):
        seeds = [turn[at].value[1] for turn in laps]
        print(f"after {steps} steps: {laps[0][at].value[0]}", *seeds, sep="\n  ", file=sys.stderr)
        for name in seeds[0]:
            ends = [stops[name] for stops in seeds if name in stops]
            report.figure(f"after {steps} steps: products of {name}", estimate([end.products for end in ends]), "")
            if name in CONTENDERS:
                ratios[name] += [
                    end.products / stops["Lanczos"].products * (stops["Lanczos"].error <= ERROR)
                    for end, stops in zip(ends, seeds, strict=False)
                ]
    own = [turn[at].value[1]["Lanczos"].error for turn in laps for at in range(len(settings.steps))]
    report.figure("relative error of Lanczos", estimate(own), "")
    missed = float(np.mean([error > ERROR for error in own]))
    report.figure(f"part of {len(own)} runs of Lanczos with an error above {ERROR:g}", Estimate(missed, missed, missed), "")
    if ratios["PyHessian"]:
        report.bar("curvature: products of PyHessian over Lanczos", estimate(ratios["PyHessian"]), PRODUCTS, at_least=True)
        report.figure("products of PyHessian's engine over Lanczos", estimate(ratios["its engine"]))


# ----------------------------------------------------------------------------------------------------------------- times
def multiply(turns: Turns, settings: Settings, keep: bool = False) -> None:
    """Multiply the Hessian with one vector in a turn; tell by how much the first product has enlarged the process."""
    fix_malloc()
    reduce = dist.all_reduce if turns.size > 1 else None
    if reduce is not None:
        turns.connect()
    mine = batches(settings)[turns.index :: turns.size]
    f = Objective(settings.network(in_channels=1), mean_loss, mine, reduce=reduce)
    vector = torch.randn(f.dim)
    CurvatureOperator(f).matvec(vector)
    operator, before = CurvatureOperator(f, keep_graph=keep), memory(peak=False)
    operator.matvec(vector)
    grown = memory(peak=False) - before
    while True:
        turns.wait()
        start = now()
        operator.matvec(vector)
        turns.report(start, now(), grown)


def survey(turns: Turns, settings: Settings) -> None:
    """Measure a grid in a turn, and tell the losses."""
    reduce = dist.all_reduce if turns.size > 1 else None
    if reduce is not None:
        turns.connect()
    f = Objective(settings.network(in_channels=1), mean_loss, batches(settings), reduce=reduce)
    while True:
        turns.wait()
        start = now()
        losses = landscape_2d(f, points=settings.grid, shard="points", progress=False).grid()
        turns.report(start, now(), losses)


def times(report: Report, settings: Settings) -> None:
    """Compare products, and grids."""
    teams = {
        "rebuilt": Team("rebuilt", partial(multiply, settings=settings)),
        "kept": Team("kept", partial(multiply, settings=settings, keep=True)),
        "two processes": Team("two processes", partial(multiply, settings=settings), size=2),
    }
    laps = interleave("products", teams, settings.product_pairs)
    seconds = {name: own_seconds(turns) for name, turns in laps.items()}
    report.figure("a product that builds its graphs", estimate([1e3 * t for t in seconds["rebuilt"]]), "ms")
    report.bar("curvature: a product with kept graphs over rebuilt ones", ratio(seconds["kept"], seconds["rebuilt"]), KEPT)
    report.figure(f"memory of the kept graphs of {settings.images} images", estimate([laps["kept"][0][0].value]), "MiB")
    on_two = ratio(seconds["two processes"], seconds["rebuilt"])
    report.bar("curvature: a product on two processes over one", on_two, TWO_PROCESSES)

    sizes = {"one process": 1, "two processes": 2}
    teams = {name: Team(name, partial(survey, settings=settings), size=size) for name, size in sizes.items()}
    laps = interleave("grids", teams, settings.grid_pairs)
    seconds = {name: own_seconds(turns) for name, turns in laps.items()}
    alone, *shared = (lap.value for name in sizes for lap in laps[name][0])
    difference = max(float(np.max(np.abs(losses / alone - 1))) for losses in shared)
    report.figure(f"a grid of {settings.grid}x{settings.grid} on one process", estimate([1e3 * t for t in seconds["one process"]]), "ms")
    report.figure("a grid on two processes over one", ratio(seconds["two processes"], seconds["one process"]))
    report.bar("curvature: relative difference of the grids", estimate([difference]), AGREEMENT)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("curvature", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
