"""A vCPU: one Python thread around one C call that loops on KVM_RUN.

    new --start--> running <--pause/resume--> parked --stop--> ended
                      |                                          ^
                      +------------------ stop ------------------+

A request is written under the condition, then immediate_exit is stored and the thread signalled; only the
thread clears immediate_exit, after it has read the request under the same condition, so none is lost.
"""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from enum import Enum
from typing import Any, Protocol

from cellvisor.core import log
from cellvisor.core._native import _native
from cellvisor.core.kvm.vm import Vm, check

lib, ffi = _native.lib, _native.ffi
KICK_SIGNAL = signal.SIGRTMIN + 1


class Wanted(Enum):
    RUN = "run"
    PARK = "park"
    STOP = "stop"


class Exits(Protocol):
    """What serves the exits that C could not settle; called on vCPU threads."""

    def io_read(self, port: int, size: int) -> int:
        """Answer IN."""

    def io_write(self, port: int, size: int, value: int) -> None:
        """Take OUT."""

    def mmio_read(self, gpa: int, size: int) -> int:
        """Answer a load."""

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        """Take a store."""

    def ended(self, index: int, reason: str) -> None:
        """vCPU `index` cannot go on: "shutdown" is a triple fault, anything else an error text."""


class Vcpu:
    """vCPU `index` of `vm`; `board` is the struct cv_board that C settles exits with."""

    def __init__(self, vm: Vm, index: int, count: int, board: Any, exits: Exits) -> None:
        self.index = index
        self._exits = exits
        self._condition = threading.Condition()
        self._wanted = Wanted.PARK
        self._parked = False
        self._nmi = False
        self._thread: threading.Thread | None = None
        self.fd = check(lib.cv_ioctl(vm.fd, lib.KVM_CREATE_VCPU, index), f"KVM_CREATE_VCPU {index}")
        os.set_inheritable(self.fd, False)
        self._run_size = vm.kvm.run_size
        self.c = ffi.new("struct cv_vcpu *")
        self.c.fd, self.c.index, self.c.board = self.fd, index, board
        self.c.run = lib.cv_vcpu_map(self.fd, self._run_size)
        if not self.c.run:
            raise MemoryError(f"vCPU {index}: kvm_run cannot be mapped")
        check(lib.cv_vcpu_set_cpuid(vm.kvm.fd, self.fd, index, count, int(vm.kvm.tsc_deadline)), "KVM_SET_CPUID2")
        check(lib.cv_vcpu_set_defaults(self.fd, int(index == 0)), f"vCPU {index} defaults")

    def set_entry(self, kind: int, rip: int, boot_params: int, page_tables: int, gdt: int, stack: int) -> None:
        """Set the state in which vCPU 0 enters the kernel (CV_ENTRY_PVH or CV_ENTRY_LONG)."""
        check(lib.cv_vcpu_set_entry(self.fd, kind, rip, boot_params, page_tables, gdt, stack), "KVM_SET_SREGS")

    def start(self) -> None:
        """Start the thread, parked."""
        self._thread = threading.Thread(target=self._loop, name=f"vcpu{self.index}", daemon=True)
        self._thread.start()

    def request(self, wanted: Wanted) -> None:
        """Ask the thread for a state; does not wait."""
        with self._condition:
            if self._wanted is Wanted.STOP:
                return
            self._wanted = wanted
            self._condition.notify_all()
            thread = self._thread
            if wanted is not Wanted.RUN and thread is not None and thread.ident and thread.is_alive():
                lib.cv_vcpu_immediate_exit(self.c, 1)
                signal.pthread_kill(thread.ident, KICK_SIGNAL)

    def request_nmi(self) -> None:
        """Have the thread inject an NMI before it enters the guest again (KVM_NMI waits for KVM_RUN to end)."""
        with self._condition:
            self._nmi = True
            thread = self._thread
            if thread is not None and thread.ident and thread.is_alive():
                lib.cv_vcpu_immediate_exit(self.c, 1)
                signal.pthread_kill(thread.ident, KICK_SIGNAL)

    def is_current(self) -> bool:
        """Is this called on the vCPU's own thread?"""
        return threading.current_thread() is self._thread

    def park_self(self) -> None:
        """Called on the vCPU's own thread while it serves an exit: execute nothing after it."""
        with self._condition:
            if self._wanted is Wanted.RUN:
                self._wanted = Wanted.PARK

    def wait_parked(self, timeout: float) -> bool:
        """Wait until the thread executes no guest code; False on time-out."""
        with self._condition:
            return self._condition.wait_for(lambda: self._parked or self._thread is None, timeout)

    def pause_clock(self) -> None:
        """Tell the guest's watchdogs that time stood still (KVM_KVMCLOCK_CTRL); a guest without is fine."""
        lib.cv_ioctl(self.fd, lib.KVM_KVMCLOCK_CTRL, 0)

    @property
    def thread(self) -> int:
        """The kernel's id of its thread, 0 while there is none."""
        return (self._thread.native_id or 0) if self._thread is not None else 0

    def counters(self) -> dict[str, int]:
        """Return how often this vCPU entered the guest and why it came back."""
        found = self.c.counters
        return {name: int(getattr(found, name)) for name in ("entries", "io", "mmio", "settled", "kicks")}

    def where(self) -> str:
        """Return rip and cr3 for a log line; only while parked."""
        rip, cr3 = ffi.new("uint64_t *"), ffi.new("uint64_t *")
        if lib.cv_vcpu_get_rip(self.fd, rip, cr3) < 0:
            return "registers unreadable"
        return f"rip={rip[0]:#x} cr3={cr3[0]:#x}"

    def close(self) -> None:
        """Stop the thread and release the vCPU."""
        self.request(Wanted.STOP)
        if self._thread is not None:
            self._thread.join()
        lib.cv_vcpu_unmap(self.c.run, self._run_size)
        os.close(self.fd)

    def _settle_request(self) -> bool:
        """Park while asked to; True when the thread must end."""
        with self._condition:
            lib.cv_vcpu_immediate_exit(self.c, 0)
            while self._wanted is Wanted.PARK:
                self._parked = True
                self._condition.notify_all()
                self._condition.wait()
            if self._nmi and self._wanted is Wanted.RUN:
                self._nmi = False
                check(lib.cv_ioctl(self.fd, lib.KVM_NMI, 0), "KVM_NMI")
            self._parked = self._wanted is Wanted.STOP
            self._condition.notify_all()
            return self._wanted is Wanted.STOP

    def _loop(self) -> None:
        try:
            self._turn()
        except BaseException as error:
            log.get("vcpu").exception("vcpu%d", self.index)
            self._exits.ended(self.index, f"{type(error).__name__}: {error}")
        finally:
            with self._condition:
                self._wanted, self._parked = Wanted.STOP, True
                self._condition.notify_all()

    def _turn(self) -> None:
        run: Callable[[Any], int] = lib.cv_vcpu_run
        exit_io, exit_mmio, exit_kick = lib.CV_EXIT_IO, lib.CV_EXIT_MMIO, lib.CV_EXIT_KICK
        c = self.c
        while True:
            if self._wanted is not Wanted.RUN and self._settle_request():
                return
            reason = run(c)
            if reason == exit_mmio:
                self._mmio()
            elif reason == exit_io:
                self._io()
            elif reason == exit_kick:
                if self._settle_request():
                    return
            else:
                shutdown = reason == lib.CV_EXIT_SHUTDOWN
                why = "shutdown" if shutdown else f"KVM exit {c.reason} detail {c.detail} {self.where()}"
                self.park_self()
                self._exits.ended(self.index, why)

    def _mmio(self) -> None:
        c = self.c
        size = c.size
        data = ffi.buffer(c.data, size)
        if c.is_write:
            self._exits.mmio_write(c.address, size, int.from_bytes(data[:], "little"))
        else:
            data[:] = self._exits.mmio_read(c.address, size).to_bytes(size, "little")

    def _io(self) -> None:
        c = self.c
        size, count = c.size, c.count
        data = ffi.buffer(c.data, size * count)
        for start in range(0, size * count, size):  # REP INS/OUTS: one port, `count` items
            if c.is_write:
                self._exits.io_write(c.address, size, int.from_bytes(data[start : start + size], "little"))
            else:
                data[start : start + size] = self._exits.io_read(c.address, size).to_bytes(size, "little")
