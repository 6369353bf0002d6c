"""The command line of `cellvisor run`: Cloud Hypervisor's flags, refused by name when not there (yet).

Only what can be judged without a device catalog is judged here; device options stay text (`Wanted`) until the
nursery has described its types. Parsing imports nothing slow: core is started right after it.
"""

from __future__ import annotations

import argparse
import os
from dataclasses import dataclass
from typing import NoReturn

from cellvisor.controlplane import config
from cellvisor.controlplane.config import Cpus, Memory, Payload, Serial
from cellvisor.controlplane.inventory import Wanted
from cellvisor.controlplane.vmconfig import Order
from cellvisor.core.errors import UsageError
from cellvisor.core.wire.budget import RateLimitGroup
from cellvisor.core.wire.options import build, describe, parse_kv
from cellvisor.core.wire.places import MAX_SOCKET_PATH, check_name

LATER = (
    "balloon", "debug-console", "device", "firmware", "fs", "generic-vhost-user", "gdb", "landlock",
    "landlock-rules", "memory-zone", "numa", "pci-segment", "platform", "pmem", "pvpanic",
    "restore", "rtc", "seccomp", "tpm", "user-device", "vdpa", "vsock", "watchdog",
)

SHAPING = ("--cpus", "--memory", "--disk", "--net", "--rng", "--console", "--serial", "--device-type", "--initramfs",
           "--cmdline", "--rate-limit-group", "--dry-run")  # what makes no sense without a kernel

_EXAMPLE = """example:
  cellvisor run --kernel vmlinuz --initramfs initrd.img --cmdline "console=hvc0 root=/dev/vda1" \\
      --cpus boot=2 --memory size=1G --disk path=root.raw path=data.raw,readonly=on --name web

exit status: 0 the guest powered off, or `cellvisor shutdown`; 1 the VM failed; 2 it could not be started;
  130, 143, 129 ended by Ctrl-C, SIGTERM, SIGHUP.
"""


@dataclass(frozen=True, slots=True)
class RunFlags:
    """The checked command line."""

    payload: Payload | None
    cpus: Cpus
    memory: Memory
    serial: Serial
    wanted: tuple[Wanted, ...]
    name: str | None = None
    verbosity: int = 0
    log_file: str | None = None
    event_monitor: str | None = None
    report: str | None = None
    api_socket: str | None = None
    metrics: str | None = None
    groups: tuple[RateLimitGroup, ...] = ()
    api: str | None = None
    dry_run: bool = False

    @property
    def order(self) -> Order | None:
        """Return what is to be booted at once, None for a process that waits for vm.create."""
        if self.payload is None:
            return None
        return Order(self.payload, self.cpus, self.memory, self.serial, self.wanted, self.groups)


class _Parser(argparse.ArgumentParser):
    def error(self, message: str) -> NoReturn:
        raise UsageError(message.replace("argument ", "", 1) if message.startswith("argument -") else message,
                         hint="see cellvisor run --help")


def parse(argv: list[str]) -> RunFlags:
    """Read the flags. Raises UsageError, one line naming flag and value; SystemExit(0) after --help."""
    parser = _make_parser()
    given, unknown = parser.parse_known_args(argv)
    if unknown:
        raise _unknown(unknown[0], parser)
    api_socket = None if given.api_socket is None else _api_socket(given.api_socket)
    if not given.kernel:
        shaping = next((flag for flag in SHAPING if _was_given(argv, flag)), None)
        if api_socket is None or shaping is not None:
            raise UsageError("--kernel is missing" + (f": {shaping} needs it" if shaping and api_socket else ""),
                             hint="give a bzImage or an uncompressed vmlinux" if api_socket is None else
                             "or give --api-socket alone, and the VM by vm.create")
    cpus = build(Cpus, parse_kv(given.cpus, describe(Cpus), "--cpus"), "--cpus")
    memory = build(Memory, parse_kv(given.memory, describe(Memory), "--memory"), "--memory")
    return RunFlags(
        payload=config.check_payload(Payload(given.kernel, given.initramfs, given.cmdline)) if given.kernel else None,
        cpus=config.check_cpus(cpus),
        memory=config.check_memory(memory),
        serial=Serial.from_text(given.serial),
        wanted=_wanted(given) if given.kernel else (),
        name=None if given.name is None else check_name(given.name),
        verbosity=given.verbose,
        log_file=os.path.abspath(given.log_file) if given.log_file else None,
        event_monitor=_event_monitor(given.event_monitor),
        report=given.report,
        api_socket=api_socket,
        metrics=None if given.metrics is None else _metrics(given.metrics),
        groups=config.check_groups("--rate-limit-group", [
            parse_kv(text, describe(RateLimitGroup), "--rate-limit-group")
            for group in given.rate_limit_group for text in group]),
        api=None if given.api is None else _api(given.api),
        dry_run=given.dry_run,
    )


