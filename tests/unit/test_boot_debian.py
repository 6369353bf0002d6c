"""The loader with Debian's own kernels, both file formats, and with every kind of truncation of them."""

from __future__ import annotations

import struct
from pathlib import Path

import pytest

from cellvisor.core.boot.loader import BootConfig, load
from cellvisor.core.errors import UsageError
from cellvisor.core.mem import layout
from tests.debian import Flavour, kernel
from tests.fakes.kernels import FakeRam

FLAVOURS: tuple[Flavour, ...] = ("cloud", "amd64")


@pytest.mark.parametrize("size", [256 * layout.MIB, 5 * layout.GIB])
@pytest.mark.parametrize("flavour", FLAVOURS)
def test_bzimage(flavour: Flavour, size: int) -> None:
    path = kernel(flavour).bzimage
    ram = FakeRam(size)
    entry = load(ram, BootConfig(path, size, cmdline="quiet"))
    assert (entry.kind, entry.rip) == ("long", 0x100200)
    image = path.read_bytes()
    start = (image[0x1F1] + 1) * 512
    assert ram.peek(layout.KERNEL, len(image) - start) == image[start:]
    assert ram.peek(layout.ZERO_PAGE + 0x202, 4) == b"HdrS"


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_vmlinux_has_a_pvh_entry(flavour: Flavour) -> None:
    path = kernel(flavour).vmlinux
    ram = FakeRam(256 * layout.MIB)
    entry = load(ram, BootConfig(path, 256 * layout.MIB, cmdline="quiet"))
    assert entry.kind == "pvh"
    assert 0x100_0000 <= entry.rip < 0x110_0000
    file = path.read_bytes()
    count = struct.unpack_from("<H", file, 56)[0]
    for number in range(count):
        kind, _, offset, _, paddr, filesz, _, _ = struct.unpack_from("<IIQQQQQQ", file, 64 + 56 * number)
        if kind == 1:
            assert ram.peek(paddr, filesz) == file[offset:offset + filesz]


@pytest.mark.parametrize("flavour", FLAVOURS)
def test_truncated_anywhere_is_refused(flavour: Flavour, tmp_path: Path) -> None:
    paths = kernel(flavour)
    cut = tmp_path / "kernel"
    for whole in (paths.bzimage, paths.vmlinux):
        image = whole.read_bytes()
        if whole == paths.bzimage:
            # What follows the code (a signature) is not the kernel's.
            image = image[:(image[0x1F1] + 1) * 512 + 16 * struct.unpack_from("<I", image, 0x1F4)[0]]
        for part in (0.0, 0.0000001, 0.00001, 0.01, 0.3, 0.6, 0.9):
            size = int(len(image) * part)
            cut.write_bytes(image[:size])
            ram = FakeRam(256 * layout.MIB)
            with pytest.raises(UsageError, match=f"^--kernel {cut}: "):
                load(ram, BootConfig(cut, 256 * layout.MIB))
            assert ram.touched == []


def test_too_little_memory_names_the_kernel() -> None:
    for path in (kernel("amd64").bzimage, kernel("amd64").vmlinux):
        with pytest.raises(UsageError, match=rf"--kernel .*{path.name}: .*needs memory up to"):
            load(FakeRam(64 * layout.MIB), BootConfig(path, 64 * layout.MIB))
