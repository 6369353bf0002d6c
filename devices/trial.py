"""Whether a device could be made: its type's own __init__, in a process that tells what came of it and ends.

The host that it gets keeps nothing and has nothing stored; what would leave a mark looks at `host.trial`.
"""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Callable, Sequence
from typing import Any

from cellvisor.core import log
from cellvisor.core.errors import CellvisorError
from cellvisor.core.ring.queue import Queue
from cellvisor.core.wire import budget
from cellvisor.core.wire.messages import MAX_REASON, pack, plain
from cellvisor.core.wire.options import build
from cellvisor.devices.worker import Surroundings, reason_of, settle_in

SECONDS = 60  # longer than anybody waits for the answer


class TrialHost:
    """The Host of a device that is only tried."""

    generation, activation, trial = 1, 0, True

    def __init__(self, device_id: str, given: Sequence[int]) -> None:
        self.device_id, self._given = device_id, {f"fd{index}": fd for index, fd in enumerate(given)}

    def watch(self, fd: int, callback: Callable[[int], None], events: int = 0) -> None:
        pass

    def unwatch(self, fd: int) -> None:
        pass

    def after(self, seconds: float, callback: Callable[[], None]) -> int:
        return 0

    def cancel(self, timer: int) -> None:
        pass

    def deposit(self, name: str, fd: int) -> None:
        pass

    def take(self, name: str) -> int | None:
        """Return a descriptor of the user's, or a page of a group: the controlplane knows which groups there are."""
        if name == budget.GROUP:
            return budget.create(dict.fromkeys(budget.KEYS, 0))
        return os.dup(self._given[name]) if name in self._given else None

    def set_config(self, data: bytes) -> None:
        pass

    def queue(self, index: int) -> Queue | None:
        return None

    def kick(self, index: int) -> None:
        pass

    def enter_syscall(self) -> None:
        pass

    def leave_syscall(self) -> None:
        pass

    def save(self, data: bytes, version: int = 1) -> None:
        pass

    def load(self) -> tuple[int, bytes]:
        return 0, b""

    def backend(self, change: str, text: str) -> None:
        pass

    def log(self, text: str) -> None:
        log.get("trial").warning("%s", text)


def run(cls: type[Any], options: dict[str, Any], device_id: str, fds: Sequence[int], around: Surroundings) -> int:
    """Be the process of one trial, in a freshly forked child: write {reason}, "" if the device can be made.

    The first of `fds` is where to, the others are the device's. Returns the exit status.
    """
    settle_in("trial", f"{device_id}/trial", around)
    signal.signal(signal.SIGALRM, signal.SIG_DFL)
    signal.alarm(SECONDS)  # a back end may hang, and nobody looks after us
    reason = ""
    try:
        device = cls(build(cls.Options, options, device_id), TrialHost(device_id, fds[1:]))
        len(device.spec.config)
        device.close()
    except Exception as error:
        reason = plain(reason_of(error), MAX_REASON) or type(error).__name__
        if not isinstance(error, CellvisorError):
            log.get("trial").exception("%s", device_id)
    with contextlib.suppress(ChildProcessError):
        while True:  # what it has started ends with its back end
            os.waitpid(-1, 0)
    os.write(fds[0], pack({"reason": reason}))
    return 0
