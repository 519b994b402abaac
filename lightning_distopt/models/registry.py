"""Networks by name."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from torch import nn

from lightning_distopt.lookup import nearest
from lightning_distopt.models.lenet import LeNet
from lightning_distopt.models.resnet import resnet8, resnet20, resnet32, resnet44, resnet56, resnet110
from lightning_distopt.models.wide_resnet import wrn28_2, wrn28_4, wrn28_8

__all__ = ["build_model"]

_MODELS: dict[str, Callable[..., nn.Module]] = {
    "lenet": LeNet,
    "resnet8": resnet8,
    "resnet20": resnet20,
    "resnet32": resnet32,
    "resnet44": resnet44,
    "resnet56": resnet56,
    "resnet110": resnet110,
    "wrn28_2": wrn28_2,
    "wrn28_4": wrn28_4,
    "wrn28_8": wrn28_8,
}


def build_model(name: str, **options: Any) -> nn.Module:
    """Build a network from its name.

    Example:
        >>> build_model("lenet", in_channels=3, image_size=32).conv1.in_channels
        3

    Args:
        name: `"lenet"`, `"resnet8"`, `"resnet20"`, `"resnet32"`, `"resnet44"`, `"resnet56"`, `"resnet110"`,
            `"wrn28_2"`, `"wrn28_4"` or `"wrn28_8"`.
        options: arguments of the network, such as `in_channels` and `num_classes`.

    Returns:
        The network, freshly initialized.

    Raises:
        ValueError: if there is no network of that name.
    """
    if name not in _MODELS:
        raise ValueError(f"There is no model {name!r}{nearest(name, _MODELS)}; the names are {', '.join(sorted(_MODELS))}.")
    return _MODELS[name](**options)
