"""Namespaces by system calls, as `os.unshare` and `os.setns` exist from Python 3.12 on only."""

from __future__ import annotations

import ctypes
import errno
import os
import signal
from pathlib import Path
from typing import NoReturn

NEW_USER, NEW_NET = 0x10000000, 0x40000000


def _call(name: str, *args: int) -> None:
    libc = ctypes.CDLL(None, use_errno=True)
    if getattr(libc, name)(*args):
        number = ctypes.get_errno()
        raise OSError(number, f"{name}: {os.strerror(number)}")


def unshare(flags: int) -> None:
    """Leave namespaces of these kinds for new ones."""
    _call("unshare", flags)


def enter(path: str) -> None:
    """Go into the namespace behind a file of `/proc`."""
    file = os.open(path, os.O_RDONLY | os.O_CLOEXEC)
    try:
        _call("setns", file, 0)
    finally:
        os.close(file)


def wait_forever() -> NoReturn:
    """Do nothing until killed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # which a terminal sends to all processes
    while True:
        signal.pause()


def isolate() -> bool:
    """Go into a new network namespace; without the right to do so into a new user namespace too, where there is one.

    Returns:
        Whether this process is in a user namespace of its own now.
    """
    try:
        unshare(NEW_NET)
        return False
    except OSError as error:
        if error.errno != errno.EPERM:
            raise
    user, group = os.geteuid(), os.getegid()
    unshare(NEW_USER | NEW_NET)
    Path("/proc/self/setgroups").write_text("deny")
    Path("/proc/self/uid_map").write_text(f"0 {user} 1")
    Path("/proc/self/gid_map").write_text(f"0 {group} 1")
    return True
