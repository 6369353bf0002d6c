"""The GDT and page tables that vCPU 0 enters the kernel with (Intel SDM 3A, 3.4.5 and 4.5).

Selectors are those of the Linux boot protocol: 0x10 code, 0x18 data, 0x20 task.
"""

from __future__ import annotations

import struct

from cellvisor.core.boot.image import Kind
from cellvisor.core.mem import layout

# Flat segments, accessed bit set: KVM's state and the table must agree.
CODE_64 = 0x00AF_9B00_0000_FFFF
CODE_32 = 0x00CF_9B00_0000_FFFF
DATA = 0x00CF_9300_0000_FFFF
TASK = 0x0000_8B00_0000_0067

PAGE = 0x1000
LARGE_PAGE = 2 * layout.MIB
ENTRIES = 512
PRESENT_WRITABLE = 0x3
LARGE = 0x80
MAPPED_GIB = 4


# Linux on hardware-reduced ACPI without EFI reboots by jumping to the BIOS entry (arch/x86/kernel/reboot.c,
# efi_reboot_required): mov dx, PORT_PM; mov al, 1; out dx, al; hlt; jmp to the hlt.
RESET_STUB = b"\xba" + struct.pack("<H", layout.PORT_PM) + b"\xb0\x01\xee\xf4\xeb\xfd"


def gdt(kind: Kind) -> bytes:
    """Return the descriptor table: two null entries, code, data, and a task segment of two entries."""
    return struct.pack("<6Q", 0, 0, CODE_64 if kind == "long" else CODE_32, DATA, TASK, 0)


def page_tables(base: int = layout.PAGE_TABLES) -> bytes:
    """Return tables for `base` (PML4 first) that map the first 4 GiB one to one with 2 MiB pages."""
    directories = [base + (2 + number) * PAGE for number in range(MAPPED_GIB)]
    top = _table([base + PAGE | PRESENT_WRITABLE])
    pointers = _table([directory | PRESENT_WRITABLE for directory in directories])
    pages = struct.pack(
        f"<{MAPPED_GIB * ENTRIES}Q",
        *(number * LARGE_PAGE | LARGE | PRESENT_WRITABLE for number in range(MAPPED_GIB * ENTRIES)),
    )
    return top + pointers + pages


def _table(entries: list[int]) -> bytes:
    return struct.pack(f"<{len(entries)}Q", *entries).ljust(PAGE, b"\0")
