"""The board around the vCPUs: what answers at which port and address. Serves the exits that C could not.

One lock for all of it. vCPU threads hold it while they serve an exit, core's main thread for single steps;
nobody waits for a process while holding it.
"""

from __future__ import annotations

import contextlib
import os
import threading
from collections.abc import Callable
from typing import Any

from cellvisor.core import log
from cellvisor.core._native import _native
from cellvisor.core.abi import acpi, pci
from cellvisor.core.acpi.ged import Ged
from cellvisor.core.acpi.power import PowerRegister
from cellvisor.core.board.bus import MMIO_SIZE, PIO_SIZE, Bus
from cellvisor.core.board.debug import CONSOLE_PORT, DebugConsole
from cellvisor.core.board.i8042 import BASE as I8042_BASE
from cellvisor.core.board.i8042 import I8042
from cellvisor.core.board.i8042 import SIZE as I8042_SIZE
from cellvisor.core.board.pmtimer import SIZE as PM_TIMER_SIZE
from cellvisor.core.board.pmtimer import PmTimer
from cellvisor.core.board.rtc import Rtc
from cellvisor.core.board.serial16550 import SIZE as UART_SIZE
from cellvisor.core.config import MachineConfig
from cellvisor.core.kvm.ports import VmDoorbells, VmMsi, VmWindows
from cellvisor.core.kvm.vm import Vm
from cellvisor.core.mem import layout
from cellvisor.core.pci.intx import IntxLines
from cellvisor.core.pci.ports import Ports
from cellvisor.core.pci.root import PciRoot
from cellvisor.core.pci.shadow import BoardShadow
from cellvisor.core.pci.slots import PciSlots
from cellvisor.core.serial_line import SerialLine
from cellvisor.core.server import Server
from cellvisor.core.wire.bytechannel import Target

lib, ffi = _native.lib, _native.ffi
SERIAL_DEVICE = "__serial"


class Calls:
    """ports.CallPort over core's main loop."""

    def __init__(self, server: Server, lock: Any) -> None:
        self._reactor, self._lock = server.reactor, lock

    def watch_call(self, fd: int, callback: Callable[[], None]) -> None:
        """Call `callback` under the lock whenever `fd` is readable (epoll_ctl is safe from any thread)."""

        def ready(events: int) -> None:
            with self._lock:
                callback()

        self._reactor.add(fd, ready)

    def unwatch_call(self, fd: int) -> None:
        """Stop watching `fd`."""
        self._reactor.remove(fd)


class ConfigPorts:
    """Ports 0xCF8 to 0xCFF as a bus device."""

    def __init__(self, root: PciRoot) -> None:
        self._root = root

    def read(self, offset: int, size: int) -> int:
        """Read the address register or what it selects."""
        return self._root.io_read(pci.CONFIG_ADDRESS_PORT + offset, size)

    def write(self, offset: int, size: int, value: int) -> None:
        """Write the address register or what it selects."""
        self._root.io_write(pci.CONFIG_ADDRESS_PORT + offset, size, value)


