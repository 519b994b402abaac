"""Weights that are masked instead of trained: what is trained is a score of each weight."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn


class _Thresholded(torch.autograd.Function):
    """The weights whose scores reach the threshold; backwards, what the mask's gradient is."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, scores: Tensor, threshold: float) -> Tensor:
        # (m_bin)_ij = 1 if m_ij >= tau else 0 (7.1); in place, since going by way of booleans takes six times as long
        mask = scores.clone().ge_(threshold)
        # W_hat = W * M_bin
        return weight * mask.to(weight.dtype)

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        weight, scores, _ = inputs
        ctx.save_for_backward(weight)
        ctx.dtype = scores.dtype

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[None, Tensor, None]:
        (weight,) = ctx.saved_tensors
        # dL/dM_bin = dL/dW_hat * W, and M takes it as its own (7.2)
        return None, gradients[0].to(ctx.dtype) * weight, None


def initial_scores(
    shape: Sequence[int],
    sparsity: float,
    threshold: float = 0.0,
    width: float = 0.02,
    seed: int = 0,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    r"""Return random scores, of which the share `sparsity` is below the threshold on average.

    $$ m_{ij} \sim U(a, b), \qquad a = \tau - s\,(b - a), \qquad P(m_{ij} < \tau) = \frac{\tau - a}{b - a} = s $$

    Example:
        >>> initial_scores([1000, 1000], sparsity=0.05).lt(0).double().mean()
        tensor(0.05, dtype=torch.float64)

    Args:
        shape: of the weight.
        sparsity: `s`, from 0 up to 1.
        threshold: `tau`.
        width: `b - a`.
        seed: of a random stream that nothing else draws from.
        dtype: of the scores.
    """
    uniform = torch.rand(tuple(shape), generator=torch.Generator().manual_seed(seed), dtype=dtype)
    return threshold + width * (uniform - sparsity)


class ScoreMask(nn.Module):
    r"""A parametrization that keeps the weights whose score reaches a threshold.

    $$ (m_{\text{bin}})_{ij} = [\, m_{ij} \ge \tau \,], \qquad \hat W = W \odot M_{\text{bin}}, \qquad
       \nabla_M := \frac{\partial L}{\partial M_{\text{bin}}} = W \odot \frac{\partial L}{\partial \hat W} $$

    The weight `W` is frozen; the optimizer moves the scores `M` by the gradient of the binary mask, straight through the
    threshold. Scores have at least single precision and keep it when the module is converted to a shorter type, because small
    steps would be rounded away.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> _ = layer.weight.requires_grad_(False).copy_(torch.tensor([[3.0, 5.0]]))
        >>> mask = ScoreMask(layer.weight, sparsity=0.0)
        >>> _ = nn.utils.parametrize.register_parametrization(layer, "weight", mask, unsafe=True)
        >>> with torch.no_grad():
        ...     _ = mask.scores.copy_(torch.tensor([[-0.1, 0.1]]))
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.weight, mask.scores.grad
        (tensor([[0., 5.]], grad_fn=<...>), tensor([[3., 5.]]))

    Args:
        weight: that will be masked.
        sparsity: share of the weights that are masked at first, from 0 up to 1.
        threshold: `tau`.
        width: of the interval that the scores are drawn from.
        seed: of a random stream of their own.

    Attributes:
        scores: `M`, in the shape of the weight.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, (7.1) and (7.2); M. Zhao et
    al., *Masking as an efficient alternative to finetuning for pretrained language models*, EMNLP 2020.
    """

    def __init__(
        self, weight: Tensor, sparsity: float = 0.05, threshold: float = 0.0, width: float = 0.02, seed: int = 0
    ) -> None:
        super().__init__()
        self.threshold = threshold
        dtype = torch.promote_types(weight.dtype, torch.float32)
        scores = initial_scores(weight.shape, sparsity, threshold, width, seed, dtype)
        self.scores = nn.Parameter(scores.to(weight.device))

    def forward(self, weight: Tensor) -> Tensor:
        """Return what the layer computes with."""
        return _Thresholded.apply(weight, self.scores, self.threshold)

    @torch.no_grad()
    def mask(self) -> Tensor:
        """Return the binary mask: true where the weight is used."""
        return self.scores >= self.threshold

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> ScoreMask:
        """Move the scores with the module, without converting them."""

        def move(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            return moved if moved.dtype == tensor.dtype else tensor.to(moved.device)

        super()._apply(move, recurse)
        return self
