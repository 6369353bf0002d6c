"""What core is told to be (CoreVerb.CONFIGURE), checked once at the edge."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from cellvisor.core.errors import UsageError
from cellvisor.core.mem import layout

MAX_VCPUS = 64


@dataclass(frozen=True, slots=True)
class MachineConfig:
    """CPUs, memory in bytes, what to boot, and where the serial port goes."""

    boot_vcpus: int
    max_vcpus: int
    memory: int
    kernel: str
    initramfs: str
    cmdline: str
    serial_mode: str
    serial_path: str
    prefault: bool
    hugepages: bool
    thp: bool


def _get(body: Mapping[str, Any], key: str, kind: type[Any], default: Any) -> Any:
    value = body.get(key, default)
    if value is None:
        value = default
    if type(value) is not kind:
        raise UsageError(f"{key}={value!r}: is {type(value).__name__}, not {kind.__name__}")
    return value


def machine_config(args: Mapping[str, Any]) -> MachineConfig:
    """Read CONFIGURE's args. Raises UsageError naming the flag and the value seen."""
    cpus, memory = _get(args, "cpus", dict, {}), _get(args, "memory", dict, {})
    payload, serial = _get(args, "payload", dict, {}), _get(args, "serial", dict, {})
    boot = _get(cpus, "boot", int, 1)
    most = _get(cpus, "max", int, boot)
    if not 1 <= boot <= most <= MAX_VCPUS:
        raise UsageError(f"--cpus boot={boot},max={most}: not 1 <= boot <= max <= {MAX_VCPUS}")
    size = _get(memory, "size", int, 512 << 20)
    layout.check_ram_size(size)
    kernel = _get(payload, "kernel", str, "")
    if not kernel:
        raise UsageError("--kernel is missing", hint="name a bzImage or an ELF vmlinux")
    return MachineConfig(
        boot_vcpus=boot, max_vcpus=most, memory=size, kernel=kernel,
        initramfs=_get(payload, "initramfs", str, ""), cmdline=_get(payload, "cmdline", str, ""),
        serial_mode=_get(serial, "mode", str, "null").lower(),
        serial_path=_get(serial, "file", str, "") or _get(serial, "socket", str, ""),
        prefault=_get(memory, "prefault", bool, False), hugepages=_get(memory, "hugepages", bool, False),
        thp=_get(memory, "thp", bool, True),
    )