class Platform:
    """Ports, MMIO, PCI and the interrupt lines of one machine; survives its resets."""

    def __init__(self, server: Server, lock: threading.RLock, config: MachineConfig, phys_bits: int,
                 on_reset: Callable[[], None], on_shutdown: Callable[[], None]) -> None:
        self.lock = lock
        self.vm: Vm | None = None
        self._server = server
        self.board = ffi.new("struct cv_board *")
        self.board.ecam_base = layout.ECAM
        self.board.pm_timer_port = layout.PORT_PM_TIMER
        self.board.pm_timer_zero_ns = lib.cv_monotonic_ns()
        self.board.serial_wake_fd = -1
        self.board.debug_wake_fd = self._debug_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._debug = DebugConsole(lambda line: log.get("guest").info("%s", line))
        self._scratch = ffi.new("uint8_t[]", 4096)
        server.reactor.add(self._debug_fd, self._drain_debug)
        self.doorbells, self.msi, self.windows = VmDoorbells(), VmMsi(), VmWindows()
        self.intx = IntxLines(self._irq_line)
        self.ports = Ports(self.doorbells, self.msi, self.intx, Calls(server, self.lock), self.windows)
        self.ged = Ged(lambda level: self._irq_line(layout.GSI_GED, level))
        self.mmio64 = layout.mmio64_window(config.memory, phys_bits)
        self.pci = PciRoot(BoardShadow(self.board), window64=self.mmio64)
        self.slots = PciSlots(self.pci, lambda: self.ged.raise_event(acpi.EVENT_PCI))
        self.serial: SerialLine | None = None
        if config.serial_mode != "off":
            self.serial = self._make_serial(config)
        self._pio, self._mmio = Bus(PIO_SIZE, "port"), Bus(MMIO_SIZE, "mmio")
        low = min(config.memory, layout.LOW_RAM_END)
        self._pio.add(layout.PORT_PM, 1, PowerRegister(on_reset, on_shutdown), "pm")
        self._pio.add(layout.PORT_PM_TIMER, PM_TIMER_SIZE, PmTimer(self.board.pm_timer_zero_ns), "pm-timer")
        self._pio.add(I8042_BASE, I8042_SIZE, I8042(on_reset), "i8042")
        self._pio.add(layout.PORT_RTC, 2, Rtc(low, config.memory - low), "rtc")
        self._pio.add(CONSOLE_PORT, 1, self._debug, "debug")
        self._pio.add(pci.CONFIG_ADDRESS_PORT, 8, ConfigPorts(self.pci), "pci-config")
        if self.serial is not None:
            self._pio.add(layout.PORT_COM1, UART_SIZE, self.serial.uart, "com1")
        self._mmio.add(layout.GED, layout.REGISTER_PAGE, self.ged, "ged")
        self._mmio.add(layout.PCI_HOTPLUG, layout.REGISTER_PAGE, self.slots, "pci-hotplug")

    def _make_serial(self, config: MachineConfig) -> SerialLine:
        given = {}
        for name in self._server.store.names(SERIAL_DEVICE):
            stored = self._server.store.get(SERIAL_DEVICE, name)
            if stored is not None:
                given[name] = os.dup(stored)
        return SerialLine(
            self._server.reactor, self.lock, self.board, lambda level: self._irq_line(layout.GSI_COM1, level),
            self._server.post, Target(config.serial_mode, config.serial_path), given,
            lambda name, fd: self._server.store.deposit(SERIAL_DEVICE, name, os.dup(fd)))

    def _irq_line(self, gsi: int, level: bool) -> None:
        if self.vm is not None:
            self.vm.irq_line(gsi, level)

    def _drain_debug(self, events: int) -> None:
        with contextlib.suppress(BlockingIOError):
            os.eventfd_read(self._debug_fd)
        while count := lib.cv_board_take_debug(self.board, self._scratch, 4096):
            with self.lock:
                self._debug.feed(bytes(ffi.buffer(self._scratch, count)))

    def bind(self, vm: Vm | None) -> None:
        """Go on with `vm`; registers are back at power-on."""
        self.windows.forget()
        self.vm = self.doorbells.vm = self.windows.vm = vm
        self.intx.forget()
        if vm is None:
            self.msi.vm = None
            return
        self.msi.rebind(vm)
        self.ged.reset()
        if self.serial is not None:
            self.serial.reset()

    def stages(self) -> list[tuple[int, int]]:
        """Return (code, CLOCK_MONOTONIC ns) of the last 64 writes to port 0x80, oldest first."""
        board, room = self.board, len(self.board.stage_ns)
        count = board.stage_count
        return [(board.stage_code[index % room], board.stage_ns[index % room])
                for index in range(max(0, count - room), count)]

    # ---- exits, on vCPU threads

    def io_read(self, port: int, size: int) -> int:
        """Answer IN."""
        with self.lock:
            return self._pio.read(port, size)

    def io_write(self, port: int, size: int, value: int) -> None:
        """Take OUT."""
        with self.lock:
            self._pio.write(port, size, value)

    def mmio_read(self, gpa: int, size: int) -> int:
        """Answer a load: the bus's PCI functions first, then the board; where nobody is, all ones."""
        with self.lock:
            answer = self.pci.mmio_read(gpa, size)
            return self._mmio.read(gpa, size) if answer is None else answer

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Take a store."""
        with self.lock:
            if not self.pci.mmio_write(gpa, size, value):
                self._mmio.write(gpa, size, value)

    def close(self) -> None:
        """Release the serial line and what the VM had mapped."""
        if self.serial is not None:
            self.serial.close()
        self.windows.forget()
        self._drain_debug(0)
        self._debug.flush()
        self._server.reactor.remove(self._debug_fd)
        self.board.debug_wake_fd = -1
        os.close(self._debug_fd)
