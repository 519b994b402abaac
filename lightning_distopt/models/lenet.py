"""LeNet-5 for small images."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["LeNet"]


class LeNet(nn.Module):
    """LeNet-5: two convolutions with pooling, then three linear layers.

    `conv(6, 5x5) - pool - conv(16, 5x5) - pool - 120 - 84 - num_classes`, with ReLU and max-pooling, as LeNet-5 is
    built today; the paper has scaled tanh, trainable average pooling, a partly connected second convolution and RBF
    outputs.

    The paper's images are 32x32 and its convolutions unpadded. Smaller images are padded so that they reach the linear
    layers: below 32 the first convolution pads by 2 (28x28 then gives the paper's sizes), below 28 the second one too.

    Example:
        >>> import torch
        >>> LeNet(in_channels=1, image_size=16)(torch.zeros(2, 1, 16, 16)).shape
        torch.Size([2, 10])
        >>> sum(p.numel() for p in LeNet(image_size=32).parameters())
        61706

    Args:
        in_channels: channels of the images, 1 or 3 as a rule.
        num_classes: number of outputs.
        image_size: height and width of the images in pixels, at least 4.

    Raises:
        ValueError: if `image_size` is smaller than 4.

    Reference: LeCun, Bottou, Bengio, Haffner: Gradient-based learning applied to document recognition. Proc. IEEE, 1998.
    """

    def __init__(self, in_channels: int = 1, num_classes: int = 10, image_size: int = 28) -> None:
        super().__init__()
        if image_size < 4:
            raise ValueError(f"LeNet pools twice and needs images of at least 4x4 pixels, not image_size={image_size}.")
        pad1 = 0 if image_size >= 32 else 2
        pad2 = 0 if image_size >= 28 else 2
        side = (image_size + 2 * pad1 - 4) // 2
        side = (side + 2 * pad2 - 4) // 2
        self.conv1 = nn.Conv2d(in_channels, 6, kernel_size=5, padding=pad1)
        self.conv2 = nn.Conv2d(6, 16, kernel_size=5, padding=pad2)
        self.fc1 = nn.Linear(16 * side * side, 120)
        self.fc2 = nn.Linear(120, 84)
        self.fc3 = nn.Linear(84, num_classes)

    def forward(self, images: Tensor) -> Tensor:
        """Map images `[B, in_channels, image_size, image_size]` to logits `[B, num_classes]`."""
        x = F.max_pool2d(F.relu(self.conv1(images)), 2)
        x = F.max_pool2d(F.relu(self.conv2(x)), 2)
        x = F.relu(self.fc1(x.flatten(1)))
        logits: Tensor = self.fc3(F.relu(self.fc2(x)))
        return logits
