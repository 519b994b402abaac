"""A process that a launcher has really started fails: the others say who it was, save what they have, and none is left over."""

from __future__ import annotations

import os
import re
import signal
import subprocess
import sys
import textwrap
import time
from contextlib import suppress
from pathlib import Path
from typing import Any

import lightning as L
import pytest
import torch
from lightning.fabric.strategies.launchers import subprocess_script

from lightning_distopt.strategies._lightning import launchers
from tests.conformance.problems import QUIET
from tests.helpers import exhaustive, fresh_environment

ROOT = Path(__file__).parent.parent

SCRIPT = textwrap.dedent(
    """
    import os, signal, sys, time, warnings
    from datetime import timedelta
    from pathlib import Path
    warnings.filterwarnings("ignore")
    warnings.filterwarnings("always", message="The process of")
    import lightning as L
    import torch
    from lightning.fabric.strategies.launchers import subprocess_script
    from lightning.pytorch.callbacks import ModelCheckpoint
    from torch.utils.data import DataLoader, TensorDataset
    from lightning_distopt import LocalSGDStrategy
    from lightning_distopt.strategies._lightning import launchers
    from tests.faults import Module

    subprocess_script._ChildProcessObserver.__init__.__defaults__ = (1,)  # looks each second: sooner than others have found out
    folder, start_method, fault = sys.argv[1:]
    if fault == "stop":
        launchers.GRACE = 2.0

    class Injector(L.Callback):
        def setup(self, trainer, module, stage):
            Path(folder, f"pid{trainer.global_rank}").write_text(str(os.getpid()))

        def on_train_batch_start(self, trainer, module, batch, batch_idx):
            if trainer.global_rank == 1 and trainer.global_step == 6:
                if fault == "raise":
                    raise ValueError("injected")
                os.kill(os.getpid(), signal.SIGKILL if fault == "kill" else signal.SIGSTOP)

        def on_exception(self, trainer, module, error):
            Path(folder, f"{os.getpid()}.txt").write_text(f"{type(error).__name__}: {error}")

    if __name__ == "__main__":
        x = torch.randn(64, 4)
        trainer = L.Trainer(
            accelerator="cpu", devices=3, max_steps=40, logger=False, enable_progress_bar=False, enable_model_summary=False,
            strategy=LocalSGDStrategy(4, timeout=timedelta(seconds=20), start_method=start_method),
            callbacks=[Injector(), ModelCheckpoint(folder, every_n_epochs=1000)],
        )
        try:
            trainer.fit(Module(), DataLoader(TensorDataset(x, x.sum(dim=1, keepdim=True)), batch_size=4))
        finally:
            assert any(isinstance(callback, Injector) for callback in trainer.callbacks)
    """
)


def fail(folder: Path, start_method: str, fault: str) -> tuple[Any, str, list[str]]:
    """Launch three processes, of which rank 1 fails in round 2.

    Returns:
        The exit code of the first process, what was written, and what `on_exception` was told on each rank.
    """
    script = folder / "train.py"
    script.write_text(SCRIPT)
    command = [sys.executable, str(script), str(folder), start_method, fault]
    output = folder / "output.txt"
    with output.open("w") as file:  # not `Forked`, which would leave out what is to happen at exit
        main = subprocess.Popen(command, env=fresh_environment(ROOT), stdout=file, stderr=file, start_new_session=True)
        try:
            main.wait(120)
            pids = [(folder / f"pid{rank}").read_text() for rank in range(3)]
            assert {path.stem for path in folder.glob("*.txt")} <= {*pids, "output"}, "told the parent"
            assert not [pid for pid in pids if is_alive(int(pid))], output.read_text()
        finally:
            with suppress(ProcessLookupError):
                os.killpg(main.pid, signal.SIGKILL)
    told = [folder / f"{pid}.txt" for pid in pids]
    return main.returncode, output.read_text(), [one.read_text() if one.exists() else "" for one in told]


def is_alive(pid: int) -> bool:
    """Return whether a process still runs; one that has ended may wait to be noticed by whoever inherited it."""
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


def check_survivors(folder: Path, told: list[str], cause: str) -> None:
    for rank in (0, 2):
        assert re.match(rf"CommunicationError: Rank {rank}: .*{cause}", told[rank]), told
        own = torch.load(folder / f"survivor-rank-{rank:05d}.ckpt", weights_only=True)
        assert own["global_step"] in (7, 8)  # in round 2, where it waited for rank 1


@pytest.mark.launch
def test_others_name_a_rank_that_was_killed(tmp_path: Path) -> None:
    code, said, told = fail(tmp_path, "popen", "kill")
    assert code == 1, said
    check_survivors(tmp_path, told, "rank 1 shows no sign of life")
    for rank in (0, 2):
        assert f"survivor-rank-{rank:05d}.ckpt" in said


