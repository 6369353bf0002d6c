"""core.kvm against the real /dev/kvm, with a few bytes of guest code."""

from __future__ import annotations

import os
import threading
import time
from collections.abc import Iterator
from typing import Any

import pytest

from cellvisor.core._native import _native
from cellvisor.core.kvm.vcpu import KICK_SIGNAL, Vcpu, Wanted
from cellvisor.core.kvm.vm import Kvm, Vm
from cellvisor.core.mem import layout
from cellvisor.core.mem.ram import GuestRam

lib, ffi = _native.lib, _native.ffi
pytestmark = [
    pytest.mark.kvm,
    pytest.mark.skipif(not os.access("/dev/kvm", os.R_OK | os.W_OK), reason="/dev/kvm is missing"),
]

# out 0xe9, 'A'; in eax, 0x1234 (dword); out 0x4321, eax; mov [0xfed00000], eax;
# mov ebx, [0xfed00008]; 1: out 0x80, al; jmp 1b
CODE = bytes.fromhex("66bae900b041ee" "66ba3412ed" "66ba2143ef" "a30000d0fe" "8b1d0800d0fe" "e680ebfc")


class Recorder:
    def __init__(self) -> None:
        self.seen: list[tuple[Any, ...]] = []
        self.done = threading.Event()

    def io_read(self, port: int, size: int) -> int:
        self.seen.append(("in", port, size))
        return 0x11223344

    def io_write(self, port: int, size: int, value: int) -> None:
        self.seen.append(("out", port, size, value))

    def mmio_read(self, gpa: int, size: int) -> int:
        self.seen.append(("load", gpa, size))
        self.done.set()
        return 7

    def mmio_write(self, gpa: int, size: int, value: int) -> None:
        self.seen.append(("store", gpa, size, value))

    def ended(self, index: int, reason: str) -> None:
        self.seen.append(("ended", reason))
        self.done.set()


@pytest.fixture
def machine() -> Iterator[tuple[Vcpu, Any, Recorder]]:
    lib.cv_install_kick(KICK_SIGNAL)
    kvm = Kvm()
    vm = Vm(kvm)
    ram = GuestRam(64 << 20)
    for gpa, size, offset in ram.ranges:
        vm.add_memory(gpa, size, ram.host + offset)
    board = ffi.new("struct cv_board *")
    board.ecam_base, board.serial_wake_fd, board.debug_wake_fd = layout.ECAM, -1, -1
    recorder = Recorder()
    vcpu = Vcpu(vm, 0, 1, board, recorder)
    ram.write(layout.KERNEL, CODE)
    vcpu.set_entry(lib.CV_ENTRY_PVH, layout.KERNEL, 0, 0, layout.GDT, layout.BOOT_STACK)
    vcpu.start()
    yield vcpu, board, recorder
    vcpu.close()
    vm.close()
    kvm.close()
    ram.close()


def test_exits_reach_python_and_answers_reach_the_guest(machine: tuple[Vcpu, Any, Recorder]) -> None:
    vcpu, board, recorder = machine
    vcpu.request(Wanted.RUN)
    assert recorder.done.wait(30)
    assert recorder.seen == [
        ("in", 0x1234, 4), ("out", 0x4321, 4, 0x11223344), ("store", 0xFED00000, 4, 0x11223344),
        ("load", 0xFED00008, 4),
    ]
    text = ffi.new("uint8_t[16]")
    assert ffi.buffer(text, lib.cv_board_take_debug(board, text, 16))[:] == b"A"


def test_parking_stops_the_guest_and_running_goes_on(machine: tuple[Vcpu, Any, Recorder]) -> None:
    vcpu, board, recorder = machine
    vcpu.request(Wanted.RUN)
    assert recorder.done.wait(30)
    for _ in range(20):
        vcpu.request(Wanted.PARK)
        assert vcpu.wait_parked(30)
        before = board.stage_count
        time.sleep(0.002)
        assert board.stage_count == before
        vcpu.request(Wanted.RUN)
        deadline = time.monotonic() + 30
        while board.stage_count == before:
            assert time.monotonic() < deadline, "the guest does not run again"
            time.sleep(0.001)


def test_settled_exits_never_reach_python(machine: tuple[Vcpu, Any, Recorder]) -> None:
    vcpu, board, recorder = machine
    vcpu.request(Wanted.RUN)
    assert recorder.done.wait(30)
    count, python = board.stage_count, len(recorder.seen)
    deadline = time.monotonic() + 30
    while board.stage_count < count + 1000:
        assert time.monotonic() < deadline
        time.sleep(0.001)
    assert len(recorder.seen) == python


def test_ram_cannot_be_truncated_but_cleared() -> None:
    ram = GuestRam(64 << 20)
    ram.write(0x1000, b"secret")
    with pytest.raises(PermissionError):
        os.ftruncate(ram.fd, 0)
    ram.clear()
    assert bytes(ram.view(0x1000, 6)) == bytes(6)
    with pytest.raises(ValueError, match="is not RAM"):
        ram.view((64 << 20) - 4, 8)
    ram.close()
