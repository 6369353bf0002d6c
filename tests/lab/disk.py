"""Disks for guests, and the checks of them: written by the guest, read by the host afterwards."""

from __future__ import annotations

import hashlib
import subprocess
from pathlib import Path

from tests.debian import need
from tests.lab.guest import Linux


def make(path: Path, size: str = "64M") -> Path:
    """Make an ext4 image with a journal."""
    path.unlink(missing_ok=True)
    subprocess.run([need("mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-E", "lazy_itable_init=1", str(path), size],
                   check=True, stdout=subprocess.DEVNULL)
    return path


def write_and_read(guest: Linux, device: str = "vda", kib: int = 2048) -> str:
    """Mount, write random data, unmount, drop caches, mount, compare; return the data's SHA-256."""
    guest.run(f"mount -t ext4 /dev/{device} /mnt")
    guest.run(f"dd if=/dev/urandom of=/tmp/data bs=64k count={kib // 64} 2>/dev/null && cp /tmp/data /mnt/data")
    guest.run("umount /mnt && echo 3 > /proc/sys/vm/drop_caches")
    guest.run(f"mount -t ext4 /dev/{device} /mnt && cmp /tmp/data /mnt/data")
    digest = guest.run("sha256sum /mnt/data").split()[0]
    guest.run("umount /mnt && rm /tmp/data")
    return digest


def digest_on_host(path: Path) -> str:
    """Check the file system of an image nobody uses and return the SHA-256 of its /data."""
    checked = subprocess.run([need("e2fsck", "e2fsprogs"), "-f", "-n", str(path)], capture_output=True, text=True,
                             check=False)
    assert checked.returncode == 0, checked.stdout + checked.stderr
    dumped = subprocess.run([need("debugfs", "e2fsprogs"), "-R", "cat /data", str(path)], capture_output=True,
                            check=True)
    return hashlib.sha256(dumped.stdout).hexdigest()
