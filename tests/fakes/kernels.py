"""Small kernels for tests of the loader, valid until a test breaks them, and a guest RAM that remembers."""

from __future__ import annotations

import mmap
import struct
from collections.abc import Iterable

from cellvisor.core.mem import layout

HDR_S = 0x53726448
PT_LOAD, PT_NOTE = 1, 4


class FakeRam:
    """`size` bytes of sparse RAM laid out by layout.ranges; `touched` lists every (gpa, size) asked for."""

    def __init__(self, size: int) -> None:
        self._memory = mmap.mmap(-1, size)
        self._view = memoryview(self._memory)
        self._ranges = layout.ranges(size)
        self.touched: list[tuple[int, int]] = []

    def view(self, gpa: int, size: int) -> memoryview:
        for start, length, offset in self._ranges:
            if start <= gpa and gpa + size <= start + length:
                self.touched.append((gpa, size))
                return self._view[gpa - start + offset:gpa - start + offset + size]
        raise AssertionError(f"the loader reached for {gpa:#x}+{size:#x}, which is no RAM")

    def write(self, gpa: int, data: bytes | memoryview) -> None:
        self.view(gpa, len(data))[:] = data

    def peek(self, gpa: int, size: int) -> bytes:
        """Read without leaving a trace."""
        data = bytes(self.view(gpa, size))
        self.touched.pop()
        return data

    def close(self) -> None:
        self._view.release()
        self._memory.close()


def bzimage(code: bytes = b"\x90" * 0x4000, *, sectors: int = 3, init_size: int = 0x40_0000,
            preferred: int = 0x100_0000, initrd_max: int = 0x7FFF_FFFF, cmdline_max: int = 2047) -> bytearray:
    """Make a bzImage of protocol 2.15 around `code`, whose payload is all but the first 0x400 bytes."""
    image = bytearray((sectors + 1) * 512)
    code += bytes(-len(code) % 16)
    for offset, form, value in (
        (0x1F1, "<B", sectors), (0x1F4, "<I", len(code) // 16), (0x1FE, "<H", 0xAA55), (0x200, "<H", 0x6AEB),
        (0x202, "<I", HDR_S), (0x206, "<H", 0x20F), (0x211, "<B", 1), (0x214, "<I", 0x100000),
        (0x22C, "<I", initrd_max), (0x230, "<I", 0x20_0000), (0x234, "<B", 1), (0x236, "<H", 1),
        (0x238, "<I", cmdline_max), (0x248, "<I", 0x400), (0x24C, "<I", len(code) - 0x400),
        (0x258, "<Q", preferred), (0x260, "<I", init_size),
    ):
        struct.pack_into(form, image, offset, value)
    return image + code


def note(owner: bytes, kind: int, data: bytes, align: int = 4) -> bytes:
    """Make one ELF note."""
    head = struct.pack("<III", len(owner), len(data), kind) + owner
    head += bytes(-len(head) % align)
    return head + data + bytes(-len(data) % align)


def pvh_note(entry: int) -> bytes:
    """Make the note that names a PVH entry point."""
    return note(b"Xen\0", 18, struct.pack("<Q", entry))


def elf(loads: Iterable[tuple[int, bytes, int]] = ((0x100_0000, b"\xf4" * 0x1000, 0x3000),), *,
        notes: bytes = b"", entry: int = 0x100_0000, virtual: int = 0, kind: int = 2, machine: int = 62,
        note_align: int = 4) -> bytearray:
    """Make an ELF kernel of (paddr, content, memory size) segments; vaddr is paddr + `virtual`."""
    loads = list(loads)
    programs: list[tuple[int, int, bytes, int, int]] = [
        (PT_LOAD, paddr, content, size, 0x1000) for paddr, content, size in loads]
    if notes:
        programs.append((PT_NOTE, 0, notes, len(notes), note_align))
    body, table = b"", b""
    start = 64 + 56 * len(programs)
    for what, paddr, content, size, align in programs:
        table += struct.pack("<IIQQQQQQ", what, 7, start + len(body), (paddr + virtual) % 2**64, paddr,
                             len(content), size, align)
        body += content
    head = struct.pack("<16sHHIQQQIHHHHHH", b"\x7fELF\x02\x01\x01", kind, machine, 1, entry, 64, 0, 0, 64, 56,
                       len(programs), 0, 0, 0)
    return bytearray(head + table + body)
