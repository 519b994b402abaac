"""Masks as bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor


def pack_masks(masks: Sequence[Tensor]) -> Tensor:
    """Return the masks' bits, eight to a byte, one mask after the other.

    Example:
        >>> pack_masks([torch.tensor([1.0, 0.0]), torch.tensor([[1.0], [1.0]])])
        tensor([13], dtype=torch.uint8)
    """
    bits = torch.cat([mask.reshape(-1) != 0 for mask in masks])
    bits = torch.nn.functional.pad(bits, (0, -len(bits) % 8)).view(-1, 8)
    shifts = torch.arange(8, dtype=torch.uint8, device=bits.device)
    return (bits.to(torch.uint8) << shifts).sum(dim=1, dtype=torch.uint8)


def unpack_masks(packed: Tensor, like: Sequence[Tensor]) -> list[Tensor]:
    """Return the masks as ones and zeros, in the shapes, types and places of `like`.

    Example:
        >>> unpack_masks(torch.tensor([13], dtype=torch.uint8), [torch.zeros(2), torch.zeros(2, 1)])
        [tensor([1., 0.]), tensor([[1.],
                [1.]])]

    Raises:
        ValueError: if there are more or fewer bits than these masks have.
    """
    sizes = [math.prod(mask.shape) for mask in like]
    if packed.numel() != (sum(sizes) + 7) // 8:
        raise ValueError(f"The masks have {sum(sizes)} bits, but {packed.numel()} bytes were given.")
    shifts = torch.arange(8, dtype=torch.uint8, device=packed.device)
    bits = ((packed[:, None] >> shifts) & 1).view(-1)[: sum(sizes)]
    return [part.view(mask.shape).to(mask) for part, mask in zip(bits.split(sizes), like, strict=True)]
