"""What happens when a rank fails: the others end too, with an error that names it."""

from __future__ import annotations

import os
import warnings
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

LOOK_AT_LOSS_EVERY = {"cpu": 1}
"""Steps between two looks at the loss, by device; on any other there are 50, since each look waits for the device."""


SURVIVOR = "survivor-rank-{rank:05d}.ckpt"
"""Name of the checkpoint that a rank leaves when another one has failed."""


class NonFiniteError(FloatingPointError):
    """A replica has parameters or a loss that are NaN or infinite; the text names the replica, the step and the tensor.

    Example:
        >>> import lightning as L
        >>> from lightning.pytorch.demos.boring_classes import BoringModel
        >>> from lightning_distopt import LocalSGDStrategy
        >>> class Diverging(BoringModel):
        ...     def configure_optimizers(self):
        ...         return torch.optim.SGD(self.parameters(), lr=float("inf"))
        >>> quiet = dict(logger=False, enable_checkpointing=False, enable_progress_bar=False, enable_model_summary=False)
        >>> strategy = LocalSGDStrategy(sync_period=4, replicas_per_device=2)
        >>> trainer = L.Trainer(strategy=strategy, accelerator="cpu", devices=1, max_steps=8, limit_val_batches=0, **quiet)
        >>> trainer.fit(Diverging())
        Traceback (most recent call last):
        ...
        lightning_distopt.strategies.faults.NonFiniteError: Replica 0, 1 (rank 0) is not finite in `layer.weight`, ...
    """


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
        self._watch.stop()
        self.set_world_ranks()
        ranks, timeout = self.num_nodes * self.num_processes, self._timeout or timedelta(minutes=30)
        self._watch = Watch(None, self.global_rank, ranks, timeout)
        try:
            super().setup_distributed()  # type: ignore[misc]
        except RuntimeError as error:
            if not _comes_from_communication(error):
                raise
            raise CommunicationError(self._watch.explain("communication", range(ranks), error)) from error
        self._watch = Watch(dist.distributed_c10d._get_default_store(), dist.get_rank(), dist.get_world_size(), timeout)

    def _guard(self: Any, operation: str) -> Any:
        return self._watch.guard(operation, range(self.world_size), self._give_up)

    def _give_up(self: Any) -> None:
        """Close our connections, so that ranks that wait for this one learn of its failure now."""
        if self.communicator is not None:
            self._drop_ddp()
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
        others = isinstance(exception, CommunicationError) or _comes_from_communication(exception)
        if _comes_from_communication(exception):  # in a collective of somebody else, such as torchmetrics'
            exception.args = (self._watch.explain("communication", range(self.world_size), exception),)
        elif not isinstance(exception, CommunicationError):  # which says already who is at fault
            self._watch.report(exception)
        self._give_up()
        if others and self.replicas is not None:
            self._save_own_replica(exception)
        self._watch.stop(failed=True)

    def _save_own_replica(self: Any, exception: BaseException) -> None:
        """Where another rank is at fault, keep what this one has: an ordinary checkpoint of its first replica."""
        folder = self._checkpoint_folder()
        if folder is None:
            return
        path = os.path.join(folder, SURVIVOR.format(rank=self.global_rank))
        try:
            self.replicas.activate(0)
            checkpoint = private.dump_checkpoint(self.lightning_module.trainer)
            self._set_positions_aside(checkpoint)
            self._write(checkpoint, path, None)
        except Exception as error:  # the first error is the one to be seen
            warnings.warn(f"The replica of rank {self.global_rank} could not be saved: {error}", stacklevel=2)
            return
        exception.args = (f"{exception} What this rank has is saved: go on with `ckpt_path={path!r}`.",)

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
        """Raise if a loss is not finite, or was not a while ago: a GPU is asked rarely, since the answer would stall it."""
        if self._loss is None:
            self._loss = torch.zeros(self.replicas_per_device, device=loss.device)
        self._loss[self.replicas.active] += (~torch.isfinite(loss)).any()  # the batches of each row where it was not finite
        every = LOOK_AT_LOSS_EVERY.get(loss.device.type, 50)
        if self.replicas.active or self.steps % every:  # row 0 is the last one of a step
            return
        counts = self._loss.tolist()
        most = int(max(counts))
        if most == 0:
            return
        # Whoever is averaged with it is not finite from the next step on: the row that has been so for longest is the cause.
        cause = [self.replicas.first_replica + row for row, count in enumerate(counts) if count == most]
        when = f"is not finite in step {self.steps + 1}"
        if every > 1:
            when = (
                f"was not finite in one of the last {every} steps (batches since then: {most}; where there are most, it began)"
            )
        raise NonFiniteError(
            f"The loss of replica {_and(cause)} {when}, and its gradient reaches all replicas: lower the learning rate, "
            "clip gradients, or look at its data."
        )

    def _finite_replicas(self: Any) -> tuple[list[bool], int]:
        """Before replicas are averaged for evaluation or a checkpoint: which of this rank are finite, and how many of all."""
        finite, bad = self._find_nonfinite(f"after {self.steps} steps, before an evaluation or a checkpoint")
        return finite, self.num_replicas - len(bad)

    def _check_finite(self: Any) -> None:
        """Before a round: a replica that is not finite is named, or is given the average of the others."""
        finite, bad = self._find_nonfinite(f"in step {self.steps + 1}, before round {self.traffic.rounds + 1}")
        if bad:
            self.replicas.replace_rows(finite, self.num_replicas - len(bad), self.communicator)
            rank_zero_warn(
                f"Replica {_and(bad)} had parameters that are not finite in step {self.steps + 1}; it goes on from the "
                "average of the others, with a new optimizer state."
            )

    def _find_nonfinite(self: Any, when: str) -> tuple[list[bool], list[int]]:
        """Raise if a replica is not finite, unless such replicas are skipped, which all ranks agree on then.

        Returns:
            Whether each replica of this rank is finite, and the numbers of those on all ranks that are not.
        """
        finite = self.replicas.finite_rows()
        bad = [self.replicas.first_replica + row for row, good in enumerate(finite) if not good]
        if self.nonfinite == "raise":
            if bad:
                self._raise_not_finite(bad, when)
            return finite, bad
        if not self.communicator.any(bool(bad))[0]:
            return finite, []
        everywhere = [replica for one in self.communicator.gather(bad) for replica in one]
        if len(everywhere) == self.num_replicas:
            raise NonFiniteError(f"No replica has finite parameters {when}: there is none to go on from.")
        return finite, everywhere

    def _raise_not_finite(self: Any, bad: list[int], when: str) -> NoReturn:
        name = self.replicas.nonfinite_parameter(bad[0] - self.replicas.first_replica)
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
