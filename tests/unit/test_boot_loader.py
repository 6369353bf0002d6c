"""The loader: what it puts where, and one clear error for everything that can be wrong with a file."""

from __future__ import annotations

import os
import struct
from pathlib import Path

import pytest

from cellvisor.core.abi import acpi
from cellvisor.core.boot.loader import BootConfig, Entry, load
from cellvisor.core.errors import UsageError
from cellvisor.core.mem import layout
from tests.fakes import kernels
from tests.fakes.kernels import FakeRam

MIB = layout.MIB


def boot(tmp_path: Path, kernel: bytes | bytearray, *, ram_size: int = 128 * MIB, initramfs: bytes | None = None,
         cmdline: str = "console=ttyS0") -> tuple[Entry, FakeRam]:
    """Load `kernel` from a file called vmlinuz into a fresh RAM."""
    (tmp_path / "vmlinuz").write_bytes(kernel)
    path = None
    if initramfs is not None:
        path = tmp_path / "initrd"
        path.write_bytes(initramfs)
    ram = FakeRam(ram_size)
    return load(ram, BootConfig(tmp_path / "vmlinuz", ram_size, path, cmdline)), ram


def e820(ram: FakeRam) -> list[tuple[int, int, int]]:
    count = ram.peek(layout.ZERO_PAGE + 0x1E8, 1)[0]
    return list(struct.iter_unpack("<QQI", ram.peek(layout.ZERO_PAGE + 0x2D0, 20 * count)))


def u32(ram: FakeRam, offset: int) -> int:
    return int(struct.unpack("<I", ram.peek(layout.ZERO_PAGE + offset, 4))[0])


def test_bzimage_is_entered_in_long_mode(tmp_path: Path) -> None:
    code = os.urandom(0x5000)
    entry, ram = boot(tmp_path, kernels.bzimage(code), initramfs=b"cpio" * 3000)
    assert entry == Entry("long", 0x100200, layout.ZERO_PAGE, layout.PAGE_TABLES, layout.GDT,
                          layout.BOOT_STACK)
    assert ram.peek(0x100000, len(code)) == code
    assert ram.peek(layout.CMDLINE, 14) == b"console=ttyS0\0"
    assert u32(ram, 0x202) == kernels.HDR_S
    assert u32(ram, 0x228) == layout.CMDLINE
    assert ram.peek(layout.ZERO_PAGE + 0x210, 1) == b"\xff"
    assert ram.peek(layout.ZERO_PAGE + 0x70, 8) == struct.pack("<Q", layout.ACPI_TABLES)
    assert ram.peek(layout.ZERO_PAGE + 0x1EF, 1) == b"\0"  # sentinel: the page is clean
    gpa, size = u32(ram, 0x218), u32(ram, 0x21C)
    assert (gpa, size) == ((128 * MIB - 12000) & -4096, 12000)
    assert ram.peek(gpa, size) == b"cpio" * 3000


def test_pvh_kernel_gets_a_start_info(tmp_path: Path) -> None:
    notes = kernels.note(b"GNU\0", 3, b"x" * 20) + kernels.pvh_note(0x1000040)
    entry, ram = boot(tmp_path, kernels.elf(notes=notes), initramfs=b"i" * 5000)
    assert (entry.kind, entry.rip, entry.boot_params) == ("pvh", 0x1000040, layout.PVH_START_INFO)
    info = struct.unpack("<IIIIQQQQII", ram.peek(layout.PVH_START_INFO, 56))
    assert info[:8] == (0x336EC578, 1, 0, 1, layout.PVH_MODULES, layout.CMDLINE, layout.ACPI_TABLES,
                        layout.PVH_MEMMAP)
    where, size, _, _ = struct.unpack("<QQQQ", ram.peek(layout.PVH_MODULES, 32))
    assert size == 5000
    assert where % 4096 == 0
    assert ram.peek(where, size) == b"i" * 5000
    entries = list(struct.iter_unpack("<QQII", ram.peek(layout.PVH_MEMMAP, 24 * info[8])))
    assert (0x100000, 127 * MIB, 1, 0) in entries
    assert ram.peek(layout.GDT + 0x10, 8) == struct.pack("<Q", 0x00CF9B000000FFFF)


