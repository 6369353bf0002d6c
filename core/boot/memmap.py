"""The memory map that a kernel is given at boot, the same for e820 and PVH."""

from __future__ import annotations

import struct

from cellvisor.core.abi import bootparams as abi
from cellvisor.core.mem import layout


def memory_map(ram_size: int) -> list[tuple[int, int, int]]:
    """Return (gpa, size, type) of RAM and of what must never be used as such, in ascending order."""
    entries = [
        (0, layout.LOW_USABLE_END, abi.MEMORY_RAM),
        # ACPI tables, kept for the guest's whole life.
        (layout.LOW_USABLE_END, layout.KERNEL - layout.LOW_USABLE_END, abi.MEMORY_RESERVED),
        (layout.ECAM, layout.ECAM_SIZE, abi.MEMORY_RESERVED),
        (layout.KVM_TSS, layout.KVM_TSS_SIZE + layout.KVM_IDENTITY_MAP_SIZE, abi.MEMORY_RESERVED),
    ]
    for gpa, size, _ in layout.ranges(ram_size):
        start = max(gpa, layout.KERNEL)
        entries.append((start, gpa + size - start, abi.MEMORY_RAM))
    return sorted(entries)


def e820_bytes(entries: list[tuple[int, int, int]]) -> bytes:
    """Encode for the zero page."""
    return b"".join(struct.pack(abi.E820_ENTRY, *entry) for entry in entries)


def pvh_bytes(entries: list[tuple[int, int, int]]) -> bytes:
    """Encode for the PVH start info."""
    return b"".join(struct.pack(abi.MEMMAP_ENTRY, *entry, 0) for entry in entries)
