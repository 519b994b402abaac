"""The density of a spectrum by stochastic Lanczos quadrature."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch
from tqdm.auto import tqdm

from lightning_distopt.analysis.lanczos import KrylovBasis
from lightning_distopt.analysis.operators import SymmetricOperator
from lightning_distopt.options import check_part, check_whole


@dataclass
class Density:
    r"""How the eigenvalues of a matrix are distributed.

    Example:
        >>> nodes, weights = np.array([1.0, 3.0]), np.array([0.75, 0.25])
        >>> found = Density(np.zeros(0), np.zeros(0), nodes, weights, width=0.02, products=2)
        >>> found.moment(1)  # of 100 eigenvalues, the trace is 150
        1.5

    Attributes:
        grid: `[points]`, eigenvalues.
        values: `[points]`, the density there, with Gaussians of standard deviation `width` in place of points.
        nodes: `[probes * steps]` at most, eigenvalues before that.
        weights: of the nodes; they sum to one.
        width: of the Gaussians.
        products: with the matrix.
    """

    grid: np.ndarray
    values: np.ndarray
    nodes: np.ndarray
    weights: np.ndarray
    width: float
    products: int

    def moment(self, order: int) -> float:
        """Return the mean of the eigenvalues' powers; the first times `d` estimates the trace."""
        return float(self.weights @ self.nodes**order)


def spectral_density(
    operator: SymmetricOperator,
    steps: int = 80,
    probes: int = 5,
    width: float = 0.01,
    points: int = 1024,
    reorthogonalize: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Density:
    r"""Return the density of a spectrum.

    For each random `v` of signs, scaled to `|v| = 1`, Lanczos from `v` gives the tridiagonal `T`, and its eigenvalues
    `theta_i`, with the first entries `tau_i` of its eigenvectors, a Gauss quadrature:

    $$ v^\top f(H) v \approx \sum_i \tau_i^2 f(\theta_i), \qquad
       \rho(x) = \frac1n \sum_{v} \sum_i \tau_i^2 \, \mathcal N(x; \theta_i, \sigma^2) $$

    which is exact for polynomials up to degree `2 steps - 1`: the first moment is the mean of `v^T H v`, Hutchinson's estimate
    of the trace over `d`, the second that of `v^T H^2 v`. Memory: `steps` vectors of `d` for one probe at a time. Without
    reorthogonalisation three, and then the same eigenvalues come up again and again, with their weight shared among them.

    Example:
        >>> from lightning_distopt.analysis import CurvatureOperator, Objective
        >>> bowl = torch.nn.Linear(50, 1, bias=False).double()
        >>> f = Objective(
        ...     bowl, lambda net, x: (net.weight**2 @ x).sum() / 2, [torch.arange(50.0).double()], size_of=lambda x: 1
        ... )
        >>> found = spectral_density(CurvatureOperator(f), steps=10, probes=2, progress=False)
        >>> round(found.moment(1), 3), round(float(found.values.sum() * (found.grid[1] - found.grid[0])), 6)
        (24.5, 1.0)

    Args:
        operator: products with the matrix.
        steps: products for each probe.
        probes: number of random vectors.
        width: standard deviation of the Gaussians, as a part of the spectrum's range.
        points: of the grid, which reaches six widths beyond the spectrum.
        reorthogonalize: whether each vector is made orthogonal to all before.
        seed: of the probes.
        progress: whether a bar counts products.

    Raises:
        ValueError: for options that make no sense.

    Reference:
        Ubaru, Chen, Saad: Fast estimation of tr(f(A)) via stochastic Lanczos quadrature. SIAM J. Matrix Anal. 38, 2017.
        Ghorbani, Krishnan, Xiao: An investigation into neural net optimization via Hessian eigenvalue density. ICML 2019.
    """
    check_whole("steps", steps)
    check_whole("probes", probes)
    # With a point to each width, sums over the grid are integrals to eight digits.
    if check_whole("points", points) < 12 + 1 / check_part("width", width):
        raise ValueError(
            f"The grid must resolve the Gaussians: `points` must be at least 12 + 1 / width; got {points!r} for {width!r}."
        )
    generator = torch.Generator().manual_seed(seed)
    nodes, weights, products = [], [], 0
    with tqdm(total=steps * probes, desc="Density", leave=False, disable=not progress) as bar:
        for _ in range(probes):
            signs = torch.randint(0, 2, (operator.dim,), generator=generator) * 2.0 - 1
            basis = KrylovBasis(operator, generator, signs, reorthogonalize)
            for _ in range(min(steps, operator.dim)):
                basis.step()
                bar.update()
                # Then the vectors span an invariant subspace, and the quadrature is exact for all functions.
                if operator.agreed(basis.exhausted):
                    break
            theta, s = basis.ritz()
            nodes.append(theta)
            weights.append(s[0] ** 2 / probes)
            products += basis.size
    found, shares = np.concatenate(nodes), np.concatenate(weights)
    low, high = float(found.min()), float(found.max())
    sigma = width * (high - low or abs(high) or 1.0)
    grid = np.linspace(low - 6 * sigma, high + 6 * sigma, points)
    values = np.zeros(points)
    for theta_i, share in zip(found, shares, strict=True):
        # tau_i^2 N(x; theta_i, sigma^2) / n
        values += share * np.exp(-((grid - theta_i) ** 2) / (2 * sigma**2)) / (sigma * np.sqrt(2 * np.pi))
    return Density(grid, values, found, shares, sigma, products)
