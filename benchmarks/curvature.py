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
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from functools import partial
from itertools import count
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.nn.functional import cross_entropy

from benchmarks.harness import Team, Turns, fix_malloc, interleave, memory, now, own_seconds
from benchmarks.report import Report, estimate, main, progress, ratio
from lightning_distopt.analysis import CurvatureOperator, Objective, lanczos, landscape_2d
from lightning_distopt.data import load_deformed_digits
from lightning_distopt.models import resnet8, resnet20

K, ERROR, CONVERGED = 5, 1e-3, 1e-9
LADDER = (1e-1, 3e-2, 1e-2, 3e-3, 1e-3, 3e-4, 1e-4, 3e-5, 1e-5, 3e-6, 1e-6)
PATIENCE = 6 * 3600.0  # seconds for a turn of all solvers
PRODUCTS, KEPT, TWO_PROCESSES, AGREEMENT = 3.0, 0.7, 0.6, 1e-10


@dataclass(frozen=True)
class Settings:
    """Seeds of Lanczos, of which the first are PyHessian's too; steps of training before a measurement; pairs of turns; images
    that the loss is measured on, in two batches; points on each side of the grid; tolerances of PyHessian, and the most
    products for each eigenvalue, twice its default; the network.
    """

    seeds: int
    paired_seeds: int
    steps: Sequence[int]
    product_pairs: int
    grid_pairs: int
    images: int = 256
    grid: int = 5
    ladder: Sequence[float] = LADDER
    most: int = 200
    network: Callable[..., nn.Module] = resnet20


FULL = Settings(seeds=20, paired_seeds=3, steps=(0, 50, 200, 600), product_pairs=25, grid_pairs=20)
QUICK = Settings(
    seeds=2, paired_seeds=1, steps=(50,), product_pairs=6, grid_pairs=4, images=32, grid=3, ladder=LADDER[::2], network=resnet8
)


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
class End:
    """What a solver needed and reached: products, and the largest relative error of an eigenvalue."""

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


def own_class(network: nn.Module, data: Any, tol: float, seed: int, most: int) -> tuple[Sequence[float], int]:
    """Return eigenvalues by PyHessian's own class, and the products."""
    from pyhessian import hessian

    class Counted(hessian):  # type: ignore[misc]
        products = 0

        def dataloader_hv_product(self, v: Any) -> Any:
            self.products += 1
            return super().dataloader_hv_product(v)

    torch.manual_seed(seed)
    solver = Counted(copy.deepcopy(network), cross_entropy, dataloader=data, cuda=False)
    values, _ = solver.eigenvalues(maxIter=most, tol=tol, top_n=K)
    return values, solver.products


def engine(network: nn.Module, data: Any, tol: float, seed: int, most: int) -> tuple[Sequence[float], int]:
    """Return eigenvalues by the package's engine of that name, and the products."""
    from lightning_distopt.analysis._pyhessian import power_iteration

    operator = CurvatureOperator(Objective(network, mean_loss, data))
    found = power_iteration(operator, K, tol, seed, max_products=K * most, progress=False)
    return found.values, found.products


CONTENDERS = {"PyHessian": own_class, "the engine": engine}


def solve(turns: Turns, settings: Settings) -> None:
    """Find the eigenvalues at one point of training, with another seed in each turn; tell of each solver how it ended."""
    network, data = train(settings, settings.steps[turns.index]), batches(settings)
    operator = CurvatureOperator(Objective(network, mean_loss, data))
    precise = Objective(copy.deepcopy(network).double(), mean_loss, batches(settings, torch.float64))
    true: np.ndarray | None = None

    def end(values: Any, products: int) -> End:
        assert true is not None
        return End(products, float(np.max(np.abs(np.sort(values)[::-1] - true) / np.abs(true))))

    def climb(contender: Callable[..., Any], seed: int) -> End:
        for tol in settings.ladder:
            reached = end(*contender(network, data, tol, seed, settings.most))
            if reached.error <= ERROR:
                break
        return reached

    for seed in count():
        turns.wait()
        if true is None:
            reference = lanczos(CurvatureOperator(precise), K, "LM", CONVERGED, max_products=1000, progress=False)
            assert reference.converged
            true = reference.values
        found = lanczos(operator, K, "LM", ERROR, seed, progress=False)
        ends = {"Lanczos": end(found.values, found.products)}
        if seed < settings.paired_seeds and importlib.util.find_spec("pyhessian"):
            ends |= {name: climb(contender, seed) for name, contender in CONTENDERS.items()}
        turns.report_value(ends)


