"""Which devices the VM has: ids and slots, given out as Cloud Hypervisor gives them.

Ids that nobody chose count up through the whole VM (`_disk0`, `_disk1`, `_net2`); fixed ones begin with two
underscores. Slots somebody chose are reserved first; every other device gets the lowest free one of bus 0.
"""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cellvisor.core.errors import Conflict, NotFound, UsageError
from cellvisor.core.wire import budget
from cellvisor.core.wire.options import defaults, parse_kv, validate
from cellvisor.core.wire.places import is_word

SLOTS = range(1, 32)  # slot 0 is the host bridge
_COMMON = ("id", "pci_segment", "pci_device_id", "iommu")
_CARE = ("restart_budget", "restart_window", "restart_backoff", "hang_timeout", "io_timeout")  # kept if given


@dataclass(frozen=True, slots=True)
class Wanted:
    """A device as the user wrote it. `kind` is a verb ("disk") or, not `by_verb`, the name of a type.

    Options are `text` as on the command line or, if there is one, the JSON object `body`.
    """

    flag: str
    kind: str
    text: str = ""
    fixed_id: str = ""
    by_verb: bool = True
    body: Mapping[str, Any] | None = field(default=None, hash=False)

    @property
    def shown(self) -> str:
        """Return the options as they were written, shortened for a message."""
        return (self.text if self.body is None else str(self.body.get("path", "")))[:80]


@dataclass(frozen=True, slots=True)
class DeviceType:
    """One entry of the nursery's catalog; `schema` as core.wire.options describes it."""

    name: str
    verb: str
    help: str
    schema: dict[str, Any] = field(hash=False)
    reads: tuple[int, ...] = (1,)  # versions of saved state


@dataclass(frozen=True, slots=True)
class Catalog:
    """The known types, and for each that could not be loaded the reason."""

    types: tuple[DeviceType, ...] = ()
    broken: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Device:
    """A device with its name and place. `options`: every key that has a value, without the common ones."""

    id: str
    type: str
    verb: str
    slot: int
    options: dict[str, Any] = field(hash=False)

    @property
    def bdf(self) -> str:
        return f"0000:00:{self.slot:02x}.0"

    @property
    def mode(self) -> str:
        """Return where a console's bytes go, "" for other devices."""
        paths = [key for key in ("file", "socket") if self.options.get(key)]
        return paths[0] if "mode" in self.options and paths else str(self.options.get("mode", ""))


# What a verb may want of a device, as its refusal says it.
_KINDS: Mapping[str, Callable[[Device], bool]] = MappingProxyType({
    "a disk": lambda device: device.verb == "disk",
    "a network card": lambda device: device.verb == "net",
    "a device with limits": lambda device: "bw_size" in device.options,
})


