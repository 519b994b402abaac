"""The package as who installs it gets it: built, and in an environment that has nothing but it and what it depends on."""

from __future__ import annotations

import importlib.metadata
import os
import re
import signal
import subprocess
import sys
import sysconfig
from contextlib import suppress
from pathlib import Path

import pytest

from tests.helpers import fresh_environment

ROOT = Path(__file__).parent.parent
_LEFT_OUT = re.compile(r"lightning_distopt|_+editable_|_lightning_distopt|pip$|pip-|__pycache__|.*\.pth$")


def build(folder: Path) -> tuple[Path, Path]:
    """Build the source distribution in `folder`, and of that the wheel.

    Returns:
        Both files.
    """
    for name in ("build", "hatchling"):
        try:
            importlib.metadata.distribution(name)
        except importlib.metadata.PackageNotFoundError:
            pytest.skip(f"builds the wheel without a network, which needs {name}")
    command = [sys.executable, "-m", "build", "--no-isolation", "--outdir", str(folder), str(ROOT)]
    done = subprocess.run(command, capture_output=True, text=True, timeout=180)
    assert done.returncode == 0, done.stdout + done.stderr
    (sdist,), (wheel,) = folder.glob("*.tar.gz"), folder.glob("*.whl")
    return sdist, wheel


def environment(folder: Path, *before: Path) -> dict[str, str]:
    """Return variables for processes that find what is installed here, but neither this package nor pip.

    Args:
        folder: to link installed packages into.
        before: folders to look into first.
    """
    folder.mkdir()
    for place in {sysconfig.get_path("purelib"), sysconfig.get_path("platlib")}:
        for entry in Path(place).iterdir():
            if not _LEFT_OUT.match(entry.name):
                (folder / entry.name).symlink_to(entry)
    assert (folder / "lightning").is_dir()
    assert (folder / "torch").is_dir()
    variables = fresh_environment(os.pathsep.join(map(str, [*before, folder])))
    return {name: value for name, value in variables.items() if not re.match(r"VIRTUAL_ENV|PYTHONHOME|PIP_", name)}


def run(command: list[str], folder: Path, variables: dict[str, str], timeout: float) -> str:
    """Run a command, and end whatever it has started.

    Returns:
        What it has written.
    """
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=variables,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        start_new_session=True,
    )
    try:
        output, _ = process.communicate(timeout=timeout)
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        process.wait(timeout=10)
    assert process.returncode == 0, output
    return output
