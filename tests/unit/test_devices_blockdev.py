"""A block device (a loop device over a file) as the back end of a disk."""

from __future__ import annotations

import os
import shutil
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.errors import Conflict, UsageError
from cellvisor.devices.backends.disk import Disk
from cellvisor.devices.virtio.blk import Blk
from tests.fakes.host import Rig

SIZE = 4 << 20


@pytest.fixture(params=[512, 4096])
def loop(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[tuple[str, Path]]:
    """Return a loop device of 4 MiB and its file; the parameter is its logical block size."""
    if shutil.which("losetup") is None or os.geteuid() != 0:
        pytest.skip("needs losetup (Debian package mount) and root")
    image = tmp_path / "image"
    image.write_bytes(b"\xaa" * SIZE)
    made = subprocess.run(["losetup", "--find", "--show", "--sector-size", str(request.param), str(image)],
                          capture_output=True, text=True, check=False)
    if made.returncode:
        pytest.skip(f"this machine gives no loop device: {made.stderr.strip()}")
    path = made.stdout.strip()
    yield path, image
    subprocess.run(["losetup", "--detach", path], check=True)


def test_block_device_serves(loop: tuple[str, Path], request: pytest.FixtureRequest) -> None:
    path, _ = loop
    disk = Disk(path)
    with pytest.raises(Conflict, match=f"pid {os.getpid()}"):
        Disk(path)
    sector = request.node.callspec.params["loop"]
    assert (disk.size, disk.logical) == (SIZE, sector)
    disk.write([memoryview(b"x" * 8192)], 4096)
    disk.flush()
    disk.zero(8192, 4096, unmap=True)
    disk.discard(1 << 20, 1 << 20)
    found = bytearray(16384)
    disk.read([memoryview(found)], 0)
    assert found == b"\xaa" * 4096 + b"x" * 4096 + bytes(4096) + b"\xaa" * 4096
    with pytest.raises(UsageError, match=f"^desired_size={2 * SIZE}: {path} is a block device"):
        disk.resize(2 * SIZE)
    disk.close()


def test_block_device_direct(loop: tuple[str, Path], request: pytest.FixtureRequest) -> None:
    sector = request.node.callspec.params["loop"]
    rig = Rig(Blk, {"path": loop[0], "direct": True})
    fresh = os.urandom(8192)
    out = b"\x01" + bytes(7) + (16).to_bytes(8, "little")
    assert rig.request([out, fresh[:100], fresh[100:]], [1]) == b"\0"
    back = bytes(8) + (16).to_bytes(8, "little")
    assert rig.request([back], [8192, 1]) == fresh + b"\0"
    odd = bytes(8) + (17).to_bytes(8, "little")
    status = rig.request([odd], [512, 1])[-1]
    assert status == (0 if sector == 512 else 1), "smaller than the device's blocks"
    rig.close()
