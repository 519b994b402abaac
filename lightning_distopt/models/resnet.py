"""Residual networks for small images (CIFAR style), depth `6n + 2`."""

from __future__ import annotations

from typing import Any, Literal, cast

import torch.nn.functional as F
from torch import Tensor, nn

from lightning_distopt.models.evonorm import EvoNormS0
from lightning_distopt.options import check_choice

__all__ = ["CifarResNet", "resnet8", "resnet20", "resnet32", "resnet44", "resnet56", "resnet110"]

Norm = Literal["batch", "group", "evonorm"]


def _norm(kind: Norm, channels: int, groups: int | None, activated: bool = False) -> nn.Module:
    """A norm; `activated` says that the activation follows, by `_activate`."""
    if kind == "batch":
        return nn.BatchNorm2d(channels)
    if kind == "group":
        return nn.GroupNorm(cast(int, groups), channels)
    return EvoNormS0(channels, groups, nonlinearity=activated)


def _activate(norm: nn.Module, x: Tensor) -> Tensor:
    """`relu(norm(x))`, or `norm(x)` of a norm that is the activation too."""
    x = norm(x)
    return x if isinstance(norm, EvoNormS0) else F.relu(x)


class _BasicBlock(nn.Module):
    """`relu(x' + norm(conv(relu(norm(conv(x))))))`; `x'` is `x`, or `norm(conv1x1(x))` where the shape changes."""

    def __init__(self, in_channels: int, channels: int, stride: int, norm: Norm, groups: int | None) -> None:
        super().__init__()
        self.conv1 = nn.Conv2d(in_channels, channels, 3, stride=stride, padding=1, bias=False)
        self.norm1 = _norm(norm, channels, groups, activated=True)
        self.conv2 = nn.Conv2d(channels, channels, 3, padding=1, bias=False)
        self.norm2 = _norm(norm, channels, groups)
        self.shortcut: nn.Module = nn.Identity()
        if stride != 1 or in_channels != channels:
            self.shortcut = nn.Sequential(
                nn.Conv2d(in_channels, channels, 1, stride=stride, bias=False), _norm(norm, channels, groups)
            )

    def forward(self, x: Tensor) -> Tensor:
        out = _activate(self.norm1, self.conv1(x))
        out = self.norm2(self.conv2(out))
        return F.relu(out + self.shortcut(x))


