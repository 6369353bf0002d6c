"""Descriptors that must outlive a device process: under device and name, closed only when the device goes.

A worker deposits what cannot be opened again (a pty master, a listening socket); its next incarnation and
nobody else gets it back.
"""

from __future__ import annotations

import os

from cellvisor.core.errors import Conflict

MAX_PER_DEVICE = 128


class Store:
    """Named descriptors per device. Owns what it holds."""

    def __init__(self) -> None:
        self._held: dict[str, dict[str, int]] = {}

    def deposit(self, device: str, name: str, fd: int) -> None:
        """Take over `fd`; one that had the name before is closed. Raises Conflict when a device has too many."""
        names = self._held.setdefault(device, {})
        if name not in names and len(names) >= MAX_PER_DEVICE:
            os.close(fd)
            raise Conflict(f"{device}: {MAX_PER_DEVICE} descriptors are stored already", hint="a worker leaks them")
        old = names.pop(name, None)
        if old is not None:
            os.close(old)
        names[name] = fd

    def get(self, device: str, name: str) -> int | None:
        """Return the stored descriptor, still owned by the store."""
        return self._held.get(device, {}).get(name)

    def names(self, device: str) -> list[str]:
        """Return what `device` has deposited."""
        return sorted(self._held.get(device, {}))

    def drop(self, device: str) -> None:
        """Close everything of `device`."""
        for fd in self._held.pop(device, {}).values():
            os.close(fd)

    def close(self) -> None:
        """Close everything."""
        for device in list(self._held):
            self.drop(device)

    def count(self) -> int:
        """Return how many descriptors are held."""
        return sum(len(names) for names in self._held.values())
