"""Start passt, which goes to the background when it is ready, and know its process from then on.

It stays a child of who started it, as long as that lives: then its end is seen and it is reaped.
"""

from __future__ import annotations

import contextlib
import os
import socket
from collections.abc import Sequence
from typing import Any

from cellvisor.core._native import _native
from cellvisor.core.errors import UsageError
from cellvisor.core.wire.places import PROCESS

NAME = "passt"
START_SECONDS = 3.0
BUFFER = 4 << 20  # bytes of frames that may wait for the card's process
lib = _native.lib


def start(arguments: Sequence[str]) -> tuple[socket.socket, int]:
    """Return our end of its socket and its pidfd, -1 if nobody knows. Raises UsageError with what it says."""
    import shutil  # not for who inherits one
    import subprocess

    program = shutil.which(NAME)
    if program is None:
        raise UsageError(f"no tap or fd is given, and {NAME} is not installed",
                         hint=f"apt install {NAME}, or name a tap: tap=NAME")
    lib.prctl(lib.PR_SET_CHILD_SUBREAPER, 1, 0, 0, 0)  # what goes to the background comes to us
    before = _children()
    ours, theirs = socket.socketpair(socket.AF_UNIX, socket.SOCK_STREAM)
    _enlarge(theirs)
    command = [program, "--quiet", "--fd", str(theirs.fileno()), *arguments]
    with theirs:
        try:
            done = subprocess.run(command, pass_fds=[theirs.fileno()], stdin=subprocess.DEVNULL,
                                  stdout=subprocess.DEVNULL, stderr=subprocess.PIPE, timeout=START_SECONDS, check=False)
            said = [line for line in done.stderr.decode(errors="replace").splitlines() if "syslog" not in line]
            if done.returncode == 0:
                return ours, _pidfd(_children() - before)
            why = said[-1] if said else f"exit status {done.returncode}"
        except (OSError, subprocess.TimeoutExpired) as error:
            why = str(error)
    ours.close()
    raise UsageError(f"{NAME} does not start: {why[:200]}", hint=f"{program} --foreground says more")


def keep(host: Any, ours: socket.socket, pidfd: int) -> None:
    """Have core keep what is to outlive us, and reap it if it ends before; `pidfd` is ours from now on."""
    if pidfd >= 0:
        host.deposit(PROCESS + NAME, pidfd)
        host.watch(pidfd, lambda events: _reap(host, pidfd))
    host.deposit(NAME, ours.fileno())  # the last step: a successor starts another one if it did not come to this


def _reap(host: Any, pidfd: int) -> None:
    host.unwatch(pidfd)
    os.waitid(os.P_PIDFD, pidfd, os.WEXITED)
    os.close(pidfd)


def _enlarge(theirs: socket.socket) -> None:
    """Let passt send a whole TCP window at once: what finds no room it drops, and old ones repeat it after 2 s."""
    try:
        theirs.setsockopt(socket.SOL_SOCKET, lib.SO_SNDBUFFORCE, BUFFER)
    except PermissionError:
        theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, BUFFER)  # as much of it as net.core.wmem_max allows


def _children() -> set[int]:
    """Return our children by process id."""
    found, us = set(), str(os.getpid())
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError), open(f"/proc/{name}/stat") as file:
            if file.read().rpartition(")")[2].split()[1] == us:
                found.add(int(name))
    return found


def _pidfd(candidates: set[int]) -> int:
    return os.pidfd_open(candidates.pop()) if len(candidates) == 1 else -1
