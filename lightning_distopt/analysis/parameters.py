"""Which parameters of a module are the variables of an analysis."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence

from torch import nn

from lightning_distopt.lookup import matching

Parameters = str | Sequence[str] | Callable[[str, nn.Parameter], bool]
"""Parameters: patterns of their names such as "layer1.*" (fnmatch), or a predicate of name and parameter."""


def select_parameters(
    module: nn.Module, parameters: Parameters | None = None, among: Mapping[str, nn.Parameter] | None = None
) -> dict[str, nn.Parameter]:
    """Return the parameters that are chosen, by name, in the order of `module.named_parameters()`.

    Example:
        >>> net = nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))
        >>> list(select_parameters(net, "2.*"))
        ['2.weight', '2.bias']

    Args:
        module: that has them.
        parameters: patterns, each of which must match, or a predicate; None: all.
        among: those to choose from; None: all that are trainable.

    Raises:
        ValueError: if a pattern, or all of it, matches nothing.
    """
    candidates = dict(among) if among is not None else {n: p for n, p in module.named_parameters() if p.requires_grad}
    if not candidates:
        raise ValueError("The module has no trainable parameter, so its loss is a function of nothing.")
    if parameters is None:
        return candidates
    known = f"none of the trainable ones, such as {', '.join(list(candidates)[:4])}"
    if callable(parameters):
        chosen = {name: parameter for name, parameter in candidates.items() if parameters(name, parameter)}
    else:
        chosen = {name: candidates[name] for name in matching(parameters, candidates, "parameters", known)}
    if not chosen:
        raise ValueError(f"`parameters` chooses {known}.")
    return chosen
