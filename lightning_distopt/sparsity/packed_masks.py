"""The masks of one task as bits, in one small file, and the weights that they belong to."""

from __future__ import annotations

import hashlib
import math
import os
import pickle
from collections.abc import Iterable, Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.utils import parametrize

from lightning_distopt.files import replacing
from lightning_distopt.sparsity.packing import pack_bits, unpack_bits
from lightning_distopt.sparsity.weights import WEIGHT, named_tensors, set_tensor, weight_key, weight_of

_FORMAT = 1
_DIGEST = 8  # bytes


def digest(tensor: Tensor) -> str:
    """Return a fingerprint of a tensor: its type, shape and values.

    Example:
        >>> digest(torch.zeros(2)) == digest(torch.zeros(2)), digest(torch.zeros(2)) == digest(torch.ones(2))
        (True, False)
    """
    values = tensor.detach().cpu().contiguous()
    made = hashlib.blake2b(repr((values.dtype, tuple(values.shape))).encode(), digest_size=_DIGEST)
    if values.numel():
        made.update(values.reshape(-1).view(torch.uint8).numpy().data)
    return made.hexdigest()


class PackedMasks:
    """Masks of one task, one bit for each masked weight, with what else the task needs beside the pretrained weights.

    A file holds `ceil(N / 8)` bytes for each layer; the tensors that the base does not have (a randomly initialized classifier,
    as it was before it was masked; statistics of batch norm that training has changed); and a fingerprint of every parameter
    of the base, so that masks are not laid over another model. It is loaded without running any code.

    Example:
        >>> base = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 2))
        >>> masks = PackedMasks.of(base, {"0": torch.eye(4)}, head=["1.weight", "1.bias"])
        >>> masks.nbytes, masks.sparsity
        (42, 0.75)
        >>> masks.apply(base)
        >>> int(base[0].weight.count_nonzero())
        4

    Args:
        bits: of each layer, by name.
        shapes: of the layers' weights.
        head: parameters and buffers of the task's own, by name.
        base: fingerprints of all other parameters, by name.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 7.2.
    """

    def __init__(
        self,
        bits: Mapping[str, Tensor],
        shapes: Mapping[str, tuple[int, ...]],
        head: Mapping[str, Tensor],
        base: Mapping[str, str],
    ) -> None:
        self.bits, self.shapes = dict(bits), {name: tuple(shape) for name, shape in shapes.items()}
        self.head, self.base = dict(head), dict(base)

    @classmethod
    def of(cls, module: nn.Module, masks: Mapping[str, Tensor], head: Iterable[str] = ()) -> PackedMasks:
        """Pack masks that belong to the weights which a module has now.

        Args:
            module: with the pretrained weights, as they were before masking.
            masks: one for each masked layer, by the layer's name, in the shape of its weight.
            head: names of the parameters and buffers that other tasks do not share; they are kept in full.

        Raises:
            ValueError: if a layer or parameter is missing or has another shape.
        """
        own, parameters, tensors = set(head), dict(module.named_parameters()), named_tensors(module)
        missing = next((name for name in own if name not in tensors), None)
        if missing is not None:
            raise ValueError(f"{type(module).__name__} has no parameter `{missing}` for the head of a task.")
        packed = cls(
            {name: pack_bits([mask]).cpu() for name, mask in masks.items()},
            {name: tuple(mask.shape) for name, mask in masks.items()},
            {name: tensor.detach().cpu().clone() for name, tensor in tensors.items() if name in own},
            {name: digest(p) for name, p in parameters.items() if name not in own},
        )
        packed.check(module, packed.base)
        return packed

    # ------------------------------------------------------------------------------------------------------------- use
    def masks(self, name: str, dtype: torch.dtype = torch.bool) -> Tensor:
        """Return the mask of a layer, true (or one) where the weight is used."""
        return unpack_bits(self.bits[name], [self.shapes[name]], dtype)[0]

    @property
    def nbytes(self) -> int:
        """Bytes of masks and head; the file has the names and fingerprints besides."""
        return sum(bits.numel() for bits in self.bits.values()) + sum(t.numel() * t.element_size() for t in self.head.values())

    @property
    def sparsity(self) -> float:
        """Share of the masked layers' weights that are zero; 0 if there are none."""
        total = sum(math.prod(shape) for shape in self.shapes.values())
        used = sum(int(self.masks(name).count_nonzero()) for name in self.bits)
        return 1 - used / total if total else 0.0

    @torch.no_grad()
    def apply(self, module: nn.Module) -> None:
        """Make a module with the pretrained weights the model of this task, in place.

        Raises:
            ValueError: if it is another model, with the first mismatch; it is left as it is then.
        """
        self.check(module)
        for name, values in self.head.items():
            set_tensor(module, name, values)
        for name in self.bits:
            weight = weight_of(module.get_submodule(name))
            weight.mul_(self.masks(name, weight.dtype).to(weight.device))

    def check(self, module: nn.Module, digests: Mapping[str, str] | None = None) -> None:
        """Raise an error if a module is not the one that the masks belong to.

        Args:
            module: with the pretrained weights.
            digests: of its parameters, if they are known already.

        Raises:
            ValueError: that names the first mismatch.
        """
        kind = type(module).__name__
        layers, parameters, tensors = dict(module.named_modules()), dict(module.named_parameters()), named_tensors(module)
        for name, shape in self.shapes.items():
            layer, own = layers.get(name), weight_key(name)
            if layer is not None and parametrize.is_parametrized(layer, WEIGHT):
                raise ValueError(
                    f"The layer `{name}` of {kind} has a mask or another parametrization already: remove that first."
                )
            if layer is None or own not in parameters:
                hint = self._part(tensors)
                raise ValueError(f"These masks belong to another model: {kind} has no layer `{name}` with a weight.{hint}")
            expected, found = tuple(self.head[own].shape) if own in self.head else tuple(parameters[own].shape), shape
            if expected != found:
                raise ValueError(
                    f"These masks belong to another model: the weight of `{name}` has the shape {list(expected)}, its mask "
                    f"{list(found)}."
                )
        for name in (*self.base, *self.head):
            if name not in tensors:
                hint = self._part(tensors)
                raise ValueError(f"These masks belong to another model: {kind} has no parameter `{name}`.{hint}")
        for name, parameter in parameters.items():
            if name in self.head:
                continue
            if name not in self.base:
                raise ValueError(f"These masks belong to another model, which has no parameter `{name}`.")
            if (digests[name] if digests is not None else digest(parameter)) != self.base[name]:
                raise ValueError(
                    f"These masks belong to another model: `{name}` has other values (or another type) than the weights that "
                    "they were trained on. If it was masked or trained since, load the pretrained weights first."
                )

    def _part(self, tensors: Mapping[str, Any]) -> str:
        """Return what to do if these are the tensors of a part of the module that the masks belong to, else nothing."""
        names = [*self.base, *self.head]
        parts = names[0].split(".") if names else []
        for k in range(1, len(parts)):
            prefix = ".".join(parts[:k])
            if all(name.startswith(f"{prefix}.") and name[len(prefix) + 1 :] in tensors for name in names):
                return f" They are those of a module whose `{prefix}` this is: use `masks.relative_to({prefix!r})`."
        return ""

    def relative_to(self, prefix: str) -> PackedMasks:
        """Return the masks for a part of the module: those of a `LightningModule`'s `model`, for the model itself.

        Example:
            >>> masks = PackedMasks({}, {}, {}, {"model.0.weight": "00"})
            >>> list(masks.relative_to("model").base)
            ['0.weight']

        Raises:
            ValueError: if something of a task lies outside of that part.
        """

        def renamed(values: Mapping[str, Any]) -> dict[str, Any]:
            for name in values:
                if not name.startswith(f"{prefix}."):
                    raise ValueError(f"`{name}` lies outside of `{prefix}`, so the masks are not those of this part alone.")
            return {name[len(prefix) + 1 :]: value for name, value in values.items()}

        return PackedMasks(renamed(self.bits), renamed(self.shapes), renamed(self.head), renamed(self.base))

    # ------------------------------------------------------------------------------------------------------------ files
    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the file; one of that name stays whole until the new one is."""
        state = {
            "masks": _FORMAT,
            "shapes": self.shapes,
            "bits": torch.cat([*self.bits.values(), torch.empty(0, dtype=torch.uint8)]).cpu(),
            "head": self.head,
            "base": self.base,
        }
        with replacing(path) as aside:
            torch.save(state, aside)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PackedMasks:
        """Read a file.

        Raises:
            FileNotFoundError: if there is none.
            ValueError: if it is no such file, or damaged.
        """
        try:
            state = torch.load(path, map_location="cpu", weights_only=True)
            sizes = [-(-math.prod(shape) // 8) for shape in state["shapes"].values()]
            if state["masks"] != _FORMAT:
                raise ValueError("unknown format")
            bits = dict(zip(state["shapes"], state["bits"].split(sizes), strict=True))
            return cls(bits, state["shapes"], state["head"], state["base"])
        except FileNotFoundError:
            raise
        except (
            OSError,
            RuntimeError,
            EOFError,
            pickle.UnpicklingError,
            ValueError,
            KeyError,
            TypeError,
            AttributeError,
        ) as error:
            raise ValueError(f"{path} is no file that `PackedMasks.save` has written, or it is damaged.") from error
