"""The generic event device's register and its level-triggered line (ACPI 6.5, 5.6.9).

    idle (line low) --raise_event--> pending (line high) --read, which gives and clears--> idle

An event raised before the guest's driver probes is not lost: the line stays high until it reads.
"""

from __future__ import annotations

import threading
from collections.abc import Callable

from cellvisor.core.abi import acpi as abi


class Ged:
    """One byte of events at offset 0; `irq` drives the line and is called on each change only."""

    def __init__(self, irq: Callable[[bool], None]) -> None:
        self._irq = irq
        self._pending = 0
        # vCPU threads read while the main thread raises; the line must follow in the same order.
        self._lock = threading.Lock()

    @property
    def pending(self) -> int:
        """The events that the guest has not read yet."""
        return self._pending

    def raise_event(self, bit: int) -> None:
        """Set event bits (EVENT_CPU, EVENT_MEMORY, EVENT_PCI, EVENT_POWER_BUTTON) and raise the line."""
        if not bit or bit & ~abi.EVENT_ALL:
            raise ValueError(f"GED has no event {bit:#x}")
        with self._lock:
            before, self._pending = self._pending, self._pending | bit
            if not before:
                self._irq(True)

    def read(self, offset: int, size: int) -> int:
        """Return `size` bytes at `offset`; a read that covers offset 0 takes the events."""
        if offset != 0 or size <= 0:
            return 0
        with self._lock:
            taken, self._pending = self._pending, 0
            if taken:
                self._irq(False)
            return taken

    def write(self, offset: int, size: int, value: int) -> None:
        """Ignore: the register is read-only."""

    def reset(self, irq: Callable[[bool], None] | None = None) -> None:
        """Forget every event, as after a machine reset; `irq` replaces the line if given."""
        with self._lock:
            if self._pending:
                self._pending = 0
                self._irq(False)
            if irq is not None:
                self._irq = irq