def test_pvh_note_with_8_byte_alignment_is_found(tmp_path: Path) -> None:
    notes = kernels.note(b"GNU\0", 5, b"x" * 12, 8) + kernels.note(b"Xen\0", 18, b"\x10\0\0\x01", 8)
    entry, _ = boot(tmp_path, kernels.elf(notes=notes, note_align=8))
    assert (entry.kind, entry.rip) == ("pvh", 0x1000010)


@pytest.mark.parametrize(("entry", "virtual"), [(0x1000020, 0), (0xFFFFFFFF81000020, 0xFFFFFFFF80000000)])
def test_elf_without_note_is_entered_in_long_mode(tmp_path: Path, entry: int, virtual: int) -> None:
    found, ram = boot(tmp_path, kernels.elf(entry=entry, virtual=virtual))
    assert (found.kind, found.rip, found.boot_params) == ("long", 0x1000020, layout.ZERO_PAGE)
    assert u32(ram, 0x202) == kernels.HDR_S
    assert ram.peek(layout.GDT + 0x10, 8) == struct.pack("<Q", 0x00AF9B000000FFFF)
    assert e820(ram)[0] == (0, 0xA0000, 1)


def test_page_tables_map_four_gib_one_to_one(tmp_path: Path) -> None:
    _, ram = boot(tmp_path, kernels.elf())

    def walk(address: int) -> int:
        table = layout.PAGE_TABLES
        for shift in (39, 30, 21):
            index = address >> shift & 511
            item = int.from_bytes(ram.peek(table + 8 * index, 8), "little")
            assert item & 3 == 3
            if item & 0x80:
                return (item & ~0x1FFFFF) + (address & 0x1FFFFF)
            table = item & ~0xFFF
        raise AssertionError("no large page")

    for address in (0, 0x7000, 0x100200, 0x1FFFFF, 0x200000, 0xBFFFFFFF, 0xC0000000, 0xFEE00020, 0xFFFFFFFF):
        assert walk(address) == address
    assert len(ram.peek(layout.PAGE_TABLES, 6 * 4096)) <= layout.PAGE_TABLES_END - layout.PAGE_TABLES


def test_memory_above_the_hole_is_in_the_map(tmp_path: Path) -> None:
    _, ram = boot(tmp_path, kernels.bzimage(), ram_size=5 << 30, initramfs=b"x")
    found = e820(ram)
    assert [entry for entry in found if entry[2] == 1] == [
        (0, 0xA0000, 1), (0x100000, 0xBFF00000, 1), (4 << 30, 2 << 30, 1)]
    assert (layout.ECAM, layout.ECAM_SIZE, 2) in found
    assert found == sorted(found)
    assert u32(ram, 0x218) == 0x7FFFF000  # initrd_addr_max of the kernel, although RAM goes on to 3 GiB


def test_elf_initramfs_goes_to_the_top_of_low_ram(tmp_path: Path) -> None:
    _, ram = boot(tmp_path, kernels.elf(notes=kernels.pvh_note(0x1000000)), ram_size=5 << 30, initramfs=b"x")
    assert struct.unpack("<Q", ram.peek(layout.PVH_MODULES, 8))[0] == layout.LOW_RAM_END - 4096


def patched(image: bytearray, offset: int, form: str, value: int) -> bytes:
    struct.pack_into(form, image, offset, value)
    return bytes(image)


LOAD_OFFSET, LOAD_PADDR, LOAD_FILESZ, LOAD_MEMSZ = 64 + 8, 64 + 24, 64 + 32, 64 + 40
NOTE_OFFSET, NOTE_FILESZ = 64 + 56 + 8, 64 + 56 + 32

PVH_ELF = bytes(kernels.elf(notes=kernels.pvh_note(0x1000000)))