def _make_parser() -> _Parser:
    parser = _Parser(prog="cellvisor run", allow_abbrev=False, epilog=_EXAMPLE,
                     description="Boot a VM in the foreground; every device is a process of its own.",
                     formatter_class=argparse.RawDescriptionHelpFormatter)
    add = parser.add_argument
    add("--kernel", metavar="PATH", help="bzImage or ELF vmlinux")
    add("--initramfs", metavar="PATH", help="initial file system of the guest")
    add("--cmdline", metavar="TEXT", default="", help="kernel command line")
    add("--cpus", metavar="boot=N,max=N", default="", help="vCPUs (boot=1)")
    add("--memory", metavar="size=N,...", default="",
        help="guest memory (size=512M); prefault, hugepages, thp")
    add("--disk", metavar="path=P,...", nargs="+", action="append", default=[], help="disks, in order")
    add("--net", metavar="tap=T,...", nargs="+", action="append", default=[],
        help="network cards, in order: tap, ip, mask, mac, host_mac, mtu, fd, num_queues, queue_size, offload_*")
    add("--rate-limit-group", metavar="id=NAME,...", nargs="+", action="append", default=[],
        help="limits that the disks with rate_limit_group=NAME share: bw_size, ops_refill_time, ... as for --disk")
    add("--rng", metavar="src=P,...", nargs="?", const="", default="",
        help="entropy source (src=/dev/urandom)")
    add("--console", metavar="MODE", default="tty",
        help="virtio console hvc0: off|null|tty|pty|file=P|socket=P (tty)")
    add("--serial", metavar="MODE", default="null", help="serial port ttyS0: the same modes (null)")
    add("--device-type", metavar="NAME,key=value", nargs="+", action="append", default=[],
        help="devices of any type in the catalog")
    add("--name", help="name of the VM (the first free of vm0, vm1, ...)")
    add("--api-socket", metavar="PATH",
        help="serve Cloud Hypervisor's HTTP API: PATH, path=PATH or fd=N; without --kernel wait for vm.create")
    add("--api", metavar="tcp://ADDR:PORT,...",
        help="serve remote clients: only with keys (key=FILE) and for those of an allow-list (allow=FILE)")
    add("--event-monitor", metavar="path=P|fd=N", help="write every event as a JSON record")
    add("--metrics", metavar="PATH|tcp://127.0.0.1:PORT", help="serve Prometheus metrics at a socket or local port")
    add("--log-file", metavar="PATH", help="collect the log of all processes of the VM (`log` in its run directory)")
    add("--report", metavar="PATH", help="at the end write processes, memory and boot stages as JSON")
    add("--dry-run", action="store_true", help="only say, as a run would, what is wrong with it; no guest is booted")
    add("-v", "--verbose", action="count", default=0, help="log more to stderr; twice for debugging")
    return parser


def _unknown(word: str, parser: argparse.ArgumentParser) -> UsageError:
    flag = word.partition("=")[0]
    if not flag.startswith("-"):
        return UsageError(f"unexpected argument {word[:80]!r}", hint="see cellvisor run --help")
    if flag.lstrip("-") in LATER:
        return UsageError(f"{flag}: not supported yet", code="not-supported")
    import difflib

    names = (name for action in parser._actions for name in action.option_strings)
    known = sorted(name for name in names if name.startswith("--"))
    close = difflib.get_close_matches(flag, known, 1)
    advice = f"did you mean {close[0]}? " if close else ""
    return UsageError(f"unknown flag {flag[:80]}", hint=f"{advice}known flags: {' '.join(known)}")


def _wanted(given: argparse.Namespace) -> tuple[Wanted, ...]:
    """List the devices in the order of their slots: console, disks, net, rng, then the rest."""
    found = []
    if given.console != "off":
        found.append(Wanted("--console", "console", given.console, "__console"))
    found += [Wanted("--disk", "disk", text) for group in given.disk for text in group]
    found += [Wanted("--net", "net", text) for group in given.net for text in group]
    found.append(Wanted("--rng", "rng", given.rng, "__rng"))
    for text in (text for group in given.device_type for text in group):
        name, _, rest = text.partition(",")
        if not name or "=" in name:
            raise UsageError(f"--device-type {text[:80]!r} does not begin with the name of a type",
                             hint="write --device-type NAME,key=value,...")
        found.append(Wanted("--device-type", name, rest, by_verb=False))
    return tuple(found)


def _event_monitor(text: str | None) -> str | None:
    """Return a path, also for an inherited descriptor."""
    if text is None:
        return None
    key, _, value = text.partition("=")
    if key == "path" and value:
        return value
    if key == "fd" and value.isdecimal():
        return f"/proc/self/fd/{value}"
    raise UsageError(f"--event-monitor {text[:80]!r}", hint="write path=FILE or fd=NUMBER")


def _metrics(text: str) -> str:
    from cellvisor.controlplane.metricsdoor import check_place  # asyncio, for those who ask for it

    return check_place(text)


def _api(text: str) -> str:
    from cellvisor.controlplane.remote import check  # zmq, for those who ask for it

    return check(text)


def _was_given(argv: list[str], flag: str) -> bool:
    return any(word == flag or word.startswith(flag + "=") for word in argv)


def _api_socket(text: str) -> str:
    """Return an absolute path, or "fd=N" for an inherited listening socket."""
    key, equals, value = text.partition("=")
    if key == "fd" and value.isdecimal():
        return text
    path = value if key == "path" else text
    if not path or (equals and key == "fd"):
        raise UsageError(f"--api-socket {text[:80]!r}", hint="write PATH, path=PATH or fd=NUMBER")
    if len(os.fsencode(os.path.abspath(path))) > MAX_SOCKET_PATH:
        raise UsageError(f"--api-socket {path[:80]}: socket paths have at most {MAX_SOCKET_PATH} bytes",
                         hint="choose a shorter one")
    return os.path.abspath(path)
