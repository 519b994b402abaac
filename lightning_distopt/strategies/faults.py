"""What happens when a rank fails: the others end too, with an error that names it."""

from __future__ import annotations

from collections.abc import Sequence
from datetime import timedelta
from typing import Any, NoReturn

import torch
import torch.distributed as dist
from lightning.pytorch.utilities.rank_zero import rank_zero_warn
from torch import Tensor

from lightning_distopt.communication import CommunicationError, Watch
from lightning_distopt.communication.messages import pack, unpack
from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.gradients import AveragingDDP

LOOK_AT_LOSS_EVERY = 50
"""Steps between two looks at the loss on a GPU, where each look waits for it."""


class NonFiniteError(FloatingPointError):
    """A replica has parameters or a loss that are NaN or infinite; the text names the replica, the step and the tensor."""


class FaultsMixin:
    """Collectives that name who is at fault, and the policy for replicas that are not finite, for a strategy."""

    _watch: Watch
    _ddp: AveragingDDP | None
    _loss: Tensor | None

    # ------------------------------------------------------------------------------------------------------- collectives
    def setup_distributed(self: Any) -> None:
        """Connect the processes and watch them; a single process needs neither."""
        if self.num_nodes * self.num_processes == 1:
            self.set_world_ranks()
            return
        super().setup_distributed()  # type: ignore[misc]
        self._watch.stop()
        timeout = self._timeout or timedelta(minutes=30)
        self._watch = Watch(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), timeout)

    def _guard(self: Any, operation: str) -> Any:
        return self._watch.guard(operation, range(self.world_size), self._give_up)

    def _give_up(self: Any) -> None:
        """Close our connections, so that ranks that wait for this one learn of its failure now."""
        if self.communicator is not None:
            if self._ddp is not None:  # which would keep its group
                self._ddp, self.model = None, self.lightning_module
            self.communicator.close()

    def barrier(self: Any, name: str | None = None) -> None:
        """Wait for all ranks, unless training has failed: then there is nobody to wait for."""
        if not self._has_failed():
            with self._guard(f"waiting ({name})" if name else "waiting"):
                super().barrier(name)  # type: ignore[misc]

    def broadcast(self: Any, obj: Any, src: int = 0) -> Any:
        """Return the object of rank `src`: numbers, strings, tensors and containers of them, which is all that is read."""
        if self.world_size == 1 or not dist.is_initialized():
            return obj
        with self._guard("broadcast"):
            message = pack(obj) if self.global_rank == src else torch.empty(0, dtype=torch.uint8)
            size = torch.tensor([message.numel()], device=self.root_device)
            dist.broadcast(size, src)
            message = (
                message.to(self.root_device)
                if self.global_rank == src
                else message.new_empty(int(size), device=self.root_device)
            )
            dist.broadcast(message, src)
        return obj if self.global_rank == src else unpack(message)

    def reduce(self: Any, tensor: Any, *args: Any, **kwargs: Any) -> Any:
        """Reduce a tensor over ranks, as Lightning does."""
        with self._guard("reduction"):
            return super().reduce(tensor, *args, **kwargs)  # type: ignore[misc]

    def all_gather(self: Any, tensor: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        """Gather tensors of all ranks, as Lightning does."""
        with self._guard("gathering"):
            gathered: Tensor = super().all_gather(tensor, *args, **kwargs)  # type: ignore[misc]
        return gathered

    def backward(self: Any, closure_loss: Tensor, optimizer: Any, *args: Any, **kwargs: Any) -> Tensor:
        """Run the backward pass, in which torch's DDP may communicate."""
        try:
            loss: Tensor = super().backward(closure_loss, optimizer, *args, **kwargs)  # type: ignore[misc]
            return loss
        except RuntimeError as error:
            if self._ddp is None or not _comes_from_communication(error):
                raise
            with self._guard("averaging of gradients"):
                raise

    # ---------------------------------------------------------------------------------------------------------- failures
    def on_exception(self: Any, exception: BaseException) -> None:
        """Let the others know, or find out which of them has caused it."""
        private.augment_message(  # Lightning's advice names another strategy
            exception,
            ".*Expected to have finished reduction in the prior iteration.*",
            "The loss of a step doesn't depend on all parameters. Where gradients are averaged, torch's DDP has to look for "
            "the unused ones: pass `ddp_kwargs={'find_unused_parameters': True}` to the strategy.",
        )
        super().on_exception(exception)  # type: ignore[misc]
        if not self._has_failed():
            return
        if _comes_from_communication(exception):  # in a collective of somebody else, such as torchmetrics'
            exception.args = (self._watch.explain("communication", range(self.world_size), exception),)
        elif not isinstance(exception, CommunicationError):  # which says already who is at fault
            self._watch.report(exception)
        self._give_up()
        self._watch.stop(failed=True)

    def _has_failed(self: Any) -> bool:
        """Return whether training ends by an exception that the ranks have not agreed on."""
        module = self.lightning_module
        return module is not None and module._trainer is not None and module.trainer.interrupted and not self._agreed_to_stop

    # ---------------------------------------------------------------------------------------------- not finite: NaN, inf
    def pre_backward(self: Any, closure_loss: Tensor) -> None:
        """Look at the loss, where its gradient is about to reach all replicas."""
        if self._watches_loss and (self._ddp is not None or self.algorithm.gradient_group(self.steps) > 1):
            self._look_at_loss(closure_loss.detach())
        super().pre_backward(closure_loss)  # type: ignore[misc]

    def _look_at_loss(self: Any, loss: Tensor) -> None:
        """Raise if the loss is not finite; a GPU is asked rarely, since the answer would stall it."""
        if loss.device.type != "cpu":
            total = loss.sum() * 0  # NaN from the first one on that was not finite
            self._loss = total if self._loss is None else self._loss + total
            if self.steps % LOOK_AT_LOSS_EVERY:
                return
            loss, self._loss = self._loss, None
        if not bool(torch.isfinite(loss).all()):
            raise NonFiniteError(
                f"The loss of replica {self._active_replica()} is not finite in step {self.steps + 1}, and its gradient would "
                "reach all replicas: lower the learning rate, clip gradients, or look at its data."
            )

    def _active_replica(self: Any) -> int:
        return int(self.replicas.first_replica + self.replicas.active)

    def _finite_replicas(self: Any) -> tuple[list[bool], int]:
        """Before replicas are averaged for evaluation or a checkpoint: which of this rank are finite, and how many of all."""
        finite = self.replicas.finite_rows()
        if self.nonfinite == "raise":
            if not all(finite):
                self._raise_not_finite(finite, f"after {self.steps} steps, before an evaluation or a checkpoint")
            return finite, self.num_replicas
        count = sum(self.communicator.gather(sum(finite)))
        if count == 0:
            raise NonFiniteError(f"No replica has finite parameters in step {self.steps + 1}: there is none to go on from.")
        return finite, count

    def _check_finite(self: Any) -> None:
        """Before a round: a replica that is not finite is named, or is given the average of the others."""
        finite = self.replicas.finite_rows()
        bad = [self.replicas.first_replica + row for row, good in enumerate(finite) if not good]
        if self.nonfinite == "raise":
            if bad:
                self._raise_not_finite(finite, f"in step {self.steps + 1}, before round {self.traffic.rounds + 1}")
            return
        if not self.communicator.any(bool(bad))[0]:
            return
        everywhere = [replica for one in self.communicator.gather(bad) for replica in one]
        if len(everywhere) == self.num_replicas:
            raise NonFiniteError(f"No replica has finite parameters in step {self.steps + 1}: there is none to go on from.")
        self.replicas.replace_rows(finite, self.num_replicas - len(everywhere), self.communicator)
        rank_zero_warn(
            f"Replica {_and(everywhere)} had parameters that are not finite in step {self.steps + 1}; it goes on from the "
            "average of the others, with a new optimizer state."
        )

    def _raise_not_finite(self: Any, finite: list[bool], when: str) -> NoReturn:
        bad = [self.replicas.first_replica + row for row, good in enumerate(finite) if not good]
        name = self.replicas.nonfinite_parameter(finite.index(False))
        raise NonFiniteError(
            f"Replica {_and(bad)} (rank {self.global_rank}) is not finite in `{name}`, {when}: lower "
            "the learning rate, clip gradients, or let such a replica go on from the average of the others with "
            "`nonfinite='skip'`."
        )


def _and(numbers: Sequence[int]) -> str:
    return ", ".join(map(str, numbers))


def _comes_from_communication(error: BaseException) -> bool:
    """Return whether an error is one of `torch.distributed`; gloo's have no type of their own."""
    text = str(error).lower()
    if isinstance(error, CommunicationError) or not isinstance(error, RuntimeError):
        return False
    return isinstance(error, dist.DistError) or any(word in text for word in ("gloo", "nccl", "connection closed by peer"))
