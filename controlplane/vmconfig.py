"""A VM as it is ordered: by flags, or by the VmConfig JSON of vm.create (Cloud Hypervisor's).

What its VmConfig has and cellvisor has not (yet) is refused by name, unless the value asks for nothing. What `info`
shows as a configuration can be given to `create` again.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

from cellvisor.controlplane import config
from cellvisor.controlplane.config import Cpus, Memory, Payload, Serial
from cellvisor.controlplane.inventory import Catalog, Inventory, Wanted
from cellvisor.core.errors import UsageError
from cellvisor.core.wire.budget import RateLimitGroup
from cellvisor.core.wire.options import build, option

_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
# Keys that cellvisor has no use for, with the values that ask for nothing.
_LATER: Mapping[str, tuple[Any, ...]] = dict.fromkeys((
    "balloon", "fs", "generic_vhost_user", "pmem", "devices", "user_devices", "vdpa",
    "vsock", "debug_console", "pvpanic", "iommu", "numa", "watchdog", "rtc", "gdb", "pci_segments", "platform", "tpm",
    "landlock_enable", "landlock_rules", "ivshmem"), _NOTHING)
_CPUS_LATER: Mapping[str, tuple[Any, ...]] = {
    "topology": _NOTHING, "kvm_hyperv": _NOTHING, "max_phys_bits": (None, 46), "affinity": _NOTHING,
    "features": (*_NOTHING, {"amx": False}), "nested": (None, True), "core_scheduling": (None, "Off", "Vm"),
    "profile": (None, "host", "Host")}
_MEMORY_LATER: Mapping[str, tuple[Any, ...]] = {
    "mergeable": _NOTHING, "hotplug_method": (None, "Acpi"), "hotplug_size": _NOTHING, "hotplugged_size": _NOTHING,
    "hugepage_size": _NOTHING, "reserve": _NOTHING, "zones": _NOTHING, "shared": (None, False, True)}
_PAYLOAD_LATER: Mapping[str, tuple[Any, ...]] = dict.fromkeys(("firmware", "igvm", "host_data"), _NOTHING)
_LIMITS = {"bandwidth": "bw", "ops": "ops"}
# ch-remote spells out every key of a device; how a disk is locked and read is the device's to choose.
_IDLE: Mapping[str, tuple[Any, ...]] = {
    **dict.fromkeys(("vhost_user", "vhost_socket", "backing_files"), (None, False)),
    **dict.fromkeys(("disable_io_uring", "disable_aio"), (None, False, True)),
    "vhost_mode": (None, "Client"), "lock_granularity": (None, "Full", "ByteRange"), "image_type": (None, "Unknown")}


@dataclass(frozen=True, slots=True)
class Order:
    """What to boot, with which devices; they get ids and slots when the VM is created."""

    payload: Payload
    cpus: Cpus
    memory: Memory
    serial: Serial
    wanted: tuple[Wanted, ...]
    groups: tuple[RateLimitGroup, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """An order whose devices have their ids and slots."""

    config: config.VmConfig
    inventory: Inventory


def plan(order: Order, catalog: Catalog) -> Plan:
    """Give the devices ids and slots. Raises CellvisorError."""
    inventory = Inventory(catalog, [group.id for group in order.groups])
    return Plan(config.VmConfig(order.cpus, order.memory, order.payload, order.serial,
                                tuple(inventory.add(order.wanted)), {}, order.groups), inventory)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Cpus:
    boot_vcpus: int = option(1, min=1, max=config.MAX_VCPUS)
    max_vcpus: int | None = option(None, min=1, max=config.MAX_VCPUS)


@dataclass(frozen=True, slots=True, kw_only=True)
class _Payload:
    kernel: str = option(path=True)
    initramfs: str | None = option(None, path=True)
    cmdline: str | None = option(None)


def read(body: Mapping[str, Any]) -> Order:
    """Check a VmConfig that may be hostile. Raises UsageError naming the key."""
    known = ("cpus", "memory", "payload", "serial", "console", "rng", "disks", "net", "virtio", "rate_limit_groups")
    given = _known(body, known, _LATER, "create")
    cpus = build(_Cpus, _known(_object(given, "cpus"), _names(_Cpus), _CPUS_LATER, "cpus"), "cpus")
    memory = build(Memory, _known(_object(given, "memory"), _names(Memory, "shared"), _MEMORY_LATER, "memory"),
                   "memory")
    if "payload" not in given:
        raise UsageError("create: payload is missing", hint='give {"payload": {"kernel": PATH}}')
    payload = build(_Payload, _known(_object(given, "payload"), _names(_Payload), _PAYLOAD_LATER, "payload"), "payload")
    return Order(
        config.check_payload(Payload(payload.kernel, payload.initramfs, payload.cmdline or "")),
        config.check_cpus(Cpus(boot=cpus.boot_vcpus, max=cpus.max_vcpus)),
        config.check_memory(memory),
        _serial(_object(given, "serial")),
        tuple(_wanted(given)),
        config.check_groups("rate_limit_groups", [flat(group) for group in _list(given, "rate_limit_groups")]))


def _names(cls: type[Any], *but: str) -> tuple[str, ...]:
    return tuple(field.name for field in fields(cls) if field.name not in but)


def _object(given: Mapping[str, Any], key: str) -> Mapping[str, Any]:
    value = given.get(key, {})
    if not isinstance(value, dict):
        raise UsageError(f"{key}: {type(value).__name__} instead of an object")
    return value


def _list(given: Mapping[str, Any], key: str) -> list[Mapping[str, Any]]:
    value = given.get(key, [])
    if not isinstance(value, list) or not all(isinstance(entry, dict) for entry in value):
        raise UsageError(f"{key}: not a list of objects")
    return value


def _known(given: Mapping[str, Any], known: tuple[str, ...], later: Mapping[str, tuple[Any, ...]],
           what: str) -> dict[str, Any]:
    """Return what is given of `known`. Raises UsageError for anything else that asks for something."""
    for key, value in given.items():
        off = isinstance(value, dict) and value.get("mode") == "Off"  # as a debug console may say
        if key in later and not off and not any(value == fine and type(value) is type(fine) for fine in later[key]):
            raise UsageError(f"{what}: {key} is not supported yet", code="not-supported")
        if key not in known and key not in later:
            import difflib

            close = difflib.get_close_matches(str(key)[:80], known, 1)
            advice = f"did you mean {close[0]}? " if close else ""
            raise UsageError(f"{what}: unknown key {str(key)[:80]!r}", hint=f"{advice}known keys: {', '.join(known)}")
    return {key: value for key, value in given.items() if key in known and value is not None}


def _serial(given: Mapping[str, Any]) -> Serial:
    body = _console(given)
    found = build(Serial, {key: value for key, value in body.items() if key not in ("iommu", "id")}, "serial")
    for mode in ("file", "socket"):
        if found.mode == mode and not getattr(found, mode):
            raise UsageError(f"serial: mode={mode} needs {mode}")
    return found


def _console(given: Mapping[str, Any]) -> dict[str, Any]:
    """Leave out the path that is none: after a boot a pty's is shown as `file`."""
    mode = str(given.get("mode", "")).lower()
    return {key: value for key, value in given.items()
            if value is not None and not (key in ("file", "socket") and key != mode)}


