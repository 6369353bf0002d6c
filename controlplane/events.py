"""The VM's events: numbered, kept for late comers, published, and written to `--event-monitor`.

The monitor file has Cloud Hypervisor's records, JSON separated by empty lines:
{timestamp{secs, nanos} since start, source, event, properties}.
"""

from __future__ import annotations

import collections
import contextlib
import json
import os
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from cellvisor.core import log
from cellvisor.core.errors import UsageError
from cellvisor.core.wire.control import VERSION

HISTORY = 512
PER_GENERATION = 1 << 32  # numbers go on rising when a successor takes over, who does not know the last one


@dataclass(frozen=True, slots=True)
class Event:
    """`time` is in seconds since the epoch, `seq` counts from 1."""

    seq: int
    time: float
    name: str
    properties: dict[str, Any]

    def as_wire(self) -> dict[str, Any]:
        return {"v": VERSION, "seq": self.seq, "time": self.time, "event": self.name,
                "properties": self.properties}


class EventLog:
    """Takes events and hands them on. Sinks must not block and must not raise."""

    def __init__(self, generation: int = 1) -> None:
        self._history: collections.deque[Event] = collections.deque(maxlen=HISTORY)
        self._sinks: list[Callable[[Event], None]] = []
        self._seq = (generation - 1) * PER_GENERATION

    def add_sink(self, sink: Callable[[Event], None]) -> None:
        """Have `sink` called with each event from now on."""
        self._sinks.append(sink)

    def emit(self, name: str, /, **properties: Any) -> None:
        """Record and publish an event."""
        self._seq += 1
        event = Event(self._seq, time.time(), name, properties)
        self._history.append(event)
        shown = " ".join(f"{key}={value}" for key, value in properties.items())
        log.get("events").info("%s %s", name, shown)
        for sink in self._sinks:
            sink(event)

    def since(self, seq: int) -> list[Event]:
        """Return the kept events with a higher number."""
        return [event for event in self._history if event.seq > seq]


class Monitor:
    """Writes events to one file or pipe; a reader that does not read loses events, never delays the VM."""

    def __init__(self, path: str, fd: int = -1) -> None:
        """Open `path`, unless `fd` is what a predecessor had open."""
        self._began = time.monotonic_ns()
        self._fd = fd
        if fd >= 0:
            return
        flags = os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NONBLOCK | os.O_CLOEXEC
        try:
            self._fd = os.open(path, flags, 0o600)
        except OSError as error:
            raise UsageError(f"--event-monitor {path}: {error.strerror}") from None

    def fileno(self) -> int:
        """Return the descriptor that records go to."""
        return self._fd

    def write(self, event: Event) -> None:
        """Append one record."""
        secs, nanos = divmod(time.monotonic_ns() - self._began, 10**9)
        source, name = _source(event.name)
        named = {"id": event.properties["device"]} if "device" in event.properties else {}  # as Cloud Hypervisor has it
        record = {"timestamp": {"secs": secs, "nanos": nanos}, "source": source, "event": name,
                  "properties": {**named, **event.properties}}
        with contextlib.suppress(OSError):
            os.write(self._fd, json.dumps(record, indent=2, default=str).encode() + b"\n\n")

    def close(self) -> None:
        """Close the file."""
        os.close(self._fd)


def _source(name: str) -> tuple[str, str]:
    """Return Cloud Hypervisor's source and name of an event."""
    source, _, what = name.partition(".")
    if name == "vm.panicked":
        return "guest", "panic"
    if source == "device" and what in ("activated", "reset"):
        return "virtio-device", what
    return (source, what) if source in ("vm", "vmm") else ("vm", f"{source}-{what}")
