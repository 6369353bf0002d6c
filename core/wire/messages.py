"""The messages between processes. One enum is one protocol; every body is a msgpack map.

Worker <-> core (ZeroMQ, worker DEALER, core ROUTER; identity `<device>/<generation>/<token>`):

    worker                         core
      | HELLO {spec}           --->  |   core builds the PCI function, makes eventfds and the state memfd
      |  (AF_UNIX fds socket: take) |   worker asks for its descriptors, core sends them with SCM_RIGHTS
      | READY {}               --->  |   memory is mapped: the function may be shown to the guest
      | <--- ACTIVATE {epoch, queues, features, paused}         on DRIVER_OK; never waited for
      | <--- RESET {epoch}           |
      | RESET_DONE {epoch}     --->  |   only now device_status reads 0
      | <--- PAUSE {}    PAUSED --->  |   nothing in execution, nothing will be fetched
      | <--- RESUME {}               |
      | <--- CONFIG_WRITE {offset, data}
      | CONFIG {data}          --->  |   new device config bytes; core raises the config interrupt
      | NEEDS_RESET {reason}   --->  |   the guest broke a rule
      | FAILED {reason, refused} --> |   cannot serve (refused: open failed, lock held by ...; else a mistake)
      | POISON {queue, text}   --->  |   a request that killed its worker thrice was refused
      | BACKEND {change, text} --->  |   what it stands on was "lost" or "found" again
      | COUNTERS {values}      --->  |
      | <--- CALL {id, verb, args}   REPLY {id, ok|error} --->   e.g. resize a disk or a console
      | <--- END {}                  |   release and exit 0

A drain incarnation says HELLO {drain: true}: it fails all requests until a RESET, and ends with RESET_DONE.
Frames are [identity][body]; body is {"k": kind, ...}. A message whose identity is unknown is dropped.
"""

from __future__ import annotations

from enum import StrEnum
from typing import Any

import msgpack

from cellvisor.core.errors import UsageError

PROTOCOL = 1
MAX_MESSAGE = 4 << 20
MAX_REASON = 500  # characters of why a worker cannot serve
MAX_ITEMS = 1 << 14  # of one list or map: a header may claim 2^32, and msgpack allocates what it claims


class ToCore(StrEnum):
    """What a worker may say to core."""

    HELLO = "hello"
    READY = "ready"
    RESET_DONE = "reset-done"
    PAUSED = "paused"
    CONFIG = "config"
    NEEDS_RESET = "needs-reset"
    FAILED = "failed"
    POISON = "poison"
    BACKEND = "backend"
    COUNTERS = "counters"
    REPLY = "reply"


class ToWorker(StrEnum):
    """What core says to a worker."""

    ACTIVATE = "activate"
    RESET = "reset"
    PAUSE = "pause"
    RESUME = "resume"
    CONFIG_WRITE = "config-write"
    CALL = "call"
    END = "end"


class CoreVerb(StrEnum):
    """What the controlplane asks of core: {"id", "verb", "args"} -> {"id", "ok"} or {"id", "error"}.

    CONFIGURE, then ATTACH for each device before its worker is forked, "device.ready" for all, BOOT. Events come
    without an id as {"event", "properties"}: device.ready, device.failed {device, generation, reason, refused},
    device.expelled {reason} (core kills a worker that lies or hangs), device.poison {queue, text},
    device.backend {change: lost|found, text}, device.reset-waits {device} (nobody is there to finish a reset),
    vm.booting, booted, paused, resumed, rebooting, rebooted, shutdown (the guest powered off), crashed {reason}.
    PLUG {device} shows an attached device to a running guest, UNPLUG {device, force?, cancel?, check?} has the guest
    give it back (check: only says whether it could), DETACH {device} forgets one that is in no slot.
    Events: slot.enumerated {device, slot, how: ost|driver|reset}, slot.bound, slot.ost {event, status}, slot.ejected
    {how: guest|reset|force}, slot.freed, eject.unexpected.
    Times are in ns of CLOCK_MONOTONIC. The user's terminal is deposited as `<device>/tty` (output) and
    `<device>/tty-in`; the serial port's device is `__serial`.

    Any args may carry `blob`, the controlplane's state after the step (core/custody.py); STATE only stores one, or
    without one returns the last. QUIESCE {device} has one worker finish what it executes and fetch nothing more
    -> {late, alive}; then UNQUIESCE lets it go on, or RELEASE ends it: its descriptors and locks are free.
    """

    CONFIGURE = "configure"
    ATTACH = "attach"
    DETACH = "detach"
    PLUG = "plug"
    UNPLUG = "unplug"
    BOOT = "boot"
    PAUSE = "pause"
    RESUME = "resume"
    RESET = "reset"
    POWER_BUTTON = "power-button"
    NMI = "nmi"
    INFO = "info"
    DEVICES = "devices"
    CALL = "call"
    QUIT = "quit"
    STATE = "state"
    QUIESCE = "quiesce"
    UNQUIESCE = "unquiesce"
    RELEASE = "release"


class ToNursery(StrEnum):
    """What the controlplane asks of the nursery (AF_UNIX SOCK_SEQPACKET, descriptors by SCM_RIGHTS).

    SPAWN {device, generation, type, options, token, run_dir, suspect?, drain?} -> SPAWNED {device, generation, pid}
    with a pidfd; later EXITED {device, generation, pid, status}, status being "exit N" or "signal N". CHILDREN ->
    CHILDREN {children: [[device, generation, pid], ...]} with their pidfds. WARD {pids} with pidfds: workers of a
    nursery that died, to be killed with the others when core is gone. TRY {device, type, options} with the end of a
    pipe: a process that only finds out whether such a device can be made writes {reason} there, "" if it can, and ends.
    """

    CATALOG = "catalog"
    SPAWN = "spawn"
    TRY = "try"
    KILL = "kill"
    CHILDREN = "children"
    WARD = "ward"
    QUIT = "quit"


class FromNursery(StrEnum):
    """What the nursery answers or reports."""

    CATALOG = "catalog"
    SPAWNED = "spawned"
    EXITED = "exited"
    CHILDREN = "children"
    ERROR = "error"


def plain(text: object, most: int = 300) -> str:
    """Return `text` of a worker as one short line without anything that a terminal would obey."""
    kept = (text if isinstance(text, str) else repr(text)[:most])[:most]
    return "".join(c if c.isprintable() else "?" for c in kept)


def pack(body: dict[str, Any]) -> bytes:
    """Encode one message."""
    data: bytes = msgpack.packb(body, use_bin_type=True)
    return data


def unpack(data: bytes) -> dict[str, Any]:
    """Decode one message from a peer that may be hostile. Raises UsageError, never anything else."""
    if len(data) > MAX_MESSAGE:
        raise UsageError(f"message of {len(data)} bytes, at most {MAX_MESSAGE}")
    try:
        body = msgpack.unpackb(data, raw=False, strict_map_key=True, ext_hook=_no_extension,
                               max_array_len=MAX_ITEMS, max_map_len=MAX_ITEMS)
    except (ValueError, TypeError, msgpack.exceptions.UnpackException, RecursionError, MemoryError) as error:
        raise UsageError(f"message is not msgpack: {type(error).__name__}") from None
    if not isinstance(body, dict):
        raise UsageError(f"message is not a map but {type(body).__name__}")
    return body


def _no_extension(code: int, data: bytes) -> None:
    raise ValueError(f"extension type {code}")
