"""Read an ELF kernel: its segments, and its PVH entry point if it has one, else the 64-bit one.

ELF-64 Object File Format 1.5; Xen public/elfnote.h (XEN_ELFNOTE_PHYS32_ENTRY).
"""

from __future__ import annotations

import struct
from dataclasses import dataclass
from itertools import pairwise

from cellvisor.core.abi import bootparams as abi
from cellvisor.core.boot.image import Image, Segment
from cellvisor.core.boot.source import Source
from cellvisor.core.mem import layout

TRUNCATED = "is the file truncated or damaged?"
SEGMENTS_MOST = 128
NOTES_MOST = 64 * layout.KIB


@dataclass(frozen=True, slots=True)
class _Program:
    """One program header, as in the file."""

    kind: int
    flags: int
    offset: int
    vaddr: int
    paddr: int
    filesz: int
    memsz: int
    align: int


def is_elf(source: Source) -> bool:
    """Say whether the file claims to be ELF."""
    return source.size >= 4 and source.read(0, 4) == abi.ELF_MAGIC


def parse(source: Source, low_end: int) -> Image:
    """Check the headers and plan the load into RAM 0..`low_end`. Raises UsageError naming the bad field."""
    entry, programs = _headers(source)
    loads = [program for program in programs if program.kind == abi.ELF_LOAD and program.memsz]
    if not loads:
        raise source.error("has no segment to load", hint="is it a kernel?")
    segments = tuple(_segment(source, program, low_end) for program in loads)
    _check_overlap(source, segments)
    pvh = _pvh_entry(source, programs)
    if pvh is None:
        start = _physical(entry, loads)
        named = "entry point"
    else:
        start = pvh if _inside(pvh, segments) else None
        entry, named = pvh, "PVH entry point"
    if start is None:
        raise source.error(f"{named} {entry:#x} is in no segment", hint=TRUNCATED)
    return Image(
        kind="long" if pvh is None else "pvh",
        entry=start,
        segments=segments,
        busy_end=max(segment.gpa + segment.memory_size for segment in segments),
        initrd_max=low_end - 1,
        cmdline_max=layout.CMDLINE_SIZE - 1,
    )


def _headers(source: Source) -> tuple[int, list[_Program]]:
    size = struct.calcsize(abi.ELF_HEADER)
    if source.size < size:
        raise source.error(f"has {source.size} bytes, less than an ELF header", hint=TRUNCATED)
    (_, wide, order, kind, machine, _, entry, phoff, _, _, _, phentsize, phnum) = struct.unpack(
        abi.ELF_HEADER, source.read(0, size))
    if wide != abi.ELF_CLASS_64 or order != abi.ELF_LITTLE_ENDIAN or machine != abi.ELF_X86_64:
        raise source.error("is ELF but not for x86-64", hint="take a kernel built for x86-64")
    if kind not in (abi.ELF_EXEC, abi.ELF_DYN):
        raise source.error(f"is ELF of type {kind}, not an executable", hint="is it a kernel?")
    if phentsize != struct.calcsize(abi.ELF_SEGMENT):
        raise source.error(f"program headers have {phentsize} bytes each, not 56", hint=TRUNCATED)
    if not 1 <= phnum <= SEGMENTS_MOST:
        raise source.error(f"has {phnum} program headers, not 1 to {SEGMENTS_MOST}", hint=TRUNCATED)
    if phoff + phnum * phentsize > source.size:
        raise source.error(f"program headers {phoff:#x}+{phnum * phentsize:#x} are beyond the file's end",
                           hint=TRUNCATED)
    table = source.read(phoff, phnum * phentsize)
    return entry, [_Program(*fields) for fields in struct.iter_unpack(abi.ELF_SEGMENT, table)]


def _segment(source: Source, program: _Program, low_end: int) -> Segment:
    at = f"segment at {program.paddr:#x}"
    if program.filesz > program.memsz:
        raise source.error(f"{at} has {program.filesz:#x} bytes in the file but {program.memsz:#x} in memory",
                           hint=TRUNCATED)
    if program.offset + program.filesz > source.size:
        raise source.error(f"{at} is at {program.offset:#x}+{program.filesz:#x}, beyond the end of the file",
                           hint=TRUNCATED)
    if program.paddr < layout.KERNEL:
        raise source.error(f"{at} would lie over the boot structures below {layout.KERNEL:#x}",
                           hint="link the kernel at 1 MiB or above")
    end = program.paddr + program.memsz
    if end > low_end:
        raise source.error(f"{at} needs memory up to {end:#x}, there is {low_end:#x}",
                           hint="give more --memory, or the header is damaged")
    return Segment(program.offset, program.paddr, program.filesz, program.memsz)


def _check_overlap(source: Source, segments: tuple[Segment, ...]) -> None:
    ordered = sorted(segments, key=lambda segment: segment.gpa)
    for lower, upper in pairwise(ordered):
        if lower.gpa + lower.memory_size > upper.gpa:
            raise source.error(f"segments at {lower.gpa:#x} and {upper.gpa:#x} overlap", hint=TRUNCATED)


def _inside(gpa: int, segments: tuple[Segment, ...]) -> bool:
    return any(segment.gpa <= gpa < segment.gpa + segment.memory_size for segment in segments)


def _physical(entry: int, loads: list[_Program]) -> int | None:
    # Linux states the entry as a physical address, other kernels as a virtual one.
    for program in loads:
        if program.paddr <= entry < program.paddr + program.memsz:
            return entry
    for program in loads:
        if program.vaddr <= entry < program.vaddr + program.memsz:
            return program.paddr + entry - program.vaddr
    return None


def _pvh_entry(source: Source, programs: list[_Program]) -> int | None:
    for program in programs:
        if program.kind != abi.ELF_NOTE:
            continue
        if program.filesz > NOTES_MOST or program.offset + program.filesz > source.size:
            raise source.error(f"notes {program.offset:#x}+{program.filesz:#x} are beyond the file's end or "
                               f"more than {NOTES_MOST} bytes", hint=TRUNCATED)
        notes = source.read(program.offset, program.filesz)
        found = _find_note(notes, 8 if program.align == 8 else 4)
        if found is not None:
            return found
    return None


def _find_note(notes: bytes, align: int) -> int | None:
    """Return the address in the first PVH note; a list that ends in the middle of a note just ends."""
    head = struct.calcsize(abi.ELF_NOTE_HEADER)
    at = 0
    while at + head <= len(notes):
        name_size, size, kind = struct.unpack_from(abi.ELF_NOTE_HEADER, notes, at)
        name_at = at + head
        data_at = _round(name_at + name_size, align)
        if data_at + size > len(notes):
            return None
        owner = notes[name_at:name_at + name_size]
        if kind == abi.NOTE_PHYS32_ENTRY and owner == abi.NOTE_OWNER and size in (4, 8):
            return int.from_bytes(notes[data_at:data_at + size], "little")
        at = _round(data_at + size, align)
    return None


def _round(value: int, align: int) -> int:
    return -(-value // align) * align