def _wanted(given: Mapping[str, Any]) -> list[Wanted]:
    """List the devices in the order of their slots, as the flags do."""
    console = _console({"mode": "tty", **_object(given, "console")})
    found = []
    if str(console.get("mode")).lower() != "off":
        found.append(_fixed("console", console, "__console"))
    found += [Wanted("disks", "disk", "", body=flat(disk)) for disk in _list(given, "disks")]
    for card in _list(given, "net"):
        body = flat(card)
        if body.get("fd") is not None:
            raise UsageError(f"create: fds={body['fd']}: descriptors come with add-net", hint="add it after create")
        found.append(Wanted("net", "net", "", body=body))
    found.append(_fixed("rng", _object(given, "rng"), "__rng"))
    for entry in _list(given, "virtio"):
        kind = entry.get("type")
        if not isinstance(kind, str) or not kind:
            raise UsageError(f"virtio: type={str(kind)[:40]!r} is not the name of a device type")
        rest = {key: value for key, value in entry.items() if key != "type"}
        found.append(Wanted("virtio", kind, "", by_verb=False, body=rest))
    return found


def _fixed(kind: str, body: Mapping[str, Any], name: str) -> Wanted:
    rest = {key: value for key, value in body.items() if not (key == "id" and value == name)}
    return Wanted(kind, kind, "", name, body=rest)


def _is_idle(key: str, value: Any) -> bool:
    return any(type(value) is type(idle) and value == idle for idle in _IDLE.get(key, ()))


def flat(options: Mapping[str, Any]) -> dict[str, Any]:
    """Return a device's JSON as the flags have it: `rate_limiter_config` is bw_size, ops_refill_time, ..., `fds` is fd,
    and what asks for nothing is left out."""
    body = {"fd" if key == "fds" else key: value for key, value in options.items()
            if key != "rate_limiter_config" and not _is_idle(key, value)}
    limits = options.get("rate_limiter_config")
    if not isinstance(limits, dict | None):
        raise UsageError(f"rate_limiter_config: {type(limits).__name__} instead of an object")
    for kind, bucket in (limits or {}).items():
        if kind not in _LIMITS or not isinstance(bucket, dict | None):
            raise UsageError(f"rate_limiter_config: unknown key {str(kind)[:40]!r}", hint="known keys: bandwidth, ops")
        body |= {f"{_LIMITS[kind]}_{key}": value for key, value in (bucket or {}).items()}
    return body
