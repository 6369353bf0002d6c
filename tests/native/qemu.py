"""Run the guest under QEMU: the reference that shows the guest right, and the neighbour in benchmarks."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from tests.debian import need
from tests.native.guest import HAVE_KVM, GuestResult, Running, build


def card(tap: str = "tap0", pairs: int = 1, more: str = "") -> list[str]:
    """Return the options for a card on a tap that is there."""
    queues = f",mq=on,vectors={2 * pairs + 2}" if pairs > 1 else ""
    return ["-netdev", f"tap,id=n0,ifname={tap},script=no,downscript=no,queues={pairs}", "-device",
            f"virtio-net-pci,disable-legacy=on,netdev=n0,mac=52:54:00:12:34:56{queues}{more}"]


def start_qemu(cmdline: str, where: Path, *, disks: Sequence[Path] = (), extra: Sequence[str] = (),
               initramfs: Path | None = None, cpus: int = 1, memory: int = 256, queues: int = 1,
               accel: str | None = None, aio: str = "threads", firmware: str = "qboot.rom") -> Running:
    """Start QEMU (q35) with one iothread a disk and a virtio-rng. `memory` in MiB; files go to `where`.

    qboot, because a host that interprets ring 0 needs seconds for SeaBIOS.
    """
    accel = accel or ("kvm" if HAVE_KVM else "tcg")
    serial = where / "serial.txt"
    command = [
        need("qemu-system-x86_64", "qemu-system-x86"), "-M", "q35", "-accel", accel, "-bios", firmware,
        "-cpu", "max,-arch-capabilities" if accel == "kvm" else "max", "-smp", str(cpus), "-m", str(memory),
        "-nodefaults", "-display", "none", "-serial", f"file:{serial}", "-kernel", str(build()), "-append", cmdline,
    ]
    for index, disk in enumerate(disks):
        command += [
            "-blockdev", f"driver=file,filename={disk},node-name=d{index},discard=unmap,aio={aio}",
            "-object", f"iothread,id=io{index}", "-device",
            f"virtio-blk-pci,disable-legacy=on,drive=d{index},iothread=io{index},serial=disk{index},num-queues={queues}",
        ]
    command += ["-device", "virtio-rng-pci,disable-legacy=on"]
    if initramfs is not None:
        command += ["-initrd", str(initramfs)]
    return Running([*command, *extra], serial, where / "vmm.log")


def run_qemu(cmdline: str, where: Path, *, timeout: float = 120.0, disks: Sequence[Path] = (),
             extra: Sequence[str] = (), initramfs: Path | None = None, cpus: int = 1, memory: int = 256,
             queues: int = 1, accel: str | None = None, aio: str = "threads") -> GuestResult:
    """Run the guest to its end and return what it said."""
    with start_qemu(cmdline, where, disks=disks, extra=extra, initramfs=initramfs, cpus=cpus, memory=memory,
                    queues=queues, accel=accel, aio=aio) as running:
        return running.finish(timeout)
