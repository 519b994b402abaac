"""A pruning method at work on the layers of a module."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules.conv import _ConvNd, _ConvTransposeNd

from lightning_distopt.sparsity.method import Layers, PruningMethod
from lightning_distopt.sparsity.packing import pack_bits, unpack_bits
from lightning_distopt.sparsity.selection import pruned_count
from lightning_distopt.sparsity.straight_through import StraightThroughMask
from lightning_distopt.sparsity.weights import attach, dense_weight, make_permanent

PRUNED_KINDS = (nn.Linear, _ConvNd)


def default_layers(root: nn.Module) -> dict[str, nn.Module]:
    """Return all convolutional and linear layers but the last one, by name.

    Example:
        >>> list(default_layers(nn.Sequential(nn.Linear(2, 2), nn.ReLU(), nn.Linear(2, 2))))
        ['0']

    Raises:
        ValueError: if there are not two of them.
    """
    layers: dict[str, nn.Module] = {name: module for name, module in root.named_modules() if isinstance(module, PRUNED_KINDS)}
    if len(layers) < 2:
        raise ValueError(
            f"There is nothing to prune by default, which is every convolutional and linear layer but the last, as there is "
            f"{'one' if layers else 'none'}: choose `layers` by patterns of their names."
        )
    layers.popitem()
    return layers


class Pruner:
    """Masks on layers, and what a method makes of them.

    Example:
        >>> from lightning_distopt.sparsity.dpf import DPF
        >>> layer = nn.Linear(4, 1, bias=False)
        >>> _ = layer.weight.data.copy_(torch.tensor([[4.0, -3.0, 2.0, 1.0]]))
        >>> pruner = Pruner({"layer": layer}, DPF())
        >>> pruner.update(sparsity=0.5)
        >>> layer.weight
        tensor([[ 4., -3.,  0.,  0.]], grad_fn=<_MaskedBackward>)
        >>> pruner.make_permanent()
        >>> layer.weight
        Parameter containing:
        tensor([[ 4., -3.,  0.,  0.]], requires_grad=True)

    Args:
        layers: by name; their weights get masks right away.
        method: which weights are pruned.

    Attributes:
        updates: mask updates so far.
        regrown, killed: weights that came back and that went, by layer, at the last update.

    Raises:
        ValueError: if a layer can't be masked, or has no filters where the method looks at them; none is then.
    """

    def __init__(self, layers: Mapping[str, nn.Module], method: PruningMethod) -> None:
        self.layers, self.method = dict(layers), method
        for name, layer in self.layers.items():
            if isinstance(layer, _ConvTransposeNd) and (method.filters or method.limit):
                raise ValueError(
                    f"{method!r} looks at filters, the rows of a weight, and those of `{name}` ({type(layer).__name__}) are "
                    "input channels: leave the layer out of `layers`, or prune single weights, without `limit`."
                )
        reached, dense = method.pruned != "rest", method.pruned == "train"
        made = attach(self.layers, lambda name, layer: StraightThroughMask(reached, soft=dense, limit=method.limit))
        self._masks: list[StraightThroughMask] = list(made.values())  # type: ignore[arg-type]
        self.updates = 0
        self.regrown = dict.fromkeys(self.layers, 0)
        self.killed = dict.fromkeys(self.layers, 0)
        self._new: list[Tensor] = []  # true where a weight has just come back

    @property
    def weights(self) -> list[nn.Parameter]:
        """The dense weights."""
        return [dense_weight(layer) for layer in self.layers.values()]

    @property
    def masks(self) -> list[Tensor]:
        """Ones and zeros for each weight; ones where there is no mask yet."""
        pairs = zip(self._masks, self.weights, strict=True)
        return [torch.ones_like(w, requires_grad=False) if m.mask is None else m.mask for m, w in pairs]

    @property
    def sparsity(self) -> float:
        """The part of all weights that is zero."""
        total = sum(w.numel() for w in self.weights)
        return sum(self.pruned.values()) / total

    @property
    def pruned(self) -> dict[str, int]:
        """Zeros in each layer's mask."""
        counts = [0 if m.mask is None else m.mask.numel() - int(m.mask.count_nonzero()) for m in self._masks]
        return dict(zip(self.layers, counts, strict=True))

    @property
    def zeros(self) -> dict[str, int]:
        """Weights of each layer that are zero for the network: the pruned ones, but where these train on only if they are."""
        if self.method.pruned != "train":
            return self.pruned
        return {name: w.numel() - int(w.count_nonzero()) for name, w in zip(self.layers, self.weights, strict=True)}

    def lacks(self, sparsity: float) -> bool:
        """Return whether masks have fewer zeros than that, or fewer filters without weights where whole filters are pruned."""
        units = [m.flatten(1).any(dim=1) if self.method.filters else m != 0 for m in self.masks]
        zeros = sum(u.numel() - int(u.count_nonzero()) for u in units)
        return zeros < pruned_count(sparsity, sum(u.numel() for u in units))

    # ---------------------------------------------------------------------------------------------------------- updates
    def compute(
        self,
        sparsity: float,
        step: int = 0,
        total: int = 1,
        gradients: Sequence[Tensor] = (),
        moments: Sequence[Tensor] = (),
        first: Sequence[Tensor] = (),
        seed: int = 0,
    ) -> list[Tensor]:
        """Return the masks that the method wants now, see `Layers`; nothing changes yet."""
        generator = torch.Generator().manual_seed(seed)
        weights = [w.detach() for w in self.weights]
        layers = Layers(weights, self.masks, sparsity, step, total, gradients, moments, first, generator)
        with torch.no_grad():
            return self.method.update(layers)

    def take(self, masks: Sequence[Tensor]) -> None:
        """Let these be the masks; `fill_regrown` follows, for every replica."""
        self.updates += 1
        self._new = []
        for name, own, old, new in zip(self.layers, self._masks, self.masks, masks, strict=True):
            back, gone = new > old, new < old
            self.regrown[name], self.killed[name] = int(back.count_nonzero()), int(gone.count_nonzero())
            self._new.append(back)
            own.set(new, old)

    def fill_regrown(self, optimizers: Sequence[torch.optim.Optimizer] = ()) -> None:
        """Let weights that have just come back start from where the method wants them to, see `PruningMethod.pruned`.

        Where that is zero and no gradient has reached them, what optimizers keep of them, momentum and the like, is zero too.
        """
        if self.method.pruned in ("zero", "train"):
            self.clear_pruned()
        elif self.method.pruned == "rest":
            with torch.no_grad():
                for weight, back in zip(self.weights, self._new, strict=True):
                    weight.masked_fill_(back, 0.0)
                    states = [optimizer.state.get(weight, {}) for optimizer in optimizers]
                    for value in (value for state in states for value in state.values()):
                        if isinstance(value, Tensor) and value.shape == weight.shape:
                            value.masked_fill_(back, 0.0)

    def clear_pruned(self) -> None:
        """Set pruned weights to zero, also behind the masks."""
        with torch.no_grad():
            for weight, mask in zip(self.weights, self._masks, strict=True):
                if mask.mask is not None:
                    weight.mul_(mask.mask)

    def update(self, sparsity: float, optimizers: Sequence[torch.optim.Optimizer] = (), **options: Any) -> None:
        """Compute masks, take them and fill in what came back; `options` are those of `compute`."""
        self.take(self.compute(sparsity, **options))
        self.fill_regrown(optimizers)

    def overshoot(self, masks: Sequence[Tensor]) -> tuple[str, float]:
        """Return how large filters would be that had no weight left and come back with these masks.

        Transposed convolutions, whose weights have no rows of filters, do not count.

        Returns:
            The layer where that is most, and the norm of the largest such filter over that of the layer's largest one without
            it; 0 if none comes back.
        """
        found = [("", 0.0)]
        for (name, layer), weight, old, new in zip(self.layers.items(), self.weights, self.masks, masks, strict=True):
            if isinstance(layer, _ConvTransposeNd):
                continue
            norms = (weight.detach() * new).flatten(1).norm(dim=1)
            alive = old.flatten(1).any(dim=1)
            back, there = norms.where(~alive, 0.0).max(), norms.where(alive, 0.0).max()
            if float(there) > 0:
                found.append((name, float(back / there)))
        return max(found, key=lambda pair: pair[1])

    # -------------------------------------------------------------------------------------------------------- gradients
    def record(self, on: bool) -> None:
        """Start to add up gradients at the pruned weights, anew, or stop."""
        for mask in self._masks:
            mask.record = on
            if on:
                mask.recorded = None

    @property
    def recorded(self) -> list[Tensor]:
        """The sum of the gradients that were recorded; zeros for a layer that had none."""
        pairs = zip(self._masks, self.weights, strict=True)
        return [torch.zeros_like(w, requires_grad=False) if m.recorded is None else m.recorded for m, w in pairs]

    def forget(self) -> None:
        """Free recorded gradients."""
        for mask in self._masks:
            mask.recorded = None

    # ------------------------------------------------------------------------------------------------------- life cycle
    def make_permanent(self) -> None:
        """Set pruned weights to zero and take the masks off, so that plain layers are left."""
        make_permanent(self.layers)

    def hidden(self, weights: Sequence[Tensor] | None = None) -> list[Tensor]:
        """Return the values of pruned weights, which the network does not show, in the order in which they stand."""
        pairs = zip(self._masks, weights or self.weights, strict=True)
        return [w.detach().new_empty(0) if m.mask is None else w.detach()[m.mask == 0] for m, w in pairs]

    def restore_hidden(self, hidden: Sequence[Tensor]) -> None:
        """Put the values of `hidden` back behind the masks."""
        with torch.no_grad():
            for mask, weight, values in zip(self._masks, self.weights, hidden, strict=True):
                if mask.mask is not None:
                    weight[mask.mask == 0] = values.to(weight)

    def state_dict(self) -> dict[str, Any]:
        """Return the masks, as bits, and what belongs to them."""
        set_ = [m.mask is not None for m in self._masks]
        return {
            "layers": {name: list(weight.shape) for name, weight in zip(self.layers, self.weights, strict=True)},
            "masks": pack_bits(self.masks).cpu() if any(set_) else None,
            "updates": self.updates,
            "regrown": dict(self.regrown),
            "killed": dict(self.killed),
            "method": type(self.method).__name__,
            "kept": self.method.state_dict(),
        }

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Continue from `state_dict`.

        Raises:
            ValueError: if it is that of other layers, or of another method.
        """
        own = {name: list(weight.shape) for name, weight in zip(self.layers, self.weights, strict=True)}
        for name in [*own, *state["layers"]]:
            if own.get(name) != state["layers"].get(name):
                raise ValueError(
                    f"The checkpoint was pruned in other layers: `{name}` is {state['layers'].get(name, 'not pruned')} there "
                    f"and {own.get(name, 'not pruned')} here. Choose the same `layers`."
                )
        if state["method"] != type(self.method).__name__:
            own_method = type(self.method).__name__
            raise ValueError(f"The checkpoint was pruned by {state['method']}, not by {own_method}: choose the same `method`.")
        weights = self.weights
        if state["masks"] is not None:
            new = unpack_bits(state["masks"], [w.shape for w in weights])
            for mask, alive, weight in zip(self._masks, new, weights, strict=True):
                mask.set(alive, weight)
        self.updates, self.regrown, self.killed = int(state["updates"]), dict(state["regrown"]), dict(state["killed"])
        self.method.load_state_dict(state["kept"])