BROKEN_KERNELS: dict[str, tuple[bytes, str]] = {
    "text": (b"#!/bin/sh\necho hello\n", "is no Linux kernel"),
    "gzip": (b"\x1f\x8b\x08" + bytes(100), "looks like gzip"),
    "empty": (b"", "is empty"),
    "one byte": (b"\x7f", "is no Linux kernel"),
    "bz header only": (bytes(kernels.bzimage()[:0x240]), "less than a kernel header"),
    "bz truncated": (bytes(kernels.bzimage()[:-1]), "bytes of kernel code"),
    "bz half": (bytes(kernels.bzimage()[:0x2000]), "bytes of kernel code"),
    "bz no code": (bytes(kernels.bzimage()[:2048]), "bytes of kernel code"),
    "bz boot flag": (patched(kernels.bzimage(), 0x1FE, "<H", 0), "boot flag"),
    "bz magic": (patched(kernels.bzimage(), 0x202, "<I", 0), "is no Linux kernel"),
    "bz version": (patched(kernels.bzimage(), 0x206, "<H", 0x20B), "boot protocol 2.11"),
    "bz 32-bit": (patched(kernels.bzimage(), 0x236, "<H", 0), "no 64-bit entry"),
    "bz zImage": (patched(kernels.bzimage(), 0x211, "<B", 0), "zImage"),
    "bz short jump": (patched(kernels.bzimage(), 0x201, "<B", 0x10), "setup header ends"),
    "bz long jump": (patched(kernels.bzimage(), 0x201, "<B", 0xFF), "setup header ends"),
    "bz setup_sects": (patched(kernels.bzimage(), 0x1F1, "<B", 0xFF), "bytes of kernel code"),
    "bz syssize 0": (patched(kernels.bzimage(), 0x1F4, "<I", 0), "header says 0 bytes"),
    "bz syssize": (patched(kernels.bzimage(), 0x1F4, "<I", 0xFFFFFFFF), "bytes of kernel code"),
    "bz payload offset": (patched(kernels.bzimage(), 0x248, "<I", 0xFFFFFFFF), "payload"),
    "bz payload length": (patched(kernels.bzimage(), 0x24C, "<I", 0x4000), "payload"),
    "bz payload none": (patched(kernels.bzimage(), 0x24C, "<I", 0), "payload"),
    "bz preferred": (patched(kernels.bzimage(), 0x258, "<Q", 2**64 - 4096), "needs memory up to"),
    "bz fixed low": (patched(kernels.bzimage(preferred=0), 0x234, "<B", 0), "below 0x100000"),
    "bz init_size": (patched(kernels.bzimage(), 0x260, "<I", 0xFFFFFFFF), "needs memory up to"),
    "bz init_size 0": (patched(kernels.bzimage(), 0x260, "<I", 0), "init_size 0"),
    "bz alignment": (patched(kernels.bzimage(), 0x230, "<I", 3), "power of two"),
    "bz alignment 0": (patched(kernels.bzimage(), 0x230, "<I", 0), "power of two"),
    "bz big alignment": (patched(kernels.bzimage(), 0x230, "<I", 1 << 31), "needs memory up to"),
    "elf header only": (bytes(kernels.elf()[:40]), "less than an ELF header"),
    "elf truncated": (bytes(kernels.elf()[:-1]), "beyond the end of the file"),
    "elf no table": (bytes(kernels.elf()[:64]), "beyond the file's end"),
    "elf 32-bit": (patched(kernels.elf(), 4, "<B", 1), "not for x86-64"),
    "elf big-endian": (patched(kernels.elf(), 5, "<B", 2), "not for x86-64"),
    "elf arm": (bytes(kernels.elf(machine=183)), "not for x86-64"),
    "elf object": (bytes(kernels.elf(kind=1)), "not an executable"),
    "elf phoff": (patched(kernels.elf(), 32, "<Q", 2**64 - 8), "beyond the file's end"),
    "elf phentsize": (patched(kernels.elf(), 54, "<H", 32), "not 56"),
    "elf phnum 0": (patched(kernels.elf(), 56, "<H", 0), "0 program headers"),
    "elf phnum": (patched(kernels.elf(), 56, "<H", 0xFFFF), "65535 program headers"),
    "elf nothing to load": (patched(kernels.elf(), 64, "<I", 0), "no segment to load"),
    "elf offset": (patched(kernels.elf(), LOAD_OFFSET, "<Q", 2**64 - 0x800), "beyond the end of the file"),
    "elf filesz": (patched(kernels.elf(), LOAD_FILESZ, "<Q", 0x2000), "beyond the end of the file"),
    "elf filesz > memsz": (patched(kernels.elf(), LOAD_FILESZ, "<Q", 2**63), "bytes in the file but"),
    "elf memsz": (patched(kernels.elf(), LOAD_MEMSZ, "<Q", 2**64 - 1), "needs memory up to"),
    "elf wraps": (patched(kernels.elf(), LOAD_PADDR, "<Q", 2**64 - 0x1000), "needs memory up to"),
    "elf over the hole": (patched(kernels.elf(), LOAD_PADDR, "<Q", 0xBFFFF000), "needs memory up to"),
    "elf low": (bytes(kernels.elf([(0x7000, b"x" * 64, 64)])), "over the boot structures"),
    "elf reaches from below": (bytes(kernels.elf([(0xFFFFF, b"x", 4096)])), "over the boot structures"),
    "elf overlap": (bytes(kernels.elf([(0x1000000, b"x" * 64, 4096), (0x1000FFF, b"y", 1)])), "overlap"),
    "elf entry": (bytes(kernels.elf(entry=0x2000000)), "entry point 0x2000000 is in no segment"),
    "elf pvh entry": (bytes(kernels.elf(notes=kernels.pvh_note(0x500))), "PVH entry point 0x500"),
    "elf notes outside": (patched(bytearray(PVH_ELF), NOTE_OFFSET, "<Q", 1 << 40),
                          "beyond the file's end"),
    "elf notes endless": (patched(bytearray(PVH_ELF), NOTE_FILESZ, "<Q", 2**64 - 1),
                          "beyond the file's end"),
}


