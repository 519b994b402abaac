"""A fixed mask on a weight, with gradients that see the whole weight or what is left of it."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


class _Masked(torch.autograd.Function):
    """`mask * weight`; backwards the identity, or what `hold_down` makes of it."""

    generate_vmap_rule = True

    @staticmethod
    def forward(weight: Tensor, mask: Tensor, limit: bool) -> Tensor:
        return weight * mask

    @staticmethod
    def setup_context(ctx: Any, inputs: Any, output: Any) -> None:
        _, mask, limit = inputs
        if limit:
            ctx.save_for_backward(mask)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None, None]:
        return hold_down(gradients[0], *ctx.saved_tensors) if ctx.saved_tensors else gradients[0], None, None


def hold_down(gradient: Tensor, mask: Tensor) -> Tensor:
    r"""Scale gradients of filters (rows) that are masked altogether down to the median norm of those that are not.

    $$ g_f \leftarrow g_f \min\!\left(1, \frac{\operatorname{median}_{\text{alive}} \| g_k \|}{\| g_f \|}\right)
       \quad \text{for filters } f \text{ without weights} $$

    Where no filter has any weights, there is nothing to measure by, and the gradient stays as it is. (It is not the largest
    norm, which may be of a filter whose own inputs are all pruned, and as much too large.)

    Example:
        >>> hold_down(torch.tensor([[3.0, 4.0], [30.0, 40.0]]), torch.tensor([[1.0, 0.0], [0.0, 0.0]]))
        tensor([[3., 4.],
                [3., 4.]])
    """
    alive = mask.flatten(1).any(dim=1)
    norms = gradient.detach().flatten(1).norm(dim=1, dtype=torch.promote_types(gradient.dtype, torch.float32))
    median = norms.where(alive, torch.nan).nanmedian()
    held = (median / norms).clamp(max=1.0).nan_to_num(nan=1.0).where(~alive, 1.0)
    return gradient * held.to(gradient.dtype).view(-1, *[1] * (gradient.dim() - 1))


class StraightThroughMask(nn.Module):
    r"""A parametrization that computes `mask * weight`.

    With feedback, the gradient at the pruned weights reaches all dense ones as it is (straight through):

    $$ \hat x = m \odot x, \qquad \nabla_x := g(\hat x) \quad \text{(feedback)} \qquad \text{or} \qquad
       \nabla_x := m \odot g(\hat x) $$

    Until a mask is set the weight itself is returned, so that a module without sparsity computes what it did before, to the
    bit. The mask has the weight's type, since products with boolean tensors are several times slower. It is no buffer: it
    belongs to the training method, and neither DDP nor the replicas of a strategy have to send it.

    Example:
        >>> layer = nn.Linear(2, 1, bias=False)
        >>> mask = StraightThroughMask()
        >>> layer = nn.utils.parametrize.register_parametrization(layer, "weight", mask)
        >>> mask.set(torch.tensor([[True, False]]), layer.parametrizations.weight.original)
        >>> layer(torch.ones(1, 2)).sum().backward()
        >>> layer.parametrizations.weight.original.grad
        tensor([[1., 1.]])

    Args:
        feedback: whether gradients reach pruned weights.
        soft: whether the mask is only kept, and the layer computes with all weights.
        limit: whether the gradient of a filter (a row of the weight) that has nothing left is held down to the median norm of
            those that have. With a zero in place of a filter, batch norm divides by the root of its epsilon alone, so that
            the gradient is some 300 times what it would be with any weights.

    Attributes:
        mask: ones and zeros in the weight's shape and type, or None.
        recorded: the sum of the gradients at the pruned weights since `record` was set, in at least single precision.
        record: whether to add up gradients.
    """

    def __init__(self, feedback: bool = True, soft: bool = False, limit: bool = False) -> None:
        super().__init__()
        self.feedback, self.soft, self.limit = feedback, soft, limit
        self.mask: Tensor | None = None
        self.recorded: Tensor | None = None
        self.record = False

    def set(self, alive: Tensor, like: Tensor) -> None:
        """Take over a mask: `alive` is true where weights stay. `like` has the type, device and strides of the weight."""
        self.mask = torch.empty_like(like, requires_grad=False).copy_(alive)

    def forward(self, weight: Tensor) -> Tensor:
        """Return what the layer computes with."""
        mask = None if self.soft else self.mask
        if mask is None:
            if not self.record:
                return weight
            pruned = weight.view_as(weight)
        else:
            limit = self.limit and self.feedback
            pruned = _Masked.apply(weight, mask, limit) if self.feedback or self.record else weight * mask
        if self.record and pruned.requires_grad:
            pruned.register_hook(self._note)
        return pruned

    def _note(self, gradient: Tensor) -> Tensor | None:
        precise = gradient.detach().to(torch.promote_types(gradient.dtype, torch.float32))
        self.recorded = precise.clone() if self.recorded is None else self.recorded + precise
        # The graph of a mask without feedback has no product while it records, so the gradient is masked here.
        return None if self.feedback or self.mask is None else gradient * self.mask

    def _apply(self, fn: Any, recurse: bool = True) -> StraightThroughMask:
        """Move the mask with the module."""
        super()._apply(fn, recurse)
        self.mask = None if self.mask is None else fn(self.mask)
        self.recorded = None if self.recorded is None else fn(self.recorded)
        return self
