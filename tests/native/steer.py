"""Steer a running VM of the native tests: look at its devices, kill or stop their processes, wait for events."""

from __future__ import annotations

import os
import signal
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

from cellvisor.core.errors import CellvisorError
from cellvisor.ctl.client import Client
from tests.native import cellvisor
from tests.native.conftest import Vm
from tests.native.guest import Running

SECONDS = 60.0


class Steer:
    """A running guest and a client of its VM."""

    def __init__(self, running: Running, client: Client) -> None:
        self.running, self.client = running, client
        self.seen = 0

    def device(self, kind: str = "blk") -> dict[str, Any]:
        """Return what the VM tells of the first device of a type."""
        listed: list[dict[str, Any]] = self.client.call("devices")["devices"]
        return next(one for one in listed if one["type"] == kind)

    def pid(self, role: str) -> int:
        """Return the process of "core", "nursery" or "controlplane"."""
        found = self.client.call("info", processes=True)["processes"]
        return int(next(one for one in found if one["role"] == role)["pid"])

    def signal(self, kind: str = "blk", number: int = signal.SIGKILL) -> int:
        """Send a signal to a device's process and return its pid; events from now on count for wait()."""
        self.mark()
        end = time.monotonic() + SECONDS
        while not (pid := int(self.device(kind)["pid"] or 0)):
            assert time.monotonic() < end, f"nobody serves the {kind}"
        os.kill(pid, number)
        return pid

    def mark(self) -> None:
        """Have wait() look at later events only."""
        self.seen = max((event["seq"] for event in self.events(0)), default=0)

    def events(self, since: int | None = None) -> list[dict[str, Any]]:
        """Return the events since the mark."""
        listed: list[dict[str, Any]] = self.client.call("events", since=self.seen if since is None else since)["events"]
        return listed

    def names(self) -> list[str]:
        """Return the names of the events since the mark."""
        return [event["event"] for event in self.events()]

    def wait(self, name: str, seconds: float = SECONDS) -> dict[str, Any]:
        """Wait for an event since the mark; returns its properties."""
        end = time.monotonic() + seconds
        while True:
            for event in self.events():
                if event["event"] == name:
                    return dict(event["properties"])
            assert time.monotonic() < end, f"no {name} in {seconds} s, only {self.names()}\n{self.running.text[-500:]}"
            time.sleep(0.02)


@contextmanager
def steer(vm: Vm, cmdline: str, **options: Any) -> Iterator[Steer]:
    """Start a guest and connect to its VM."""
    running = vm.start(cmdline, **options)
    places = Path(cellvisor.runtime_dir(vm.where)) / "cellvisor"
    client, end = None, time.monotonic() + SECONDS
    while client is None:
        assert time.monotonic() < end, f"no VM in {places}"
        assert running.process.poll() is None, running.log.read_text()
        time.sleep(0.02)
        with suppress(CellvisorError, StopIteration, FileNotFoundError):
            client = Client(str(next(places.iterdir())), timeout=30)
    try:
        while True:
            with suppress(CellvisorError):
                if client.call("info")["state"] == "Running":
                    break
            assert time.monotonic() < end, running.log.read_text()
            time.sleep(0.02)
        yield Steer(running, client)
    finally:
        client.close()
