"""Wide residual networks for small images, depth `6n + 4`."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["WideResNet", "wrn28_2", "wrn28_4", "wrn28_8"]


class _WideBlock(nn.Module):
    """`x' + conv(relu(norm(conv(a))))` with `a = relu(norm(x))`; `x'` is `x`, or `conv1x1(a)` where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, dropout: float) -> None:
        super().__init__()
        self.norm1 = nn.BatchNorm2d(in_channels)
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm2 = nn.BatchNorm2d(channels)
        self.dropout = nn.Dropout(dropout)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.shortcut: nn.Conv2d | None = None
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        active = F.relu(self.norm1(x))
        out = self.conv2(self.dropout(F.relu(self.norm2(self.conv1(active)))))
        shortcut: Tensor = x if self.shortcut is None else self.shortcut(active)
        return shortcut + out


class WideResNet(nn.Module):
    """Wide ResNet of depth `6n + 4` for small images.

    One 3x3 convolution to 16 channels, three stages of `n` blocks with `16, 32, 64` channels times `width`, the second and
    third stage starting with stride 2; norm and ReLU come before each convolution. Then a norm, ReLU, global average pooling
    and one linear layer. WRN-28-2 with 10 classes has 1,467,610 parameters.

    Convolutions start from He's normal distribution, variance `2 / fan_out`, biases from 0.

    Example:
        >>> import torch
        >>> net = WideResNet(28, width=2)
        >>> sum(p.numel() for p in net.parameters())
        1467610
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])

    Args:
        depth: number of convolutions on the main path and the projections' three: 10, 16, 22, 28, 40, ...
        width: factor on the channels 16, 32, 64.
        num_classes: number of outputs.
        in_channels: channels of the images.
        dropout: probability of dropout between the convolutions of a block.

    Raises:
        ValueError: if `depth` is not `6n + 4`, `width` is less than 1, or `dropout` is not between 0 and 1.

    Reference: Zagoruyko, Komodakis: Wide residual networks. BMVC 2016.
    """

    def __init__(
        self, depth: int = 28, width: int = 2, num_classes: int = 10, in_channels: int = 3, dropout: float = 0.0
    ) -> None:
        super().__init__()
        if depth < 10 or (depth - 4) % 6 != 0:
            raise ValueError(f"WideResNet needs a depth of 6n + 4 (10, 16, 22, 28, 40, ...), not depth={depth}.")
        if width < 1:
            raise ValueError(f"WideResNet needs a width of at least 1, not width={width}.")
        blocks, channels = (depth - 4) // 6, [16 * width, 32 * width, 64 * width]
        self.conv = nn.Conv2d(in_channels, 16, 3, padding=1, bias=False)
        self.stage1 = _stage(blocks, 16, channels[0], 1, dropout)
        self.stage2 = _stage(blocks, channels[0], channels[1], 2, dropout)
        self.stage3 = _stage(blocks, channels[1], channels[2], 2, dropout)
        self.norm = nn.BatchNorm2d(channels[2])
        self.linear = nn.Linear(channels[2], num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, in_channels, height, width]` of any size to logits `[B, num_classes]`."""
        x = self.stage3(self.stage2(self.stage1(self.conv(images))))
        logits: Tensor = self.linear(F.relu(self.norm(x)).mean(dim=(2, 3)))
        return logits


def _stage(blocks: int, in_channels: int, channels: int, stride: int, dropout: float) -> nn.Sequential:
    first = _WideBlock(in_channels, channels, stride, dropout)
    return nn.Sequential(first, *(_WideBlock(channels, channels, 1, dropout) for _ in range(blocks - 1)))


def wrn28_2(num_classes: int = 10, in_channels: int = 3, **options: Any) -> WideResNet:
    """Build WRN-28-2, of depth 28 and width 2, for small images.

    Example:
        >>> sum(p.numel() for p in wrn28_2().parameters())
        1467610

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `WideResNet`: dropout.

    Raises:
        ValueError: if `dropout` is not between 0 and 1.

    Reference: the same as that of `WideResNet`.
    """
    return WideResNet(28, 2, num_classes, in_channels, **options)


def wrn28_4(num_classes: int = 10, in_channels: int = 3, **options: Any) -> WideResNet:
    """Build WRN-28-4, of depth 28 and width 4, for small images.

    Example:
        >>> sum(p.numel() for p in wrn28_4().parameters())
        5849050

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `WideResNet`: dropout.

    Raises:
        ValueError: if `dropout` is not between 0 and 1.

    Reference: the same as that of `WideResNet`.
    """
    return WideResNet(28, 4, num_classes, in_channels, **options)


def wrn28_8(num_classes: int = 10, in_channels: int = 3, **options: Any) -> WideResNet:
    """Build WRN-28-8, of depth 28 and width 8, for small images.

    Example:
        >>> sum(p.numel() for p in wrn28_8().parameters())
        23354842

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `WideResNet`: dropout.

    Raises:
        ValueError: if `dropout` is not between 0 and 1.

    Reference: the same as that of `WideResNet`.
    """
    return WideResNet(28, 8, num_classes, in_channels, **options)
