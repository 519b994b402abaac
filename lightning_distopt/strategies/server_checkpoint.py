"""Checkpoints of federations: the ordinary file has the server, with which any number of ranks can go on."""

from __future__ import annotations

from typing import Any

from lightning.pytorch.utilities.exceptions import MisconfigurationException
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

from lightning_distopt.strategies import _lightning as private
from lightning_distopt.strategies.checkpoint import ALONE
from lightning_distopt.strategies.clients import RoundLoader

SERVER = "lightning_distopt_server"  # in the checkpoint of several ranks


class ServerCheckpointMixin:
    """Saving and resuming of a federation's server, for a strategy.

    What clients keep, and what has arrived in a round under way, is in the files of the ranks, as replicas are; in a single
    process, which has no such file, it is in the ordinary one.
    """

    def save_checkpoint(self: Any, checkpoint: dict[str, Any], filepath: Any, storage_options: Any = None) -> None:
        """Let the ordinary file have the server's state, with which any number of ranks can go on at the end of a round."""
        if self.replicas is not None and "optimizer_states" in checkpoint:
            # The server knows which turn comes next, and strategies that have other loaders would miss this one's state.
            trainer = self.lightning_module.trainer
            private.take_loader_states(trainer, checkpoint, ours=lambda loader: isinstance(loader, RoundLoader))
            if self.num_replicas > 1:
                checkpoint[SERVER] = self.algorithm.server_state()
        super().save_checkpoint(checkpoint, filepath, storage_options)  # type: ignore[misc]

    def _goes_on_elsewhere(self, checkpoint: dict[str, Any]) -> bool:
        """Return whether it has the server's state, which is all that another number of ranks needs."""
        return SERVER in checkpoint

    def load_optimizer_state_dict(self: Any, checkpoint: Any) -> None:
        """Restore the server, and clients where the checkpoint has those of this rank."""
        state = checkpoint.get(SERVER, checkpoint.get(ALONE))
        if self.replicas is not None and state is not None:
            try:
                self.algorithm.check_kind(state)
            except ValueError as error:
                raise MisconfigurationException(str(error)) from None
        super().load_optimizer_state_dict(checkpoint)  # type: ignore[misc]
        self._resumed = self._resume is not None or (self.num_replicas == 1 and ALONE in checkpoint)
        if self._resumed or self.replicas is None:
            return
        if state is None:
            if checkpoint.get("global_step"):
                rank_zero_warn(
                    "The checkpoint has a model and no server (it was saved after training, or by another strategy), so the "
                    "aggregator's state, what clients keep, and the check that these have the same data begin anew; those of "
                    "`ModelCheckpoint`, and of `trainer.save_checkpoint` during `fit`, have it."
                )
            return
        inside = int(state["turn"]) > 0
        self.algorithm.load_server_state(state)
        self._resumed = not inside
        lost = [
            what
            for what, is_so in (("the clients of the round under way", inside), ("what clients keep", self.algorithm.stateful))
            if is_so
        ]
        if lost:
            rank_zero_warn(
                "The checkpoint was saved on other ranks, or with another `replicas_per_device`, so "
                f"{' and '.join(lost)} begin anew; the server goes on."
            )
