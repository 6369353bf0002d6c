"""A VM without KVM behind core.pci.ports, and a virtio-pci driver that knows only config space and MMIO.

FakeVm behaves as KVM does where it matters: no two doorbells at an address, no eventfd in two irqfds, an
irqfd delivers what its eventfd has pending when it is assigned.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from typing import Any

from cellvisor.core._native import _native
from cellvisor.core.abi import pci, virtio
from cellvisor.core.mem import layout
from cellvisor.core.pci import eventfd
from cellvisor.core.pci.ports import Ports
from cellvisor.core.pci.root import PciRoot
from cellvisor.core.pci.shadow import BoardShadow
from cellvisor.core.virtio.device import VirtioPciDevice
from cellvisor.core.wire.spec import Spec

WINDOW64 = (0x40_0000_0000, 0x40_0000_0000)


class FakeVm:
    """Every port at once."""

    def __init__(self) -> None:
        self.doorbells: dict[int, int] = {}  # gpa -> eventfd
        self.doorbell_calls = 0
        self.gsis: set[int] = set()
        self.routes: dict[int, tuple[int, int]] = {}
        self.irqfds: dict[int, int] = {}  # eventfd -> gsi
        self.messages: list[tuple[int, int]] = []  # (address, data) as the guest's LAPICs got them
        self.lines: dict[int, bool] = {}
        self.watched: dict[int, Callable[[], None]] = {}
        self.mappings: dict[int, tuple[int, int, int, bool]] = {}
        self.drains = True  # KVM takes what it delivers; before Linux 5.11 it did not
        self.board = _native.ffi.new("struct cv_board *")
        self.shadow = BoardShadow(self.board)
        self.ports = Ports(_Doorbells(self), _Msi(self), _Lines(self), _Calls(self), _Memory(self))

    def call(self, fd: int) -> None:
        """What a worker does to interrupt, and the kernel then."""
        eventfd.signal(fd)
        if fd in self.irqfds and not self.drains:
            self.messages.append(self.routes[self.irqfds[fd]])
        self.settle()

    def settle(self) -> None:
        """Let the kernel and core's main loop handle every signalled eventfd."""
        for fd, gsi in self.irqfds.items():
            if self.drains and eventfd.take(fd):
                self.messages.append(self.routes[gsi])
        for fd, callback in list(self.watched.items()):
            if eventfd.pending(fd):
                callback()

    def check(self) -> None:
        """Fail if something is registered where no BAR may be."""
        windows = [(layout.MMIO32, layout.MMIO32_END), (WINDOW64[0], sum(WINDOW64))]
        for gpa, size in [*((gpa, 4) for gpa in self.doorbells), *((g, m[0]) for g, m in self.mappings.items())]:
            assert any(base <= gpa and gpa + size <= end for base, end in windows), f"{gpa:#x}"


class _Doorbells:
    def __init__(self, vm: FakeVm) -> None:
        self.vm = vm

    def assign(self, fd: int, gpa: int) -> None:
        self.vm.doorbell_calls += 1
        if gpa in self.vm.doorbells:
            raise AssertionError(f"two doorbells at {gpa:#x}")
        self.vm.doorbells[gpa] = fd

    def deassign(self, fd: int, gpa: int) -> None:
        self.vm.doorbell_calls += 1
        assert self.vm.doorbells.pop(gpa) == fd


class _Msi:
    def __init__(self, vm: FakeVm) -> None:
        self.vm = vm

    def allocate(self) -> int:
        gsi = next(number for number in range(24, 4096) if number not in self.vm.gsis)
        self.vm.gsis.add(gsi)
        return gsi

    def free(self, gsi: int) -> None:
        assert gsi not in self.vm.irqfds.values(), "freed under an irqfd"
        self.vm.gsis.remove(gsi)
        self.vm.routes.pop(gsi, None)

    def update(self, gsi: int, address: int, data: int) -> None:
        assert gsi in self.vm.gsis
        assert not address >> 32 & 0xFF, "KVM: EINVAL"
        self.vm.routes[gsi] = (address, data)

    def assign(self, fd: int, gsi: int) -> None:
        assert fd not in self.vm.irqfds, "KVM: EBUSY"
        self.vm.irqfds[fd] = gsi
        if eventfd.take(fd):
            self.vm.messages.append(self.vm.routes[gsi])
            if not self.vm.drains:
                eventfd.signal(fd)

    def deassign(self, fd: int, gsi: int) -> None:
        assert self.vm.irqfds.pop(fd) == gsi