@pytest.mark.parametrize("case", BROKEN_KERNELS)
def test_broken_kernel_is_one_line_that_names_it(tmp_path: Path, case: str) -> None:
    image, says = BROKEN_KERNELS[case]
    path = tmp_path / "vmlinuz"
    path.write_bytes(image)
    ram = FakeRam(64 * MIB)
    with pytest.raises(UsageError) as caught:
        load(ram, BootConfig(path, 64 * MIB))
    text = str(caught.value)
    assert text.startswith(f"--kernel {path}: ")
    assert says in text
    assert "\n" not in text
    assert ram.touched == []


def test_note_list_cut_short_is_no_pvh_note(tmp_path: Path) -> None:
    cut = kernels.pvh_note(0x1000000)[:-5]
    entry, _ = boot(tmp_path, kernels.elf(notes=cut))
    assert entry.kind == "long"


def test_paths_that_are_no_files(tmp_path: Path) -> None:
    kernel = tmp_path / "vmlinuz"
    kernel.write_bytes(kernels.elf())
    fifo = tmp_path / "fifo"
    os.mkfifo(fifo)
    empty = tmp_path / "empty"
    empty.touch()
    cases = {
        tmp_path / "none": "no such file", tmp_path: "is a directory", fifo: "not a regular file",
        Path("/dev/null"): "not a regular file", empty: "is empty", kernel / "x": "not a directory",
        tmp_path / "two\nlines": r"two\nlines: no such file", tmp_path / ("x" * 300): "file name too long",
    }
    for path, says in cases.items():
        for flag, config in (("--kernel", BootConfig(path, 64 * MIB)),
                             ("--initramfs", BootConfig(kernel, 64 * MIB, path))):
            with pytest.raises(UsageError) as caught:
                load(FakeRam(64 * MIB), config)
            assert str(caught.value).startswith(flag)
            assert says in str(caught.value)
            assert "\n" not in str(caught.value)


def test_unreadable_kernel(tmp_path: Path) -> None:
    path = tmp_path / "vmlinuz"
    path.write_bytes(kernels.elf())
    path.chmod(0)
    child = os.fork()
    if child == 0:
        # root may read everything, so the file is opened by somebody else
        code = 1
        try:
            tmp_path.chmod(0o755)
            os.chdir(tmp_path)
            if os.geteuid() == 0:
                os.setresuid(65534, 65534, 65534)
            load(FakeRam(64 * MIB), BootConfig(Path("vmlinuz"), 64 * MIB))
        except UsageError as error:
            code = 0 if str(error) == "--kernel vmlinuz: permission denied" else 2
        finally:
            os._exit(code)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0


