"""Guest RAM: one memfd of the largest size the VM may reach, sealed, sparse, mapped once.

F_SEAL_SHRINK|GROW|SEAL: no process that holds it can truncate it under another's feet; holes can still be
punched (memfd_create(2), fcntl(2)).
"""

from __future__ import annotations

import fcntl
import mmap
import os

from cellvisor.core import log
from cellvisor.core._native import _native
from cellvisor.core.errors import UsageError
from cellvisor.core.mem import layout

SEALS = fcntl.F_SEAL_SHRINK | fcntl.F_SEAL_GROW | fcntl.F_SEAL_SEAL


class GuestRam:
    """`size` bytes are RAM now; `gpa`s are those of layout.ranges(size)."""

    def __init__(self, size: int, *, prefault: bool = False, hugepages: bool = False, thp: bool = True) -> None:
        """Create and map the memfd. Raises UsageError if the host cannot give it."""
        self.size = size
        self.effects: dict[str, bool] = {}
        flags = os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING | (os.MFD_HUGETLB if hugepages else 0)
        self.fd = -1
        try:
            self.fd = os.memfd_create("cellvisor-ram", flags)
            os.ftruncate(self.fd, size)
            fcntl.fcntl(self.fd, fcntl.F_ADD_SEALS, SEALS)
            self.map = mmap.mmap(self.fd, size)
        except (OSError, ValueError) as error:
            if self.fd >= 0:
                os.close(self.fd)
            why = "are enough huge pages reserved?" if hugepages else "is the host short of memory?"
            raise UsageError(f"--memory size={size}: {error}", hint=why) from None
        self._view = memoryview(self.map)
        self.host = int(_native.ffi.cast("uintptr_t", _native.ffi.from_buffer(self.map)))
        self.effects["hugepages"] = hugepages
        self.effects["thp"] = thp and not hugepages and self._advise("MADV_HUGEPAGE")
        self.effects["prefault"] = prefault and self._populate()
        self.ranges = layout.ranges(size)

    def _advise(self, name: str) -> bool:
        try:
            self.map.madvise(getattr(mmap, name))
        except (OSError, AttributeError) as error:
            log.get("ram").info("%s not taken: %s", name, error)
            return False
        return True

    def _populate(self) -> bool:
        """Touch every page now (MADV_POPULATE_WRITE, Linux 5.14). False if this kernel cannot."""
        result = int(_native.lib.cv_populate(_native.ffi.from_buffer(self.map), self.size))
        if result < 0:
            log.get("ram").warning("prefault not taken: %s", os.strerror(-result))
        return result == 0

    def view(self, gpa: int, size: int) -> memoryview:
        """Return `size` bytes of RAM at `gpa`. Raises ValueError if they are not all RAM."""
        for start, length, offset in self.ranges:
            if start <= gpa and gpa + size <= start + length:
                into = gpa - start + offset
                return self._view[into : into + size]
        raise ValueError(f"{gpa:#x}+{size:#x} is not RAM")

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        """Copy `data` to `gpa`."""
        self.view(gpa, len(data))[:] = data

    def clear(self) -> None:
        """Give every page back to the host: RAM reads zero, mappings stay valid."""
        result = int(_native.lib.cv_file_punch(self.fd, 0, self.size))
        if result < 0:
            raise OSError(-result, f"clearing guest RAM: {os.strerror(-result)}")

    def close(self) -> None:
        """Unmap and close."""
        self._view.release()
        self.map.close()
        os.close(self.fd)
