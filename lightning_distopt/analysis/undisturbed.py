"""Measuring on a module that is being trained, without leaving a trace."""

from __future__ import annotations

import random
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import partial
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.attention import SDPBackend, sdpa_kernel

from lightning_distopt.communication.rng import isolated_streams, seed_streams

Mode = Literal["eval", "train"]

_UNTOUCHED = frozenset({"_parameters", "_modules", "_trainer", "_fabric", "_jit_module"})
"""Attributes of modules that are not looked into: weights are never written to, and the trainer is not part of the module."""


@contextmanager
def undisturbed(module: nn.Module, mode: Mode = "eval", seed: int = 0) -> Iterator[None]:
    """Let the body evaluate and differentiate a module as it likes, and undo all of it.

    Put back are, of every submodule, buffers, mode, attributes (numbers, and what is in tensors, arrays, lists, dictionaries
    and sets: counters, states of metrics; random generators of torch, NumPy and Python), of every parameter `requires_grad`,
    and the random streams, which start from `seed` inside. Weights and gradients are nobody's to write to. Inside, gradients
    are on whatever was before (`inference_mode` too), hooks that see gradients are off, so is autocast, and attention and
    recurrent layers take those kernels that have second derivatives.

    Example:
        >>> norm = nn.BatchNorm1d(2)
        >>> with undisturbed(norm, mode="train"):
        ...     _ = norm(torch.randn(8, 2))
        >>> norm.running_mean, norm.training
        (tensor([0., 0.]), True)

    Args:
        module: on which something is measured.
        mode: "eval" or "train", of all its submodules.
        seed: of the random streams inside.

    Yields:
        Nothing.
    """
    device = next((p.device for p in module.parameters()), torch.device("cpu"))
    restore = [_snapshot(child) for child in module.modules()]
    parameters = [(parameter, parameter.requires_grad, parameter._backward_hooks) for parameter in module.parameters()]
    with ExitStack() as stack:
        stack.enter_context(isolated_streams(device))
        stack.enter_context(torch.inference_mode(False))
        stack.enter_context(torch.enable_grad())
        stack.enter_context(torch.autocast(device.type, enabled=False))
        stack.enter_context(sdpa_kernel(SDPBackend.MATH))
        if device.type == "cuda" and any(isinstance(child, nn.RNNBase) for child in module.modules()):
            stack.enter_context(torch.backends.cudnn.flags(enabled=False))
        try:
            seed_streams(seed, device)
            for child in module.modules():
                child.training = mode == "train"
                child._backward_hooks.clear()
                child._backward_pre_hooks.clear()
            for parameter, _, hooks in parameters:
                if hooks:
                    parameter._backward_hooks = None
            yield
        finally:
            for undo in restore:
                undo()
            for parameter, needed, hooks in parameters:
                if parameter.requires_grad != needed:
                    parameter.requires_grad_(needed)
                if hooks:
                    parameter._backward_hooks = hooks


def _snapshot(module: nn.Module) -> Callable[[], None]:
    """Return a function that puts a module's own attributes back, and what is in them where that can change in place."""
    attributes = {name: value for name, value in vars(module).items() if name not in _UNTOUCHED}
    contents = [undo for value in attributes.values() if (undo := _contents(value, set())) is not None]

    def restore() -> None:
        now = vars(module)
        for name in [name for name in now if name not in attributes and name not in _UNTOUCHED]:
            del now[name]
        now.update(attributes)
        for undo in contents:
            undo()

    return restore


def _contents(value: Any, seen: set[int]) -> Callable[[], object] | None:
    """Return a function that puts back what is in a tensor, an array, a container or a generator; None for anything else.

    Args:
        value: an attribute, or what is in one.
        seen: identities of all around it.
    """
    if isinstance(value, Tensor):
        if value.is_inference() or value.requires_grad or value.is_meta or value.layout is not torch.strided:
            return None  # the first are read-only here, the second are weights
        saved = value.detach().clone()

        def put_back() -> None:
            if not torch.equal(value.detach(), saved):  # the kernels of batch norm write without counting versions ...
                value.data.copy_(saved)  # ... and a counted write would spoil graphs that are kept

        return put_back
    if isinstance(value, np.ndarray):
        array = value.copy()
        return lambda: None if np.array_equal(value, array) else np.copyto(value, array)
    if isinstance(value, torch.Generator | np.random.RandomState):
        state: Any = value.get_state()
        return partial(value.set_state, state)
    if isinstance(value, np.random.Generator):
        return partial(setattr, value.bit_generator, "state", value.bit_generator.state)
    if isinstance(value, random.Random):
        return partial(value.setstate, value.getstate())
    if not isinstance(value, list | deque | dict | set) or id(value) in seen:
        return None
    items = list(value.values()) if isinstance(value, dict) else list(value)
    inner = [undo for item in items if (undo := _contents(item, {*seen, id(value)})) is not None]
    before = value.copy()

    def refill() -> None:
        value.clear()
        value.extend(before) if isinstance(value, list | deque) else value.update(before)
        for undo in inner:
            undo()

    return refill
