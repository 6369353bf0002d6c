"""What the VM was asked to be, and its JSON in the shape of Cloud Hypervisor's VmConfig.

Declared with the option codec, so the command line and (later) JSON bodies are checked by the same rules.
"""

from __future__ import annotations

import os
import stat
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.budget import RateLimitGroup, check_limits
from cellvisor.core.wire.options import build, describe, option, parse_kv
from cellvisor.core.wire.places import is_word

if TYPE_CHECKING:
    from cellvisor.controlplane.inventory import Device

MAX_VCPUS = 64
MIB = 1 << 20
MIN_MEMORY = 2 * MIB
MAX_MEMORY = 1 << 45  # half of a 46-bit guest-physical space: the rest is for devices
MAX_CMDLINE = 65535  # the guest's memory map keeps 64 KiB for it, with the final NUL
CONSOLE_MODES = ("off", "null", "tty", "pty", "file", "socket")


@dataclass(frozen=True, slots=True, kw_only=True)
class Cpus:
    """How many vCPUs: `--cpus`."""

    boot: int = option(1, help="vCPUs at boot", min=1, max=MAX_VCPUS)
    max: int | None = option(None, help="most vCPUs ever (as many as boot)", min=1, max=MAX_VCPUS)

    def as_json(self) -> dict[str, Any]:
        return {"boot_vcpus": self.boot, "max_vcpus": self.max}


@dataclass(frozen=True, slots=True, kw_only=True)
class Memory:
    """How much guest RAM, and how it is backed: `--memory`."""

    size: int = option(512 * MIB, help="guest memory in bytes", size=True)
    prefault: bool = option(False, help="touch every page before boot")
    hugepages: bool = option(False, help="use hugetlbfs pages")
    thp: bool = option(True, help="ask for transparent huge pages")
    shared: bool = option(True, help="always on: devices are processes", choices=(True,))

    def as_json(self) -> dict[str, Any]:
        return {"size": self.size, "prefault": self.prefault, "hugepages": self.hugepages,
                "thp": self.thp, "shared": True}


@dataclass(frozen=True, slots=True)
class Payload:
    """What to boot: paths as given, and the command line."""

    kernel: str
    initramfs: str | None = None
    cmdline: str = ""

    def as_json(self) -> dict[str, Any]:
        return {"kernel": self.kernel, "initramfs": self.initramfs, "cmdline": self.cmdline}


@dataclass(frozen=True, slots=True, kw_only=True)
class Serial:
    """The 16550, which lives in core: `mode` is one of CONSOLE_MODES."""

    mode: str = option("null", help="where ttyS0 goes", choices=CONSOLE_MODES, bare=True)
    file: str | None = option(None, help="write to this file", path=True)
    socket: str | None = option(None, help="listen on this Unix socket", path=True)

    @classmethod
    def from_text(cls, text: str) -> Serial:
        """Read off|null|tty|pty|file=PATH|socket=PATH."""
        given = build(cls, parse_kv(text, describe(cls), "--serial"), "--serial")
        if text.startswith(("file=", "socket=")):
            given = replace(given, mode=text.partition("=")[0])
        named = {"file": given.file, "socket": given.socket}
        for mode, path in named.items():
            if (given.mode == mode) != (path is not None):
                raise UsageError(f"--serial {text[:80]}: {mode} and mode do not fit together",
                                 hint=f"write --serial {mode}=PATH")
        return given

    def as_json(self) -> dict[str, Any]:
        return {"mode": self.mode.capitalize(), "file": self.file, "socket": self.socket}


