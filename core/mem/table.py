"""The range table, core's side: which guest-physical ranges are RAM, published to every worker (design 2).

One sealed memfd of one struct cv_table. After creation nobody can map it writable again, so a worker that
holds the descriptor can only read it.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from typing import Any

from cellvisor.core._native import _native
from cellvisor.core.errors import Internal

PAGE = 4096


class RangeTable:
    """Write the table of RAM ranges. A context manager; `fd` is what workers receive."""

    def __init__(self, fd: int, native: Any = _native) -> None:
        self.fd = fd
        self._native = native
        size = native.ffi.sizeof("struct cv_table")
        self._map = mmap.mmap(fd, size)
        self._buffer = native.ffi.from_buffer(self._map, require_writable=True)
        self._table = native.ffi.cast("struct cv_table *", self._buffer)

    @classmethod
    def create(cls, native: Any = _native) -> RangeTable:
        """Make an empty table in a sealed memfd. Raises Internal if sealing fails."""
        fd = os.memfd_create("cellvisor-ranges", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
        os.ftruncate(fd, native.ffi.sizeof("struct cv_table"))
        table = cls(fd, native)
        seal(fd, readonly=True)
        table.publish(())
        return table

    @property
    def version(self) -> int:
        """Return the number of the table last published (even, rises by 2)."""
        return int(self._table.version)

    def publish(self, ranges: Sequence[tuple[int, int, int]]) -> int:
        """Replace the table by `ranges` of (gpa, size, offset in the RAM memfd), all in bytes.

        Returns the new version. Raises Internal for more than 64 ranges, and for ranges that are empty,
        not page aligned or overlap in the guest.
        """
        if len(ranges) > self._native.lib.CV_TABLE_RANGES:
            raise Internal(f"{len(ranges)} RAM ranges, at most {self._native.lib.CV_TABLE_RANGES}")
        end = 0
        for gpa, size, offset in sorted(ranges):
            if size <= 0 or (gpa | size | offset) % PAGE or gpa < end:
                raise Internal(f"RAM range gpa={gpa:#x} size={size:#x} offset={offset:#x} is empty, "
                               f"not page aligned or overlaps another")
            end = gpa + size
        array = self._native.ffi.new("struct cv_range[]", [tuple(entry) for entry in sorted(ranges)])
        self._native.lib.cv_table_publish(self._table, array, len(ranges))
        return self.version

    def close(self) -> None:
        """Unmap the table and close its descriptor."""
        if self.fd >= 0:
            del self._table
            self._native.ffi.release(self._buffer)
            self._map.close()
            os.close(self.fd)
            self.fd = -1

    def __enter__(self) -> RangeTable:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()


def seal(fd: int, *, readonly: bool = False) -> None:
    """Seal memfd `fd` against shrinking, growing and more seals; `readonly` refuses new writable mappings.

    Raises Internal if the kernel refuses.
    """
    error = _native.lib.cv_memfd_seal(fd, readonly)
    if error:
        raise Internal(f"cannot seal memfd {fd}: {os.strerror(-error)}")
