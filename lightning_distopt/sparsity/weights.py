"""Weights that a mask is laid over: which they are, how the mask is attached, and how it becomes permanent."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_distopt.lookup import matching

Selection = str | Sequence[str] | Callable[[str, nn.Module], bool]
"""Layers: patterns of their names such as "stage*.conv?" (fnmatch), or a predicate of name and module."""

WEIGHT = "weight"


def select_layers(root: nn.Module, layers: Selection) -> dict[str, nn.Module]:
    """Return the layers that are chosen, by name, in the order of `root.named_modules()`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> list(select_layers(net, ["0", "2"]))
        ['0', '2']
        >>> list(select_layers(net, lambda name, layer: isinstance(layer, nn.ReLU)))
        ['1']

    Args:
        root: the network.
        layers: patterns (each of which must match), or a predicate. Patterns match what has a `weight` of two dimensions or
            more.

    Raises:
        ValueError: if a pattern, or all of it, matches nothing.
    """
    candidates = {name: module for name, module in root.named_modules() if _has_matrix(module)}
    if callable(layers):
        chosen = {name: module for name, module in root.named_modules() if layers(name, module)}
    else:
        nothing = f"no layer with a weight matrix; the layers are {_shortened(list(candidates))}"
        chosen = {name: candidates[name] for name in matching(layers, candidates, "layers", nothing)}
    if not chosen:
        raise ValueError(f"`layers` chooses no layer; those with a weight matrix are {_shortened(list(candidates))}.")
    return chosen


def called(layers: Selection) -> list[str] | str:
    """Return a choice of layers as another process would write it: patterns as a list, a predicate by its name.

    Example:
        >>> called("conv*"), called(lambda name, layer: True)
        (['conv*'], '<lambda>')
    """
    if not callable(layers):
        return [layers] if isinstance(layers, str) else list(layers)
    while isinstance(layers, partial):
        layers = layers.func
    return getattr(layers, "__qualname__", type(layers).__qualname__)


def _has_matrix(module: nn.Module) -> bool:
    weight = getattr(module, WEIGHT, None)
    return isinstance(weight, Tensor) and (nn.parameter.is_lazy(weight) or weight.dim() >= 2)


def check_untied(root: nn.Module, layers: Mapping[str, nn.Module]) -> None:
    """Raise a `ValueError` if some other layer of the network uses the weight of a chosen one, and so would not be masked."""
    own_weights = {name: dict(layer.named_parameters(recurse=False)).get(WEIGHT) for name, layer in layers.items()}
    chosen = {id(weight): (name, layers[name]) for name, weight in own_weights.items() if weight is not None}
    for name, module in root.named_modules():
        for own, parameter in module.named_parameters(recurse=False):
            layer = chosen.get(id(parameter))
            if layer is not None and layer[1] is not module:
                raise ValueError(
                    f"`{layer[0]}.{WEIGHT}` is also `{f'{name}.' if name else ''}{own}`: choose layers that have a weight of "
                    "their own."
                )


def _shortened(names: list[str]) -> str:
    return ", ".join(names[:8]) + (f" and {len(names) - 8} more" if len(names) > 8 else "") if names else "none"


def attach(layers: Mapping[str, nn.Module], make: Callable[[str, nn.Module], nn.Module]) -> dict[str, nn.Module]:
    """Let every layer compute with `parametrization(weight)` in place of its weight; all of them, or none and an error.

    The weight goes on as `parametrizations.weight.original`, and is the same `Parameter` object.

    Args:
        layers: by name.
        make: returns the parametrization of a layer, a module that maps a weight to one of the same shape and type.

    Returns:
        The parametrizations by the name of their layer.

    Raises:
        ValueError: for a layer whose weight can't be replaced; nothing is changed then.
    """
    owners: dict[int, str] = {}
    for name, layer in layers.items():
        problem = _problem(layer)
        if problem:
            raise ValueError(f"The weight of `{name}` ({type(layer).__name__}) can't be masked: {problem}.")
        first = owners.setdefault(id(layer.weight), name)
        if first != name:
            raise ValueError(f"`{first}` and `{name}` share one weight: choose layers that have a weight of their own.")
    made = {name: make(name, layer) for name, layer in layers.items()}
    done: list[tuple[nn.Module, nn.Parameter]] = []
    try:
        for name, layer in layers.items():
            order, weight = list(layer._parameters), layer._parameters[WEIGHT]
            assert weight is not None
            done.append((layer, weight))
            # torch calls `set_` on what it registers, after which DDP, if it is there already, waits for no gradient of it.
            layer._parameters[WEIGHT] = nn.Parameter(weight.detach(), weight.requires_grad)
            parametrize.register_parametrization(layer, WEIGHT, made[name], unsafe=True)
            own: Any = layer.parametrizations[WEIGHT]  # type: ignore[union-attr, index]
            own.original, own.order = weight, order
    except BaseException:
        for layer, weight in done:
            if parametrize.is_parametrized(layer, WEIGHT):
                take_off(layer)
            layer._parameters[WEIGHT] = weight
        raise
    return made


def take_off(layer: nn.Module) -> None:
    """Take the parametrization off a layer; its parameters stand in their old order again, by which optimizers number them."""
    order = getattr(layer.parametrizations[WEIGHT], "order", [])  # type: ignore[union-attr, index]
    parametrize.remove_parametrizations(layer, WEIGHT, leave_parametrized=False)
    for name in order:
        layer._parameters[name] = layer._parameters.pop(name)


def _problem(layer: nn.Module) -> str:
    """Return why the weight of a layer can't be replaced, or nothing."""
    if isinstance(layer, torch.jit.ScriptModule):
        return "it is compiled to TorchScript; mask the module before it is scripted"
    if parametrize.is_parametrized(layer, WEIGHT):
        return "it has a mask or another parametrization already; give the layer to one callback only, or make that permanent"
    if hasattr(layer, f"{WEIGHT}_orig") or hasattr(layer, f"{WEIGHT}_g"):
        return "`torch.nn.utils` has pruned or normalized it already; call `prune.remove` or `remove_weight_norm` first"
    weight = getattr(layer, WEIGHT, None)
    if not isinstance(weight, nn.Parameter):
        return f"it has no parameter `{WEIGHT}`"
    if nn.parameter.is_lazy(weight):
        return "it is lazy and has no shape yet; run one batch through the module first"
    if not weight.is_floating_point():
        return f"its type is {weight.dtype}"
    if weight.dim() < 2:
        return "it is no matrix, but a vector like that of a norm; choose convolutional and linear layers"
    return ""


