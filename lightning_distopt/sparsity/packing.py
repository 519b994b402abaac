"""Masks as bits."""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.compression.packing import pack, unpack


def pack_bits(masks: Sequence[Tensor]) -> Tensor:
    """Return the masks' bits, one mask after the other, the first in the lowest bit of a byte; what is not zero is a one.

    Example:
        >>> pack_bits([torch.tensor([1.0, 0.0]), torch.tensor([[1.0], [1.0]])])
        tensor([13], dtype=torch.uint8)
    """
    return pack(torch.cat([mask.detach().reshape(-1) != 0 for mask in masks])[None], bits=1)[0]


def unpack_bits(bits: Tensor, shapes: Sequence[Sequence[int]], dtype: torch.dtype = torch.bool) -> list[Tensor]:
    """Return the masks of `pack_bits`, as ones and zeros of any type, where the bits are.

    Example:
        >>> unpack_bits(torch.tensor([13], dtype=torch.uint8), [[2], [1, 2]], torch.float32)
        [tensor([1., 0.]), tensor([[1., 1.]])]

    Raises:
        ValueError: if there are more or fewer bytes than masks of these shapes have.
    """
    sizes = [math.prod(shape) for shape in shapes]
    if len(bits) != (sum(sizes) + 7) // 8:
        raise ValueError(f"The masks have {sum(sizes)} bits, but {len(bits)} bytes were given.")
    if bits.device.type == "cpu":
        ones = torch.from_numpy(np.unpackbits(bits.numpy(), count=sum(sizes), bitorder="little"))
    else:
        ones = unpack(bits[None], bits=1, n=sum(sizes))[0]
    values = ones.view(torch.bool) if dtype == torch.bool else ones.to(dtype)
    return [part.view(tuple(shape)) for part, shape in zip(values.split(sizes), shapes, strict=True)]
