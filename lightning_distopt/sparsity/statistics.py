"""What masks do over training: how much they leave out, how they differ, and when they come to rest."""

from __future__ import annotations

from bisect import bisect_right
from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

_RECORDS = 512


def pruning_error(weights: Sequence[Tensor], masks: Sequence[Tensor]) -> float:
    r"""Return the part of the weights' squared norm that masks leave out.

    $$ \delta_t = \frac{\|x_t - m_t \odot x_t\|^2}{\|x_t\|^2} $$

    Where masks leave out the smallest weights it is at most the sparsity.

    Example:
        >>> pruning_error([torch.tensor([3.0, 1.0])], [torch.tensor([1.0, 0.0])])
        0.1

    Args:
        weights: the dense ones.
        masks: ones and zeros in their shapes.

    Returns:
        From 0 to 1, and 0 if all weights are zero.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, equation (6.1).
    """

    def squared_norm(tensors: list[Tensor]) -> float:
        return sum(float(torch.linalg.vector_norm(t.detach(), dtype=torch.float64)) ** 2 for t in tensors)

    whole = squared_norm(list(weights))
    # ||x - m x||^2 / ||x||^2
    return squared_norm([w - w * m for w, m in zip(weights, masks, strict=True)]) / whole if whole else 0.0


def overlap(first: Sequence[Tensor], second: Sequence[Tensor]) -> float:
    r"""Return how far two masks keep the same weights (intersection over union).

    $$ \frac{|m \wedge m'|}{|m \vee m'|} $$

    Example:
        >>> overlap([torch.tensor([1.0, 1.0, 0.0])], [torch.tensor([0.0, 1.0, 1.0])])
        0.3333333333333333

    Args:
        first: masks of some layers; what is not zero is kept.
        second: others of the same layers.

    Returns:
        From 0 to 1, which it is for two masks that keep nothing.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, appendix 15 (line 4910).
    """
    pairs = [(a != 0, b != 0) for a, b in zip(first, second, strict=True)]
    union = sum(int((a | b).sum()) for a, b in pairs)
    return sum(int((a & b).sum()) for a, b in pairs) / union if union else 1.0


def flip_curve(last_flip: Sequence[Tensor], updates: int) -> list[float]:
    r"""Return for each mask update which part of all mask elements still changes after it.

    $$ F(u) = \frac{|\{ i : \text{element } i \text{ changes at an update } v > u \}|}{N}, \qquad u = 0, ..., U $$

    Example:
        >>> flip_curve([torch.tensor([0, 1, 1, 2])], updates=2)
        [0.75, 0.25, 0.0]

    Args:
        last_flip: for every element, the number of the update that changed it last, from 1, or 0, see `LastFlips`.
        updates: `U`.

    Returns:
        `U + 1` values that don't rise, the last of which is 0.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, figure 6.4.
    """
    counts = torch.zeros(updates + 1, dtype=torch.int64)
    for flips in last_flip:
        counts += torch.bincount(flips.reshape(-1).cpu().long(), minlength=updates + 1)
    total = int(counts.sum())
    # F(u) = 1 - #(last flip <= u) / N
    return [(total - done) / total if total else 0.0 for done in counts.cumsum(0).tolist()]


class LastFlips:
    """When each element of some masks has changed last.

    Example:
        >>> flips = LastFlips([torch.tensor([1.0, 1.0])])
        >>> for mask in ([0.0, 1.0], [0.0, 0.0], [0.0, 1.0]):
        ...     flips.add([torch.tensor(mask)])
        >>> flips.updates, flips.last
        (3, [tensor([1, 3], dtype=torch.int32)])

    Args:
        masks: at first; what is not zero is kept.

    Attributes:
        updates: that have been added.
        last: for every element the number of the update that changed it last, from 1, or 0.
    """

    def __init__(self, masks: Sequence[Tensor]) -> None:
        self.updates = 0
        self.last = [torch.zeros(mask.shape, dtype=torch.int32, device=mask.device) for mask in masks]
        self._masks = [mask != 0 for mask in masks]

    def add(self, masks: Sequence[Tensor]) -> None:
        """Note the masks after an update."""
        self.updates += 1
        before, self._masks = self._masks, [mask != 0 for mask in masks]
        for last, old, new in zip(self.last, before, self._masks, strict=True):
            last[old ^ new] = self.updates


