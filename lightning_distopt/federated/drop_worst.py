"""DropWorst: a server that takes nothing from clients that have learned nothing."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from torch import Tensor

from lightning_distopt.federated.aggregator import Aggregator, Client
from lightning_distopt.federated.distillation import check_labels, check_logits
from lightning_distopt.federated.wrapper import Wrapper
from lightning_distopt.options import is_number


class DropWorst(Wrapper):
    r"""Drop clients that only guess, before another aggregator averages or distills what the clients send.

    $$ S_t \leftarrow \{ k \in S_t : \text{accuracy}(\hat x^k_t) > \text{chance} + \text{margin} \} $$

    on the server's validation data: that of all validation loaders of the Trainer, whose batches are pairs (inputs, class
    labels); the module maps inputs to logits. Evaluated is what a client has trained, before `uplink` compresses it. Who is
    dropped is warned about, counts among `dropped`, keeps no new state, and the weights of the others add up to one, as after
    a loss that is not finite. Where all are dropped, the server's model stays.

    The thesis says "at the random level", not how near to it. An accuracy on `N` samples of somebody who guesses among
    `M` balanced classes is off by `sqrt((M - 1) / N) / M` (one standard deviation): the default margin is three of these for
    ten classes and 2,025 samples. Where classes are not balanced, a constant answer may be better than `1 / M`: let `chance`
    be the share of the most frequent class then.

    Example:
        >>> DropWorst("fedprox", chance=0.1)
        DropWorst(aggregator=FedProx(mu=0.01), chance=0.1, margin=0.02)

    Args:
        aggregator: what the server makes of the models that are left.
        chance: accuracy of guessing, between 0 and 1; by default one over the number of classes in the validation data.
        margin: how much better than that a client has to be, at least 0.

    Raises:
        ValueError: for options outside of their range; when training starts, for validation data that is not for a classifier.

    Reference: T. Lin, *Optimization for deep learning in distributed and heterogeneous systems*, section 8.5.2 ("drop-worst"),
    table 8.3.
    """

    def __init__(self, aggregator: Aggregator | str = "fedavg", chance: float | None = None, margin: float = 0.02) -> None:
        super().__init__(aggregator)
        if self.changes_model_at_end:
            raise ValueError(
                f"`DropWorst` has to see what a client sends, which {self.aggregator!r} makes of the model at the end: use "
                "`DropWorst` inside, as in `OneBit(DropWorst(...))`."
            )
        for name, value in (("chance", chance), ("margin", margin)):
            fits = is_number(value) and 0 <= value < 1
            if not (fits or (name == "chance" and value is None)):
                raise ValueError(f"`{name}` is an accuracy, at least 0 and below 1; got {value!r}.")
        self.chance, self.margin = chance, margin

    def _take_traits(self) -> None:
        super()._take_traits()
        self.needs_data_of_both = True

    def setup(self, server: Any) -> None:
        """Bind to a server, whose validation data is looked at in the first round."""
        super().setup(server)
        self._bound: float | None = None

    def begin_round(self) -> None:
        """Look at the validation data, the first time."""
        self._settle()
        super().begin_round()

    def end_client(self, client: Client) -> None:
        """Refuse a client that guesses."""
        bound = self._settle()
        server = self.server
        with server.showing(client.model, server.replicas.buffers(server.replicas.active)) as module:
            right, total = 0, 0
            for inputs, targets in self._batches():
                right = right + (module(inputs).argmax(dim=1) == targets).sum()
                total += len(targets)
        if int(right) / total <= bound:
            client.refused = f"the accuracy on the validation data is at most {bound:.4g}, which is like guessing (`DropWorst`)"
            return
        super().end_client(client)

    def _settle(self) -> float:
        """Return the accuracy that clients have to exceed."""
        if self._bound is None:
            labels: set[int] = set()
            for inputs, targets in self._batches():
                if not labels:
                    with self.server.showing(self.server.model, self.server.buffers) as module:
                        check_logits("DropWorst", module(inputs), len(targets))
                labels.update(targets.unique().tolist())
            if not labels:
                raise ValueError("`DropWorst` evaluates clients on validation data, and there is none: give it some samples.")
            self._bound = (1 / len(labels) if self.chance is None else self.chance) + self.margin
        return self._bound

    def _batches(self) -> Iterator[tuple[Tensor, Tensor]]:
        for inputs, targets in self.server.validation_batches():
            check_labels("DropWorst", targets)
            yield inputs, targets
