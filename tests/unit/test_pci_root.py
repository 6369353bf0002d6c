"""The bus: config mechanisms, slots, BAR allocation and dispatch; config space and its shadow."""

from __future__ import annotations

import os
from itertools import pairwise

import pytest

from cellvisor.core._native import _native
from cellvisor.core.abi import pci
from cellvisor.core.errors import Conflict, Internal, NotFound, UsageError
from cellvisor.core.mem import layout
from cellvisor.core.pci import eventfd
from cellvisor.core.pci.config import ConfigSpace
from cellvisor.core.pci.intx import IntxLines
from cellvisor.core.pci.raw import RawPciDevice
from cellvisor.core.pci.root import PciRoot
from cellvisor.core.wire.spec import Spec, Window, WindowKind
from tests.fakes.pci import WINDOW64, FakeVm


class Function:
    """A function with BARs that remember what happened."""

    def __init__(self, name="fn", **bars):
        self.name = name
        self.config = ConfigSpace(vendor=0x1234, device=0x5678, pci_class=0x020000)
        for index, (size, wide) in bars.items():
            self.config.add_bar(int(index[3:]), size, wide=wide)
        self.at = {}
        self.writes = []

    def attached(self, slot):
        self.slot = slot

    def detached(self):
        self.slot = None

    def machine_reset(self):
        self.config.reset()

    def bar_read(self, bar, offset, size):
        return 0xB0000000 | bar << 24 | offset

    def bar_write(self, bar, offset, size, value):
        self.writes.append((bar, offset, size, value))

    def bar_placed(self, bar, gpa):
        self.at[bar] = gpa


@pytest.fixture
def vm():
    return FakeVm()


@pytest.fixture
def root(vm):
    return PciRoot(vm.shadow, window64=WINDOW64)


def ecam(slot, register=0, function=0):
    return layout.ECAM + (slot << 15) + (function << 12) + register


def select(root, slot, register, bus=0, function=0, extra=0):
    root.io_write(0xCF8, 4, 1 << 31 | extra | bus << 16 | slot << 11 | function << 8 | register)


def test_host_bridge(root):
    assert root.mmio_read(ecam(0), 4) == 0x0D57_8086
    assert root.mmio_read(ecam(0, 8), 4) == 0x0600_0000
    select(root, 0, 0)
    assert root.io_read(0xCFC, 4) == 0x0D57_8086
    assert root.io_read(0xCFE, 2) == 0x0D57
    assert root.io_read(0xCFF, 1) == 0x0D
    assert root.io_read(0xCFD, 1) == 0x80
    assert root.mmio_read(ecam(0), 8) == 0x0D57_8086


def test_nobody_home_is_all_ones(root):
    root.attach(4, Function())
    for bus, slot, function, extra in ((0, 5, 0, 0), (1, 4, 0, 0), (0, 4, 1, 0), (255, 31, 7, 0), (0, 4, 0, 1 << 24)):
        select(root, slot, 0, bus, function, extra)
        assert root.io_read(0xCFC, 4) == 0xFFFF_FFFF
        root.io_write(0xCFC, 4, 0)
    root.io_write(0xCF8, 4, 4 << 11)  # not enabled
    assert root.io_read(0xCFC, 4) == 0xFFFF_FFFF
    assert root.mmio_read(ecam(5), 4) == 0xFFFF_FFFF
    assert root.mmio_read(ecam(4, function=3), 2) == 0xFFFF
    assert root.mmio_read(ecam(4, 0xFFC), 8) == 0xFFFF_FFFF_0000_0000
    assert root.mmio_read(layout.ECAM + layout.ECAM_SIZE, 4) is None
    assert not root.mmio_write(layout.ECAM - 4, 4, 0)


def test_config_address_takes_dwords_only(root):
    select(root, 3, 0x10)
    for port, size in ((0xCF8, 1), (0xCF9, 1), (0xCFA, 2), (0xCFB, 1), (0xCF8, 2), (0xCFA, 4)):
        root.io_write(port, size, 0x06)
    assert root.io_read(0xCF8, 4) == 0x8000_1810
    assert root.io_read(0xCFA, 4) == 0xFFFF_FFFF
    assert root.io_read(0xCFE, 4) == 0xFFFF_FFFF