def make_permanent(layers: Mapping[str, nn.Module]) -> None:
    """Replace each weight by what its layer computes with, and take the parametrization off: plain layers are left.

    Parameters keep their identity and their storage.

    Example:
        >>> layer = nn.Linear(2, 1)
        >>> _ = attach({"layer": layer}, lambda name, layer: nn.ReLU())
        >>> make_permanent({"layer": layer})
        >>> isinstance(layer.weight, nn.Parameter), bool((layer.weight >= 0).all())
        (True, True)

    Args:
        layers: by name.
    """
    for layer in layers.values():
        if parametrize.is_parametrized(layer, WEIGHT):
            with torch.no_grad():
                values, original = getattr(layer, WEIGHT).clone(), dense_weight(layer)
                take_off(layer)
                original.copy_(values)


def dense_weight(layer: nn.Module) -> nn.Parameter:
    """Return the parameter behind the parametrization of a layer."""
    weight: nn.Parameter = layer.parametrizations[WEIGHT].original  # type: ignore[union-attr, index, assignment]
    return weight


def weight_key(layer: str) -> str:
    """Return what the weight of a layer is called in a plain module's state dict.

    Example:
        >>> weight_key("encoder.0"), weight_key("")
        ('encoder.0.weight', 'weight')
    """
    return f"{layer}.{WEIGHT}" if layer else WEIGHT


def mask_prefix(layer: str) -> str:
    """Return what the names of a masked layer's weight and of all that belongs to its mask begin with in a state dict."""
    return f"{layer}.parametrizations.{WEIGHT}." if layer else f"parametrizations.{WEIGHT}."


def original_key(layer: str) -> str:
    """Return what the weight behind the mask of a layer is called in a state dict.

    Example:
        >>> original_key("encoder.0")
        'encoder.0.parametrizations.weight.original'
    """
    return f"{mask_prefix(layer)}original"


def plain_state_dict(state: Mapping[str, Any], computed: Mapping[str, Tensor]) -> dict[str, Any]:
    """Return a state dict as the plain module has it, with the weights that layers compute with.

    Example:
        >>> state = {"0.bias": 1, "0.parametrizations.weight.original": 2, "0.parametrizations.weight.0.scores": 3}
        >>> plain_state_dict(state, {"0": 4})
        {'0.bias': 1, '0.weight': 4}

    Args:
        state: of the module with parametrizations.
        computed: what each layer computes with, by name.
    """
    prefixes = {mask_prefix(name): name for name in computed}
    result: dict[str, Any] = {}
    for key, value in state.items():
        prefix = next((p for p in prefixes if key.startswith(p)), None)
        if prefix is None:
            result[key] = value
        else:
            result[weight_key(prefixes[prefix])] = computed[prefixes[prefix]]
    return result


def weight_of(layer: nn.Module) -> Tensor:
    """Return what a layer computes with: its weight, or what a mask leaves of it."""
    weight: Tensor = getattr(layer, WEIGHT)
    return weight


def named_tensors(module: nn.Module) -> dict[str, Tensor]:
    """Return all parameters and buffers by name."""
    return {**dict(module.named_parameters()), **dict(module.named_buffers())}


@torch.no_grad()
def set_tensor(module: nn.Module, name: str, values: Tensor) -> None:
    """Give a parameter or buffer a copy of some values, also of another shape: those of another number of classes."""
    owner, _, last = name.rpartition(".")
    layer = module.get_submodule(owner)
    tensor: Tensor = getattr(layer, last)
    tensor.grad = None if tensor.shape != values.shape else tensor.grad
    tensor.data = values.to(device=tensor.device, dtype=tensor.dtype, copy=True)
    if isinstance(layer, nn.Linear) and last == WEIGHT:
        layer.out_features, layer.in_features = values.shape
