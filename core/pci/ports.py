"""What the PCI bus and its functions need from outside: KVM, the shadow page, core's main loop, the worker.

Every call is made with the board lock held by the caller and must not block. The objects may be rebound to
another VM between calls: nothing here is cached by the callers.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Protocol


class ConfigShadow(Protocol):
    """The copy of config space that C answers guest reads from (struct cv_board)."""

    config_address: int  # what the guest wrote to 0xCF8

    def present(self, slot: int, on: bool) -> None:
        """Say whether there is a function in `slot`; absent ones read all ones."""

    def publish(self, slot: int, offset: int, data: bytes) -> None:
        """Store config bytes of `slot` at `offset`."""

    def ask(self, slot: int, dword: int, on: bool) -> None:
        """Say whether reads of dword 0..1023 must come to Python."""


class Doorbells(Protocol):
    """ioeventfds without data match and of any width. Raises CellvisorError."""

    def assign(self, eventfd: int, gpa: int) -> None:
        """Signal `eventfd` on each write at `gpa`."""

    def deassign(self, eventfd: int, gpa: int) -> None:
        """Undo assign."""


class MsiPort(Protocol):
    """GSI routes and irqfds. Raises CellvisorError."""

    def allocate(self) -> int:
        """Return a GSI that no one else has."""

    def free(self, gsi: int) -> None:
        """Give a GSI back, its route with it."""

    def update(self, gsi: int, address: int, data: int) -> None:
        """Route `gsi` to the message (address u64, data u32)."""

    def assign(self, eventfd: int, gsi: int) -> None:
        """Raise `gsi` on each write to `eventfd`. A count that is pending must fire at once: KVM_IRQFD does
        so, it polls the eventfd while assigning."""

    def deassign(self, eventfd: int, gsi: int) -> None:
        """Undo assign: what is written from now on stays in the eventfd."""


class LinePort(Protocol):
    """Level-triggered INTx; the lines are shared, whoever implements this ORs the slots."""

    def drive(self, slot: int, level: bool) -> None:
        """Set what INTA# of `slot` asks for."""


class CallPort(Protocol):
    """Core's main loop, watching call eventfds while MSI-X is off."""

    def watch_call(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` (board lock held) whenever `fd` is readable; the callback drains it."""

    def unwatch_call(self, fd: int) -> None:
        """Stop watching `fd`."""


class MemoryWindows(Protocol):
    """KVM memory slots over a worker's descriptor. Raises CellvisorError."""

    def map(self, gpa: int, size: int, fd: int, offset: int, readonly: bool) -> None:
        """Show `size` bytes of `fd` from `offset` at `gpa`; all multiples of 4096."""

    def unmap(self, gpa: int, size: int) -> None:
        """Undo map."""


@dataclass(frozen=True, slots=True)
class Ports:
    """Everything a function is given."""

    doorbells: Doorbells
    msi: MsiPort
    lines: LinePort
    calls: CallPort
    memory: MemoryWindows


class Owner(Protocol):
    """Who serves a virtio function: the link to its worker. Not waited for."""

    def activate(self, epoch: int, queues: list[dict[str, int]], features: int) -> None:
        """DRIVER_OK: `queues` has {index, size, desc, avail, used} of each enabled queue."""

    def reset(self, epoch: int) -> None:
        """The driver reset what activate(epoch) began; answer with reset_done(epoch)."""

    def config_write(self, offset: int, data: bytes) -> None:
        """The driver wrote to device config space."""