class _Lines:
    def __init__(self, vm: FakeVm) -> None:
        self.vm = vm

    def drive(self, slot: int, level: bool) -> None:
        self.vm.lines[slot] = level


class _Calls:
    def __init__(self, vm: FakeVm) -> None:
        self.vm = vm

    def watch_call(self, fd: int, callback: Callable[[], None]) -> None:
        assert fd not in self.vm.watched
        self.vm.watched[fd] = callback

    def unwatch_call(self, fd: int) -> None:
        del self.vm.watched[fd]


class _Memory:
    def __init__(self, vm: FakeVm) -> None:
        self.vm = vm

    def map(self, gpa: int, size: int, fd: int, offset: int, readonly: bool) -> None:
        for start, (length, *_) in self.vm.mappings.items():
            assert gpa + size <= start or start + length <= gpa, "memory slots overlap"
        self.vm.mappings[gpa] = (size, fd, offset, readonly)

    def unmap(self, gpa: int, size: int) -> None:
        assert self.vm.mappings.pop(gpa)[0] == size


class FakeOwner:
    """Records what the function says."""

    def __init__(self) -> None:
        self.log: list[tuple[Any, ...]] = []

    def activate(self, epoch: int, queues: list[dict[str, int]], features: int) -> None:
        self.log.append(("activate", epoch, queues, features))

    def reset(self, epoch: int) -> None:
        self.log.append(("reset", epoch))

    def config_write(self, offset: int, data: bytes) -> None:
        self.log.append(("config", offset, data))


class Bench:
    """A root with one virtio device in slot 3 and its driver."""

    def __init__(self, spec: Spec | None = None, slot: int = 3, window_fds: dict[str, int] | None = None) -> None:
        self.vm = FakeVm()
        self.root = PciRoot(self.vm.shadow, window64=WINDOW64)
        self.owner = FakeOwner()
        self.spec = spec or Spec(virtio_id=virtio.ID_BLOCK, pci_class=0x018000, queues=(256, 64),
                                 features=virtio.BLK_F_RO, config=bytes(range(60)))
        self.fds = [os.eventfd(0) for _ in range(2 * len(self.spec.queues) + 1)]
        count = len(self.spec.queues)
        self.kicks, self.calls, self.config_fd = self.fds[:count], self.fds[count:-1], self.fds[-1]
        self.device = VirtioPciDevice("disk0", self.spec, self.vm.ports, self.owner, kick_fds=self.kicks,
                                      call_fds=self.calls, config_fd=self.config_fd, window_fds=window_fds)
        self.root.attach(slot, self.device)
        self.driver = Driver(self.root, slot)

    def close(self) -> None:
        for fd in self.fds:
            os.close(fd)


