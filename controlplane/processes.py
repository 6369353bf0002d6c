"""Start core and nurseries in sessions of their own, watch them by pidfd, and end them whatever happens."""

from __future__ import annotations

import contextlib
import json
import os
import select
import signal
import subprocess
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from cellvisor.controlplane.rundir import RunDir
from cellvisor.core.wire import places


@dataclass(frozen=True, slots=True)
class Programs:
    """The command lines that start core, a nursery, and (with the VM's name behind it) a successor of ours."""

    core: Sequence[str] = (sys.executable, "-P", "-m", "cellvisor.core")
    nursery: Sequence[str] = (sys.executable, "-P", "-m", "cellvisor.devices.nursery")
    successor: Sequence[str] = (sys.executable, "-P", "-m", "cellvisor.controlplane", "adopt", "--as-successor")


class Child:
    """A process of the VM. `pidfd` is readable once it ended, `ready` has a byte once its sockets are bound.

    Of one that a predecessor started (no `process`) nobody can know how it ends.
    """

    def __init__(self, role: str, pid: int, pidfd: int, ready: int = -1,
                 process: subprocess.Popen[bytes] | None = None) -> None:
        self.role = role
        self.pid = pid
        self.pidfd = pidfd
        self.ready = ready
        self._process = process

    def is_alive(self) -> bool:
        """Tell whether it runs."""
        poll = select.poll()
        poll.register(self.pidfd, select.POLLIN)
        return self.pidfd >= 0 and not poll.poll(0)

    def status(self) -> int | None:
        """Return the exit status (negative: the signal), None while it runs or if nobody can know."""
        return self._process.poll() if self._process is not None else None

    def kill(self) -> None:
        """Send SIGKILL; a process that is gone is fine."""
        kill_pidfd(self.pidfd)

    def close(self) -> None:
        """Reap and forget; the process must have ended or been killed."""
        if self._process is not None:
            with contextlib.suppress(subprocess.TimeoutExpired):
                self._process.wait(2)
        for fd in {self.pidfd, self.ready} - {-1}:
            os.close(fd)
        self.pidfd = self.ready = -1


class Launcher:
    """Starts the processes of one VM; put_down() ends those that are still there."""

    def __init__(self, programs: Programs, rundir: RunDir, verbosity: int, log_file: str | None) -> None:
        self._programs, self._rundir, self._verbosity, self._log_file = programs, rundir, verbosity, log_file
        self._started: list[Child] = []

    def core(self) -> Child:
        """Start core, which inherits the lock of the run directory."""
        rundir = self._rundir
        core = self._start("core", [*self._programs.core, "--run-dir", rundir.path, "--token", rundir.token],
                           (rundir.lock_fd,), "--log-file")
        rundir.note(core=core.pid)
        return core

    def nursery(self, core: Child, number: int = 0) -> Child:
        """Start the `number`th nursery. It ends everything when core's pidfd fires, and starts a successor of
        ours when we die."""
        heir = json.dumps([*self._programs.successor, self._rundir.name])
        argv = [*self._programs.nursery, "--socket", self._rundir.file(places.nursery(number)),
                "--core-pidfd", str(core.pidfd), "--successor", heir]
        return self._start("nursery", argv, (core.pidfd,), "--log")

    def put_down(self) -> None:
        """Kill what nobody ended; nothing happens when all was."""
        for child in self._started:
            if child.pidfd >= 0:
                child.kill()
                child.close()

    def _start(self, role: str, argv: list[str], fds: Sequence[int], log_flag: str) -> Child:
        ready, write_end = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        ourselves = os.pidfd_open(os.getpid())
        argv += ["--controlplane-pidfd", str(ourselves), "--ready-fd", str(write_end), *["-v"] * self._verbosity]
        try:
            # Its own session: Ctrl-C in the terminal is for the controlplane alone.
            process = subprocess.Popen(argv + ([log_flag, self._log_file] if self._log_file else []), close_fds=True,
                                       stdin=subprocess.DEVNULL, stdout=2, start_new_session=True,
                                       pass_fds=[*fds, write_end, ourselves])
        except BaseException:
            os.close(ready)
            raise
        finally:
            os.close(write_end)
            os.close(ourselves)
        child = Child(role, process.pid, os.pidfd_open(process.pid), ready, process)
        self._started.append(child)
        return child


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