def products(report: Report, settings: Settings) -> None:
    """Compare the products that solvers need."""
    runs: dict[int, list[dict[str, End]]] = {steps: [] for steps in settings.steps}
    with Team("eigenvalues", partial(solve, settings=settings), size=len(runs)) as team:
        for k in range(settings.seeds):
            progress("eigenvalues", k, settings.seeds)
            for ends, lap in zip(runs.values(), team.turn(timeout=PATIENCE), strict=True):
                ends.append(lap.value)
    progress("eigenvalues", settings.seeds, settings.seeds)
    for steps, ends in runs.items():
        for name in ends[0]:
            needed = [end[name].products for end in ends if name in end]
            report.figure(f"after {steps} steps: products of {name}", estimate(needed), "")
    every = [end for ends in runs.values() for end in ends]
    errors = [end["Lanczos"].error for end in every]
    missed = float(np.mean([error > ERROR for error in errors]))
    report.figure("relative error of Lanczos", estimate([error / ERROR for error in errors]), f"* {ERROR:g}")
    report.figure("the largest", estimate([max(errors) / ERROR]), f"* {ERROR:g}")
    report.figure(f"{len(errors)} runs of Lanczos: part that stops with a larger error", estimate([missed]), "")
    for name in [name for name in CONTENDERS if name in every[0]]:
        paired = [end for end in every if name in end]
        fewer = estimate([end[name].products / end["Lanczos"].products * (end["Lanczos"].error <= ERROR) for end in paired])
        if name == "PyHessian":
            report.bar("curvature: products of PyHessian over Lanczos", fewer, PRODUCTS, at_least=True)
        else:
            report.figure(f"products of {name} over Lanczos", fewer)


# ----------------------------------------------------------------------------------------------------------------- times
def objective(turns: Turns, settings: Settings, share: bool = False) -> Objective:
    """Return the loss over all batches, or over a share of them on each process."""
    if turns.size > 1:
        turns.connect()
    mine = batches(settings)[turns.index :: turns.size] if share else batches(settings)
    reduce = dist.all_reduce if turns.size > 1 else None
    return Objective(settings.network(in_channels=1), mean_loss, mine, reduce=reduce)


def multiply(turns: Turns, settings: Settings, keep: bool = False) -> None:
    """Multiply the Hessian with one vector in a turn."""
    operator = CurvatureOperator(objective(turns, settings, share=True), keep_graph=keep)
    vector = torch.randn(operator.dim)
    while True:
        turns.wait()
        start = now()
        operator.matvec(vector)
        turns.report(start, now())


def hold(turns: Turns, settings: Settings) -> None:
    """Tell by how many MiB the graphs that are kept enlarge the process."""
    fix_malloc()
    f = objective(turns, settings)
    vector = torch.randn(f.dim)
    CurvatureOperator(f).matvec(vector)
    while True:
        turns.wait()
        before, operator = memory(peak=False), CurvatureOperator(f, keep_graph=True)
        operator.matvec(vector)
        turns.report_value(memory(peak=False) - before)
        operator.release()


def survey(turns: Turns, settings: Settings) -> None:
    """Measure a grid in a turn, and tell the losses."""
    f = objective(turns, settings)
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
    with Team("memory", partial(hold, settings=settings)) as team:
        report.figure(f"memory of the kept graphs of {settings.images} images", estimate([team.turn()[0].value]), "MiB")
    on_two = ratio(seconds["two processes"], seconds["rebuilt"])
    report.bar("curvature: a product on two processes over one", on_two, TWO_PROCESSES)

    sizes = {"one process": 1, "two processes": 2}
    teams = {name: Team(name, partial(survey, settings=settings), size=size) for name, size in sizes.items()}
    laps = interleave("grids", teams, settings.grid_pairs)
    seconds = {name: own_seconds(turns) for name, turns in laps.items()}
    alone, *shared = (lap.value for name in sizes for lap in laps[name][0])
    difference = max(float(np.max(np.abs(losses / alone - 1))) for losses in shared)
    side = settings.grid
    report.figure(f"a grid of {side}x{side} on one process", estimate([1e3 * t for t in seconds["one process"]]), "ms")
    report.figure("a grid on two processes over one", ratio(seconds["two processes"], seconds["one process"]))
    report.bar("curvature: relative difference of the grids", estimate([difference]), AGREEMENT)


def cli(argv: Sequence[str] | None = None) -> None:
    """Run from the command line."""
    main("curvature", run, FULL, QUICK, argv)


if __name__ == "__main__":
    cli()
