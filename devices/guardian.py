"""Starts a successor when the controlplane dies: the nursery outlives it and knows the command line.

    watching --its pidfd--> starting a successor --it connects--> watching that one
                                 |   +--died--> once more, up to ATTEMPTS times in a row
                                 +--"somebody is in charge already"--> waiting for that one to connect
"""

from __future__ import annotations

import contextlib
import os
import time
from collections.abc import Callable, Sequence

from cellvisor.core import log
from cellvisor.core.wire.reactor import Reactor

ATTEMPTS = 5
RETRY_SECONDS = 0.5
NO_VM, IN_CHARGE = 3, 5  # exit statuses of `cellvisor adopt`
BEGAN = "CELLVISOR_BEGAN_NS"


class Guardian:
    """Watches one controlplane at a time. `argv` starts a successor, empty: nobody does.

    `needless()` is called when a successor found somebody in charge.
    """

    def __init__(self, reactor: Reactor, argv: Sequence[str], needless: Callable[[], None]) -> None:
        self._reactor, self._argv, self._needless = reactor, list(argv), needless
        self._watched = self._successor = -1
        self._successor_pid = 0
        self._attempts = 0
        self._died_ns = 0

    def watch(self, pidfd: int) -> None:
        """Watch the process of `pidfd`, ours from now on, as the controlplane."""
        self._unwatch()
        self._watched = pidfd
        self._reactor.add(pidfd, lambda events: self._gone())

    def connected(self, pid: int) -> None:
        """Process `pid` speaks for the controlplane now."""
        self._attempts = 0
        if pid == self._successor_pid:
            self._unwatch()  # our child: its pidfd is watched already
            return
        try:
            self.watch(os.pidfd_open(pid))
        except ProcessLookupError:
            self._gone()

    def _unwatch(self) -> None:
        if self._watched >= 0:
            self._reactor.remove(self._watched)
            os.close(self._watched)
            self._watched = -1

    def _gone(self) -> None:
        self._unwatch()
        self._died_ns = time.monotonic_ns()
        if self._argv and self._successor < 0:
            log.get("nursery").warning("the controlplane died: starting its successor")
            self._start()

    def _start(self) -> None:
        self._attempts += 1
        environ = {**os.environ, BEGAN: str(self._died_ns)}
        try:
            pid = os.posix_spawn(self._argv[0], self._argv, environ, setsid=True)
        except OSError as error:
            log.get("nursery").error("%s: %s", self._argv[0], error.strerror)
            self._retry()
            return
        self._successor_pid, self._successor = pid, os.pidfd_open(pid)
        self._reactor.add(self._successor, lambda events: self._successor_ended())

    def _successor_ended(self) -> None:
        ended = os.waitid(os.P_PIDFD, self._successor, os.WEXITED | os.WNOHANG)
        if ended is None:
            return
        self._reactor.remove(self._successor)
        os.close(self._successor)
        self._successor, self._successor_pid = -1, 0
        status = ended.si_status if ended.si_code == os.CLD_EXITED else -ended.si_status
        if status in (NO_VM, IN_CHARGE):
            self._needless()
        elif self._watched < 0:
            log.get("nursery").warning("the successor ended with %d", status)
            self._died_ns = time.monotonic_ns()
            self._retry()

    def _retry(self) -> None:
        if self._attempts < ATTEMPTS:
            self._reactor.after(RETRY_SECONDS * (self._attempts - 1), self._again)
        else:
            log.get("nursery").error("no successor stays alive: the VM runs on without one (cellvisor adopt)")

    def _again(self) -> None:
        if self._watched < 0 and self._successor < 0:
            self._start()

    def close(self) -> None:
        """Watch nobody any more."""
        self._unwatch()
        if self._successor >= 0:
            with contextlib.suppress(FileNotFoundError):
                self._reactor.remove(self._successor)
            os.close(self._successor)
            self._successor = -1
