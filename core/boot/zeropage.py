"""Build the zero page, struct boot_params, of the 64-bit boot protocol (Linux x86 zero-page.rst)."""

from __future__ import annotations

import struct

from cellvisor.core.abi import bootparams as abi
from cellvisor.core.boot.image import Image
from cellvisor.core.boot.memmap import e820_bytes, memory_map
from cellvisor.core.mem import layout


def zero_page(image: Image, ram_size: int, rsdp: int, initramfs: tuple[int, int] | None) -> bytes:
    """Return the page for `image`; `initramfs` is (gpa, size)."""
    page = bytearray(abi.ZERO_PAGE_SIZE)
    entries = memory_map(ram_size)
    page[abi.HEADER_START:abi.HEADER_START + len(image.setup_header)] = image.setup_header
    if not image.setup_header:
        # An ELF kernel brings no header; it believes the loader's only with the right marks.
        struct.pack_into("<H", page, abi.BOOT_FLAG, abi.BOOT_FLAG_VALUE)
        struct.pack_into("<I", page, abi.MAGIC, abi.MAGIC_VALUE)
        struct.pack_into("<H", page, abi.VERSION, abi.VERSION_SPOKEN)
        struct.pack_into("<I", page, abi.CMDLINE_SIZE, image.cmdline_max)
    page[abi.TYPE_OF_LOADER] = abi.LOADER_UNKNOWN
    page[abi.LOADFLAGS] |= abi.LOADED_HIGH
    gpa, size = initramfs or (0, 0)
    for offset, form, value in (
        (abi.VID_MODE, "<H", abi.VID_MODE_NORMAL),
        (abi.CODE32_START, "<I", image.segments[0].gpa),
        (abi.RAMDISK_IMAGE, "<I", gpa),
        (abi.RAMDISK_SIZE, "<I", size),
        (abi.CMD_LINE_PTR, "<I", layout.CMDLINE),
        (abi.SETUP_DATA, "<Q", 0),  # a list of gpas: nothing a file may bring
        (abi.ACPI_RSDP_ADDR, "<Q", rsdp),
        (abi.E820_ENTRIES, "<B", len(entries)),
    ):
        struct.pack_into(form, page, offset, value)
    table = e820_bytes(entries)
    page[abi.E820_TABLE:abi.E820_TABLE + len(table)] = table
    return bytes(page)