class Inventory:
    """The VM's devices by id. Changes all or nothing."""

    def __init__(self, catalog: Catalog, groups: Collection[str] = ()) -> None:
        self._catalog, self._groups = catalog, groups
        self._devices: dict[str, Device] = {}
        self._count = 0
        self._blocked: set[int] = set()

    @property
    def devices(self) -> Mapping[str, Device]:
        return self._devices

    def get(self, key: str) -> Device:
        """Return device `key` or raise NotFound naming it."""
        try:
            return self._devices[key]
        except KeyError:
            raise NotFound(f"no device {key[:80]!r}", hint=f"devices: {', '.join(self._devices)}") from None

    def require(self, verb: str, key: str, what: str) -> Device:
        """Return device `key` if it is `what` `verb` is for: "a disk", ... Raises NotFound, UsageError naming both."""
        device = self.get(key)
        if not _KINDS[what](device):
            raise UsageError(f"{verb}: id={device.id} is not {what} but {device.type}")
        return device

    def relearn(self, catalog: Catalog) -> None:
        """Take devices of these types from now on."""
        self._catalog = catalog

    def release(self, key: str) -> None:
        """Forget a device: its id and slot are free. Unknown ones are ignored."""
        self._devices.pop(key, None)

    def block(self, slot: int) -> None:
        """Give `slot` to nobody: the guest still believes in the device that was there."""
        self._blocked.add(slot)

    def unblock(self, slot: int | None = None) -> None:
        """Undo block() for one slot, or for all."""
        self._blocked = set() if slot is None else self._blocked - {slot}

    def free_slots(self) -> list[int]:
        """Return the slots that a device can still get, lowest first."""
        taken = {device.slot for device in self._devices.values()} | self._blocked
        return [slot for slot in SLOTS if slot not in taken]

    def state(self) -> dict[str, Any]:
        """Return all that restore() needs, as plain data."""
        return {"count": self._count, "blocked": sorted(self._blocked), "devices": [
            {"id": device.id, "type": device.type, "verb": device.verb, "slot": device.slot,
             "options": device.options} for device in self._devices.values()]}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Become what state() described."""
        self._count, self._blocked = int(state["count"]), set(state["blocked"])
        self._devices = {entry["id"]: Device(**entry) for entry in state["devices"]}

    def check(self, want: Wanted) -> Device:
        """Return the device that add() would make; nothing changes."""
        before = self._devices.copy(), self._count
        try:
            return self.add([want])[0]
        finally:
            self._devices, self._count = before

    def add(self, wanted: Iterable[Wanted]) -> list[Device]:
        """Check, name and place devices. Changes nothing and raises CellvisorError if one is wrong."""
        checked = [(want, kind, self._options(want, kind)) for want in wanted for kind in [self.find(want)]]
        ids = set(self._devices)
        taken = dict.fromkeys(self._blocked, "a device that the guest still holds")
        taken |= {device.slot: device.id for device in self._devices.values()}
        for want, _, options in checked:
            _reserve(want, options, ids, taken)
        count = self._count
        free = (slot for slot in SLOTS if slot not in taken)
        added = []
        for want, kind, options in checked:
            key = options.get("id") or want.fixed_id
            while not key or (key in ids and not options.get("id")):
                key = f"_{kind.verb or kind.name}{count}"
                count += 1
            slot = options.get("pci_device_id") or next(free, None)
            if slot is None:
                raise Conflict(f"{want.flag} {want.shown}: no free slot, all {len(SLOTS)} are taken",
                               hint="remove a device first")
            ids.add(key)
            full = {**defaults(kind.schema), **options}
            common = {*_COMMON, *(name for name in _CARE if name not in options)}
            left = {name: value for name, value in full.items() if name not in common and value is not None}
            added.append(Device(key, kind.name, kind.verb, slot, left))
        self._devices.update((device.id, device) for device in added)
        self._count = count
        return added

    def find(self, want: Wanted) -> DeviceType:
        """Return the type that `want` means. Raises UsageError listing the known ones."""
        for kind in self._catalog.types:
            if want.kind == (kind.verb if want.by_verb else kind.name):
                return kind
        if want.kind in self._catalog.broken:
            raise UsageError(f"{want.flag}: device type {want.kind} cannot be loaded: "
                             f"{self._catalog.broken[want.kind]}")
        import difflib

        known = sorted(kind.name for kind in self._catalog.types)
        close = difflib.get_close_matches(want.kind, known, 1)
        advice = f"did you mean {close[0]}? " if close else ""
        raise UsageError(f"{want.flag}: no device type {want.kind[:60]!r}",
                         hint=f"{advice}known types: {', '.join(known)}")

    def _options(self, want: Wanted, kind: DeviceType) -> dict[str, Any]:
        # Slots are judged here with Cloud Hypervisor's messages, not by the schema's limits.
        keys = dict(kind.schema["keys"])
        if "pci_device_id" in keys:
            limits = {"min": None, "max": None}
            keys["pci_device_id"] = {**keys["pci_device_id"], **limits}
        schema = {**kind.schema, "keys": keys}
        if want.body is None:
            options = parse_kv(want.text, schema, want.flag)
        else:  # a null is a key that was not given, whether it is known or not
            options = validate({name: value for name, value in want.body.items() if value is not None}, schema,
                               want.flag)
        _check_id(want, options.get("id"))
        if budget.GROUP in keys:
            self._check_limits(want.flag, options)
        return options

    def _check_limits(self, flag: str, options: Mapping[str, Any]) -> None:
        budget.check_limits(options, flag)
        group = options.get(budget.GROUP)
        if group is None:
            return
        budget.check_member(group, options, flag)
        if group not in self._groups:
            known = f"groups: {', '.join(self._groups)}" if self._groups else "the VM has none"
            raise UsageError(f"{flag}: {budget.GROUP}={group} is not a rate limit group of this VM", hint=known)


def _check_id(want: Wanted, key: str | None) -> None:
    if key is None:
        return
    if key.startswith("__"):
        raise UsageError(f"{want.flag}: id={key} begins with two underscores",
                         hint="those names are the VM's own")
    if not is_word(key):
        raise UsageError(f"{want.flag}: id={key[:80]!r} cannot name a device",
                         hint="letters, digits, '.', '_' and '-' can")


def _reserve(want: Wanted, options: Mapping[str, Any], ids: set[str], taken: dict[int, str]) -> None:
    key, slot = options.get("id"), options.get("pci_device_id")
    if key is not None:
        if key in ids:
            raise Conflict(f"{want.flag}: id={key} is used by another device")
        ids.add(key)
    if slot is None:
        return
    if slot == 0:
        raise UsageError(f"{want.flag}: pci_device_id=0 is reserved for the host bridge", hint="use 1 to 31")
    if not 0 < slot < 32:
        raise UsageError(f"{want.flag}: pci_device_id={slot} is outside the range 0..32", hint="use 1 to 31")
    if slot in taken:
        raise Conflict(f"{want.flag}: Valid PCI device identifier but already used: {slot}",
                       hint=f"by {taken[slot] or 'another device'}")
    taken[slot] = key or ""
