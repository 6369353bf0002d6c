"""Run the guest under cellvisor, as a user would: the command line in a process of its own."""

from __future__ import annotations

import contextlib
import os
import sys
import tempfile
from collections.abc import Sequence
from pathlib import Path

from tests.native.guest import GuestResult, Running, build


def start_cellvisor(cmdline: str, where: Path, *, disks: Sequence[Path | str] = (), extra: Sequence[str] = (),
                    initramfs: Path | None = None, cpus: int = 1, memory: int = 256, console: str = "off",
                    program: Sequence[str] = (str(Path(sys.executable).with_name("cellvisor")),),
                    environ: dict[str, str] | None = None) -> Running:
    """Start `cellvisor run` with the guest. A disk is a path or a whole --disk argument; `memory` in MiB.

    Its run directory is private to this VM, so tests may run side by side.
    """
    serial = where / "serial.txt"
    command = [
        *program, "run", "--kernel", str(build()), "--cmdline", cmdline,
        "--serial", f"file={serial}", "--console", console, "--cpus", f"boot={cpus}", "--memory", f"size={memory}M",
    ]
    if initramfs is not None:
        command += ["--initramfs", str(initramfs)]
    for disk in disks:
        command += ["--disk", f"path={disk}" if isinstance(disk, Path) else disk]
    environment = dict(os.environ, XDG_RUNTIME_DIR=runtime_dir(where), **(environ or {}))
    return Running([*command, *extra], serial, where / "vmm.log", environment)


def runtime_dir(where: Path) -> str:
    """Return the run directory that VMs started in `where` use: short, for socket paths end at 107 bytes."""
    link = where / "run"
    if not link.is_symlink() or not link.exists():
        link.unlink(missing_ok=True)
        link.symlink_to(tempfile.mkdtemp(prefix="cv-"))
    return os.readlink(link)


def processes(runtime: str) -> dict[int, str]:
    """Return pid -> command line of every process with that run directory; zombies do not count."""
    mark = f"XDG_RUNTIME_DIR={runtime}".encode()
    found = {}
    for name in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                found[int(name)] = Path(f"/proc/{name}/cmdline").read_bytes().replace(b"\0", b" ").decode()
    return found


def run_cellvisor(cmdline: str, where: Path, *, timeout: float = 120.0, disks: Sequence[Path | str] = (),
                  extra: Sequence[str] = (), initramfs: Path | None = None, cpus: int = 1, memory: int = 256,
                  console: str = "off") -> GuestResult:
    """Run the guest to its end and return what it said."""
    with start_cellvisor(cmdline, where, disks=disks, extra=extra, initramfs=initramfs, cpus=cpus, memory=memory,
                         console=console) as running:
        said = running.finish(timeout)
    with contextlib.suppress(OSError):  # another VM of this directory may still run
        place = runtime_dir(where)
        for path in (os.path.join(place, "cellvisor"), place):
            os.rmdir(path)
        (where / "run").unlink()
    return said
