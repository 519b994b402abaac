"""Python objects as bytes, in a form that can be read without running anything that it says."""

from __future__ import annotations

import io
from typing import Any

import torch
from torch import Tensor

from lightning_distopt.communication.watch import first_line


def pack(value: Any) -> Tensor:
    """Return an object as bytes, uint8 `[size]` on the CPU.

    Example:
        >>> unpack(pack({"step": 3, "weights": torch.ones(2)}))
        {'step': 3, 'weights': tensor([1., 1.])}

    Args:
        value: numbers, strings, bytes, None, tensors, and lists, tuples, dictionaries and sets of them.
    """
    buffer = io.BytesIO()
    torch.save(value, buffer)
    return torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)


def unpack(message: Tensor) -> Any:
    """Return the object that `pack` made into bytes.

    Tensors come back on the CPU. The bytes may come from anywhere: like a checkpoint they are read with
    `weights_only=True`, which makes nothing but the types that `pack` names.

    Raises:
        ValueError: for bytes that hold anything else.
    """
    try:
        return torch.load(io.BytesIO(message.cpu().numpy().tobytes()), map_location="cpu", weights_only=True)
    except Exception as error:
        raise ValueError(
            "A message between ranks holds something else than numbers, strings, tensors and containers of them, so it was "
            f"not read: send only those. ({first_line(error)})"
        ) from error