def test_both_mechanisms_and_the_shadow_agree(root, vm):
    function = Function(bar0=(0x1000, False))
    root.attach(2, function)
    select(root, 2, 0x3C)
    root.io_write(0xCFC, 1, 0x5A)
    assert root.mmio_read(ecam(2, 0x3C), 1) == 0x5A
    assert root.mmio_write(ecam(2, pci.COMMAND), 2, 0xFFFF)
    select(root, 2, 4)
    assert root.io_read(0xCFC, 2) == 0x546, "only bits that exist stick"
    assert bytes(_native.ffi.buffer(vm.board.config[2])) == b"".join(
        root.config_read(0, 2, 0, at, 8).to_bytes(8, "little") for at in range(0, 4096, 8))
    assert [slot for slot in range(32) if vm.board.present[slot]] == [0, 2]


def test_slots(root, vm):
    assert root.free_slot() == 1
    for slot in range(1, 32):
        root.attach(slot, Function(f"fn{slot}"))
    with pytest.raises(Conflict, match="all 32"):
        root.free_slot()
    with pytest.raises(Conflict, match="taken by fn7"):
        root.attach(7, Function())
    for slot in (-1, 32):
        with pytest.raises(UsageError, match=r"outside 0\.\.31"):
            root.attach(slot, Function())
    gone = root.detach(7)
    assert gone.slot is None
    assert not vm.board.present[7]
    assert root.free_slot() == 7
    for slot in (0, 7, 99):
        with pytest.raises(NotFound):
            root.detach(slot)


@pytest.mark.parametrize(("size", "wide"), [(16, False), (0x1000, False), (0x80000, True), (1 << 33, True)])
def test_bar_sizing(root, size, wide):
    root.attach(1, Function(bar0=(size, wide)))
    assert root.mmio_write(ecam(1, pci.COMMAND), 2, 0)
    home = root.mmio_read(ecam(1, 0x10), 8)
    for register in (0x10, 0x14):
        assert root.mmio_write(ecam(1, register), 4, 0xFFFF_FFFF)
    answer = root.mmio_read(ecam(1, 0x10), 8)
    if wide:
        assert answer == (1 << 64) - size | 4
    else:
        assert answer == (1 << 32) - size
    for register in (0x10, 0x14):
        assert root.mmio_write(ecam(1, register), 4, home >> 8 * (register - 0x10) & 0xFFFF_FFFF)
    assert root.mmio_read(ecam(1, 0x10), 8) == home


def test_allocation_is_aligned_disjoint_and_reused(root):
    functions = [Function(bar0=(0x80000, True), bar2=(0x1000, False), bar4=(1 << 30, True)) for _ in range(8)]
    for slot, function in enumerate(functions, 1):
        root.attach(slot, function)
    spans = sorted((address, address + function.config.bars[bar].size)
                   for function in functions for bar, address in function.at.items())
    assert len(spans) == 24
    assert all(end <= start for (_, end), (start, _) in pairwise(spans))
    assert all(start % (end - start) == 0 for start, end in spans)
    assert all(function.at[4] >= WINDOW64[0] for function in functions)
    assert all(function.at[0] < layout.MMIO32_END for function in functions)
    home = dict(functions[3].at)
    root.detach(4)
    again = Function(bar0=(0x80000, True), bar2=(0x1000, False), bar4=(1 << 30, True))
    root.attach(4, again)
    assert again.at == home


def test_allocation_avoids_where_the_guest_put_others(root):
    first, second = Function(bar0=(0x1000, False)), Function(bar0=(0x1000, False))
    root.attach(1, first)
    root.mmio_write(ecam(1, 0x10), 4, layout.MMIO32 + 0x1000)
    root.attach(2, second)
    assert first.at == {0: layout.MMIO32 + 0x1000}
    assert second.at == {0: layout.MMIO32 + 0x2000}