class Driver:
    """A guest's virtio-pci driver."""

    def __init__(self, root: PciRoot, slot: int) -> None:
        self.root, self.slot = root, slot
        self.capabilities = self._walk()
        kinds = {self.config(at + 3, 1): at for kind, at in self.capabilities if kind == pci.CAP_VENDOR}
        self.common, self.isr, self.notify = (
            self._place(kinds[kind]) for kind in (virtio.CAP_COMMON, virtio.CAP_ISR, virtio.CAP_NOTIFY))
        self.device = self._place(kinds[virtio.CAP_DEVICE]) if virtio.CAP_DEVICE in kinds else (0, 0)
        self.pci_cfg = kinds[virtio.CAP_PCI]
        self.multiplier = self.config(kinds[virtio.CAP_NOTIFY] + virtio.PCI_CAP_DATA, 4)
        self.msix = next(at for kind, at in self.capabilities if kind == pci.CAP_MSIX)
        self.table = self.config(self.msix + pci.MSIX_TABLE, 4) & ~7
        self.pba = self.config(self.msix + pci.MSIX_PBA, 4) & ~7

    def ecam(self, register: int = 0) -> int:
        return layout.ECAM + (self.slot << 15) + register

    def config(self, register: int, size: int) -> int:
        value = self.root.mmio_read(self.ecam(register), size)
        assert value is not None
        return value

    def set_config(self, register: int, size: int, value: int) -> None:
        assert self.root.mmio_write(self.ecam(register), size, value)

    def _walk(self) -> list[tuple[int, int]]:
        found, at = [], self.config(pci.CAPABILITY_LIST, 1)
        while at:
            found.append((self.config(at, 1), at))
            assert len(found) < 48
            at = self.config(at + 1, 1)
        return found

    def _place(self, at: int) -> tuple[int, int]:
        assert self.config(at + virtio.PCI_CAP_BAR, 1) == 0
        return self.config(at + virtio.PCI_CAP_OFFSET, 4), self.config(at + virtio.PCI_CAP_LENGTH, 4)

    @property
    def bar(self) -> int:
        return self.config(pci.BAR_0, 8) & ~0xF

    def read(self, offset: int, size: int) -> int:
        value = self.root.mmio_read(self.bar + offset, size)
        assert value is not None
        return value

    def write(self, offset: int, size: int, value: int) -> None:
        assert self.root.mmio_write(self.bar + offset, size, value)

    @property
    def status(self) -> int:
        return self.read(self.common[0] + virtio.COMMON_STATUS, 1)

    @status.setter
    def status(self, value: int) -> None:
        self.write(self.common[0] + virtio.COMMON_STATUS, 1, value)

    def reg(self, register: int, size: int) -> int:
        return self.read(self.common[0] + register, size)

    def set_reg(self, register: int, size: int, value: int) -> None:
        self.write(self.common[0] + register, size, value)

    def features(self) -> int:
        found = 0
        for word in range(2):
            self.set_reg(virtio.COMMON_DEVICE_FEATURE_SELECT, 4, word)
            found |= self.reg(virtio.COMMON_DEVICE_FEATURE, 4) << 32 * word
        return found

    def accept(self, features: int) -> bool:
        """ACKNOWLEDGE to FEATURES_OK; False if the device refuses."""
        self.status = virtio.S_ACKNOWLEDGE
        self.status = virtio.S_ACKNOWLEDGE | virtio.S_DRIVER
        for word in range(2):
            self.set_reg(virtio.COMMON_DRIVER_FEATURE_SELECT, 4, word)
            self.set_reg(virtio.COMMON_DRIVER_FEATURE, 4, features >> 32 * word & 0xFFFF_FFFF)
        self.status = self.status | virtio.S_FEATURES_OK
        return bool(self.status & virtio.S_FEATURES_OK)

    def set_queue(self, index: int, size: int, vector: int = virtio.NO_VECTOR) -> None:
        self.set_reg(virtio.COMMON_QUEUE_SELECT, 2, index)
        self.set_reg(virtio.COMMON_QUEUE_SIZE, 2, size)
        base = 0x10_0000_0000 + (index << 20)
        for number, register in enumerate(
                (virtio.COMMON_QUEUE_DESC, virtio.COMMON_QUEUE_AVAIL, virtio.COMMON_QUEUE_USED)):
            address = base + (number << 16)
            self.set_reg(register, 4, address & 0xFFFF_FFFF)
            self.set_reg(register + 4, 4, address >> 32)
        self.set_reg(virtio.COMMON_QUEUE_VECTOR, 2, vector)
        self.set_reg(virtio.COMMON_QUEUE_ENABLE, 2, 1)

    def start(self, *, msix: bool = True) -> None:
        """Bring the device from reset to DRIVER_OK, every queue with a vector of its own, config with 0."""
        assert self.status == 0
        assert self.accept(self.features())
        count = self.reg(virtio.COMMON_NUM_QUEUES, 2)
        self.set_config(self.msix + pci.MSIX_FLAGS, 2, pci.MSIX_FLAGS_ENABLE if msix else 0)
        if msix:
            for vector in range(count + 1):
                self.set_vector(vector, data=0x40 + vector)
            self.set_reg(virtio.COMMON_CONFIG_VECTOR, 2, 0)
        for index in range(count):
            self.set_reg(virtio.COMMON_QUEUE_SELECT, 2, index)
            size = self.reg(virtio.COMMON_QUEUE_SIZE, 2)
            self.set_queue(index, size, index + 1 if msix else virtio.NO_VECTOR)
        self.status = self.status | virtio.S_DRIVER_OK

    def set_vector(self, vector: int, *, data: int, masked: bool = False, address: int = 0xFEE0_0000) -> None:
        entry = self.table + vector * pci.MSIX_ENTRY_SIZE
        self.write(entry + pci.MSIX_ENTRY_LOWER, 4, address & 0xFFFF_FFFF)
        self.write(entry + pci.MSIX_ENTRY_UPPER, 4, address >> 32)
        self.write(entry + pci.MSIX_ENTRY_DATA, 4, data)
        self.mask(vector, masked)

    def mask(self, vector: int, masked: bool) -> None:
        self.write(self.table + vector * pci.MSIX_ENTRY_SIZE + pci.MSIX_ENTRY_CONTROL, 4, int(masked))
