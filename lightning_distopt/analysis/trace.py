"""Traces from products with random vectors, and how sure they are."""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal, get_args

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_distopt.analysis.operators import SymmetricOperator
from lightning_distopt.options import check_choice, check_positive, check_whole

TraceMethod = Literal["hutchinson", "hutch++"]

_PILOT = 10  # samples that tell how many are needed


@dataclass
class TraceEstimate:
    """A trace.

    Example:
        >>> found = TraceEstimate(mean=14.0, standard_error=1.0, samples=np.array([13.0, 15.0]), products=2)
        >>> f"{found.mean:g} +- {2 * found.standard_error:g}"
        '14 +- 2'

    Attributes:
        mean: the estimate.
        standard_error: of the mean, from the samples.
        samples: `[n]`, independent, each with the trace as its expectation; `mean` is theirs.
        products: with the matrix.
    """

    mean: float
    standard_error: float
    samples: np.ndarray
    products: int


def estimate_trace(
    operator: SymmetricOperator,
    products: int = 99,
    method: TraceMethod = "hutch++",
    error: float | None = None,
    seed: int = 0,
    progress: bool = True,
) -> TraceEstimate:
    r"""Estimate the trace of a matrix without bias.

    $$ \text{Hutchinson:}\quad \frac1n \sum_j z_j^\top H z_j \qquad \text{Hutch++:}\quad
       \mathrm{tr}(Q^\top H Q) + \frac{1}{n} \sum_j z_j^\top (I - QQ^\top) H (I - QQ^\top) z_j $$

    with signs `z_j`, and in the second `Q` an orthonormal basis of `H S`, `S` random signs too: a third of the products each
    for `H S`, `H Q` and the samples. What `Q` holds, outliers foremost, has no variance left. Memory: two vectors for
    Hutchinson, a third of `products` for Hutch++.

    **Until an error is reached.** To stop as soon as the samples so far look precise enough biases the mean, since it stops
    where they happen to agree, and that goes with their values. Here ten samples alone decide, by their variance `s^2`, how
    many fresh ones there will be, `n = (s / (error |mean|))^2`, and are then thrown away: those `n` know nothing of the
    decision (Stein's two stages), and every one of them counts.

    Example:
        >>> from lightning_distopt.analysis import CurvatureOperator, Objective
        >>> bowl = torch.nn.Linear(50, 1, bias=False).double()
        >>> f = Objective(bowl, lambda net, x: (net.weight**2 @ x).sum() / 2, [torch.ones(50).double()], size_of=lambda x: 1)
        >>> estimate_trace(CurvatureOperator(f), products=9, method="hutchinson", progress=False).mean
        50.0

    Args:
        operator: products with the matrix.
        products: their number, or with `error` the largest.
        method: "hutchinson" or "hutch++".
        error: standard error of the mean to reach, as a part of the trace; None: spend all products.
        seed: of the random vectors.
        progress: whether a bar counts products.

    Raises:
        ValueError: for options that make no sense.

    Reference:
        Hutchinson: A stochastic estimator of the trace of the influence matrix. Comm. Stat. Sim. 19, 1990.
        Meyer, Musco, Musco, Woodruff: Hutch++: Optimal stochastic trace estimation. SOSA 2021, algorithm 1.
    """
    check_choice("method", method, get_args(TraceMethod))
    if error is not None:
        check_positive("error", error)
    pilot = 0 if error is None else _PILOT
    least = (6 if method == "hutch++" else 2) + pilot
    if check_whole("products", products) < least:
        raise ValueError(f"A trace with a standard error takes {least} products at least; got `products={products}`.")
    rank = min((products - pilot) // 3, operator.dim) if method == "hutch++" else 0
    generator = torch.Generator().manual_seed(seed)
    with tqdm(total=products, desc="Trace", leave=False, disable=not progress) as bar:

        def multiply(vector: Tensor) -> Tensor:
            bar.update()
            return operator.matvec(vector)

        basis, held = _sketch(operator, rank, generator, multiply)

        def sample() -> float:
            z = _signs(operator, generator)
            z = z - basis.T @ (basis @ z)
            # tr(Q^T H Q) + z^T (I - QQ^T) H (I - QQ^T) z
            return held + float(z.double() @ multiply(z).double())

        spent = pilot + 2 * rank
        needed = count = products - spent
        if error is not None:
            first = np.array([sample() for _ in range(pilot)])
            wanted = error * abs(first.mean())
            needed = math.ceil(min(first.var(ddof=1) / wanted**2, count)) if wanted > 0 else count
        drawn: list[float] = []
        while len(drawn) < count and not (len(drawn) >= 2 and operator.agreed(len(drawn) >= needed)):
            drawn.append(sample())
    samples = np.array(drawn)
    mean, spread = float(samples.mean()), float(samples.std(ddof=1))
    return TraceEstimate(mean, spread / math.sqrt(len(samples)), samples, spent + len(samples))


def _sketch(
    operator: SymmetricOperator, rank: int, generator: torch.Generator, multiply: Callable[[Tensor], Tensor]
) -> tuple[Tensor, float]:
    """Return an orthonormal basis `Q` of `H S`, as rows, and `tr(Q^T H Q)`."""
    if rank == 0:
        return _signs(operator, generator).new_zeros(0, operator.dim), 0.0
    image = torch.stack([multiply(_signs(operator, generator)) for _ in range(rank)])
    basis = torch.linalg.qr(image.T)[0].T
    return basis, sum(float(row.double() @ multiply(row).double()) for row in basis)


def _signs(operator: SymmetricOperator, generator: torch.Generator) -> Tensor:
    drawn = torch.randint(0, 2, (operator.dim,), generator=generator) * 2 - 1
    return drawn.to(operator.device, torch.promote_types(operator.dtype, torch.float32))
