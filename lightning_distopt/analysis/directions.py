"""Random directions in the space of parameters, scaled so that models can be compared along them."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from lightning_distopt.analysis.objective import Objective
from lightning_distopt.communication.rng import derive_seed

OneDimensional = Literal["ignore", "whole"]


def gaussian_direction(objective: Objective, seed: int = 0, index: int = 0) -> Tensor:
    """Return a vector of independent standard normal numbers that depends on seeds and shapes alone.

    It is drawn on the CPU in float64, so it is the same on every rank and device, and for every model of the architecture.
    Global random streams are left alone.

    Example:
        >>> f = Objective(torch.nn.Linear(2, 1), lambda net, x: net(x).mean(), [torch.ones(4, 2)])
        >>> gaussian_direction(f, seed=1).equal(gaussian_direction(f, seed=1))
        True

    Args:
        objective: whose parameters the direction has entries for.
        seed: of all directions.
        index: of this one, from 0.

    Returns:
        `[d]`, in the objective's dtype and on its device.
    """
    generator = torch.Generator().manual_seed(derive_seed(seed, "direction", index))
    draws = [torch.randn(p.shape, generator=generator, dtype=torch.float64) for p in objective.parameters.values()]
    return torch.cat([draw.reshape(-1) for draw in draws]).to(objective.device, objective.dtype)


def filter_normalized(
    objective: Objective, direction: Tensor, weights: Tensor | None = None, one_dimensional: OneDimensional = "ignore"
) -> Tensor:
    r"""Return a direction whose filters are as long as those of the weights.

    $$ d_{i,j} \leftarrow \frac{d_{i,j}}{\lVert d_{i,j} \rVert} \, \lVert w_{i,j} \rVert $$

    `w_{i,j}` is the `j`-th filter of layer `i`: a slice of its weight along the first dimension, in a linear layer the weights
    into one neuron. So one step of length 1 along `d` changes every filter by its own size, and a network that computes the
    same with larger weights (ReLU, batch norm) has the same landscape.

    Example:
        >>> net = torch.nn.Linear(2, 1, bias=False)
        >>> _ = net.weight.data.copy_(torch.tensor([[3.0, 4.0]]))
        >>> f = Objective(net, lambda net, x: net(x).mean(), [torch.ones(4, 2)])
        >>> filter_normalized(f, torch.tensor([0.0, -2.0]))
        tensor([ 0., -5.])

    Args:
        objective: whose parameters they are.
        direction: `[d]`.
        weights: `[d]`, those whose lengths the filters get; None: the module's.
        one_dimensional: what becomes of parameters with one dimension or none, such as biases and those of norms: "ignore"
            sets them to zero, "whole" takes each as one filter.

    Returns:
        `[d]`. Filters that are zero, in the weights or in the direction, are zero.

    Raises:
        ValueError: for an unknown option.

    Reference:
        Li et al.: Visualizing the loss landscape of neural nets. NeurIPS 2018, section 4.
    """
    if one_dimensional not in ("ignore", "whole"):
        raise ValueError(f"`one_dimensional` must be 'ignore' or 'whole'; got {one_dimensional!r}.")
    lengths = objective.tensors(objective.vector() if weights is None else weights.to(objective.device, objective.dtype))
    pieces: list[Tensor | None] = []
    for name, d in objective.tensors(direction.to(objective.device, objective.dtype)).items():
        if d.dim() <= 1 and one_dimensional == "ignore":
            pieces.append(None)
            continue
        d_ij, w_ij = ((x if x.dim() > 1 else x.reshape(1, -1)).flatten(1) for x in (d, lengths[name]))
        # d_ij <- d_ij / |d_ij| |w_ij|
        of_d, of_w = (x.norm(dim=1, keepdim=True) for x in (d_ij, w_ij))
        pieces.append(d_ij * torch.where(of_d > 0, of_w / of_d, 0))
    return objective.flatten(pieces)


def random_direction(
    objective: Objective,
    seed: int = 0,
    index: int = 0,
    weights: Tensor | None = None,
    one_dimensional: OneDimensional = "ignore",
) -> Tensor:
    """Return a random filter-normalised direction.

    Models that are compared share the random draw, and each has it normalised by its own filters: this is what makes a step
    mean the same for all of them. For the very same vector at every model, give one model's `weights` for all.

    Example:
        >>> net = torch.nn.Linear(3, 2)
        >>> f = Objective(net, lambda net, x: net(x).mean(), [torch.ones(4, 3)])
        >>> d = f.tensors(random_direction(f))
        >>> bool(torch.allclose(d["weight"].norm(dim=1), net.weight.norm(dim=1))), d["bias"]
        (True, tensor([0., 0.]))

    Args:
        objective: whose parameters the direction has entries for.
        seed: of all directions.
        index: of this one, from 0.
        weights: `[d]`, by which it is normalised; None: the module's.
        one_dimensional: "ignore" or "whole", see `filter_normalized`.

    Returns:
        `[d]`.

    Raises:
        ValueError: if it is zero, for lack of a parameter with two dimensions that is not zero.
    """
    direction = filter_normalized(objective, gaussian_direction(objective, seed, index), weights, one_dimensional)
    if not bool(direction.any()):
        raise ValueError(
            "The filter-normalised direction is zero: no parameter has two dimensions and weights other than zero. Use "
            "`one_dimensional='whole'` for those with one."
        )
    return direction
