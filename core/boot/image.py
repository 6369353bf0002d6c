"""A kernel as the loader sees it, whatever file format it came in."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, TypeAlias

Kind: TypeAlias = Literal["pvh", "long"]


@dataclass(frozen=True, slots=True)
class Segment:
    """Copy `file_size` bytes at `offset` of the file to `gpa`; the kernel owns `memory_size` bytes there."""

    offset: int
    gpa: int
    file_size: int
    memory_size: int


@dataclass(frozen=True, slots=True)
class Image:
    """A checked kernel: every segment lies in RAM, above the boot structures, and inside the file.

    `kind` says how it is entered: "pvh" in 32-bit protected mode with the start info in rbx, "long" in 64-bit
    mode with the zero page in rsi. `busy_end` is the first gpa that the kernel leaves alone while it starts.
    `initrd_max` is the last gpa an initramfs may use; `cmdline_max` counts bytes without the final NUL.
    `setup_header` holds the zero page's bytes from HEADER_START on; empty for an ELF kernel.
    """

    kind: Kind
    entry: int
    segments: tuple[Segment, ...]
    busy_end: int
    initrd_max: int
    cmdline_max: int
    setup_header: bytes = b""
