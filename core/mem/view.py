"""Guest RAM, a worker's side: the only way from a guest-physical address to bytes (design 2).

RAM is mapped once at its maximum size; the range table says which guest-physical ranges exist now.
"""

from __future__ import annotations

import mmap
import os
from typing import Any

from cellvisor.core._native import _native
from cellvisor.core.errors import Internal, RingError


class GuestMemory:
    """Map guest RAM and the range table. A context manager; the descriptors stay the caller's.

    `c` is the struct cv_memory * that C functions of `native` take, `ram` the whole memfd as bytes.
    """

    def __init__(self, ram_fd: int, table_fd: int, native: Any = _native) -> None:
        """Map both. Raises Internal if a descriptor is not what it should be."""
        self.native = native
        size = native.ffi.sizeof("struct cv_table")
        if os.fstat(table_fd).st_size < size:
            raise Internal(f"range table has {os.fstat(table_fd).st_size} bytes, not {size}")
        self._ram_map = mmap.mmap(ram_fd, 0)
        self._table_map = mmap.mmap(table_fd, size, prot=mmap.PROT_READ)
        self.ram = memoryview(self._ram_map)
        self._ram_buffer = native.ffi.from_buffer(self._ram_map, require_writable=True)
        self._table_buffer = native.ffi.from_buffer(self._table_map)
        self.c = native.ffi.new("struct cv_memory *")
        self.c.ram = native.ffi.cast("uint8_t *", self._ram_buffer)
        self.c.ram_size = len(self._ram_map)
        self.c.table = native.ffi.cast("const struct cv_table *", self._table_buffer)
        self.refresh()

    def refresh(self) -> int:
        """Take over the newest range table; returns its version. Raises Internal if it makes no sense."""
        error = self.native.lib.cv_memory_refresh(self.c)
        if error:
            raise Internal(f"range table version {self.c.table.version}: {os.strerror(-error)}")
        return int(self.c.copy.version)

    def at(self, gpa: int, length: int) -> memoryview:
        """Return `length` bytes at `gpa`. Raises RingError unless all of it is RAM in one piece."""
        pieces = self.pieces(gpa, length)
        if len(pieces) != 1:
            raise RingError(f"memory {gpa:#x}+{length:#x} crosses RAM ranges")
        return pieces[0]

    def pieces(self, gpa: int, length: int) -> list[memoryview]:
        """Return `length` bytes at `gpa` as views in order. Raises RingError unless all of it is RAM."""
        if length <= 0 or not 0 <= gpa < 1 << 64 or length >= 1 << 64:
            raise RingError(f"memory {gpa:#x}+{length:#x} is no range")
        ffi, lib = self.native.ffi, self.native.lib
        room = ffi.new("uint64_t *")
        base = int(ffi.cast("uintptr_t", self.c.ram))
        found: list[memoryview] = []
        while length:
            room[0] = length
            host = lib.cv_memory_at(self.c, gpa, room) if gpa < 1 << 64 else ffi.NULL
            if host == ffi.NULL:
                raise RingError(f"memory {gpa:#x}+{length:#x} is not RAM")
            offset = int(ffi.cast("uintptr_t", host)) - base
            found.append(self.ram[offset:offset + room[0]])
            gpa += room[0]
            length -= room[0]
        return found

    def close(self) -> None:
        """Unmap. Views that are still held keep the RAM mapping alive until they go."""
        if self._table_map.closed:
            return
        self.c.copy.count = 0
        self.c.table = self.native.ffi.NULL
        self.native.ffi.release(self._table_buffer)
        self._table_map.close()
        self.c.ram = self.native.ffi.NULL
        self.native.ffi.release(self._ram_buffer)
        try:
            self.ram.release()
            self._ram_map.close()
        except BufferError:
            pass

    def __enter__(self) -> GuestMemory:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
