"""Start core and the nursery in sessions of their own, watch them by pidfd, and end them whatever happens."""

from __future__ import annotations

import contextlib
import os
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cellvisor.controlplane.rundir import RunDir
from cellvisor.core.wire import places


@dataclass(frozen=True, slots=True)
class Programs:
    """The command lines that start core and the nursery."""

    core: Sequence[str] = (sys.executable, "-P", "-m", "cellvisor.core")
    nursery: Sequence[str] = (sys.executable, "-P", "-m", "cellvisor.devices.nursery")


class Child:
    """A process of ours. `pidfd` is readable once it ended, `ready` has a byte once its sockets are bound."""

    def __init__(self, role: str, process: subprocess.Popen[bytes], ready: int) -> None:
        self.role = role
        self.ready = ready
        self.pid = process.pid
        self.pidfd = os.pidfd_open(process.pid)
        self._process = process

    def status(self) -> int | None:
        """Return the exit status (negative: the signal), None while it runs."""
        return self._process.poll()

    def kill(self) -> None:
        """Send SIGKILL; a process that is gone is fine."""
        with contextlib.suppress(ProcessLookupError):
            self._process.kill()

    def close(self) -> None:
        """Reap and forget; the process must have ended or been killed."""
        with contextlib.suppress(subprocess.TimeoutExpired):
            self._process.wait(2)
        if self.pidfd >= 0:
            os.close(self.pidfd)
            os.close(self.ready)
            self.pidfd = self.ready = -1


def start_core(programs: Programs, rundir: RunDir, token: str, verbosity: int, log_file: str | None) -> Child:
    """Start core, which inherits the lock of the run directory."""
    argv = [*programs.core, "--run-dir", rundir.path, "--token", token, *["-v"] * verbosity]
    return _start("core", argv + (["--log-file", log_file] if log_file else []), (rundir.lock_fd,))


def start_nursery(programs: Programs, rundir: RunDir, core: Child, verbosity: int,
                  log_file: str | None) -> Child:
    """Start the nursery, which listens at `nursery.sock` and ends everything when core's pidfd fires."""
    argv = [*programs.nursery, "--socket", rundir.file(places.NURSERY), "--core-pidfd", str(core.pidfd),
            *["-v"] * verbosity]
    return _start("nursery", argv + (["--log", log_file] if log_file else []), (core.pidfd,))


def _start(role: str, argv: list[str], fds: Sequence[int]) -> Child:
    ready, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
    try:
        # Its own session: Ctrl-C in the terminal is for the controlplane alone.
        process = subprocess.Popen([*argv, "--ready-fd", str(write_end)], stdin=subprocess.DEVNULL, stdout=2,
                                   close_fds=True, pass_fds=[*fds, write_end], start_new_session=True)
    except BaseException:
        os.close(ready)
        raise
    finally:
        os.close(write_end)
    return Child(role, process, ready)


def describe_exit(status: int | None) -> str:
    """Say in words how a process ended; `status` as Popen gives it, None when nobody can know."""
    if status is None:
        return "died, reason unknown"
    if status >= 0:
        return f"ended with exit status {status}"
    try:
        return f"killed by {signal.Signals(-status).name}"
    except ValueError:
        return f"killed by signal {-status}"


def kill_pidfd(pidfd: int) -> None:
    """Send SIGKILL by pidfd; a process that is gone is fine."""
    with contextlib.suppress(OSError):
        signal.pidfd_send_signal(pidfd, signal.SIGKILL)
