"""Read a bzImage: check the setup header and find what to load where (Linux boot protocol 2.12 and later)."""

from __future__ import annotations

import struct

from cellvisor.core.abi import bootparams as abi
from cellvisor.core.boot.image import Image, Segment
from cellvisor.core.boot.source import Source
from cellvisor.core.mem import layout

TRUNCATED = "is the file truncated or damaged?"


def is_bzimage(source: Source) -> bool:
    """Say whether the file claims to be a bzImage."""
    if source.size < abi.MAGIC + 4:
        return False
    return _number(source.read(abi.MAGIC, 4), 0, "<I") == abi.MAGIC_VALUE


def parse(source: Source, low_end: int) -> Image:
    """Check the header and plan the load into RAM 0..`low_end`. Raises UsageError naming the bad field."""
    if source.size < abi.HEADER_MOST_END:
        raise source.error(f"has {source.size} bytes, less than a kernel header", hint=TRUNCATED)
    header = source.read(0, abi.HEADER_MOST_END)
    _check_identity(source, header)
    header_end = abi.MAGIC + header[abi.JUMP + 1]
    if not abi.HEADER_LEAST_END <= header_end <= abi.HEADER_MOST_END:
        raise source.error(f"setup header ends at {header_end:#x}, not within "
                           f"{abi.HEADER_LEAST_END:#x}..{abi.HEADER_MOST_END:#x}", hint=TRUNCATED)
    start = ((header[abi.SETUP_SECTS] or 4) + 1) * abi.SECTOR
    _check_sizes(source, header, start)
    return _plan(source, header[abi.HEADER_START:header_end], header, start, low_end)


def _check_identity(source: Source, header: bytes) -> None:
    flag = _number(header, abi.BOOT_FLAG, "<H")
    if flag != abi.BOOT_FLAG_VALUE:
        raise source.error(f"boot flag is {flag:#06x}, not {abi.BOOT_FLAG_VALUE:#06x}", hint=TRUNCATED)
    version = _number(header, abi.VERSION, "<H")
    if version < abi.VERSION_LEAST:
        raise source.error(f"speaks boot protocol {version >> 8}.{version & 0xFF:02}, not 2.12 or later",
                           hint="take Linux 3.8 or newer")
    if not _number(header, abi.XLOADFLAGS, "<H") & abi.XLF_KERNEL_64:
        raise source.error("has no 64-bit entry point", hint="take a kernel built for x86-64")
    if not header[abi.LOADFLAGS] & abi.LOADED_HIGH:
        raise source.error("wants to be loaded below 1 MiB (a zImage)", hint="take a bzImage")


def _check_sizes(source: Source, header: bytes, start: int) -> None:
    stated = _number(header, abi.SYSSIZE, "<I") * 16
    rest = source.size - start
    if stated <= abi.ENTRY_64:
        raise source.error(f"header says {stated} bytes of kernel code", hint=TRUNCATED)
    if rest < stated:
        raise source.error(f"header says {stated} bytes of kernel code, the file has {max(rest, 0)}",
                           hint=TRUNCATED)
    offset = _number(header, abi.PAYLOAD_OFFSET, "<I")
    length = _number(header, abi.PAYLOAD_LENGTH, "<I")
    if length == 0 or offset + length > stated:
        raise source.error(f"payload {offset:#x}+{length:#x} is outside the {stated:#x} bytes of kernel code",
                           hint=TRUNCATED)


def _plan(source: Source, setup: bytes, header: bytes, start: int, low_end: int) -> Image:
    preferred = _number(header, abi.PREF_ADDRESS, "<Q")
    alignment = _number(header, abi.KERNEL_ALIGNMENT, "<I")
    init_size = _number(header, abi.INIT_SIZE, "<I")
    relocatable = header[abi.RELOCATABLE] != 0
    if alignment & (alignment - 1) or (relocatable and alignment == 0):
        raise source.error(f"kernel alignment {alignment:#x} is no power of two", hint=TRUNCATED)
    if init_size == 0:
        raise source.error("header says it needs no memory to start (init_size 0)", hint=TRUNCATED)
    load = layout.KERNEL if relocatable else preferred
    size = source.size - start
    # A relocatable kernel moves itself up to its preferred address and unpacks there.
    runs_at = max(-(-load // alignment) * alignment, preferred) if relocatable else load
    busy_end = max(load + size, runs_at + init_size)
    if load < layout.KERNEL:
        raise source.error(f"wants to be loaded at {load:#x}, below {layout.KERNEL:#x}", hint=TRUNCATED)
    if busy_end > low_end:
        raise source.error(f"needs memory up to {busy_end:#x}, there is {low_end:#x}",
                           hint=f"at least --memory size={-(-busy_end // layout.MIB)}M, or a damaged header")
    cmdline_max = _number(header, abi.CMDLINE_SIZE, "<I")
    return Image(
        kind="long",
        entry=load + abi.ENTRY_64,
        segments=(Segment(start, load, size, size),),
        busy_end=busy_end,
        initrd_max=_number(header, abi.INITRD_ADDR_MAX, "<I"),
        cmdline_max=min(cmdline_max, layout.CMDLINE_SIZE - 1),
        setup_header=setup,
    )


def _number(data: bytes, offset: int, form: str) -> int:
    return int(struct.unpack_from(form, data, offset)[0])
