"""Extreme eigenvalues by LOBPCG, which finds multiplicities and can start from earlier eigenvectors."""

from __future__ import annotations

import warnings
from typing import Literal

import numpy as np
import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_distopt.analysis.lanczos import Eigenpairs, check_options, error_bounds, warn_unconverged
from lightning_distopt.analysis.operators import SymmetricOperator

_GUARDS = 2  # vectors beyond the wanted ones: they make the last of those converge, and tell its gap
_ITERATIONS = 10  # between two looks at the errors


def lobpcg(
    operator: SymmetricOperator,
    k: int = 5,
    which: Literal["LA", "SA"] = "LA",
    tol: float = 1e-3,
    seed: int = 0,
    max_products: int | None = None,
    start: Tensor | None = None,
    progress: bool = True,
) -> Eigenpairs:
    """Return eigenvalues at one end of a spectrum by SciPy's block method, with their multiplicities.

    It takes several times as many products as `lanczos`, with memory for `6 (k + 2)` vectors only. Errors are estimated by
    residual and gap, as there, after every ten iterations. The vectors are `float64`, in the memory of the CPU.

    Example:
        >>> from lightning_distopt.analysis import CurvatureOperator, Objective
        >>> bowl = torch.nn.Linear(60, 1, bias=False).double()
        >>> curvatures = torch.cat([torch.tensor([9.0, 9.0, 5.0]), torch.linspace(-0.1, 0.1, 57)]).double()
        >>> f = Objective(bowl, lambda net, x: (net.weight**2 @ x).sum() / 2, [curvatures], size_of=lambda x: 1)
        >>> lobpcg(CurvatureOperator(f), k=3, tol=1e-6, progress=False).values.round(3)
        array([9., 9., 5.])

    Args:
        operator: products with the matrix.
        k: number of eigenvalues; all `d` where that is less.
        which: "LA" or "SA", the largest or the smallest.
        tol: relative error of each value.
        seed: of the random start.
        max_products: after which it gives up, with a warning; None: `100 + 200 k`. Where `d <= 5 (k + 2)`, the whole
            matrix is made instead, by `d` products.
        start: `[n, d]`, vectors to start from, such as `Eigenpairs.vectors` of a while ago.
        progress: whether a bar counts products.

    Raises:
        ModuleNotFoundError: without SciPy.
        ValueError: for options that make no sense.

    Reference:
        Knyazev: Toward the optimal preconditioned eigensolver. SIAM J. Sci. Comput. 23, 2001.
    """
    check_options(k, which, tol, max_products)
    if which not in ("LA", "SA"):
        raise ValueError(f"LOBPCG finds one end of the spectrum: use `which='LA'` or 'SA', or Lanczos for {which!r}.")
    try:
        from scipy.sparse.linalg import LinearOperator
        from scipy.sparse.linalg import lobpcg as iterate
    except ModuleNotFoundError as error:
        raise ModuleNotFoundError("LOBPCG needs SciPy: pip install 'lightning-distopt[hessian]'") from error
    d, k = operator.dim, min(k, operator.dim)
    limit = max_products or 100 + 200 * k
    block = min(k + _GUARDS, d)
    generator = torch.Generator().manual_seed(seed)
    given = torch.empty(0, d) if start is None else start[:block]
    random = torch.randn(block - len(given), d, generator=generator, dtype=torch.float64)
    x = np.linalg.qr(torch.cat([given.cpu().double(), random]).numpy().T)[0]
    products = 0
    with tqdm(total=limit, desc="LOBPCG", leave=False, disable=not progress) as bar:

        def multiply(vectors: np.ndarray) -> np.ndarray:
            nonlocal products
            columns = torch.from_numpy(np.ascontiguousarray(vectors.reshape(d, -1).T))
            products += len(columns)
            bar.update(len(columns))
            return torch.stack([operator.matvec(column).cpu().double() for column in columns]).numpy().T

        matrix = LinearOperator((d, d), matvec=lambda v: multiply(v)[:, 0], matmat=multiply, dtype=np.float64)
        # SciPy solves a problem of this size by the whole matrix.
        whole = 5 * block >= d
        while True:
            if whole:
                theta, vectors = np.linalg.eigh(_symmetric(multiply(np.eye(d))))
                x = vectors[:, ::-1][:, :block] if which == "LA" else vectors[:, :block]
                residuals = np.zeros(x.shape[1])
                theta = theta[::-1][:block] if which == "LA" else theta[:block]
            else:
                with warnings.catch_warnings():
                    warnings.simplefilter("ignore", UserWarning)  # that it has not converged in so few iterations
                    left = (limit - products) // block - 2  # two for what comes before and after
                    most = min(max(left, 1), _ITERATIONS)
                    _, x = iterate(matrix, x, largest=which == "LA", tol=1e-14, maxiter=most)
                x = np.linalg.qr(x)[0]
                image = multiply(x)
                theta, turn = np.linalg.eigh(_symmetric(x.T @ image))
                turn, theta = (turn[:, ::-1], theta[::-1]) if which == "LA" else (turn, theta)
                x, image = x @ turn, image @ turn
                residuals = np.linalg.norm(image - x * theta, axis=0)
            errors = error_bounds(theta, residuals)
            scale = np.maximum(np.abs(theta), np.sqrt(torch.finfo(operator.dtype).eps) * np.abs(theta).max())
            done = operator.agreed(whole or bool((errors <= tol * scale)[:k].all()))
            if done or products >= limit:
                break
    if not done:
        warn_unconverged(products, k, tol, float((errors / scale)[:k].max()))
    order = np.arange(k) if which == "LA" else np.arange(k)[::-1]
    rows = torch.from_numpy(np.ascontiguousarray(x.T[order])).to(operator.device, operator.dtype)
    return Eigenpairs(theta[order], rows, residuals[order], errors[order], products, done)


def _symmetric(matrix: np.ndarray) -> np.ndarray:
    half: np.ndarray = (matrix + matrix.T) / 2
    return half
