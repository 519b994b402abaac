"""EvoNorm-S0: a normalization and an activation in one layer."""

from __future__ import annotations

import torch
from torch import Tensor, nn

__all__ = ["EvoNormS0"]


class EvoNormS0(nn.Module):
    """EvoNorm-S0, which normalizes each image by itself and is the nonlinearity too: no ReLU comes after it.

    With one `v`, `gamma` (`weight`) and `beta` (`bias`) per channel, and the variance over a group of channels and all
    positions of one image:

        y = x sigmoid(v x) / sqrt(var_group(x) + eps) * gamma + beta

    Where a norm has no activation after it, as at the end of a residual branch, the authors keep `y = x gamma + beta`:
    that is `nonlinearity=False`.

    The mean is not subtracted, there are no running statistics, and training and evaluation are the same. The variance
    divides by the number of values, as in the authors' code, and is taken in float32 where the input is float16 or
    bfloat16; the output has the type of the input.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> layer, images = EvoNormS0(16, groups=2), torch.randn(4, 16, 8, 8)
        >>> layer(images).shape
        torch.Size([4, 16, 8, 8])
        >>> torch.allclose(layer(images)[:1], layer(images[:1]))
        True
        >>> EvoNormS0(48)  # 32 does not divide 48
        EvoNormS0(48, groups=24, eps=1e-05)

    Args:
        channels: channels `C` of the input `[B, C, ...]`, with any number of dimensions after them.
        groups: number of groups of channels, a divisor of `channels`. The default is the largest divisor that is at most
            32; `groups=channels` takes the variance of every channel by itself.
        eps: added to the variance.
        nonlinearity: whether to do more than scale and shift; without it, `groups` and `eps` are not used.

    Raises:
        ValueError: if `groups` does not divide `channels`; from a call, if the input has other channels, or only one
            value in each group.

    Reference: Liu, Brock, Simonyan, Le: Evolving normalization-activation layers. NeurIPS 2020.
    """

    def __init__(self, channels: int, groups: int | None = None, eps: float = 1e-5, nonlinearity: bool = True) -> None:
        super().__init__()
        if channels < 1:
            raise ValueError(f"EvoNormS0 needs at least one channel, not channels={channels}.")
        if groups is None:
            groups = max(divisor for divisor in range(1, 33) if channels % divisor == 0)
        if groups < 1 or channels % groups != 0:
            raise ValueError(f"groups={groups} does not divide the {channels} channels of an EvoNormS0.")
        self.channels = channels
        self.groups = groups
        self.eps = eps
        self.nonlinearity = nonlinearity
        self.weight = nn.Parameter(torch.ones(channels))
        self.bias = nn.Parameter(torch.zeros(channels))
        self.v = nn.Parameter(torch.ones(channels)) if nonlinearity else None

    def forward(self, x: Tensor) -> Tensor:
        """Map `[B, C, ...]` to the same shape and type."""
        if x.ndim < 2 or x.shape[1] != self.channels:
            raise ValueError(f"This EvoNormS0 takes [B, {self.channels}, ...], not an input of shape {list(x.shape)}.")

        def per_channel(parameter: Tensor) -> Tensor:
            return parameter.to(x.dtype).view(-1, self.channels, *[1] * (x.ndim - 2))

        if self.v is None:
            return torch.addcmul(per_channel(self.bias), x, per_channel(self.weight))
        # gamma / sqrt(var + eps), [B, C]
        scale = self._rstd(x).repeat_interleave(self.channels // self.groups, dim=1) * self.weight
        return torch.addcmul(per_channel(self.bias), x * torch.sigmoid(per_channel(self.v) * x), per_channel(scale))

    def _rstd(self, x: Tensor) -> Tensor:
        """`1 / sqrt(var + eps)` of every group, `[B, groups]`."""
        groups = x.unflatten(1, (self.groups, -1)).flatten(2)
        if groups.shape[2] == 1:
            raise ValueError(
                f"A group of an EvoNormS0 holds one value of an input of shape {list(x.shape)}, which has no variance: "
                f"take fewer than groups={self.groups}, or larger images."
            )
        if x.dtype in (torch.float16, torch.bfloat16):
            groups = groups.float()
        # On CPU three times as fast as torch.var, and as exact.
        variance = (groups - groups.mean(dim=2, keepdim=True)).square().mean(dim=2)
        return (variance + self.eps).rsqrt()

    def extra_repr(self) -> str:
        """What `print` shows between the parentheses."""
        if not self.nonlinearity:
            return f"{self.channels}, nonlinearity=False"
        return f"{self.channels}, groups={self.groups}, eps={self.eps}"
