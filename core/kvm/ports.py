"""What PCI functions need of KVM (core.pci.ports), over whichever VM is the present one.

A machine reset makes a new VM: rebind() forgets routes and windows, which died with the old one.
"""

from __future__ import annotations

import mmap
import os
import stat

from cellvisor.core._native import _native
from cellvisor.core.errors import Internal, UsageError
from cellvisor.core.kvm.vm import Vm
from cellvisor.core.mem import layout

MAX_GSI = 4096  # KVM_MAX_IRQ_ROUTES


class VmDoorbells:
    """ports.Doorbells over KVM's ioeventfds."""

    def __init__(self) -> None:
        self.vm: Vm | None = None

    def assign(self, eventfd: int, gpa: int) -> None:
        """Signal `eventfd` on each write at `gpa`."""
        _present(self.vm).assign_doorbell(eventfd, gpa)

    def deassign(self, eventfd: int, gpa: int) -> None:
        """Undo assign."""
        _present(self.vm).deassign_doorbell(eventfd, gpa)


class VmMsi:
    """ports.MsiPort: GSIs after the IOAPIC's pins."""

    def __init__(self) -> None:
        self.vm: Vm | None = None
        self._used: set[int] = set()
        self._routes: dict[int, tuple[int, int]] = {}

    def rebind(self, vm: Vm) -> None:
        """Go on with a new VM, which has no routes yet."""
        self.vm = vm
        self._routes.clear()
        vm.set_routes({})

    def allocate(self) -> int:
        """Return a GSI that no one else has."""
        for gsi in range(layout.IOAPIC_PINS, MAX_GSI):
            if gsi not in self._used:
                self._used.add(gsi)
                return gsi
        raise Internal(f"all {MAX_GSI} interrupt routes are taken")

    def free(self, gsi: int) -> None:
        """Give a GSI back; its stale route harms nobody until the table is written next."""
        self._used.discard(gsi)
        self._routes.pop(gsi, None)

    def update(self, gsi: int, address: int, data: int) -> None:
        """Route `gsi` to the message."""
        if self._routes.get(gsi) == (address, data):
            return
        self._routes[gsi] = (address, data)
        _present(self.vm).set_routes(self._routes)

    def assign(self, eventfd: int, gsi: int) -> None:
        """Raise `gsi` on each write to `eventfd`."""
        _present(self.vm).assign_irqfd(eventfd, gsi)

    def deassign(self, eventfd: int, gsi: int) -> None:
        """Undo assign."""
        _present(self.vm).deassign_irqfd(eventfd, gsi)


class VmWindows:
    """ports.MemoryWindows: a worker's memory as KVM slots. Core maps it but never reads it."""

    def __init__(self) -> None:
        self.vm: Vm | None = None
        self._maps: dict[int, mmap.mmap] = {}

    def map(self, gpa: int, size: int, fd: int, offset: int, readonly: bool) -> None:
        """Show `size` bytes of `fd` from `offset` at `gpa`. Raises UsageError for a file that is too short."""
        info = os.fstat(fd)
        if stat.S_ISREG(info.st_mode) and info.st_size < offset + size:
            raise UsageError(f"window of {size:#x} bytes at {offset:#x} in a file of {info.st_size:#x}")
        access = mmap.PROT_READ if readonly else mmap.PROT_READ | mmap.PROT_WRITE
        shown = mmap.mmap(fd, size, mmap.MAP_SHARED, access, offset=offset)
        host = int(_native.ffi.cast("uintptr_t", _native.ffi.from_buffer(shown)))
        try:
            _present(self.vm).add_memory(gpa, size, host, readonly=readonly)
        except Internal:
            shown.close()
            raise
        self._maps[gpa] = shown

    def unmap(self, gpa: int, size: int) -> None:
        """Undo map."""
        _present(self.vm).remove_memory(gpa)
        self._maps.pop(gpa).close()

    def forget(self) -> None:
        """The VM is gone: release what it had mapped."""
        for shown in self._maps.values():
            shown.close()
        self._maps.clear()


def _present(vm: Vm | None) -> Vm:
    if vm is None:
        raise Internal("there is no VM")
    return vm
