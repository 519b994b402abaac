"""Small whole numbers, packed into bytes: the lowest bits of a byte come first."""

from __future__ import annotations

import functools

import numpy as np
import torch
from torch import Tensor

from lightning_distopt.compression.vectors import Segments


def pack(codes: Tensor, bits: int) -> Tensor:
    """Pack numbers below `2^bits` into `ceil(n bits / 8)` bytes per row.

    Example:
        >>> pack(torch.tensor([[1, 2, 3]], dtype=torch.uint8), bits=4)
        tensor([[33,  3]], dtype=torch.uint8)

    Args:
        codes: `[rows, n]`, bytes (or booleans, for one bit).
        bits: of each number, 1 to 8.
    """
    rows, n = codes.shape
    if bits == 8:
        return codes
    if bits == 1 and codes.device.type == "cpu":
        return torch.from_numpy(np.packbits(codes.numpy(), axis=1, bitorder="little"))
    size = -(-n * bits // 8)
    codes = codes.to(torch.uint8)
    if n % 8:
        codes = torch.nn.functional.pad(codes, (0, -n % 8))
    if 8 % bits == 0:
        if codes.device.type == "cpu":
            packed = codes.numpy()
            while bits < 8:  # two neighbours at a time
                pairs = packed.view("<u2")
                packed = (pairs | (pairs >> (8 - bits))).astype(np.uint8)
                bits *= 2
            result = torch.from_numpy(packed)
        else:
            shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=codes.device)
            result = (codes.view(rows, -1, 8 // bits) << shifts).sum(2, dtype=torch.uint8)
    else:
        shifts = torch.arange(0, 8 * bits, bits, device=codes.device)
        words = (codes.view(rows, -1, 8).to(torch.int64) << shifts).sum(2, keepdim=True)
        result = words.view(torch.uint8)[:, :, :bits].reshape(rows, -1)
    return result[:, :size]


def unpack(packed: Tensor, bits: int, n: int) -> Tensor:
    """Return the `n` numbers of each row as bytes `[rows, n]`.

    Example:
        >>> unpack(torch.tensor([[33, 3]], dtype=torch.uint8), bits=4, n=3)
        tensor([[1, 2, 3]], dtype=torch.uint8)
    """
    rows = packed.shape[0]
    if bits == 8:
        return packed[:, :n]
    if 8 % bits == 0:
        shifts = torch.arange(0, 8, bits, dtype=torch.uint8, device=packed.device)
        return ((packed[:, :, None] >> shifts) & (2**bits - 1)).view(rows, -1)[:, :n]
    packed = torch.nn.functional.pad(packed, (0, -packed.shape[1] % bits)).view(rows, -1, bits)
    words = torch.nn.functional.pad(packed, (0, 8 - bits)).contiguous().view(torch.int64)
    shifts = torch.arange(0, 8 * bits, bits, device=packed.device)
    return ((words >> shifts) & (2**bits - 1)).to(torch.uint8).view(rows, -1)[:, :n]


@functools.cache
def _codes_of_bytes(bits: int) -> Tensor:
    return unpack(torch.arange(256, dtype=torch.uint8)[:, None], bits, 8 // bits).long()


class LookUp:
    """What packed codes stand for: `levels[code]` times the scale of the vector.

    Where codes do not cross bytes, a table of what each byte stands for is read, one entry per byte.

    Example:
        >>> look_up = LookUp(torch.arange(16.0), torch.tensor([[10.0]]), Segments([(0, 3)]), torch.float32)
        >>> look_up(torch.tensor([[33, 3]], dtype=torch.uint8), n=3)
        tensor([[10., 20., 30.]])

    Args:
        levels: `[2^bits]`.
        scale: `[rows, count]`, one for each of the vectors `of`.
        of: the vectors whose codes they are.
        dtype: of the values.
    """

    def __init__(self, levels: Tensor, scale: Tensor, of: Segments, dtype: torch.dtype) -> None:
        self.bits, self.dtype = (len(levels) - 1).bit_length(), dtype
        levels = levels.to(scale)
        # The scale of a single vector goes into the table.
        self.values = (levels * scale).to(dtype) if of.count == 1 else levels[None]
        self.scale = None if of.count == 1 else of.spread(scale)
        self.codes = _codes_of_bytes(self.bits).to(scale.device) if 8 % self.bits == 0 else None
        self._table: np.ndarray | None = None
        self._room = np.empty(0, dtype=np.uint8)

    def __call__(self, packed: Tensor, n: int) -> Tensor:
        """Return `[rows, n]` values of packed codes, which may be overwritten by the next call."""
        values = self._values(packed, n)
        return values if self.scale is None else values.mul_(self.scale).to(self.dtype)

    def _values(self, packed: Tensor, n: int) -> Tensor:
        rows, size = packed.shape
        values = self.values.expand(rows, -1)
        if self.codes is None:
            return values.gather(1, unpack(packed, self.bits, n).long())
        if len(self.values) > 1 or packed.device.type != "cpu" or rows * size < 256:
            return values.gather(1, self.codes[packed.long()].view(rows, -1)[:, :n])
        if self._table is None:
            table = self.values[0][self.codes].view(torch.uint8).numpy()
            self._table = table.view(f"V{table.shape[1]}")[:, 0]  # NumPy knows no bfloat16
        if len(self._room) < rows * size:
            self._room = np.empty(rows * size, dtype=self._table.dtype)
        found = self._table.take(packed.numpy().reshape(-1), out=self._room[: rows * size], mode="clip")
        return torch.from_numpy(found.view(np.uint8)).view(self.values.dtype).view(rows, -1)[:, :n]
