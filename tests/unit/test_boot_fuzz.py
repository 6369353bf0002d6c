"""Damaged kernels by the thousand: one clear error, or nothing written where it must not be."""

from __future__ import annotations

import os
import struct
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from cellvisor.core.boot.loader import BootConfig, load
from cellvisor.core.errors import CellvisorError
from cellvisor.core.mem import layout
from tests.fakes import kernels
from tests.fakes.kernels import FakeRam


def patched(image: bytearray, offset: int, raw: bytes) -> bytearray:
    """Overwrite bytes of `image`."""
    image[offset:offset + len(raw)] = raw
    return image


RAM_SIZE = 64 * layout.MIB
SEEDS = (
    bytes(kernels.bzimage(b"\x90" * 0x1000)),
    bytes(kernels.elf([(0x100_0000, b"a" * 300, 4096), (0x200_0000, b"b" * 64, 64)],
                      notes=kernels.pvh_note(0x1000010))),
    bytes(kernels.elf()),
    bytes(patched(kernels.bzimage(b"\x90" * 0x1000), 0x234, b"\0")),  # not relocatable
)
# (offset, bytes) of every header field: blind mutations hardly ever hit one whole.
ELF_HEAD = ((16, 2), (24, 8), (32, 8), (54, 2), (56, 2))
SEGMENT = ((0, 4), (8, 8), (16, 8), (24, 8), (32, 8), (40, 8), (48, 8))
BZIMAGE = (
    (0x1F1, 1), (0x1F4, 4), (0x201, 1), (0x206, 2), (0x211, 1), (0x22C, 4), (0x230, 4), (0x234, 1), (0x236, 2),
    (0x238, 4), (0x248, 4), (0x24C, 4), (0x258, 8), (0x260, 4),
)
HEADERS: tuple[tuple[tuple[int, int], ...], ...] = (
    BZIMAGE,
    ELF_HEAD + tuple((64 + 56 * number + offset, size) for number in range(3) for offset, size in SEGMENT),
    ELF_HEAD + tuple((64 + offset, size) for offset, size in SEGMENT),
    BZIMAGE,
)
STRANGE = (0, 1, 2, 0x7F, 0x80, 0xFF, 0xFFFF, 0x7FFF_FFFF, 0x8000_0000, 0xFFFF_FFFF, 0x6000, 0x7000, 0xFFFFF,
           0x100000, 0x100_0000, 0x200_0000, 0x3FF_FFFF, 0x400_0000, 2**63, 2**64 - 4096, 2**64 - 1)
BOOT_PIECES = (
    (layout.GDT, 0x30), (layout.PVH_START_INFO, 56), (layout.PVH_MODULES, 32), (layout.ZERO_PAGE, 0x1000),
    (layout.PAGE_TABLES, layout.PAGE_TABLES_END - layout.PAGE_TABLES), (layout.CMDLINE, layout.CMDLINE_SIZE),
    (layout.RESET_VECTOR, 16),
)


@st.composite
def damaged(draw: st.DrawFn) -> bytes:
    which = draw(st.integers(0, len(SEEDS) - 1))
    image = bytearray(SEEDS[which])
    for _ in range(draw(st.integers(1, 3))):
        blind = st.tuples(st.integers(0, len(image) - 1), st.sampled_from((1, 2, 4, 8)))
        offset, width = draw(st.one_of(st.sampled_from(HEADERS[which]), blind))
        value = draw(st.one_of(st.sampled_from(STRANGE), st.integers(0, 2**64 - 1)))
        patched(image, offset, struct.pack("<Q", value)[:width])
    if draw(st.integers(0, 4)) == 0:
        del image[draw(st.integers(0, len(image))):]
    return bytes(image)


def check(image: bytes, initramfs_size: int) -> None:
    """Load and look at every stretch of memory that was asked for."""
    files = [os.memfd_create("kernel"), os.memfd_create("initramfs")]
    ram = FakeRam(RAM_SIZE)
    try:
        os.write(files[0], image)
        os.truncate(files[1], initramfs_size)
        kernel, initramfs = (Path(f"/proc/self/fd/{fd}") for fd in files)
        config = BootConfig(kernel, RAM_SIZE, initramfs if initramfs_size else None, "quiet")
        complaint = ""
        try:
            entry = load(ram, config)
        except CellvisorError as error:
            complaint = str(error)
        if complaint:
            assert "\n" not in complaint
            return
        assert layout.KERNEL <= entry.rip < RAM_SIZE
        high = sorted(piece for piece in ram.touched if piece[0] >= layout.KERNEL)
        for gpa, size in ram.touched:
            inside = any(start <= gpa and gpa + size <= start + length for start, length in BOOT_PIECES)
            assert inside or gpa >= layout.KERNEL, f"{gpa:#x}+{size:#x}"
        for (gpa, size), (following, _) in pairwise(high):
            assert gpa + size <= following, "kernel and initramfs overlap"
    finally:
        ram.close()
        for fd in files:
            os.close(fd)


@given(damaged(), st.sampled_from((0, 4096, 5_000_000)))
@settings(max_examples=400, deadline=None)
def test_a_damaged_kernel_stays_in_its_place(image: bytes, initramfs_size: int) -> None:
    check(image, initramfs_size)


@given(st.binary(max_size=2000), st.sampled_from((b"", b"\x7fELF", b"\x7fELF\x02\x01\x01")))
@settings(max_examples=300, deadline=None)
def test_any_bytes_are_no_kernel_or_a_harmless_one(image: bytes, head: bytes) -> None:
    check(head + image, 4096)


@pytest.mark.parametrize("which", range(len(SEEDS)))
def test_every_header_field_with_every_strange_value(which: int) -> None:
    for offset, width in HEADERS[which]:
        for value in STRANGE:
            image = bytes(patched(bytearray(SEEDS[which]), offset, struct.pack("<Q", value)[:width]))
            # An initramfs is refused where a kernel claims all memory, so the kernel alone is tried too.
            check(image, 0)
            check(image, 4096)


def test_every_truncation() -> None:
    for image in SEEDS:
        for size in (*range(0, min(len(image), 1200), 7), *range(len(image) - 40, len(image))):
            check(image[:size], 4096)