@dataclass(frozen=True, slots=True)
class VmConfig:
    """Everything that was asked for, devices placed."""

    cpus: Cpus
    memory: Memory
    payload: Payload
    serial: Serial
    devices: tuple[Device, ...] = ()
    paths: Mapping[str, str] = field(default_factory=dict)  # ptys that were made, by console id or `__serial`
    groups: tuple[RateLimitGroup, ...] = ()

    def as_json(self) -> dict[str, Any]:
        """Return Cloud Hypervisor's VmConfig; types without a place in it are listed under `virtio`."""
        body: dict[str, Any] = {
            "cpus": self.cpus.as_json(), "memory": self.memory.as_json(), "payload": self.payload.as_json(),
            "serial": self.serial.as_json(), "console": {"mode": "Off"}, "disks": [], "net": [], "virtio": [],
        }
        if self.groups:
            body["rate_limit_groups"] = [group.as_json() for group in self.groups]
        if "__serial" in self.paths:
            body["serial"]["file"] = self.paths["__serial"]
        for device in self.devices:
            shown = {"id": device.id, "pci_segment": 0, "pci_device_id": device.slot, **device.options}
            if device.verb == "disk":
                body["disks"].append(shown)
            elif device.verb == "net":
                body["net"].append({"fds" if key == "fd" else key: value for key, value in shown.items()})
            elif device.id == "__console":
                path = {"file": self.paths[device.id]} if device.id in self.paths else {}
                body["console"] = {**shown, "mode": device.mode.capitalize(), **path}
            elif device.id == "__rng":
                body["rng"] = shown
            else:
                body["virtio"].append({"type": device.type, **shown})
        return body

    def for_core(self) -> dict[str, Any]:
        """Return the arguments of core's CONFIGURE; paths are absolute."""
        return {
            "cpus": {"boot": self.cpus.boot, "max": self.cpus.max},
            "memory": self.memory.as_json(),
            "payload": self.payload.as_json(),
            "serial": {"mode": self.serial.mode, "file": self.serial.file, "socket": self.serial.socket},
        }


def check_cpus(cpus: Cpus) -> Cpus:
    """Fill in `max`. Raises UsageError if it is below `boot`."""
    most = cpus.boot if cpus.max is None else cpus.max
    if most < cpus.boot:
        raise UsageError(f"--cpus: max={most} is below boot={cpus.boot}")
    return replace(cpus, max=most)


def check_memory(memory: Memory) -> Memory:
    """Refuse sizes that make no sense."""
    if not MIN_MEMORY <= memory.size <= MAX_MEMORY:
        raise UsageError(f"--memory: size={memory.size} is outside {MIN_MEMORY // MIB}M..{MAX_MEMORY >> 40}T",
                         hint="sizes take K, M, G or T: size=1G")
    if memory.size % MIN_MEMORY:
        raise UsageError(f"--memory: size={memory.size} is not a multiple of 2M")
    return memory


def check_groups(flag: str, given: list[dict[str, Any]]) -> tuple[RateLimitGroup, ...]:
    """Make groups of checked options. Raises UsageError for halves of a limit and for names twice or odd."""
    groups: dict[str, RateLimitGroup] = {}
    for options in given:
        group = build(RateLimitGroup, options, flag)
        if not is_word(group.id):
            raise UsageError(f"{flag}: id={group.id!r} cannot name a group",
                             hint="letters, digits, '.', '_' and '-' can")
        if group.id in groups:
            raise UsageError(f"{flag}: id={group.id} is given twice")
        check_limits(group.limits(), f"{flag} id={group.id}")
        groups[group.id] = group
    return tuple(groups.values())


def check_payload(payload: Payload) -> Payload:
    """Make paths absolute. Raises UsageError naming flag and file for what can be seen without reading it."""
    length = len(payload.cmdline.encode(errors="surrogateescape"))
    if length > MAX_CMDLINE or "\0" in payload.cmdline:
        raise UsageError(f"--cmdline has {length} bytes, at most {MAX_CMDLINE} without a NUL work")
    _check_file("--kernel", payload.kernel)
    if payload.initramfs is not None:
        _check_file("--initramfs", payload.initramfs)
    initramfs = None if payload.initramfs is None else os.path.abspath(payload.initramfs)
    return replace(payload, kernel=os.path.abspath(payload.kernel), initramfs=initramfs)


def _check_file(flag: str, path: str) -> None:
    try:
        fd = os.open(path, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
    except (OSError, ValueError) as error:
        reason = error.strerror if isinstance(error, OSError) else str(error)
        raise UsageError(f"{flag} {path}: {reason}") from None
    try:
        status = os.fstat(fd)
        if not stat.S_ISREG(status.st_mode):
            raise UsageError(f"{flag} {path}: not a file")
        if status.st_size == 0:
            raise UsageError(f"{flag} {path}: empty file")
    finally:
        os.close(fd)