class SparsityHistory:
    """How sparse each layer was after mask updates, and how many weights had come back and gone.

    It has at most 512 records: when there are more, two neighbours become one each.

    Example:
        >>> history = SparsityHistory({"conv": 10, "linear": 20})
        >>> history.add(0, {"conv": 0, "linear": 0}, {"conv": 4, "linear": 10})
        >>> history.add(16, {"conv": 1, "linear": 0}, {"conv": 3, "linear": 5})
        >>> history.steps, history.sparsity, history.regrown, history.killed
        ([0, 16], [[0.4, 0.5], [0.6, 0.75]], [0, 1], [14, 8])

    Args:
        sizes: weights of each layer, by name.

    Attributes:
        steps: of the records.
        regrown: weights that have come back since the record before.
        killed: weights that have gone.
    """

    def __init__(self, sizes: dict[str, int]) -> None:
        self.sizes = dict(sizes)
        self.steps: list[int] = []
        self.regrown: list[int] = []
        self.killed: list[int] = []
        self._zeros: list[list[int]] = []
        self._now = [0] * len(sizes)
        self._stride = 1  # updates to a record
        self._waiting = 0

    def add(self, step: int, regrown: dict[str, int], killed: dict[str, int]) -> None:
        """Note an update.

        Args:
            step: after which it was.
            regrown: weights that it has brought back, by layer.
            killed: weights that it has taken away.
        """
        self._now = [n + killed[name] - regrown[name] for name, n in zip(self.sizes, self._now, strict=True)]
        back, gone = sum(regrown.values()), sum(killed.values())
        if self._waiting:  # the record goes on
            self.steps[-1], self._zeros[-1] = step, self._now
            self.regrown[-1] += back
            self.killed[-1] += gone
        else:
            for column, value in ((self.steps, step), (self.regrown, back), (self.killed, gone)):
                column.append(value)
            self._zeros.append(self._now)
        self._waiting = (self._waiting + 1) % self._stride
        if len(self.steps) > _RECORDS and not self._waiting:
            self._halve()

    def _halve(self) -> None:
        """Make one record of two, and of those that follow."""
        odd = len(self.steps) % 2  # the last one has no neighbour yet
        self.steps = self.steps[1::2] + self.steps[-1:] * odd
        self._zeros = self._zeros[1::2] + self._zeros[-1:] * odd
        self.regrown, self.killed = (
            [sum(column[k : k + 2]) for k in range(0, len(column), 2)] for column in (self.regrown, self.killed)
        )
        self._waiting = self._stride * odd
        self._stride *= 2

    @property
    def sparsity(self) -> list[list[float]]:
        """The part of each layer that was zero, for every record."""
        return [[n / size for n, size in zip(row, self.sizes.values(), strict=True)] for row in self._zeros]

    @classmethod
    def joined(cls, histories: Sequence[SparsityHistory]) -> SparsityHistory:
        """Return one of the layers of several, with a record for each step that one of them has a record of.

        Example:
            >>> one, other = SparsityHistory({"conv": 10}), SparsityHistory({"linear": 20})
            >>> one.add(4, {"conv": 0}, {"conv": 5})
            >>> other.add(8, {"linear": 0}, {"linear": 10})
            >>> whole = SparsityHistory.joined([one, other])
            >>> whole.steps, whole.sparsity, whole.killed
            ([4, 8], [[0.5, 0.0], [0.5, 0.5]], [5, 10])
        """
        whole = cls({name: n for history in histories for name, n in history.sizes.items()})
        whole.steps = sorted({step for history in histories for step in history.steps})
        whole._zeros = [[n for history in histories for n in history._zeros_at(step)] for step in whole.steps]
        for step in whole.steps:
            records = [(history, history.steps.index(step)) for history in histories if step in history.steps]
            whole.regrown.append(sum(history.regrown[k] for history, k in records))
            whole.killed.append(sum(history.killed[k] for history, k in records))
        return whole

    def _zeros_at(self, step: int) -> list[int]:
        """Return the zeros of each layer by the last record up to a step."""
        records = bisect_right(self.steps, step)
        return self._zeros[records - 1] if records else [0] * len(self.sizes)

    def state_dict(self) -> dict[str, Any]:
        """Return the records."""
        return {
            "steps": list(self.steps),
            "regrown": list(self.regrown),
            "killed": list(self.killed),
            "zeros": torch.tensor(self._zeros),
            "now": list(self._now),
            "stride": self._stride,
            "waiting": self._waiting,
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`."""
        self.steps, self.regrown, self.killed = (list(state[name]) for name in ("steps", "regrown", "killed"))
        self._zeros, self._now = state["zeros"].tolist(), list(state["now"])
        self._stride, self._waiting = state["stride"], state["waiting"]
