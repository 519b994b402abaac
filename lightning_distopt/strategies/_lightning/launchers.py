"""How processes that a launcher of Lightning has started end when one of them fails."""

from __future__ import annotations

import atexit
import functools
import threading
import time
from collections.abc import Callable
from typing import Any

import lightning.pytorch as pl
from lightning.pytorch.utilities.rank_zero import rank_zero_warn

GRACE = 60.0
"""Seconds that processes have after the failure of one, to find out which it was and to save what they have."""


def end_in_order(launcher: Any, start_method: str) -> None:
    """Let every process of a launcher handle a failure itself, before those that are left are killed.

    Lightning looks every five seconds after processes that run the script again ("popen"), and kills all once one has failed,
    whatever the others are doing. Errors of those that are forked or spawned it handles in the parent alone, which has not
    trained.
    """
    if start_method == "popen":
        launcher.launch = Children(launcher).launch
    else:
        launcher.launch = functools.partial(_launch_handling, launcher)


def _lacks(name: str) -> None:
    lacks = f"This Lightning version ({pl.__version__}) is unknown: it lacks `{name}`"
    rank_zero_warn(f"{lacks}. After a failure ranks may be killed before they say which one it was.")


# ------------------------------------------------------------------------------------------------------------ fork, spawn
def _launch_handling(
    launcher: Any, function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any
) -> Any:
    run = functools.partial(_run_in_child, launcher, trainer, function)
    before = launcher.procs
    try:
        return type(launcher).launch(launcher, run, *args, trainer=trainer, **kwargs)
    except BaseException:
        if trainer is not None and launcher.procs is not before:
            _leave_hooks_to_children(trainer)
        raise


def _leave_hooks_to_children(trainer: Any) -> None:
    """Let callbacks not be told of the exception that is on its way in the parent: what its children have saved is theirs.

    `OnExceptionCheckpoint` would overwrite it here, with a module that has not trained.
    """
    strategy, callbacks = trainer.strategy, trainer.callbacks
    handle = strategy.on_exception

    def handle_and_restore(exception: BaseException) -> None:  # which Lightning calls after the callbacks
        trainer.callbacks = callbacks
        vars(strategy).pop("on_exception")
        handle(exception)

    trainer.callbacks, strategy.on_exception = [], handle_and_restore


def _run_in_child(launcher: Any, trainer: Any, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
    """Run in a process that was forked or spawned, and handle errors there, as one does that runs the script again."""
    try:
        from lightning.pytorch.trainer.call import _call_and_handle_interrupt
    except ImportError:
        _lacks("_call_and_handle_interrupt")
        return function(*args, **kwargs)
    launcher.launch = _run_here  # this process is one of those that were to be launched
    try:
        return _call_and_handle_interrupt(trainer, function, *args, **kwargs)
    except SystemExit as end:  # of one that ends without an error, the parent would wait for the result
        raise SystemExit(end.code or 1) from end


def _run_here(function: Callable[..., Any], *args: Any, trainer: pl.Trainer | None = None, **kwargs: Any) -> Any:
    return function(*args, **kwargs)


# ------------------------------------------------------------------------------------------------------------------ popen
class Children:
    """The processes that this one has started on its node: once one has failed, the others have time to end by themselves.

    Args:
        launcher: has them in the list `procs`, by local rank, from 1; in those processes themselves there are none.
    """

    def __init__(self, launcher: Any) -> None:
        self.launcher = launcher
        self._failed_at: float | None = None
        self._ending = False

    def launch(self, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Start them, unless they have been, and run the function beside them."""
        run = functools.partial(self._run, bool(self.launcher.procs), function)
        return type(self.launcher).launch(self.launcher, run, *args, **kwargs)

    def _run(self, started_before: bool, function: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        if self.launcher.procs and not started_before:
            self._give_grace()
        try:
            return function(*args, **kwargs)
        except BaseException:
            if self.launcher.procs:
                atexit.register(self.end)
            raise

    def _give_grace(self) -> None:
        """Let Lightning's observer, which kills all processes once one of them has failed, do so after some time only."""
        for thread in threading.enumerate():
            if getattr(thread, "_child_processes", None) is self.launcher.procs and hasattr(thread, "_run"):
                thread._run = functools.partial(self._look, thread._run)
                return
        _lacks("_ChildProcessObserver")

    def _look(self, look: Callable[[], bool]) -> bool:
        """Look after them, as the observer does; returns whether there is nothing more to be done."""
        if self._ending:
            return True
        if any(process.poll() for process in self.launcher.procs) and time.monotonic() < self._deadline():
            return False
        return look()

    def _deadline(self) -> float:
        if self._failed_at is None:
            self._failed_at = time.monotonic()
        return self._failed_at + GRACE

    def end(self) -> None:
        """As this process ends after a failure: wait for them, and kill those that don't end, so that none is left over."""
        self._ending = True
        deadline = self._deadline()
        try:
            while any(process.poll() is None for process in self.launcher.procs) and time.monotonic() < deadline:
                time.sleep(0.05)
        finally:  # also where the user does not want to wait
            for rank, process in enumerate(self.launcher.procs, start=1):
                if process.poll() is None:
                    rank_zero_warn(
                        f"The process of local rank {rank} ({process.pid}) has not ended by itself after a failure, and is "
                        "killed."
                    )
                    process.kill()
