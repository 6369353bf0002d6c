"""A guest with PCI hotplug (tests/guest/hotplug.c) and a client that adds, removes, counts and waits."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire.control import TEXT
from cellvisor.ctl.client import Client
from tests.native import cellvisor
from tests.native.conftest import Vm
from tests.native.guest import Running, make_disk


class Steered:
    """A running VM with a client; `disk` is the image to add."""

    def __init__(self, vm: Vm, running: Running) -> None:
        self.vm, self.running = vm, running
        self.disk = make_disk(vm.where / "added.raw", 16 << 20)
        self.directory = Path(cellvisor.runtime_dir(vm.where)) / "cellvisor"
        self.client: Client = eventually(lambda: self.connect(self.directory), "the API")

    def reconnect(self) -> None:
        self.client.close()
        self.client = eventually(lambda: self.connect(self.directory), "the next controlplane")

    def connect(self, directory: Path) -> Client | None:
        for name in directory.iterdir() if directory.exists() else ():
            with suppress(CellvisorError):
                client = Client(str(name), timeout=60)
                try:
                    client.call("ping")
                    return client
                except CellvisorError:
                    client.close()
        return None

    def another_client(self) -> Client:
        return Client(self.client.path, timeout=60)

    def add(self, text: str = "", verb: str = "add-disk", **more: Any) -> dict[str, Any]:
        options = f"path={self.disk},id=test0" if verb == "add-disk" and not text else text
        answer = self.client.call(verb, **more, **{TEXT: options})
        return {"id": answer["id"], "bdf": answer["bdf"]}

    def remove(self, key: str = "test0", **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.call("remove-device", id=key, **more)
        return answer

    def wait(self, key: str = "test0", timeout: float = 30) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.call("ops", action="wait", id=key, timeout=timeout)
        return answer

    def done(self, key: str = "test0") -> dict[str, Any]:
        operation = self.wait(key)
        assert operation["state"] == "done", (operation, self.running.text)
        return operation

    def devices(self) -> dict[str, dict[str, Any]]:
        return {one["id"]: one for one in self.client.call("devices")["devices"]}

    def operations(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.call("ops", action="list")["operations"]
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        return [one["properties"] for one in self.client.call("events")["events"] if one["event"] == name]

    def processes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.call("info", processes=True)["processes"]
        return found

    def footprint(self) -> dict[str, int]:
        """Count what must not grow, once it has settled: core lets a worker's last descriptors go when it has seen
        its end, which may be after the answer."""
        before, now = {}, self.count()
        while before != now:
            time.sleep(0.1)
            before, now = now, self.count()
        return now

    def count(self) -> dict[str, int]:
        """Count descriptors of each kind of process, mappings of core, processes, slots."""
        counted = {"free slots": self.client.call("capacity")["slots"]["free"]}
        for one in self.processes():
            if one["role"] != "worker":
                counted[f"{one['role']} fds"] = len(os.listdir(f"/proc/{one['pid']}/fd"))
            counted[f"{one['role']}s"] = counted.get(f"{one['role']}s", 0) + 1
            if one["role"] == "core":
                maps = Path(f"/proc/{one['pid']}/maps").read_text()
                counted["core memfd maps"] = maps.count("/memfd:")
        return counted


def eventually(condition: Callable[[], Any], what: str, timeout: float = 30) -> Any:
    until = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


def starting(vm: Vm) -> Iterator[Callable[..., Steered]]:
    """Yield what starts the guest with `test=hotplug WORDS` and waits until it listens."""
    made: list[Steered] = []

    def begin(words: str = "", *, listening: bool = True, **options: Any) -> Steered:
        running = vm.start(f"test=hotplug {words}", **{"console": "null", **options})
        made.append(Steered(vm, running))
        if listening:
            running.wait_for("listening=1")
        return made[-1]

    yield begin
    for steered in made:
        if steered.running.process.poll() is not None:  # its controlplane died: a successor has it, or nobody
            with suppress(CellvisorError):
                steered.client.call("shutdown")
        steered.client.close()


def vm_processes(vm: Steered) -> list[int]:
    """Return the workers of test0, by the name that a worker gives itself."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                if Path(f"/proc/{name}/comm").read_text().strip() == "cv-test0":
                    environ = Path(f"/proc/{name}/environ").read_bytes()
                    if cellvisor.runtime_dir(vm.vm.where).encode() in environ:
                        found.append(int(name))
    return found
