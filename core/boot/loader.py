"""Put kernel, initramfs and command line into guest RAM and say how vCPU 0 enters.

Nothing is written before every check has passed. RAM must read zero where nothing is written: it is fresh, or
was cleared by a reset.
"""

from __future__ import annotations

import os
from contextlib import ExitStack
from dataclasses import dataclass
from pathlib import Path
from typing import Protocol

from cellvisor.core import log
from cellvisor.core.boot import bzimage, elf
from cellvisor.core.boot.cpustate import RESET_STUB, gdt, page_tables
from cellvisor.core.boot.image import Image, Kind
from cellvisor.core.boot.pvh import start_info
from cellvisor.core.boot.source import Source
from cellvisor.core.boot.zeropage import zero_page
from cellvisor.core.errors import UsageError
from cellvisor.core.mem import layout

PAGE = 0x1000
LINUX_CMDLINE_MAX = 2047  # COMMAND_LINE_SIZE of x86 Linux, which an ELF kernel does not state
PACKED = {b"\x1f\x8b": "gzip", b"\xfd7zXZ": "xz", b"\x28\xb5\x2f\xfd": "zstd", b"\x02\x21\x4c\x18": "lz4"}


class Ram(Protocol):
    """Guest RAM by guest-physical address."""

    def write(self, gpa: int, data: bytes | memoryview, /) -> None:
        """Copy `data` to `gpa`."""

    def view(self, gpa: int, size: int, /) -> memoryview:
        """Return `size` writable bytes at `gpa`."""


@dataclass(frozen=True, slots=True)
class BootConfig:
    """What to boot. `ram_size` is in bytes and laid out by layout.ranges; `rsdp` is the gpa of the RSDP."""

    kernel: Path
    ram_size: int
    initramfs: Path | None = None
    cmdline: str = ""
    rsdp: int = layout.ACPI_TABLES
    phys_bits: int = layout.DEFAULT_PHYS_BITS


@dataclass(frozen=True, slots=True)
class Entry:
    """The state of vCPU 0 at its first instruction.

    "pvh": 32-bit protected mode, paging off, `boot_params` (the start info) in rbx. "long": 64-bit mode on
    `page_tables`, `boot_params` (the zero page) in rsi. `gdt` has 0x10 for code, 0x18 data, 0x20 the task.
    """

    kind: Kind
    rip: int
    boot_params: int
    page_tables: int
    gdt: int
    stack: int


def load(ram: Ram, config: BootConfig) -> Entry:
    """Load everything that `config` names. Raises UsageError naming the flag and file at fault."""
    layout.check_ram_size(config.ram_size, config.phys_bits)
    low_end = min(config.ram_size, layout.LOW_RAM_END)
    with ExitStack() as files:
        kernel = files.enter_context(Source.open("--kernel", config.kernel))
        image = parse_kernel(kernel, low_end)
        cmdline = _cmdline(config.cmdline, image)
        initramfs = None
        if config.initramfs is not None:
            source = files.enter_context(Source.open("--initramfs", config.initramfs))
            initramfs = _place(source, image, low_end)
            source.read_into(0, ram.view(*initramfs))
        for segment in image.segments:
            if segment.file_size:
                kernel.read_into(segment.offset, ram.view(segment.gpa, segment.file_size))
    ram.write(layout.CMDLINE, cmdline + b"\0")
    ram.write(layout.GDT, gdt(image.kind))
    ram.write(layout.RESET_VECTOR, RESET_STUB)
    ram.write(layout.PAGE_TABLES, page_tables())
    if image.kind == "pvh":
        boot_params = layout.PVH_START_INFO
        for gpa, data in start_info(config.ram_size, config.rsdp, initramfs):
            ram.write(gpa, data)
    else:
        boot_params = layout.ZERO_PAGE
        ram.write(boot_params, zero_page(image, config.ram_size, config.rsdp, initramfs))
    return Entry(image.kind, image.entry, boot_params, layout.PAGE_TABLES, layout.GDT, layout.BOOT_STACK)


def parse_kernel(source: Source, low_end: int) -> Image:
    """Recognise and check a kernel file for RAM 0..`low_end`. Raises UsageError."""
    if elf.is_elf(source):
        return elf.parse(source, low_end)
    if bzimage.is_bzimage(source):
        return bzimage.parse(source, low_end)
    head = source.read(0, min(source.size, 8))
    packed = next((name for magic, name in PACKED.items() if head.startswith(magic)), "")
    hint = f"it looks like {packed}: unpack it first" if packed else "give a bzImage or an ELF vmlinux"
    raise source.error("is no Linux kernel", hint=hint)


def _cmdline(text: str, image: Image) -> bytes:
    line = os.fsencode(text)
    if b"\0" in line or b"\n" in line:
        raise UsageError("--cmdline: holds a NUL or a line end")
    if len(line) > image.cmdline_max:
        raise UsageError(f"--cmdline: has {len(line)} bytes, this kernel takes at most {image.cmdline_max}",
                         hint="shorten it")
    if len(line) > LINUX_CMDLINE_MAX and not image.setup_header:
        log.get("boot").warning("--cmdline: has %d bytes, Linux keeps the first %d only", len(line),
                                LINUX_CMDLINE_MAX)
    return line


def _place(source: Source, image: Image, low_end: int) -> tuple[int, int]:
    """Return (gpa, size): as high in low RAM as the kernel allows, on a page of its own."""
    top = min(low_end, image.initrd_max + 1)
    gpa = (top - source.size) & -PAGE
    if gpa < image.busy_end:
        room = max(top - image.busy_end, 0)
        raise source.error(f"has {source.size} bytes, but beside the kernel there is room for {room}",
                           hint="give more --memory or a smaller initramfs")
    return gpa, source.size
