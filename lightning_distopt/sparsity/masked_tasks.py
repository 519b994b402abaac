"""Several tasks over one set of pretrained weights."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lightning_distopt.sparsity.packed_masks import PackedMasks, digest
from lightning_distopt.sparsity.weights import named_tensors, set_tensor, weight_key, weight_of


@dataclass(frozen=True)
class TaskMemory:
    """What several tasks take, in bytes.

    Example:
        >>> TaskMemory(base=4000, heads=80, masks={"a": 125, "b": 125}, fine_tuned=8080).total
        4330

    Attributes:
        base: the pretrained weights, once.
        heads: heads of the tasks; equal ones count once.
        masks: by task.
        fine_tuned: what a fine-tuned copy of the model for each task would take.
    """

    base: int
    heads: int
    masks: dict[str, int]
    fine_tuned: int

    @property
    def total(self) -> int:
        """All of it."""
        return self.base + self.heads + sum(self.masks.values())


class MaskedTasks:
    """One model that becomes the model of one task after the other, by masks over the same weights.

    Masks stay packed and are unpacked layer by layer when a task becomes active. The weights of layers that some task masks
    are kept a second time, unmasked, while the model shows those of the active task.

    Example:
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> tasks = MaskedTasks(base)
        >>> tasks.add("diagonal", PackedMasks.of(base, {"0": torch.eye(4)}))
        >>> with tasks.using("diagonal"):
        ...     print(int(base[0].weight.count_nonzero()))
        4
        >>> int(base[0].weight.count_nonzero()), tasks.memory().masks
        (16, {'diagonal': 2})

    Args:
        model: with the pretrained weights. It has to stay as it is, but for `activate`; move it to its device first.

    Attributes:
        active: the name of the task whose model it is, or None.
    """

    def __init__(self, model: nn.Module) -> None:
        self.model = model
        self.active: str | None = None
        self._tasks: dict[str, PackedMasks] = {}
        self._heads: dict[str, Tensor] = {}  # by fingerprint, so that equal ones are held once
        self._digests: dict[str, str] = {}
        self._base: dict[str, Tensor] = {}  # weights that some task masks, by layer
        self._own: dict[str, Tensor] = {}  # what the model has itself in place of tasks' heads, by name

    @property
    def names(self) -> list[str]:
        """The tasks, in the order in which they were added."""
        return list(self._tasks)

    def add(self, name: str, masks: PackedMasks | str | os.PathLike[str]) -> None:
        """Add a task, or replace the masks of one that is not active.

        Args:
            name: of the task.
            masks: of the task, or their file.

        Raises:
            ValueError: if they belong to another model, with the first mismatch, or the task is active.
        """
        if name == self.active:
            raise ValueError(f"The task {name!r} is active: `activate(None)` first.")
        masks = masks if isinstance(masks, PackedMasks) else PackedMasks.load(masks)
        with self.using(None):
            parameters = dict(self.model.named_parameters())
            if not self._digests:
                self._digests = {key: digest(p) for key, p in parameters.items()}
            masks.check(self.model, self._digests)
            head = {key: self._heads.setdefault(digest(values), values) for key, values in masks.head.items()}
            for key in head:
                self._own.setdefault(key, named_tensors(self.model)[key].detach().clone())
            for layer in masks.bits:
                if weight_key(layer) not in head and layer not in self._base:
                    self._base[layer] = parameters[weight_key(layer)].detach().clone()
        self._tasks[name] = PackedMasks(masks.bits, masks.shapes, head, masks.base)

    @torch.no_grad()
    def activate(self, name: str | None) -> None:
        """Make the model that of a task, in place; None: that of the pretrained weights, with the head it had itself.

        Raises:
            ValueError: if there is no such task.
        """
        if name is not None and name not in self._tasks:
            raise ValueError(f"There is no task {name!r}; the tasks are {', '.join(map(repr, self._tasks)) or 'none'}.")
        if name == self.active:
            return
        nothing = PackedMasks({}, {}, {}, {})
        before = self._tasks[self.active] if self.active is not None else nothing
        after = self._tasks[name] if name is not None else nothing
        for key in before.head.keys() - after.head.keys():
            set_tensor(self.model, key, self._own[key])
        for layer in (before.bits.keys() - after.bits.keys()) & self._base.keys():
            weight_of(self.model.get_submodule(layer)).copy_(self._base[layer])
        for key, values in after.head.items():
            set_tensor(self.model, key, values)
        for layer in after.bits:
            weight = weight_of(self.model.get_submodule(layer))
            base = weight if weight_key(layer) in after.head else self._base[layer]
            torch.mul(base, after.masks(layer, weight.dtype).to(weight.device), out=weight.data)
        self.active = name

    @contextmanager
    def using(self, name: str | None) -> Iterator[nn.Module]:
        """Let the model be that of a task inside the body."""
        before = self.active
        self.activate(name)
        try:
            yield self.model
        finally:
            self.activate(before)

    def memory(self) -> TaskMemory:
        """Return what the tasks take: the pretrained weights and equal heads once, the masks of each."""
        base = sum(_size(p) for key, p in self.model.named_parameters() if key not in self._own)
        heads = {id(values): _size(values) for masks in self._tasks.values() for values in masks.head.values()}
        masks = {name: sum(map(_size, task.bits.values())) for name, task in self._tasks.items()}
        own = sum(_size(values) for task in self._tasks.values() for values in task.head.values())
        return TaskMemory(base, sum(heads.values()), masks, len(self._tasks) * base + own)


def _size(tensor: Tensor) -> int:
    return tensor.numel() * tensor.element_size()