def test_initramfs_that_does_not_fit(tmp_path: Path) -> None:
    kernel, initrd = tmp_path / "vmlinuz", tmp_path / "initrd"
    for image in (kernels.bzimage(), kernels.elf()):
        kernel.write_bytes(image)
        with open(initrd, "wb") as file:
            file.truncate(60 * MIB)
        ram = FakeRam(64 * MIB)
        with pytest.raises(UsageError, match=rf"--initramfs {initrd}: has {60 * MIB} bytes, but beside"):
            load(ram, BootConfig(kernel, 64 * MIB, initrd))
        assert ram.touched == []


def test_initramfs_never_lies_over_the_kernel(tmp_path: Path) -> None:
    room = 64 * MIB - (16 * MIB + 4 * MIB)  # preferred address 16 MiB, init_size 4 MiB
    _, ram = boot(tmp_path, kernels.bzimage(), ram_size=64 * MIB, initramfs=bytes(room))
    assert u32(ram, 0x218) == 20 * MIB
    with pytest.raises(UsageError, match="room for"):
        boot(tmp_path, kernels.bzimage(), ram_size=64 * MIB, initramfs=bytes(room + 1))


def test_initramfs_limit_of_the_kernel_counts(tmp_path: Path) -> None:
    _, ram = boot(tmp_path, kernels.bzimage(initrd_max=0x37FF_FFFF), ram_size=1 << 30, initramfs=b"x")
    assert u32(ram, 0x218) == 0x37FF_F000
    with pytest.raises(UsageError, match="room for 0"):
        boot(tmp_path, kernels.bzimage(initrd_max=0), initramfs=b"x")


def test_cmdline_limits(tmp_path: Path) -> None:
    boot(tmp_path, kernels.bzimage(), cmdline="x" * 2047)
    with pytest.raises(UsageError, match=r"--cmdline: has 2048 bytes, this kernel takes at most 2047"):
        boot(tmp_path, kernels.bzimage(), cmdline="x" * 2048)
    boot(tmp_path, kernels.elf(), cmdline="x" * 65535)
    for image in (kernels.elf(), kernels.bzimage(cmdline_max=1 << 30)):
        with pytest.raises(UsageError, match="at most 65535"):
            boot(tmp_path, image, cmdline="x" * 65536)
    with pytest.raises(UsageError, match="--cmdline: holds a NUL"):
        boot(tmp_path, kernels.elf(), cmdline="a\0b")


@pytest.mark.parametrize(("size", "says"), [
    (0, "no memory at all"), (-4096, "no memory at all"), (4096, "too little"), (64 * MIB - 1, "too little"),
    (65 * MIB, "no multiple of 2 MiB"), (128 * MIB + 4096, "no multiple of 2 MiB"),
    (1 << 46, "does not fit into 46 bits"), (1 << 60, "does not fit into 46 bits"),
])
def test_memory_that_makes_no_sense(tmp_path: Path, size: int, says: str) -> None:
    (tmp_path / "vmlinuz").write_bytes(kernels.elf())
    with pytest.raises(UsageError, match=rf"^--memory size: {size} bytes .*{says}"):
        load(FakeRam(64 * MIB), BootConfig(tmp_path / "vmlinuz", size))


def test_largest_memory_leaves_a_device_window() -> None:
    largest = (1 << 40) - 5 * layout.GIB
    layout.check_ram_size(largest, 40)
    assert layout.mmio64_window(largest, 40) == ((1 << 40) - 4 * layout.GIB, 4 * layout.GIB)
    with pytest.raises(UsageError, match="40 bits"):
        layout.check_ram_size(largest + 2 * MIB, 40)


def test_ranges_split_around_the_hole() -> None:
    assert layout.ranges(3 << 30) == [(0, 3 << 30, 0)]
    assert layout.ranges((3 << 30) + 2 * MIB) == [(0, 3 << 30, 0), (4 << 30, 2 * MIB, 3 << 30)]


def test_a_jump_to_the_bios_entry_pulls_the_reset_line(tmp_path: Path) -> None:
    _, ram = boot(tmp_path, kernels.elf())
    code = ram.peek(0xFFFF0, 9)
    assert code == b"\xba" + struct.pack("<H", layout.PORT_PM) + bytes((0xB0, acpi.RESET_VALUE)) + b"\xee\xf4\xeb\xfd"
