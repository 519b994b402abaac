"""Signals and other wishes to stop, which ranks act upon together, after the same round."""

from __future__ import annotations

import os
import signal
import threading
from typing import Any

from lightning.pytorch.callbacks import Checkpoint
from lightning.pytorch.utilities.rank_zero import rank_zero_info, rank_zero_warn

from lightning_distopt.communication import NO_NOTICE
from lightning_distopt.strategies import _lightning as private

INTERRUPTED = "interrupted.ckpt"
"""Name of the checkpoint that is written when a signal ends training; it lies where the other checkpoints lie."""


class StoppingMixin:
    """Notes SIGTERM, SIGINT, SLURM's requeue signal and `trainer.should_stop`, for a strategy.

    A rank that stopped by itself would leave the others waiting in the next round, and its checkpoint would be half of one.
    So a rank only notes what it has been told. At the end of a batch with a round all ranks tell each other, with one small
    message, and then do the same. Where replicas talk to neighbours alone, notices travel with what they send: all ranks act
    once the notice must have reached the last.
    """

    def _note_signals(self: Any, trainer: Any) -> None:
        """Listen for signals while training."""
        self._noted = dict.fromkeys(("terminate", "interrupt", "requeue", "stop"), False)
        self._shared = 0  # by the communicator, when this was last asked
        self._patches.defer_sigterm(trainer, lambda: self._noted.update(terminate=True))
        self._patches.defer_requeue(trainer, lambda: self._noted.update(requeue=True))
        self._patches.after_batch(trainer, self._settle_signals)

    def on_train_start(self: Any) -> None:
        """Listen for Ctrl-C: now, since Lightning has kept the handlers that it puts back after training."""
        super().on_train_start()  # type: ignore[misc]
        main = threading.current_thread() is threading.main_thread()
        if self._has_copies and main and signal.getsignal(signal.SIGINT) is not signal.SIG_IGN:
            self._patches.handle_signal(signal.SIGINT, self._note_interrupt)

    def _note_interrupt(self: Any, *_: Any) -> None:
        if self._noted["interrupt"]:  # pressed twice: the user does not want to wait
            raise KeyboardInterrupt
        self._noted["interrupt"] = True
        when = "the next round" if self.world_size > 1 else "this step"
        rank_zero_info(f"\nTraining ends after {when}, with a checkpoint; press Ctrl-C again to end it at once, without.")

    def _settle_signals(self: Any, trainer: Any) -> None:
        """After a batch: where it ended in a round, or there is one rank only, do what any rank has been told."""
        if self.world_size > 1:
            if trainer.should_stop:
                self._noted["stop"], trainer.should_stop = True, False
            if not self._round:
                return
        elif not any(self._noted.values()):
            return
        told = self._told_by_neighbours() if self._has_gossiped() else self._told_by_all()
        self._noted = {name: noted and not told[name] for name, noted in self._noted.items()}
        trainer.should_stop |= told["stop"]
        if told["requeue"]:
            self._save_and_requeue()
        if told["terminate"] or told["interrupt"]:
            self._save_interrupted(trainer)
            self._agreed_to_stop = True
            if told["terminate"]:
                private.stop_for_sigterm(trainer)
            else:
                raise KeyboardInterrupt

    def _told_by_all(self: Any) -> dict[str, bool]:
        self.communicator.notice = NO_NOTICE  # of an earlier round that did gossip
        return dict(zip(self._noted, self.communicator.any(*self._noted.values()), strict=True))

    def _has_gossiped(self: Any) -> bool:
        """Return whether messages of neighbours, with their notices, have arrived since this was last asked."""
        before, self._shared = self._shared, self.communicator.shared
        return self.world_size > 1 and self._shared != before

    def _told_by_neighbours(self: Any) -> dict[str, bool]:
        """Return what is to be done now: what one rank has noted spreads with the messages to neighbours.

        A notice says what, and after which of the messages that are yet to come all ranks know of it. They act then; of
        several notices the earliest wins, and a rank whose own was not the one notes it again.
        """
        communicator, algorithm = self.communicator, self.algorithm
        kinds = len(self._noted)
        if any(self._noted.values()):
            what = sum(noted << k for k, noted in enumerate(self._noted.values()))
            hops = algorithm.topology.steps_to_reach_all(communicator.local_replicas.start, algorithm.next_gossip_step)
            communicator.notice = min(communicator.notice, ((communicator.started + hops) << kinds) + what)
        when, what = communicator.notice >> kinds, communicator.notice % (1 << kinds)
        if communicator.shared < when:
            what = 0
        else:
            communicator.notice = NO_NOTICE
        return {name: bool(what >> k & 1) for k, name in enumerate(self._noted)}

    def _save_and_requeue(self: Any) -> None:
        """Do what Lightning does at SLURM's signal, on all ranks: save a checkpoint, and on rank 0 ask for the job again."""
        private.requeue_handler(self.lightning_module.trainer)()

    def _save_interrupted(self: Any, trainer: Any) -> None:
        folder = self._checkpoint_folder()
        if folder is None:
            rank_zero_warn(
                f"Training ends by a signal after step {trainer.global_step}. Nothing was saved, since there is no checkpoint "
                "callback (`enable_checkpointing=False`)."
            )
            return
        path = os.path.join(folder, INTERRUPTED)
        trainer.save_checkpoint(path)
        rank_zero_info(f"Training ends by a signal after step {trainer.global_step}. Go on with `ckpt_path={path!r}`.")

    def _checkpoint_folder(self: Any) -> str | None:
        """Return where the other checkpoints lie; None if there is no checkpoint callback."""
        trainer = self.lightning_module.trainer
        checkpoints = [callback for callback in trainer.callbacks if isinstance(callback, Checkpoint)]
        if not checkpoints:
            return None
        folders = [str(folder) for callback in checkpoints if (folder := getattr(callback, "dirpath", None))]
        return (folders or [str(trainer.default_root_dir)])[0]
