"""Command lines of the VMMs that can run a lab guest: ours, and QEMU to compare with in the same place."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

from tests.debian import need


@dataclass(frozen=True, slots=True)
class Machine:
    """A guest, as both VMMs understand it. `agent` is "hvc0" or "ttyS0"; its console is a Unix socket."""

    kernel: Path
    initrd: Path
    cmdline: str
    cpus: int
    memory: str
    disks: tuple[str, ...]
    socket: Path
    serial_log: Path
    agent: str = "hvc0"
    args: tuple[str, ...] = field(default=())


def cellvisor_command() -> str:
    """Return the `cellvisor` of this Python's environment, else the one on the PATH."""
    beside = Path(sys.executable).with_name("cellvisor")
    return str(beside) if beside.exists() else "cellvisor"


def cellvisor(machine: Machine) -> list[str]:
    """Return the command line of `cellvisor run`."""
    if machine.agent == "hvc0":
        consoles = ["--console", f"socket={machine.socket}", "--serial", f"file={machine.serial_log}"]
    else:
        consoles = ["--console", "off", "--serial", f"socket={machine.socket}"]
    disks = [word for disk in machine.disks for word in ("--disk", disk)]
    return [cellvisor_command(), "run", "--kernel", str(machine.kernel),
            "--initramfs", str(machine.initrd), "--cmdline", machine.cmdline, "--cpus", f"boot={machine.cpus}",
            "--memory", f"size={machine.memory}", *disks, *consoles, *machine.args]


def qemu(machine: Machine) -> list[str]:
    """Return QEMU's command line for the same guest (microvm with PCI, no firmware menu, no VGA)."""
    port = f"socket,id=agent,path={machine.socket},server=on,wait=off"
    if machine.agent == "hvc0":
        consoles: Sequence[str] = ("-chardev", port, "-device", "virtio-serial-pci",
                                   "-device", "virtconsole,chardev=agent", "-serial", f"file:{machine.serial_log}")
    else:
        consoles = ("-chardev", port, "-serial", "chardev:agent")
    disks: list[str] = []
    for number, disk in enumerate(machine.disks):
        options = dict(word.split("=", 1) for word in disk.split(","))
        only = "on" if options.get("readonly") == "on" else "off"
        disks += ["-drive", f"file={options['path']},format=raw,if=none,id=d{number},read-only={only}",
                  "-device", f"virtio-blk-pci,drive=d{number}"]
    return [need("qemu-system-x86_64", "qemu-system-x86"), "-M", "microvm,pcie=on,acpi=on,rtc=on", "-enable-kvm",
            "-cpu", "max", "-smp", str(machine.cpus), "-m", machine.memory, "-nodefaults", "-no-user-config",
            "-display", "none", "-no-reboot", "-kernel", str(machine.kernel), "-initrd", str(machine.initrd),
            "-append", machine.cmdline, "-device", "virtio-rng-pci", *disks, *consoles, *machine.args]