def test_no_room_is_an_error_that_changes_nothing(vm):
    root = PciRoot(vm.shadow, window32=(0xC000_0000, 0x2000))
    root.attach(1, Function(bar0=(0x1000, False)))
    with pytest.raises(Conflict, match="big: no MMIO room for BAR 0"):
        root.attach(2, Function("big", bar0=(0x2000, True)))
    root.attach(2, Function(bar0=(0x1000, False)))


def test_dispatch(root):
    function = Function(bar0=(0x1000, False), bar1=(0x100, False))
    root.attach(1, function)
    at = function.at
    assert root.mmio_read(at[0] + 0x10, 4) == 0xB000_0010
    assert root.mmio_read(at[1] + 0x10, 2) == 0x10
    assert root.mmio_read(at[1] + 0xFE, 4) == 0xFFFF_FFFF, "crosses the end"
    assert root.mmio_write(at[0] + 8, 2, 0x12345)
    assert root.mmio_write(at[1] + 0xFF, 2, 1)
    assert function.writes == [(0, 8, 2, 0x2345)]
    assert root.mmio_read(at[0] - 1, 1) is None
    root.mmio_write(ecam(1, pci.COMMAND), 2, 0)
    assert root.mmio_read(at[0], 4) is None
    assert function.at == at, "doorbells stay while decode is off"


def test_overlapping_bars_first_come(root):
    first, second = Function("first", bar0=(0x1000, False)), Function("second", bar0=(0x1000, False))
    root.attach(1, first)
    root.attach(2, second)
    home = first.at[0]
    root.mmio_write(ecam(2, 0x10), 4, home)
    assert second.at[0] is None
    assert first.at[0] == home
    root.mmio_write(home, 4, 1)
    assert first.writes
    assert not second.writes
    root.mmio_write(ecam(1, 0x10), 4, home + 0x10000)
    assert (first.at[0], second.at[0]) == (home + 0x10000, home), "the place is free now"


def test_a_bar_without_decode_gives_way(root):
    first, second = Function(bar0=(0x1000, False)), Function(bar0=(0x1000, False))
    root.attach(1, first)
    root.attach(2, second)
    home = first.at[0]
    root.mmio_write(ecam(1, pci.COMMAND), 2, 0)
    root.mmio_write(ecam(2, 0x10), 4, home)
    assert (first.at[0], second.at[0]) == (None, home)
    root.mmio_write(ecam(1, pci.COMMAND), 2, pci.COMMAND_MEMORY)
    assert (first.at[0], second.at[0]) == (None, home)


def test_swapping_two_bars_of_one_function(root):
    """Everything must leave before anything arrives."""
    function = Function(bar0=(0x1000, False), bar1=(0x1000, False))
    root.attach(1, function)
    events = []
    function.bar_placed = lambda bar, gpa: events.append((bar, gpa))
    old = function.at
    root.mmio_write(ecam(1, 0x10), 8, old[1] | old[0] << 32)
    assert events == [(0, None), (1, None), (0, old[1]), (1, old[0])]


def test_attach_without_decode(root):
    function = Function(bar0=(0x1000, False))
    root.attach(1, function, decode=False)
    assert function.at == {}
    assert root.mmio_read(ecam(1, pci.COMMAND), 2) == 0
    address = root.mmio_read(ecam(1, 0x10), 4)
    root.mmio_write(ecam(1, pci.COMMAND), 2, pci.COMMAND_MEMORY)
    assert function.at == {0: address}


def test_machine_reset_and_another_board(root):
    function = Function(bar0=(0x1000, False))
    root.attach(1, function)
    home = function.at[0]
    root.mmio_write(ecam(1, 0x10), 4, home + 0x5000)
    root.mmio_write(ecam(1, 0x3C), 1, 9)
    select(root, 1, 0)
    root.machine_reset()
    assert function.at == {0: None}
    other = FakeVm()
    root.power_on(other.shadow)
    assert function.at == {0: home}
    assert root.io_read(0xCF8, 4) == 0
    assert other.board.present[0]
    assert other.board.present[1]
    assert other.board.config[1][0] == 0x34
    assert other.board.config[1][0x3C] == 0


