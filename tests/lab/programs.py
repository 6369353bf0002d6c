"""Programs for guests, which have only busybox: each with its libraries on a read-only disk of its own."""

from __future__ import annotations

import re
import shutil
import subprocess
import tempfile
from pathlib import Path

from tests.debian import need
from tests.lab.guest import Linux

LOADER = "ld-linux-x86-64.so.2"  # what such a program's process is called


def make(path: Path, program: str) -> Path:
    """Make an ext4 image of this machine's `program`, which is in Debian's package of that name."""
    found = need(program, program)
    needed = subprocess.run(["ldd", found], capture_output=True, text=True, check=True).stdout
    with tempfile.TemporaryDirectory(prefix=f"{program}-") as folder:
        for file in (found, *re.findall(r"(/\S+) \(0x", needed)):
            shutil.copy(file, folder)
        content = sum(file.stat().st_size for file in Path(folder).iterdir())
        subprocess.run([need("mke2fs", "e2fsprogs"), "-q", "-t", "ext4", "-O", "^has_journal", "-d", folder,
                        str(path), f"{content * 5 // 4096 + 4096}K"], check=True, stdout=subprocess.DEVNULL)
    return path


def install(guest: Linux, device: str, program: str) -> None:
    """Make `program` a command of the guest; the image is its disk `device`."""
    place = f"/{program}"
    run = f"{place}/{LOADER} --library-path {place} {place}/{program}"
    guest.run(f"mkdir {place} && mount -t ext4 -o ro /dev/{device} {place}")
    guest.run(f"printf '#!/bin/sh\\nexec {run} \"$@\"\\n' >/bin/{program} && chmod +x /bin/{program} && "
              f"{program} --version")
