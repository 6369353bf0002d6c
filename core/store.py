"""Descriptors that must outlive a device process: under device and name, closed only when the device goes.

A worker deposits what cannot be opened again (a pty master, a listening socket); its next incarnation and
nobody else gets it back.
"""

from __future__ import annotations

import os
import select
from typing import Any

from cellvisor.core.closer import Closer
from cellvisor.core.errors import Conflict, UsageError
from cellvisor.core.wire.places import PROCESS, is_word

MAX_PER_DEVICE = 128
PIDFD = "anon_inode:[pidfd]"  # what proc(5) calls one


class Store:
    """Named descriptors per device. Owns what it holds."""

    def __init__(self, closer: Closer) -> None:
        self._closer = closer
        self._held: dict[str, dict[str, int]] = {}

    def deposit(self, device: str, name: str, fd: int) -> None:
        """Take over `fd`; one that had the name before is closed.

        Raises Conflict when a device has too many, UsageError when closing them takes too long.
        """
        names = self._held.setdefault(device, {})
        if name not in names and len(names) >= MAX_PER_DEVICE:
            self._close(device, fd)
            raise Conflict(f"{device}: {MAX_PER_DEVICE} descriptors are stored already", hint="a worker leaks them")
        old = names.pop(name, None)
        names[name] = fd
        if old is not None:
            self._close(device, old)

    def get(self, device: str, name: str) -> int | None:
        """Return the stored descriptor, still owned by the store."""
        return self._held.get(device, {}).get(name)

    def names(self, device: str) -> list[str]:
        """Return what `device` has deposited."""
        return sorted(self._held.get(device, {}))

    def processes(self) -> list[dict[str, Any]]:
        """Return {"device", "role", "pid"} of each living process whose pidfd was deposited as `process:<role>`."""
        found = []
        for device, names in self._held.items():
            for name, fd in names.items():
                role = name.removeprefix(PROCESS)
                if role != name and is_word(role) and (pid := _pid(fd)) > 0:
                    found.append({"device": device, "role": role, "pid": pid})
        return found

    def drop(self, device: str) -> None:
        """Close everything of `device`."""
        self._closer.close(f"store of {device}", *self._held.pop(device, {}).values())

    def close(self) -> None:
        """Close everything."""
        for device in list(self._held):
            self.drop(device)

    def count(self) -> int:
        """Return how many descriptors are held."""
        return sum(len(names) for names in self._held.values())

    def _close(self, device: str, fd: int) -> None:
        if not self._closer.close(f"store of {device}", fd):
            raise UsageError(f"{device}: its descriptors do not close")


def _pid(fd: int) -> int:
    """Return the process that a pidfd stands for while it lives, else 0."""
    if os.readlink(f"/proc/self/fd/{fd}") != PIDFD:
        return 0
    poll = select.poll()
    poll.register(fd, select.POLLIN)
    if poll.poll(0):
        return 0
    with open(f"/proc/self/fdinfo/{fd}") as lines:
        return next((int(line.split()[1]) for line in lines if line.startswith("Pid:")), 0)