def test_capability_list_and_its_limits():
    config = ConfigSpace(vendor=1, device=2, pci_class=3)
    assert not config.status & pci.STATUS_CAP_LIST
    first = config.add_capability(9, b"\x05abc", b"\0\xff")
    second = config.add_capability(0x11, bytes(10))
    assert (first, second) == (0x40, 0x48)
    assert config.status & pci.STATUS_CAP_LIST
    assert config.read(pci.CAPABILITY_LIST, 1) == first
    assert config.read(first, 4) == 0x05_48_09 | ord("a") << 24
    assert config.read(second, 2) == 0x11
    config.write(first, 8, 0)
    assert config.read(first, 8).to_bytes(8, "little") == b"\x09\x48\x05\0bc\0\0", "by the mask"
    with pytest.raises(Internal, match="no room"):
        config.add_capability(9, bytes(200))
    with pytest.raises(Internal, match="power of two"):
        config.add_bar(0, 0x1800)
    with pytest.raises(Internal, match="taken or do not exist"):
        config.add_bar(5, 0x1000, wide=True)


def test_intx_lines_are_shared():
    changes = []
    lines = IntxLines(lambda gsi, level: changes.append((gsi, level)))
    gsi = layout.intx_gsi(1, 0)
    assert layout.intx_gsi(9, 0) == gsi
    lines.drive(1, True)
    lines.drive(9, True)
    lines.drive(1, False)
    lines.drive(9, False)
    lines.drive(9, False)
    assert changes == [(gsi, True), (gsi, False)]
    lines.drive(1, True)
    lines.forget()
    lines.drive(1, True)
    assert changes[2:] == [(gsi, True), (gsi, True)]


def test_raw_device(root, vm):
    bell, file = os.eventfd(0), os.memfd_create("registers")
    os.write(file, bytes(range(200)))
    spec = Spec(vendor=0x1B36, device=0x0011, pci_class=0x088000, revision=3, subsystem=0x1100, windows=(
        Window(0, 0, 4, WindowKind.BYTES, data=b"\x01\x02"),
        Window(0, 0x100, 4, WindowKind.DOORBELL, fd="bell"),
        Window(0, 0x200, 0x10, WindowKind.FILE, fd="file", fd_offset=100),
        Window(0, 0x300, 0x10, WindowKind.FILE, fd="file", readonly=True),
        Window(2, 0, 0x2000, WindowKind.MEMORY, fd="file", readonly=True)))
    device = RawPciDevice("raw0", spec, vm.ports, window_fds={"bell": bell, "file": file})
    root.attach(5, device)
    assert root.mmio_read(ecam(5), 4) == 0x0011_1B36
    assert root.mmio_read(ecam(5, 8), 4) == 0x08800003
    base, memory = (root.mmio_read(ecam(5, register), 8) & ~0xF for register in (0x10, 0x18))
    assert root.mmio_read(base, 4) == 0x0201
    assert root.mmio_read(base + 0x50, 4) == 0
    assert vm.doorbells == {base + 0x100: bell}
    assert vm.mappings == {memory: (0x2000, file, 0, True)}
    assert root.mmio_write(base + 0x100, 1, 0)
    assert root.mmio_write(base + 0x101, 1, 0)
    assert eventfd.take(bell) == 1
    assert root.mmio_read(base + 0x201, 2) == 0x6665
    assert root.mmio_write(base + 0x20E, 4, 0xAABBCCDD)
    assert os.pread(file, 4, 114) == b"\xdd\xcc\x74\x75", "cut at the window's end"
    assert root.mmio_write(base + 0x300, 4, 0)
    assert os.pread(file, 1, 1) == b"\x01"
    root.detach(5)
    assert not vm.doorbells
    assert not vm.mappings
    os.close(bell)
    os.close(file)
