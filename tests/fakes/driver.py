"""A fake guest: RAM, its range table, and a virtio driver for split rings (virtio 1.2, 2.7), in plain Python.

    guest = FakeGuest()                          ram_fd, table (RangeTable), memory (GuestMemory), read/write
    driver = FakeDriver(8, guest=guest)          lays out one ring; several may share one guest
    queue = driver.queue()                       core.ring.queue.Queue over it, with its own state memfd
    head = driver.add([b"out"], [512]); driver.offer()
    ... the device serves queue ...
    [(head, length)] = driver.used(); driver.data(head, length)
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from struct import pack_into, unpack_from
from typing import Any

from cellvisor.core._native import _native
from cellvisor.core.mem.table import RangeTable, seal
from cellvisor.core.mem.view import GuestMemory
from cellvisor.core.ring.queue import Queue, QueueConfig
from cellvisor.core.ring.state import StateMap, create_state

NEXT, WRITE, INDIRECT = 1, 2, 4
INDIRECT_DESC, EVENT_IDX = 1 << 28, 1 << 29
_FIRST_BUFFER = 0x4000


class FakeGuest:
    """Guest RAM in a sealed memfd. `ranges` are (gpa, size, offset); by default one from gpa 0.

    `native` swaps the compiled module (fault injection).
    """

    def __init__(self, ram_size: int = 1 << 22, ranges: Sequence[tuple[int, int, int]] | None = None,
                 native: Any = _native) -> None:
        self.native = native
        self.ram_fd = os.memfd_create("fake-ram", os.MFD_ALLOW_SEALING)
        os.ftruncate(self.ram_fd, ram_size)
        seal(self.ram_fd)
        self.ram = mmap.mmap(self.ram_fd, ram_size)
        self.ranges = list(ranges or [(0, ram_size, 0)])
        self.table = RangeTable.create(native)
        self.table.publish(self.ranges)
        self.memory = GuestMemory(self.ram_fd, self.table.fd, native)
        self._next = _FIRST_BUFFER
        self._free: dict[int, list[int]] = {}

    def offset(self, gpa: int) -> int:
        """Translate `gpa` to an offset in `ram`; ValueError if it is not RAM."""
        for start, size, offset in self.ranges:
            if start <= gpa < start + size:
                return offset + gpa - start
        raise ValueError(f"gpa {gpa:#x} is not RAM")

    def read(self, gpa: int, length: int) -> bytes:
        """Copy guest memory (byte by byte across ranges)."""
        at = self.offset(gpa)
        if length == 0 or self.offset(gpa + length - 1) == at + length - 1:
            return self.ram[at:at + length]
        return bytes(self.ram[self.offset(gpa + i)] for i in range(length))

    def write(self, gpa: int, data: bytes) -> None:
        """Store guest memory (byte by byte across ranges)."""
        at = self.offset(gpa)
        if not data or self.offset(gpa + len(data) - 1) == at + len(data) - 1:
            self.ram[at:at + len(data)] = data
            return
        for i, byte in enumerate(data):
            self.ram[self.offset(gpa + i)] = byte

    def alloc(self, size: int, align: int = 16) -> int:
        """Return the gpa of `size` unused bytes. Buffers come from 0x4000 on; RAM must begin at gpa 0."""
        size = -(-max(size, 1) // align) * align
        if self._free.get(size):
            return self._free[size].pop()
        gpa = -(-self._next // align) * align
        self._next = gpa + size
        self.offset(self._next)
        return gpa

    def free(self, gpa: int, size: int, align: int = 16) -> None:
        """Give back what alloc() returned."""
        self._free.setdefault(-(-max(size, 1) // align) * align, []).append(gpa)

    def close(self) -> None:
        """Unmap and close everything."""
        self.memory.close()
        self.table.close()
        self.ram.close()
        os.close(self.ram_fd)


class FakeDriver:
    """The driver of one split virtqueue of `size`.

    `start` is where avail.idx and used.idx begin. The ring parts are allocated unless gpas are given.
    `kick_fd` and `call_fd` are eventfds: offer() writes the first if the device asked for it, the device
    writes the second. used() asserts that each head it sees was outstanding, so a completion that comes
    twice fails there.
    """

    def __init__(self, size: int = 8, *, guest: FakeGuest | None = None, event_idx: bool = True,
                 indirect: bool = True, start: int = 0, desc: int | None = None, avail: int | None = None,
                 used: int | None = None, native: Any = _native) -> None:
        self.own_guest = guest is None
        self.guest = guest or FakeGuest(native=native)
        self.size = size
        self.event_idx = event_idx
        self.features = (EVENT_IDX if event_idx else 0) | (INDIRECT_DESC if indirect else 0)
        self.desc = self.guest.alloc(16 * size, 4096) if desc is None else desc
        self.avail = self.guest.alloc(6 + 2 * size, 4096) if avail is None else avail
        self.used_ring = self.guest.alloc(6 + 8 * size, 4096) if used is None else used
        self.config = QueueConfig(size, self.desc, self.avail, self.used_ring)
        self.kick_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.call_fd = os.eventfd(0, os.EFD_NONBLOCK)
        self.state_fd = -1
        self.state: StateMap | None = None
        self.avail_idx = self.used_idx = start
        self.outstanding: dict[int, list[tuple[int, int, bool]]] = {}
        self.last: dict[int, list[tuple[int, int, bool]]] = {}
        self._links: dict[int, tuple[list[int], int]] = {}
        self._free = list(range(size - 1, -1, -1))
        self._waiting: list[int] = []
        self.put16(self.avail + 2, start)
        self.put16(self.used_ring + 2, start)
        self.want_interrupts(True)

    # ---- the device's side, ready-made

    def queue(self, index: int = 0, *, epoch: int = 0, state: StateMap | None = None) -> Queue:
        """Make the device's Queue. Without `state` the driver makes a state memfd, once, and keeps it."""
        if state is None:
            if self.state is None:
                self.state_fd = create_state([self.size] * (index + 1), 256)
                self.state = StateMap(self.state_fd, self.guest.native)
            state = self.state
        return Queue(index, state, self.guest.memory, self.config, self.features, self.call_fd, epoch=epoch)

    # ---- what a driver does

    @property
    def room(self) -> int:
        """Return how many descriptors are free."""
        return len(self._free)

    def add(self, readable: Sequence[bytes] = (), writable: Sequence[int] = (), *,
            indirect: bool = False) -> int:
        """Build a chain of buffers (contents, then sizes) and return its head; offer() makes it available."""
        buffers: list[tuple[int, int, bool]] = []
        for data in readable:
            gpa = self.guest.alloc(len(data))
            self.guest.write(gpa, data)
            buffers.append((gpa, len(data), False))
        buffers += [(self.guest.alloc(length), length, True) for length in writable]
        return self.add_at(buffers, indirect=indirect)

    def add_at(self, buffers: Sequence[tuple[int, int, bool]], *, indirect: bool = False) -> int:
        """Build a chain of (gpa, length, device writes it) wherever they point, and return its head."""
        count = 1 if indirect else len(buffers)
        if count > len(self._free):
            raise ValueError(f"{count} descriptors wanted, {len(self._free)} free")
        heads = [self._free.pop() for _ in range(count)]
        table = self.guest.alloc(16 * len(buffers)) if indirect else 0
        for i, (gpa, length, writable) in enumerate(buffers):
            last = i == len(buffers) - 1
            flags = (WRITE if writable else 0) | (0 if last else NEXT)
            if indirect:
                self.put_desc(table + 16 * i, gpa, length, flags, 0 if last else i + 1)
            else:
                self.put_desc(self.desc + 16 * heads[i], gpa, length, flags, 0 if last else heads[i + 1])
        if indirect:
            self.put_desc(self.desc + 16 * heads[0], table, 16 * len(buffers), INDIRECT, 0)
        self._links[heads[0]] = (heads, table)
        self.outstanding[heads[0]] = list(buffers)
        self._waiting.append(heads[0])
        return heads[0]

    def offer(self, count: int | None = None) -> bool:
        """Make what was added available (the first `count`); kicks and returns True if the device asked."""
        batch = self._waiting[:count]
        self._waiting = self._waiting[len(batch):]
        for i, head in enumerate(batch):
            self.put16(self.avail + 4 + 2 * ((self.avail_idx + i) % self.size), head)
        old, self.avail_idx = self.avail_idx, (self.avail_idx + len(batch)) & 0xFFFF
        self.put16(self.avail + 2, self.avail_idx)
        if self.event_idx:
            event = self.get16(self.used_ring + 4 + 8 * self.size)
            kick = (self.avail_idx - event - 1) & 0xFFFF < (self.avail_idx - old) & 0xFFFF
        else:
            kick = bool(batch) and not self.get16(self.used_ring) & 1
        if kick:
            os.eventfd_write(self.kick_fd, 1)
        return kick

    def used(self) -> list[tuple[int, int]]:
        """Take what the device published: (head, written length). Frees descriptors and buffers."""
        found: list[tuple[int, int]] = []
        end = self.get16(self.used_ring + 2)
        assert (end - self.used_idx) & 0xFFFF <= self.size, f"used.idx jumped from {self.used_idx} to {end}"
        while self.used_idx != end:
            raw = self.guest.read(self.used_ring + 4 + 8 * (self.used_idx % self.size), 8)
            head, length = unpack_from("<II", raw)
            assert head in self.outstanding, f"head {head} completed but it was not outstanding"
            self.last[head] = self.outstanding.pop(head)
            heads, table = self._links.pop(head)
            self._free.extend(reversed(heads))
            for gpa, size, _ in self.last[head]:
                self.guest.free(gpa, size)
            if table:
                self.guest.free(table, 16 * len(self.last[head]))
            found.append((head, length))
            self.used_idx = (self.used_idx + 1) & 0xFFFF
        if self._wants:
            self.want_interrupts(True)
        return found

    def want_interrupts(self, on: bool) -> None:
        """Ask to be interrupted at the next completion, or not at all."""
        self._wants = on
        if self.event_idx:
            event = self.used_idx if on else self.used_idx - 1
            self.put16(self.avail + 4 + 2 * self.size, event & 0xFFFF)
        else:
            self.put16(self.avail, 0 if on else 1)

    def interrupts(self) -> int:
        """Return how often the device has interrupted since the last call."""
        return self._drain(self.call_fd)

    def kicks(self) -> int:
        """Return how often the driver has kicked since the last call."""
        return self._drain(self.kick_fd)

    def data(self, head: int, length: int = -1) -> bytes:
        """Return the writable part of a completed head (its first `length` bytes). Before reusing buffers."""
        raw = b"".join(self.guest.read(gpa, size) for gpa, size, writable in self.last[head] if writable)
        return raw if length < 0 else raw[:length]

    # ---- corruption: raw access to everything

    def put_desc(self, gpa: int, addr: int, length: int, flags: int, following: int) -> None:
        """Write 16 bytes of descriptor at `gpa` (the table's entry i is at desc + 16 * i)."""
        raw = bytearray(16)
        pack_into("<QIHH", raw, 0, addr, length, flags, following)
        self.guest.write(gpa, bytes(raw))

    def raw_offer(self, *heads: int) -> None:
        """Put any numbers into the available ring, bookkeeping nothing."""
        for head in heads:
            self.put16(self.avail + 4 + 2 * (self.avail_idx % self.size), head)
            self.avail_idx = (self.avail_idx + 1) & 0xFFFF
        self.put16(self.avail + 2, self.avail_idx)

    def put16(self, gpa: int, value: int) -> None:
        """Store a little-endian u16."""
        pack_into("<H", self.guest.ram, self.guest.offset(gpa), value)

    def get16(self, gpa: int) -> int:
        """Load a little-endian u16."""
        value: int = unpack_from("<H", self.guest.ram, self.guest.offset(gpa))[0]
        return value

    def read(self, gpa: int, length: int) -> bytes:
        """Copy guest memory."""
        return self.guest.read(gpa, length)

    def write(self, gpa: int, data: bytes) -> None:
        """Store guest memory."""
        self.guest.write(gpa, data)

    def _drain(self, fd: int) -> int:
        try:
            return os.eventfd_read(fd)
        except BlockingIOError:
            return 0

    def close(self) -> None:
        """Close what this driver made; queues on it must be closed before."""
        for fd in (self.kick_fd, self.call_fd):
            os.close(fd)
        if self.state is not None:
            self.state.close()
            os.close(self.state_fd)
        if self.own_guest:
            self.guest.close()
