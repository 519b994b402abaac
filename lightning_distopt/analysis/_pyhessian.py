"""PyHessian's power iteration and trace, on our products with the curvature."""

from __future__ import annotations

import math

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_distopt.analysis.lanczos import Eigenpairs, check_options, error_bounds
from lightning_distopt.analysis.operators import CurvatureOperator
from lightning_distopt.analysis.trace import TraceEstimate
from lightning_distopt.communication.rng import isolated_streams, seed_streams

try:
    import pyhessian
except ModuleNotFoundError as missing:
    raise ModuleNotFoundError(
        "`engine='pyhessian'` needs the package of that name: pip install 'lightning-distopt[hessian]'"
    ) from missing

_LENGTH = 1e6  # of products: PyHessian divides by their norm plus 1e-6


class _NoModel:
    """Stands where PyHessian clears the gradients of the model."""

    def zero_grad(self) -> None:
        """Leave them."""


class PyHessian(pyhessian.hessian):
    """PyHessian with products that leave the model alone, over all batches and ranks.

    Its constructor, which runs a backward pass on the model and puts it into evaluation mode, is not called.

    Args:
        operator: products with the curvature.
        progress: whether a bar counts products.
    """

    def __init__(self, operator: CurvatureOperator, progress: bool = False) -> None:
        self._unit = 0.0  # the norm of the first product
        self._operator, self._bar = operator, tqdm(desc="PyHessian", leave=False, disable=not progress)
        # What its methods read:
        self.full_dataset = True
        self.model = _NoModel()
        self.device = operator.device
        self.params = [operator.objective.vector().to(operator.objective.wide)]  # all in one

    def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
        """Return the Rayleigh quotient, as a part of the norm of the first product, and the product with a large norm.

        PyHessian adds 1e-6 to norms and eigenvalues before it divides by them. That is nothing, then.
        """
        quotient, product = self._product(v)
        length = float(product.norm())
        self._unit = self._unit or length
        if length > 0:
            quotient, product = quotient / self._unit, product * (_LENGTH / length)
        return quotient, [product]

    def _product(self, v: list[Tensor]) -> tuple[float, Tensor]:
        product = self._operator.matvec(v[0])
        vector = v[0].to(product)
        self._bar.update()
        squared = float(vector @ vector)
        # v^T H v / v^T v
        return float(vector @ product) / squared if squared > 0 else 0.0, product


class _Trace(PyHessian):
    def dataloader_hv_product(self, v: list[Tensor]) -> tuple[float, list[Tensor]]:
        """Return the Rayleigh quotient, and the product as it is."""
        quotient, product = self._product(v)
        return quotient, [product]


def power_iteration(
    operator: CurvatureOperator,
    k: int = 5,
    tol: float = 1e-3,
    seed: int = 0,
    max_products: int | None = None,
    progress: bool = True,
) -> Eigenpairs:
    """Return the eigenvalues of largest magnitude by PyHessian's power iteration with deflation.

    It ends where two Rayleigh quotients in a row agree to `tol`, which says little of the error; one more product for each
    vector gives the eigenvalues that are returned, their residuals and errors.

    Args:
        operator: products with the curvature.
        k: number of eigenvalues.
        tol: relative change of an eigenvalue to stop at.
        seed: of the random starts.
        max_products: `max_products / k` for each eigenvalue; None: 100 for each.
        progress: whether a bar counts products.
    """
    check_options(k, "LM", tol, max_products)
    k, before = min(k, operator.dim), operator.products
    most = 100 if max_products is None else max(2, max_products // k)
    with isolated_streams(operator.device):
        seed_streams(seed, operator.device)
        engine = PyHessian(operator, progress)
        _, found = engine.eigenvalues(maxIter=most, tol=tol, top_n=k)
        rows = torch.linalg.qr(torch.stack([vector for (vector,) in found]).double().T)[0].T
    images = torch.stack([operator.matvec(row) for row in rows]).double()
    theta = (rows * images).sum(dim=1).cpu().numpy()
    residuals = (images - torch.from_numpy(theta).to(rows)[:, None] * rows).norm(dim=1).cpu().numpy()
    order = np.argsort(theta)[::-1]
    theta, residuals = theta[order], residuals[order]
    errors = error_bounds(theta, residuals)
    converged = bool((errors <= tol * np.abs(theta)).all())
    vectors = rows[torch.from_numpy(order.copy())].to(operator.device, operator.dtype)
    return Eigenpairs(theta, vectors, residuals, errors, operator.products - before, converged)


def hutchinson(operator: CurvatureOperator, products: int, seed: int = 0, progress: bool = True) -> TraceEstimate:
    """Return PyHessian's estimate of the trace; with a tolerance that is never met it can't stop early.

    Args:
        operator: products with the curvature.
        products: number of samples.
        seed: of the random vectors.
        progress: whether a bar counts products.
    """
    with isolated_streams(operator.device):
        seed_streams(seed, operator.device)
        samples = np.array(_Trace(operator, progress).trace(maxIter=products, tol=-math.inf))
    return TraceEstimate(float(samples.mean()), float(samples.std(ddof=1) / math.sqrt(products)), samples, products)
