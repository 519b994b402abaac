"""Matrices by two thin ones."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from lightning_distopt.compression.compressor import Compressor, bytes_of, values_of, working_type
from lightning_distopt.compression.randomness import generators
from lightning_distopt.options import check_whole


class LowRank(Compressor):
    r"""A matrix's projection onto `r` directions, found from a random sketch by power iteration.

    $$ P_1 = \operatorname{orth}(X \Omega), \quad P_{i+1} = \operatorname{orth}(X X^T P_i), \qquad Q(X) = P \, (X^T P)^T $$

    with the last `P` of `iterations`. A tensor of several dimensions counts as the matrix of its first dimension by all others.
    What has one dimension, or would take no fewer bytes than it has, goes as it is. As a projection `Q` never moves away from
    `X`; how near it comes depends on the singular values. A value that is no number makes all of its matrix so.

    Example:
        >>> x = torch.outer(torch.arange(4.0), torch.arange(6.0))[None]
        >>> low_rank = LowRank(rank=1)
        >>> torch.allclose(low_rank.decompress(low_rank.compress(x, seeds=[0]), (4, 6), x.dtype), x, atol=1e-5)
        True
        >>> low_rank.nbytes((4, 6)), low_rank.nbytes((4,))
        (40, 16)

    Args:
        rank: `r`, at least 1.
        iterations: products with `X`, at least 1; more come closer to the largest singular vectors.

    Raises:
        ValueError: if an argument is below 1.

    Reference: T. Vogels, S. P. Karimireddy and M. Jaggi, *PowerSGD: practical low-rank gradient compression for distributed
    optimization*, NeurIPS 2019 (which keeps the sketch from round to round; here it is drawn each time).
    """

    fine = False
    matrices = True

    def __init__(self, rank: int = 2, iterations: int = 1) -> None:
        self.rank, self.iterations = check_whole("rank", rank), check_whole("iterations", iterations)

    def nbytes(self, shape: Sequence[int], dtype: torch.dtype = torch.float32) -> int:
        """Return the bytes of both factors, or of the tensor."""
        n, m, r = self._sizes(shape)
        return (r * (n + m) if r else n * m) * dtype.itemsize

    def compress(self, x: Tensor, seeds: Sequence[int]) -> Tensor:
        """Compress each row of `x`, see `Compressor.compress`."""
        x = x.detach()
        n, m, r = self._sizes(x.shape[1:])
        if not r:
            return bytes_of(x.reshape(len(x), -1))
        factors = [
            self._factors(matrix.reshape(n, m), r, source)
            for matrix, source in zip(x, generators(seeds, x.device), strict=True)
        ]
        return bytes_of(torch.stack(factors))

    def decompress(self, payload: Tensor, shape: Sequence[int], dtype: torch.dtype) -> Tensor:
        """Return `Q(x)`, `[rows, *shape]`, from the bytes of `compress`."""
        n, m, r = self._sizes(shape)
        values = values_of(payload, dtype)
        if r:
            values = torch.stack([row[: n * r].view(n, r) @ row[n * r :].view(m, r).T for row in values])
        return values.view(-1, *shape)

    def _sizes(self, shape: Sequence[int]) -> tuple[int, int, int]:
        """Return rows, columns and rank of the factors, 0 if there are none."""
        n = shape[0] if shape else 1
        m = math.prod(shape[1:])
        r = min(self.rank, n, m)
        return n, m, r if len(shape) > 1 and r * (n + m) < n * m else 0

    def _factors(self, matrix: Tensor, r: int, source: torch.Generator) -> Tensor:
        """Return `P` and `X^T P` as one vector."""
        x = matrix.to(working_type(matrix.dtype))
        sketch = torch.randn(x.shape[1], r, dtype=x.dtype, device=x.device, generator=source)
        for _ in range(self.iterations):
            p = torch.linalg.qr(x @ sketch).Q
            sketch = x.T @ p
        return torch.cat([p.flatten(), sketch.flatten()]).to(matrix.dtype)
