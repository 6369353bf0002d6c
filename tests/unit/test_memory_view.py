"""Guest memory and the state memfd: table versions, translation, seals, the private area."""

from __future__ import annotations

import mmap
import os
import threading
from collections.abc import Iterator

import pytest

from cellvisor.core.errors import Internal, RingError, UsageError
from cellvisor.core.mem.table import RangeTable, seal
from cellvisor.core.mem.view import GuestMemory
from cellvisor.core.ring.state import StateLayout, StateMap, create_state

PAGE = 4096


@pytest.fixture
def ram() -> Iterator[int]:
    fd = os.memfd_create("ram", os.MFD_ALLOW_SEALING)
    os.ftruncate(fd, 64 * PAGE)
    yield fd
    os.close(fd)


def test_a_view_sees_a_new_table_only_after_refresh(ram: int) -> None:
    with RangeTable.create() as table, GuestMemory(ram, table.fd) as memory:
        with pytest.raises(RingError, match="not RAM"):
            memory.at(0, 1)
        first = table.publish([(0, 4 * PAGE, 0)])
        with pytest.raises(RingError):
            memory.at(0, 1)
        assert memory.refresh() == first
        memory.at(4 * PAGE - 1, 1)[0] = 7
        assert os.pread(ram, 1, 4 * PAGE - 1) == b"\7"
        second = table.publish([(0x10000000, PAGE, 8 * PAGE), (0, PAGE, 0)])
        assert second == first + 2
        assert memory.refresh() == second
        assert memory.refresh() == second
        with pytest.raises(RingError):
            memory.at(PAGE, 1)
        os.pwrite(ram, b"high", 8 * PAGE)
        assert bytes(memory.at(0x10000000, 4)) == b"high"


def test_pieces_cross_ranges_and_at_does_not(ram: int) -> None:
    with RangeTable.create() as table:
        table.publish([(0, PAGE, PAGE), (PAGE, PAGE, 0), (3 * PAGE, PAGE, 2 * PAGE)])
        with GuestMemory(ram, table.fd) as memory:
            assert [len(view) for view in memory.pieces(PAGE - 3, 10)] == [3, 7]
            with pytest.raises(RingError, match="crosses"):
                memory.at(PAGE - 3, 10)
            for gpa, length in ((2 * PAGE - 1, 2), (4 * PAGE - 1, 2), (2**64 - 1, 2), (0, 0), (-1, 1),
                                (2**64, 1), (0, 2**64), (0, -5)):
                with pytest.raises(RingError):
                    memory.pieces(gpa, length)


@pytest.mark.parametrize("ranges", [
    [(0, 0, 0)], [(1, PAGE, 0)], [(0, PAGE, 1)], [(0, PAGE + 1, 0)], [(0, 2 * PAGE, 0), (PAGE, PAGE, 0)],
    [(i * PAGE, PAGE, 0) for i in range(65)],
])
def test_core_publishes_no_nonsense(ranges: list[tuple[int, int, int]]) -> None:
    with RangeTable.create() as table, pytest.raises(Internal):
        table.publish(ranges)


@pytest.mark.parametrize("ranges", [
    [(0, 65 * PAGE, 0)], [(0, PAGE, 64 * PAGE)], [(0, PAGE, 2**64 - PAGE)], [(2**64 - PAGE, PAGE, 0)],
])
def test_a_range_outside_the_memfd_is_refused(ram: int, ranges: list[tuple[int, int, int]]) -> None:
    with RangeTable.create() as table, GuestMemory(ram, table.fd) as memory:
        table.publish([(0, PAGE, 0)])
        memory.refresh()
        table.publish(ranges)
        with pytest.raises(Internal, match="Invalid argument"):
            memory.refresh()
        with pytest.raises(RingError):
            memory.at(0, 1)
        table.publish([(0, PAGE, 0)])
        memory.refresh()
        memory.at(0, 1)


def test_a_table_whose_writer_died_keeps_the_old_copy(ram: int) -> None:
    with RangeTable.create() as table, GuestMemory(ram, table.fd) as memory:
        table.publish([(0, PAGE, 0)])
        memory.refresh()
        table._table.version += 1
        with pytest.raises(Internal, match="temporarily unavailable"):
            memory.refresh()
        memory.at(0, 1)


def test_no_torn_table_is_ever_seen(ram: int) -> None:
    """A writer flips between two tables; a reader must never see the count of one with ranges of the other."""
    small = [(0, PAGE, 0)]
    large = [(i * PAGE, PAGE, (63 - i) * PAGE) for i in range(64)]
    with RangeTable.create() as table, GuestMemory(ram, table.fd) as memory:
        stop = threading.Event()

        def flip() -> None:
            while not stop.is_set():
                table.publish(large)
                table.publish(small)

        writer = threading.Thread(target=flip)
        writer.start()
        try:
            for _ in range(3000):
                memory.refresh()
                seen = [(r.gpa, r.size, r.offset) for r in memory.c.copy.ranges[0:memory.c.copy.count]]
                assert seen in ([], small, large)
        finally:
            stop.set()
            writer.join()


def test_seals() -> None:
    with RangeTable.create() as table:
        with pytest.raises(PermissionError):
            os.ftruncate(table.fd, 1 << 20)
        with pytest.raises(PermissionError):
            mmap.mmap(table.fd, 16)
        with pytest.raises(PermissionError):
            os.pwrite(table.fd, b"x", 0)
        with pytest.raises(Internal, match="seal"):
            seal(table.fd)
    fd = create_state([8])
    for size in (0, 1 << 20):
        with pytest.raises(PermissionError):
            os.ftruncate(fd, size)
    os.close(fd)


def test_state_layout_and_words() -> None:
    layout = StateLayout.of([8, 256, 32768], 100)
    assert layout.areas == (4096, 4096 + 192, 4096 + 192 + 4160)
    assert layout.private_offset == layout.areas[2] + 16 * 32768 + 64
    for sizes, private in (([3], 0), ([65536], 0), ([0], 0), ([8] * 65, 0), ([8], (1 << 20) + 1), ([8], -1)):
        with pytest.raises(UsageError):
            StateLayout.of(sizes, private)
    fd = create_state([8, 16], 100)
    with StateMap(fd) as worker, StateMap(fd) as core:
        worker.generation, worker.epoch, worker.features = 3, 5, 1 << 63 | 1
        core.ping = 2**63
        worker.echo = core.ping
        worker.in_syscall_since = 17
        assert (core.generation, core.epoch, core.features) == (3, 5, 1 << 63 | 1)
        assert (core.echo, core.in_syscall_since) == (2**63, 17)
    os.close(fd)


def test_private_area_is_replaced_as_a_whole() -> None:
    fd = create_state([8], 100)
    with StateMap(fd) as state:
        assert state.load_private() == (0, b"")
        state.save_private(b"one", 1)
        state.save_private(b"x" * 100, 2)
        assert state.load_private() == (2, b"x" * 100)
        before = state._load("private_current")
        state.save_private(b"half", 3)
        # A crash before the last store of save_private: the older copy is whole.
        state._store("private_current", before)
        assert state.load_private() == (2, b"x" * 100)
        with pytest.raises(Internal, match="101 bytes"):
            state.save_private(b"x" * 101, 2)
    os.close(fd)
    fd = create_state([8])
    with StateMap(fd) as state:
        state.save_private(b"", 9)
        assert state.load_private() == (9, b"")
    os.close(fd)
