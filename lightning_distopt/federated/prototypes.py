"""Several architectures in one federation: which clients train which, and what of the module is theirs."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from lightning_distopt.communication import Replicas
from lightning_distopt.communication.tensors import named_buffers

Prototypes = str | Sequence[str] | Mapping[int, str] | Callable[[int], str] | None
"""What says which prototype a client has: "even", names in the order of clients, or a dictionary or function of its number."""


@dataclass(frozen=True)
class Group:
    """Clients that train the same network: all of them, or those of one prototype.

    Args:
        name: of the prototype; None where there are none.
        columns: what of the blocks is its parameters: the number of a block, and columns.
        slots: the numbers of its parameters.
        buffers: the numbers of its buffers.
        common: those of buffers outside of all prototypes, which every group has.
        nbytes: of its parameters.
        nbytes_of_buffers: of its buffers, and of the common ones.
    """

    name: str | None
    columns: tuple[tuple[int, slice], ...]
    slots: tuple[int, ...]
    buffers: tuple[int, ...]
    common: tuple[int, ...]
    nbytes: int
    nbytes_of_buffers: int

    @property
    def all_buffers(self) -> tuple[int, ...]:
        """The numbers of its buffers, and of the common ones."""
        return self.buffers + self.common


def check_prototypes(prototypes: Any, clients: int) -> None:
    """Raise a `ValueError` for what does not say which prototype each client has."""
    if prototypes is None or callable(prototypes) or prototypes == "even":
        return
    if isinstance(prototypes, Mapping):
        missing = [k for k in range(clients) if k not in prototypes]
        if missing:
            raise ValueError(f"`prototypes` names none for client {missing[0]}: give each of the {clients} clients one.")
    elif isinstance(prototypes, str) or not isinstance(prototypes, Sequence):
        raise ValueError(
            '`prototypes` must be "even", a name for each client, or a dictionary or function from a client\'s number to a '
            f"name; got {prototypes!r}."
        )
    elif len(prototypes) != clients:
        raise ValueError(f"`prototypes` has {len(prototypes)} names, but there are {clients} clients.")


def assign(prototypes: Prototypes, clients: int, names: Sequence[str]) -> list[str]:
    """Return the prototype of each client.

    Example:
        >>> assign("even", clients=5, names=["small", "large"])
        ['small', 'large', 'small', 'large', 'small']

    Args:
        prototypes: what the user has said; "even" lets client `k` have prototype `k mod p`.
        clients: `K`.
        names: of the `p` prototypes of the module.

    Raises:
        ValueError: for a name that the module does not have, and for a prototype that no client has.
    """
    if prototypes == "even":
        chosen = [names[k % len(names)] for k in range(clients)]
    elif callable(prototypes):
        chosen = [prototypes(k) for k in range(clients)]
    else:
        chosen = [prototypes[k] for k in range(clients)]  # type: ignore[index]
    known = ", ".join(map(repr, names))
    for k, name in enumerate(chosen):
        if name not in names:
            raise ValueError(f"Client {k} shall have the prototype {name!r}; those of the module are {known}.")
    for name in names:
        if name not in chosen:
            raise ValueError(f"No client has the prototype {name!r}: give it to one, or leave it out of the module.")
    return chosen


def one_group(replicas: Replicas) -> Group:
    """Return the group of all clients, where there are no prototypes."""
    columns = tuple((k, slice(None)) for k in range(len(replicas.parameters)))
    slots = range(len(replicas.slots))
    return _group(replicas, None, columns, slots, range(len(replicas.buffers(0))))


def groups_of(replicas: Replicas) -> tuple[Group, ...]:
    """Return a group for each of the module's `prototypes`.

    Raises:
        ValueError: if the module does not name its prototypes, or trains parameters that are not those of one of them.
    """
    module: Any = replicas.module
    networks = getattr(module, "prototypes", None)
    if not isinstance(networks, nn.ModuleDict) or not isinstance(getattr(module, "prototype", None), str):
        raise ValueError(
            f"With `prototypes`, {type(module).__name__} must have its networks in `self.prototypes`, a `torch.nn.ModuleDict`, "
            "and the name of the one that it is just now in `self.prototype`."
        )
    names: dict[int, str] = {}
    for name, network in networks.items():
        for parameter in network.parameters():
            if parameter.requires_grad and names.setdefault(id(parameter), name) != name:
                raise ValueError(
                    f"The prototypes {names[id(parameter)]!r} and {name!r} share a parameter, but each must have its own."
                )
    trained = [(name, parameter) for name, parameter in module.named_parameters() if parameter.requires_grad]
    for name, parameter in trained:
        if id(parameter) not in names:
            raise ValueError(f"The parameter `{name}` belongs to no prototype, so no client would train it: freeze or move it.")
    of_slots = [names[id(parameter)] for _, parameter in trained]
    parts = list(replicas.parts(of_slots))
    owners = {id(part): name for name, network in networks.items() for part in network.modules()}
    of_buffers = [owners.get(id(part)) for _, part, _ in named_buffers(module)]
    return tuple(
        _group(
            replicas,
            name,
            tuple((k, columns) for k, columns, of in parts if of == name),
            [k for k, of in enumerate(of_slots) if of == name],
            [k for k, of in enumerate(of_buffers) if of == name],
            [k for k, of in enumerate(of_buffers) if of is None],
        )
        for name in networks
    )


def _group(
    replicas: Replicas,
    name: str | None,
    columns: tuple[tuple[int, slice], ...],
    slots: Sequence[int],
    buffers: Sequence[int],
    common: Sequence[int] = (),
) -> Group:
    sizes = [replicas.slots[k].numel * replicas.parameters[replicas.slots[k].block].element_size() for k in slots]
    of_buffers = [replicas.buffers(0)[k].nbytes for k in (*buffers, *common)]
    return Group(name, columns, tuple(slots), tuple(buffers), tuple(common), sum(sizes), sum(of_buffers))
