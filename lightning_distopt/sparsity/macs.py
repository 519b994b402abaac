"""What a network costs: multiply-accumulates and parameters, of dense and of sparse layers."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd
from torch.overrides import TorchFunctionMode

# What norms and activations do to each value that they return: a norm scales and shifts it.
_OPERATIONS = {"batch_norm": 2, "group_norm": 2, "layer_norm": 2, "instance_norm": 2}
_OPERATIONS |= dict.fromkeys(("relu", "relu_", "gelu", "silu", "hardtanh", "sigmoid", "tanh"), 1)


class MacCounter:
    r"""Counts multiply-accumulates of convolutions and linear maps in forward passes, by hooks, while it is entered.

    A convolution with `c` input channels in `g` groups and a kernel of `k` values has, for each value of its output,

    $$ \frac{c}{g} \, k \quad \text{multiply-accumulates,} $$

    a linear layer as many as it has inputs. A transposed convolution has `c' k / g` for each value of its input, with `c'`
    output channels. Of `nn.MultiheadAttention` the projections are counted: those of queries, keys and values under its own
    name, and that of the output under the name of its `out_proj`. Not counted are biases, norms, activations, products between
    activations such as those of queries with keys, and recurrent layers.

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Conv2d(3, 16, 3, padding=1), nn.Flatten(), nn.Linear(16 * 64, 10))
        >>> with MacCounter(net) as counter:
        ...     _ = net(torch.zeros(1, 3, 8, 8))
        >>> counter.macs
        {'0': 27648, '2': 10240}

    Args:
        module: the network.

    Attributes:
        macs: of each layer that has been called, by name; several calls add up.
    """

    def __init__(self, module: nn.Module) -> None:
        self.module = module
        self.macs: dict[str, int] = {}
        self._handles: list[Any] = []

    def __enter__(self) -> MacCounter:
        for name, layer in self.module.named_modules():
            if isinstance(layer, _ConvNd | nn.Linear):
                self.macs[name] = 0
                self._handles.append(layer.register_forward_hook(self._hook(name)))
            elif isinstance(layer, nn.MultiheadAttention):
                self.macs[name] = 0
                self._handles.append(layer.register_forward_hook(self._attention_hook(name), with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self.macs = {name: count for name, count in self.macs.items() if count}

    def _hook(self, name: str) -> Callable[[nn.Module, tuple[Tensor, ...], Tensor], None]:
        def count(layer: nn.Module, inputs: tuple[Tensor, ...], output: Tensor) -> None:
            if isinstance(layer, _ConvNd):
                channels = layer.out_channels if isinstance(layer, _ConvTransposeNd) else layer.in_channels
                values = inputs[0].numel() if isinstance(layer, _ConvTransposeNd) else output.numel()
                self.macs[name] += values * channels // layer.groups * math.prod(layer.kernel_size)
            elif isinstance(layer, nn.Linear):
                self.macs[name] += output.numel() * layer.in_features

        return count

    def _attention_hook(self, name: str) -> Callable[[nn.Module, tuple[Any, ...], dict[str, Any], Any], None]:
        output = f"{name}.out_proj" if name else "out_proj"

        def count(layer: nn.Module, inputs: tuple[Any, ...], named: dict[str, Any], result: Any) -> None:
            assert isinstance(layer, nn.MultiheadAttention)
            query, key, value = (*inputs, *(named[one] for one in ("query", "key", "value")[len(inputs) :]))[:3]
            self.macs[name] += (query.numel() + key.numel() + value.numel()) * layer.embed_dim
            if output in self.macs:  # `forward` takes its weight without calling it
                self.macs[output] += result[0].numel() * layer.embed_dim

        return count


def count_macs(module: nn.Module, run: Callable[[], Any]) -> dict[str, int]:
    """Return the multiply-accumulates of every convolutional and linear layer in one forward pass, by name.

    Example:
        >>> import torch
        >>> from lightning_distopt.sparsity.macs import count_macs
        >>> net = nn.Linear(100, 10)
        >>> count_macs(net, lambda: net(torch.zeros(1, 100)))
        {'': 1000}

    Args:
        module: the network.
        run: calls it, with a batch of one sample, say.
    """
    with MacCounter(module) as counter:
        run()
    return counter.macs


def sparse_macs(dense: Mapping[str, float], density: Mapping[str, float]) -> float:
    r"""Return the multiply-accumulates that are left where layers are sparse: `sum_l density_l MACs_l`.

    A weight takes part in the same number of products wherever it stands in its layer, so what counts is how many of a layer's
    weights are left, and this is so for whole filters as well. Filters that are zero save no more than that: a norm and a
    shortcut behind them make something else of the zeros, so the layers that follow can't leave their inputs out and still
    compute the same.

    Example:
        >>> sparse_macs({"conv": 1000, "linear": 10}, {"conv": 0.1})
        110.0

    Args:
        dense: of each layer, see `count_macs`.
        density: the part of a layer's weights that is not zero, by name; layers that are not named are dense.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, table 15.2.
    """
    # MACs = sum_l d_l MACs_l
    return float(sum(count * density.get(name, 1.0) for name, count in dense.items()))


def count_elementwise(run: Callable[[], Any]) -> int:
    """Return the operations of norms and activations in one forward pass: two for each value of a norm, one of an activation.

    The thesis adds these to the multiply-accumulates of convolutions: for ResNet-20 on 32x32 images 0.59 M, which stay as they
    are however sparse convolutions become (table 15.2).

    Example:
        >>> import torch
        >>> net = nn.Sequential(nn.Linear(4, 10), nn.LayerNorm(10), nn.ReLU())
        >>> count_elementwise(lambda: net(torch.zeros(1, 4)))
        30

    Args:
        run: calls the network, with a batch of one sample, say.
    """
    with _Elementwise() as mode:
        run()
    return mode.operations


class _Elementwise(TorchFunctionMode):
    def __init__(self) -> None:
        super().__init__()
        self.operations = 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        self.operations += _OPERATIONS.get(getattr(func, "__name__", ""), 0) * getattr(result, "numel", lambda: 0)()
        return result


def count_parameters(module: nn.Module, zeros: int = 0) -> int:
    """Return how many parameters a network has, but for those that are pruned.

    Example:
        >>> count_parameters(nn.Linear(10, 10), zeros=90)
        20

    Args:
        module: the network, with masks or without.
        zeros: pruned weights.
    """
    return sum(p.numel() for p in module.parameters()) - zeros