@pytest.mark.exhaustive
@pytest.mark.launch
def test_a_process_that_does_not_end_is_killed(tmp_path: Path) -> None:
    code, said, told = fail(tmp_path, "popen", "stop")
    assert code == 1, said
    check_survivors(tmp_path, told, "rank 1 shows no sign of life")
    assert re.search(r"The process of local rank 1 \(\d+\) has not ended by itself after a failure, and is killed", said)


@pytest.mark.launch
@pytest.mark.parametrize("start_method", ["fork", exhaustive("spawn")])
@pytest.mark.parametrize("fault", ["raise", "kill"])
def test_children_that_share_a_parent_handle_failures_themselves(tmp_path: Path, start_method: str, fault: str) -> None:
    code, said, told = fail(tmp_path, start_method, fault)
    assert code == 1
    if fault == "raise":
        check_survivors(tmp_path, told, r"rank 1 raised ValueError: injected \(in round 2, after 6 steps\)")
        assert told[1] == "ValueError: injected"
        assert "ValueError: injected" in said
    else:
        check_survivors(tmp_path, told, "rank 1 shows no sign of life")
        assert "process 1 terminated with signal SIGKILL" in said


@pytest.mark.parametrize(("code", "expected"), [(0, 1), (None, 1), (3, 3)])
def test_a_child_that_exits_early_ends_by_an_error(code: int | None, expected: int) -> None:
    """After a good end the parent would wait for its result."""
    told = []

    class Tell(L.Callback):
        def on_exception(self, trainer: L.Trainer, module: Any, error: BaseException) -> None:
            told.append((type(error), trainer.interrupted))

    def leave(*args: Any) -> None:
        raise SystemExit(code)

    trainer = L.Trainer(accelerator="cpu", devices=1, callbacks=[Tell()], **QUIET)
    with pytest.raises(SystemExit) as caught:
        launchers._run_in_child(Launcher(), trainer, leave, 1, 2)
    assert caught.value.code == expected
    assert told == [(SystemExit, True)]


# ---------------------------------------------------------------------------------------------- the children of a process


class Launcher:
    """What `Children` needs of one."""

    def __init__(self, *commands: str) -> None:
        self.procs = [subprocess.Popen([sys.executable, "-S", "-c", command]) for command in commands]

    def launch(self, function: Any) -> Any:
        return function()


@pytest.fixture
def grace(monkeypatch: pytest.MonkeyPatch) -> float:
    monkeypatch.setattr(launchers, "GRACE", 1.0)
    return 1.0


def test_the_observer_waits_before_it_kills(monkeypatch: pytest.MonkeyPatch, grace: float) -> None:
    killed = []
    monkeypatch.setattr(subprocess_script._ChildProcessObserver, "_terminate_all", lambda _: killed.append(time.monotonic()))
    launcher = Launcher("raise SystemExit(3)", "import time; time.sleep(100)")
    try:
        observer = subprocess_script._ChildProcessObserver(os.getpid(), launcher.procs, sleep_period=0.1)  # type: ignore[arg-type]
        observer.start()
        children = launchers.Children(launcher)
        children._give_grace()
        observer.join(60)
        assert len(killed) == 1
        assert children._failed_at is not None
        assert killed[0] - children._failed_at >= grace  # by the same clock, however busy the machine is
    finally:
        launcher.procs[1].kill()
        launcher.procs[1].wait(10)


def test_children_that_are_left_are_killed(grace: float) -> None:
    launcher = Launcher("import time; time.sleep(0.2)", "import time; time.sleep(100)")
    children = launchers.Children(launcher)
    begin = time.monotonic()
    with pytest.warns(UserWarning, match=rf"The process of local rank 2 \({launcher.procs[1].pid}\) has not ended by itself"):
        children.end()
    assert time.monotonic() - begin >= grace
    assert [process.wait(10) for process in launcher.procs] == [0, -signal.SIGKILL]
    assert children._look(lambda: pytest.fail("the observer would end this process too"))  # type: ignore[arg-type, return-value]


def test_children_are_ended_after_a_failure_only(monkeypatch: pytest.MonkeyPatch) -> None:
    registered: list[Any] = []
    monkeypatch.setattr("atexit.register", registered.append)
    for commands in ((), ("pass",)):
        launcher = Launcher(*commands)
        children = launchers.Children(launcher)
        assert children.launch(lambda: 5) == 5
        with pytest.raises(ZeroDivisionError):
            children.launch(lambda: 1 // 0)
        assert registered == [children.end] * len(commands)
        for process in launcher.procs:
            process.wait(10)


def test_a_launcher_without_an_observer_is_warned_about() -> None:
    with pytest.warns(UserWarning, match="it lacks `_ChildProcessObserver`"):
        launchers.Children(Launcher())._give_grace()