class CifarResNet(nn.Module):
    """ResNet of depth `6n + 2` for small images.

    One 3x3 convolution, three stages of `n` basic blocks with `16, 32, 64` channels (times `width`), the second and
    third stage starting with stride 2, global average pooling, one linear layer. Shortcuts that change the shape are
    projections, a 1x1 convolution and a norm (the paper's option B). With 10 classes ResNet-20 then has 272,474
    parameters; with the paper's parameter-free option A it would have 269,722.

    Convolutions start from He's normal distribution, variance `2 / fan_out`; the linear layer from `N(0, 0.01^2)`,
    its bias from 0.

    With `norm="evonorm"`, EvoNorm-S0 takes the place of a norm and the ReLU after it. No activation comes directly after
    the norm at the end of a residual branch and that of a projection: there the authors of EvoNorm have a scale and a
    shift per channel, and so have we. The ReLU after the sum stays.

    Example:
        >>> import torch
        >>> net = CifarResNet(20)
        >>> sum(p.numel() for p in net.parameters())
        272474
        >>> net(torch.zeros(2, 3, 32, 32)).shape
        torch.Size([2, 10])
        >>> len(list(CifarResNet(8, norm="group").buffers()))
        0

    Args:
        depth: number of layers with weights on the main path: 8, 14, 20, 26, 32, 44, 56, 110, ...
        num_classes: number of outputs.
        in_channels: channels of the images.
        width: factor on the channels 16, 32, 64; fractions make networks smaller than the paper's.
        norm: `"batch"`; or `"group"` or `"evonorm"`, which keep no running statistics and do not mix the images of a
            batch.
        groups: number of groups of channels in each norm, unused with `norm="batch"`. The default is 2 with `"group"`,
            and with `"evonorm"` that of `EvoNormS0`: for 16, 32 and 64 channels 16, 32 and 32 groups.

    Raises:
        ValueError: if `depth` is not `6n + 2`, or `width` leaves no channels or channels that `groups` does not divide.

    Reference: He, Zhang, Ren, Sun: Deep residual learning for image recognition. CVPR 2016, section 4.2. He, Zhang, Ren, Sun:
    Delving deep into rectifiers. ICCV 2015 (initialization). Wu, He: Group normalization. ECCV 2018. Liu, Brock, Simonyan, Le:
    Evolving normalization-activation layers. NeurIPS 2020.
    """

    def __init__(
        self,
        depth: int,
        num_classes: int = 10,
        in_channels: int = 3,
        width: float = 1.0,
        norm: Norm = "batch",
        groups: int | None = None,
    ) -> None:
        super().__init__()
        if depth < 8 or (depth - 2) % 6 != 0:
            raise ValueError(f"CifarResNet needs a depth of 6n + 2 (8, 20, 32, 44, 56, 110, ...), not depth={depth}.")
        check_choice("norm", norm, ("batch", "group", "evonorm"))
        base = round(16 * width)
        if base < 1:
            raise ValueError(f"width={width} leaves no channels: 16 * width must round to at least 1.")
        if norm == "group" and groups is None:
            groups = 2
        if norm != "batch" and groups is not None and (groups < 1 or base % groups != 0):
            raise ValueError(f"groups={groups} does not divide the {base} channels that width={width} gives.")
        blocks = (depth - 2) // 6
        self.conv = nn.Conv2d(in_channels, base, 3, padding=1, bias=False)
        self.norm = _norm(norm, base, groups, activated=True)
        self.stage1 = _stage(blocks, base, base, 1, norm, groups)
        self.stage2 = _stage(blocks, base, 2 * base, 2, norm, groups)
        self.stage3 = _stage(blocks, 2 * base, 4 * base, 2, norm, groups)
        self.linear = nn.Linear(4 * base, num_classes)
        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.kaiming_normal_(module.weight, mode="fan_out", nonlinearity="relu")
        nn.init.normal_(self.linear.weight, std=0.01)
        nn.init.zeros_(self.linear.bias)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, in_channels, height, width]` of any size to logits `[B, num_classes]`."""
        x = _activate(self.norm, self.conv(images))
        x = self.stage3(self.stage2(self.stage1(x)))
        logits: Tensor = self.linear(x.mean(dim=(2, 3)))
        return logits


def _stage(blocks: int, in_channels: int, channels: int, stride: int, norm: Norm, groups: int | None) -> nn.Sequential:
    first = _BasicBlock(in_channels, channels, stride, norm, groups)
    return nn.Sequential(first, *(_BasicBlock(channels, channels, 1, norm, groups) for _ in range(blocks - 1)))


def resnet8(num_classes: int = 10, in_channels: int = 3, **options: Any) -> CifarResNet:
    """Build ResNet-8 for small images.

    Example:
        >>> sum(p.numel() for p in resnet8().parameters())
        78042

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `CifarResNet`: width, norm and groups.

    Raises:
        ValueError: for options that `CifarResNet` refuses.

    Reference: the same as that of `CifarResNet`.
    """
    return CifarResNet(8, num_classes=num_classes, in_channels=in_channels, **options)


def resnet20(num_classes: int = 10, in_channels: int = 3, **options: Any) -> CifarResNet:
    """Build ResNet-20 for small images.

    Example:
        >>> sum(p.numel() for p in resnet20().parameters())
        272474

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `CifarResNet`: width, norm and groups.

    Raises:
        ValueError: for options that `CifarResNet` refuses.

    Reference: the same as that of `CifarResNet`.
    """
    return CifarResNet(20, num_classes=num_classes, in_channels=in_channels, **options)


def resnet32(num_classes: int = 10, in_channels: int = 3, **options: Any) -> CifarResNet:
    """Build ResNet-32 for small images.

    Example:
        >>> sum(p.numel() for p in resnet32().parameters())
        466906

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `CifarResNet`: width, norm and groups.

    Raises:
        ValueError: for options that `CifarResNet` refuses.

    Reference: the same as that of `CifarResNet`.
    """
    return CifarResNet(32, num_classes=num_classes, in_channels=in_channels, **options)


def resnet44(num_classes: int = 10, in_channels: int = 3, **options: Any) -> CifarResNet:
    """Build ResNet-44 for small images.

    Example:
        >>> sum(p.numel() for p in resnet44().parameters())
        661338

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `CifarResNet`: width, norm and groups.

    Raises:
        ValueError: for options that `CifarResNet` refuses.

    Reference: the same as that of `CifarResNet`.
    """
    return CifarResNet(44, num_classes=num_classes, in_channels=in_channels, **options)


def resnet56(num_classes: int = 10, in_channels: int = 3, **options: Any) -> CifarResNet:
    """Build ResNet-56 for small images.

    Example:
        >>> sum(p.numel() for p in resnet56().parameters())
        855770

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `CifarResNet`: width, norm and groups.

    Raises:
        ValueError: for options that `CifarResNet` refuses.

    Reference: the same as that of `CifarResNet`.
    """
    return CifarResNet(56, num_classes=num_classes, in_channels=in_channels, **options)


def resnet110(num_classes: int = 10, in_channels: int = 3, **options: Any) -> CifarResNet:
    """Build ResNet-110 for small images.

    Example:
        >>> sum(p.numel() for p in resnet110().parameters())
        1730714

    Args:
        num_classes: number of outputs.
        in_channels: channels of the images.
        **options: others of `CifarResNet`: width, norm and groups.

    Raises:
        ValueError: for options that `CifarResNet` refuses.

    Reference: the same as that of `CifarResNet`.
    """
    return CifarResNet(110, num_classes=num_classes, in_channels=in_channels, **options)
