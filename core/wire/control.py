"""THE verb table of a VM's API and the shape of its requests, replies and events.

One table, served over ZeroMQ (ROUTER at `api.sock`, one msgpack map per message) and over HTTP by `path`
(controlplane/routes.py):
  request {"v": 1, "id": "...", "verb": "pause", "args": {...}}     the same id twice gives the same answer
  reply   {"v": 1, "id": "...", "ok": ...} or {"v": 1, "id": "...", "error": {code, status, message, hint}}
  event   topic frame `vm.booted`, then {"v": 1, "seq", "time", "event", "properties"} (PUB at `events.sock`)
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any

from cellvisor.core.errors import CellvisorError, UsageError
from cellvisor.core.wire.budget import RateLimitArgs
from cellvisor.core.wire.options import describe, option, validate

VERSION = 1
MAX_ID = 64
TEXT = "="  # key of add-* verbs: the options as text, instead of one key for each


@dataclass(frozen=True, slots=True, kw_only=True)
class NoArgs:
    """A verb without arguments."""


@dataclass(frozen=True, slots=True, kw_only=True)
class InfoArgs:
    """What `info` takes."""

    processes: bool = option(False, help="list the VM's processes with their memory, and tell CPU time (slower)")


@dataclass(frozen=True, slots=True, kw_only=True)
class EventsArgs:
    """What `events` takes."""

    since: int = option(0, help="only events with a higher sequence number", min=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class LogsArgs:
    """What `logs` takes."""

    since: int = option(0, help="where to begin, in bytes: what the last answer called next", min=0)
    lines: int | None = option(None, help="begin with so many lines before the end instead", min=0)


@dataclass(frozen=True, slots=True, kw_only=True)
class ConsoleArgs:
    """What `console` takes. `read` answers {data, next, lost, closed}, `write` {written}; data is base64."""

    action: str = option("read", help="what to do", choices=("read", "write", "resize"))
    id: str | None = option(None, help="which console, the first that is a pty or a socket if none is named")
    since: int = option(-1, help="read: what the last answer called next", min=-1)
    timeout: float = option(2.0, help="seconds to wait for a byte, or for room for one", min=0, max=60)
    data: str = option("", help="write: what is typed", length=8192)
    columns: int = option(80, help="resize: how wide the terminal is", min=1, max=65535)
    rows: int = option(25, help="resize: how high the terminal is", min=1, max=65535)


@dataclass(frozen=True, slots=True, kw_only=True)
class ObjectArgs:
    """Any object: the verb itself knows the keys, which depend on the device types there are."""


@dataclass(frozen=True, slots=True, kw_only=True)
class DeviceArgs:
    """What a verb about one device takes."""

    id: str = option(help="the device")


@dataclass(frozen=True, slots=True, kw_only=True)
class ResizeDiskArgs:
    """What `resize-disk` takes."""

    id: str = option(help="name of the disk")
    desired_size: int = option(help="its new size in bytes", size=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class SetLinkArgs:
    """What `set-link` takes."""

    id: str = option(help="name of the network card")
    link: str = option(help="pull its cable, put it in, or have the guest tell its neighbours where it is",
                       choices=("up", "down", "announce"))


@dataclass(frozen=True, slots=True, kw_only=True)
class SwapDiskArgs:
    """What `swap-disk` takes."""

    id: str = option(help="name of the disk")
    path: str = option(help="the image that it has from now on", path=True)


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoveArgs:
    """What `remove-device` takes."""

    id: str = option(help="name of the device")
    timeout: float = option(30.0, help="seconds until a silent guest counts as timed out", min=0, max=86400)
    host_only: bool = option(False, help="take the device away without asking: the guest's driver loses what it has "
                                         "not written and may hang until the guest reboots")


@dataclass(frozen=True, slots=True, kw_only=True)
class OpsArgs:
    """What `ops` takes. `seen`: return as soon as the state is another one."""

    action: str = option("list", help="what to do", choices=("list", "show", "wait", "cancel"))
    id: str | None = option(None, help="an operation's id, or a device's for its latest one")
    seen: str = option("", help="wait until the state is not this one")
    timeout: float = option(30.0, help="seconds to wait", min=0, max=60)


@dataclass(frozen=True, slots=True)
class Verb:
    """One thing that a VM can be asked.

    `reads` verbs change nothing (GET over HTTP), `path` is Cloud Hypervisor's HTTP name below /api/v1/ if it has
    one (`http_path` is for all), `alias` the verb that really serves it. `answers`: what a change answers is a body
    over HTTP too. `empty`: works while no VM is created. `takes_fds`: descriptors may come with it. A verb that is
    not `ready` is refused: "not supported yet".
    """

    name: str
    help: str
    args: type[Any] = NoArgs
    reads: bool = False
    path: str = ""
    alias: str = ""
    ready: bool = True
    answers: bool = False
    empty: bool = False
    takes_fds: bool = False

    @property
    def http_path(self) -> str:
        return self.path or f"vm.{self.name}"


_TABLE = (
    Verb("ping", "answer with version and process id", reads=True, path="vmm.ping", empty=True),
    Verb("info", "tell configuration, state, devices and boot stages", InfoArgs, reads=True, path="vm.info"),
    Verb("devices", "list the devices with slot, type, process and state", reads=True),
    Verb("events", "return the latest events; new ones are published on events.sock", EventsArgs, reads=True,
         empty=True),
    Verb("logs", "tell what is in the log of all processes, in pieces", LogsArgs, reads=True, empty=True),
    Verb("console", "read from, type at, or resize a console that is a pty or a socket", ConsoleArgs, answers=True),
    Verb("pause", "stop the vCPUs and quiesce every device", path="vm.pause"),
    Verb("resume", "go on after a pause", path="vm.resume"),
    Verb("reset", "reset the machine as its reset button would"),
    Verb("reboot", "the same as reset", path="vm.reboot", alias="reset"),
    Verb("power-button", "press the ACPI power button: the guest may shut down", path="vm.power-button"),
    Verb("shutdown", "end the VM now; with --api-socket the process stays for another boot", path="vm.shutdown"),
    Verb("shutdown-vmm", "end the process and its VM: every process, socket and file of it", path="vmm.shutdown",
         empty=True),
    Verb("counters", "tell every device's counters", reads=True, path="vm.counters"),
    Verb("create", "take a configuration (VmConfig) without booting it", ObjectArgs, path="vm.create", empty=True),
    Verb("boot", "boot the VM that was created", path="vm.boot"),
    Verb("delete", "end the VM and forget its configuration", path="vm.delete", empty=True),
    Verb("nmi", "inject a non-maskable interrupt into every vCPU", path="vm.nmi"),
    Verb("validate", "tell whether another verb would be refused now, without doing it", ObjectArgs, answers=True,
         empty=True, takes_fds=True),
    Verb("capacity", "tell free slots and free memory room", reads=True),
    Verb("resize", "change vCPUs, memory or balloon", path="vm.resize", ready=False),
    Verb("resize-zone", "change a memory zone's size", path="vm.resize-zone", ready=False),
    Verb("resize-disk", "change a disk's size", ResizeDiskArgs, path="vm.resize-disk"),
    Verb("swap-disk", "give a disk another image; whoever uses the old one in the guest should have let it go",
         SwapDiskArgs),
    Verb("set-rate-limit", "change how much a disk, a network card or a rate limit group may do", RateLimitArgs),
    Verb("add-disk", "plug a disk", ObjectArgs, path="vm.add-disk", answers=True),
    Verb("add-rng", "plug an entropy source", ObjectArgs, answers=True),
    Verb("add-console", "plug a console", ObjectArgs, answers=True),
    Verb("add-net", "plug a network card", ObjectArgs, path="vm.add-net", answers=True, takes_fds=True),
    Verb("set-link", "pull a network card's cable, put it in, or have the guest announce itself", SetLinkArgs),
    Verb("add-fs", "plug a shared directory", path="vm.add-fs", ready=False),
    Verb("add-pmem", "plug persistent memory", path="vm.add-pmem", ready=False),
    Verb("add-vsock", "plug a socket device", path="vm.add-vsock", ready=False),
    Verb("add-device", "plug a device of the host", path="vm.add-device", ready=False),
    Verb("add-user-device", "plug a vfio-user device", path="vm.add-user-device", ready=False),
    Verb("add-generic-vhost-user", "plug a vhost-user device", path="vm.add-generic-vhost-user", ready=False),
    Verb("add-vdpa", "plug a vDPA device", path="vm.add-vdpa", ready=False),
    Verb("add-virtio", "plug a device of any type", ObjectArgs, answers=True),
    Verb("remove-device", "have the guest give a device back, then end it", RemoveArgs, path="vm.remove-device"),
    Verb("restart-device", "start a new process for a parked device: what the guest waits for is done", DeviceArgs),
    Verb("upgrade-device", "give a device (or all) the code that is on disk now, while the guest runs on", DeviceArgs),
    Verb("drain-device", "give a parked device up: all that is asked of it fails until the driver's reset", DeviceArgs),
    Verb("snapshot", "save the VM's state", path="vm.snapshot", ready=False),
    Verb("restore", "start from a saved state", path="vm.restore", ready=False),
    Verb("coredump", "write the guest's memory to a file", path="vm.coredump", ready=False),
    Verb("send-migration", "move the VM to another host", path="vm.send-migration", ready=False),
    Verb("receive-migration", "take a VM from another host", path="vm.receive-migration", ready=False),
    Verb("ops", "list, show, wait for or cancel operations", OpsArgs, answers=True),
)

VERBS: Mapping[str, Verb] = MappingProxyType({verb.name: verb for verb in _TABLE})
PATHS: Mapping[str, Verb] = MappingProxyType({verb.http_path: verb for verb in _TABLE})


@dataclass(frozen=True, slots=True)
class Request:
    """A request that passed the table: `verb` is never an alias, `args` has every default filled in.

    `fds` came with it; what the verb does not dup() is closed when it has been answered.
    """

    id: str
    verb: str
    args: dict[str, Any]
    fds: tuple[int, ...] = field(default=(), compare=False)


def look_up(name: object) -> Verb:
    """Return the verb that serves `name`. Raises UsageError for unknown and not yet supported ones."""
    verb = VERBS.get(name) if isinstance(name, str) else None
    if verb is None:
        import difflib

        shown = repr(name) if len(repr(name)) <= 60 else repr(name)[:57] + "..."
        close = difflib.get_close_matches(name[:60], VERBS, 1) if isinstance(name, str) else []
        ready = ", ".join(verb.name for verb in _TABLE if verb.ready)
        hint = f"did you mean {close[0]}?" if close else f"known verbs: {ready}"
        raise UsageError(f"unknown verb {shown}", hint=hint, code="unknown-verb")
    if not verb.ready:
        raise UsageError(f"{verb.name}: not supported yet", code="not-supported")
    return VERBS[verb.alias] if verb.alias else verb


def check_args(verb: Verb, args: object) -> dict[str, Any]:
    """Check arguments and fill in defaults. Raises UsageError naming verb and key."""
    if verb.args is ObjectArgs:
        if not isinstance(args, dict):
            raise UsageError(f"{verb.name}: {type(args).__name__} instead of an object")
        return args
    schema = describe(verb.args)
    given = validate(args, schema, verb.name)
    return {name: given.get(name, rule.get("default")) for name, rule in schema["keys"].items()}


def check_fds(verb: Verb, fds: Sequence[int]) -> None:
    """Raise UsageError for descriptors that nobody wants."""
    if fds and not verb.takes_fds:
        raise UsageError(f"{verb.http_path} takes no descriptors, {len(fds)} came")


def repeats(name: str, args: Mapping[str, Any]) -> bool:
    """Tell whether asking twice is as good as asking once."""
    if name in ("ops", "console"):
        return args.get("action") not in ("cancel", "write")
    verb = VERBS.get(name)
    return verb is not None and verb.reads


def request_id(body: Mapping[str, Any]) -> str | None:
    """Return the id of a request that may be malformed, or None: an error reply then has no id."""
    key = body.get("id")
    return key if isinstance(key, str) and 0 < len(key) <= MAX_ID else None


def parse_request(body: Mapping[str, Any]) -> Request:
    """Check a request that may be hostile. Raises UsageError and nothing else."""
    if body.get("v") != VERSION or isinstance(body.get("v"), bool):
        raise UsageError("request: v is missing or not 1", hint=f"this VM speaks version {VERSION}",
                         code="bad-version")
    key = request_id(body)
    if key is None:
        raise UsageError(f"request: id is missing or not a string of 1 to {MAX_ID} characters")
    extra = set(body) - {"v", "id", "verb", "args"}
    if extra:
        raise UsageError(f"request: unknown key {sorted(map(repr, extra))[0][:40]}",
                         hint="known keys: v, id, verb, args")
    verb = look_up(body.get("verb"))
    args = body.get("args")
    return Request(key, verb.name, check_args(verb, {} if args is None else args))


def request(key: str, verb: str, args: Mapping[str, Any]) -> dict[str, Any]:
    """Make a request body."""
    return {"v": VERSION, "id": key, "verb": verb, "args": dict(args)}


def reply(key: str | None, value: object) -> dict[str, Any]:
    """Make the body of a reply: an error if `value` is one, else a success."""
    if isinstance(value, CellvisorError):
        return {"v": VERSION, "id": key, "error": value.as_wire()}
    return {"v": VERSION, "id": key, "ok": value}
