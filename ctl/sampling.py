"""What VMs do right now: two looks at each one's totals make rates. Used by `top`; draws nothing."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

from cellvisor.core.errors import CellvisorError, NotFound
from cellvisor.core.wire import places
from cellvisor.ctl import remotes
from cellvisor.ctl.client import Client
from cellvisor.ctl.errand import Errand

PATIENCE = 5.0  # seconds for an answer
OPERATIONS = ("_ops", "requests", "_frames", "_packets")  # how counters of operations end
NOBODY = "vm"
STATES_OF_NOBODY = ("dead", "parked", "failed", "ended")


@dataclass(frozen=True, slots=True)
class Row:
    """One line of top. `cpu` in percent of a host CPU, `pss` in KiB, `latency` in us; None: nobody knows."""

    vm: str
    kind: str  # vcpu, device, core, nursery, controlplane, or the role of a process that device `name` started
    name: str
    type: str = ""
    state: str = ""
    pid: int | None = None
    cpu: float | None = None
    pss: int | None = None
    iops: float | None = None
    bytes_per_second: float | None = None
    latency: float | None = None
    restarts: int | None = None


@dataclass(frozen=True, slots=True)
class Look:
    """What one VM told at a moment (CLOCK_MONOTONIC seconds)."""

    moment: float
    info: Mapping[str, Any]
    devices: Sequence[Mapping[str, Any]]
    counters: Mapping[str, Mapping[str, int]]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """All VMs at once: their states and rows; `errors` says which did not answer, and why."""

    states: Mapping[str, str]
    rows: Sequence[Row]
    errors: Mapping[str, str]

    def as_json(self) -> dict[str, Any]:
        """Return it as plain data."""
        return asdict(self)


def rows(vm: str, now: Look, before: Look | None) -> list[Row]:
    """Return the lines of a VM: its vCPUs, its devices, its other processes."""
    seconds = max(1e-6, now.moment - before.moment) if before is not None else 0.0
    listed = {entry["pid"]: entry for entry in now.info.get("processes", ())}
    earlier = {entry["pid"]: entry for entry in before.info.get("processes", ())} if before is not None else {}

    def share(new: Mapping[str, Any] | None, old: Mapping[str, Any] | None) -> float | None:
        if not new or not old or "cpu" not in new or "cpu" not in old:
            return None
        return max(0.0, 100 * (float(new["cpu"]) - float(old["cpu"])) / seconds)

    vcpus = now.info.get("core", {}).get("vcpus", ())
    old_vcpus = before.info.get("core", {}).get("vcpus", ()) if before is not None else ()
    found = [Row(vm, "vcpu", f"vcpu{number}", state=now.info["state"].lower(), cpu=share(
        vcpu, old_vcpus[number] if number < len(old_vcpus) else None)) for number, vcpu in enumerate(vcpus)]
    workers = set()
    for device in now.devices:
        pid = device.get("pid")
        workers.add(pid)
        key = device["id"]
        rates = _rates(now.counters.get(key, {}), before.counters.get(key) if before is not None else None, seconds)
        found.append(Row(vm, "device", key, device["type"], device["state"], pid,
                         share(listed.get(pid), earlier.get(pid)), listed.get(pid, {}).get("pss"), *rates,
                         max(0, device.get("generation", 1) - 1)))
    found += [Row(vm, entry["role"], entry.get("device", entry["role"]), pid=pid, cpu=share(entry, earlier.get(pid)),
                  pss=entry.get("pss"))
              for pid, entry in listed.items() if pid not in workers]
    return found


def _rates(new: Mapping[str, int], old: Mapping[str, int] | None,
           seconds: float) -> tuple[float | None, float | None, float | None]:
    """Return operations and bytes per second, and us per operation; a fresh process has counted from 0."""
    if old is None or not new:
        return None, None, None
    # A process that took over begins at 0: its counts fall behind.
    grown = {name: value - (old.get(name, 0) if value >= old.get(name, 0) else 0) for name, value in new.items()}
    operations = sum(value for name, value in grown.items() if name.endswith(OPERATIONS))
    moved = sum(value for name, value in grown.items() if name.endswith("bytes"))
    latency = grown["busy_us"] / operations if "busy_us" in grown and operations else None
    return operations / seconds, moved / seconds, latency


class Sampler:
    """Looks at one VM, or at all that run here or are in remotes.toml. Not to be shared between threads; close() it."""

    def __init__(self, where: str | None, *, everyone: bool) -> None:
        self._everyone, self._where, self._name = everyone, where, ""
        self._closed = False
        self._clients: dict[str, Client] = {}
        self._asked: dict[str, Errand[Look]] = {}  # a VM that does not answer is not asked again meanwhile
        self._before: dict[str, Look] = {}
        self._wrong = ""  # with remotes.toml
        self._far: list[str] = []   # VMs on other machines
        self._late: set[str] = set()  # who kept us waiting last time: the others do not wait for them again

    def sample(self, patience: float = PATIENCE) -> Snapshot:
        """Look once more, for at most `patience` seconds. Raises NotFound ("no-vm") if the VM named is gone."""
        names = self._names()
        until = time.monotonic() + patience
        asked = [name for name in names if name not in self._asked]
        for name in asked:
            self._asked[name] = Errand(lambda name=name: self._look(name))  # type: ignore[misc]
        for name in asked:
            if name not in self._late:
                self._asked[name].wait(until)
        states: dict[str, str] = {}
        errors: dict[str, str] = {}
        found: list[Row] = []
        for name in names:
            states[name] = "?"
            if not self._asked[name].wait(0.0):
                errors[name] = "no answer"
                self._late.add(name)
                continue
            try:
                now = self._asked.pop(name).answer()
            except CellvisorError as error:
                self._drop(name)
                if error.code != "no-vm" or name in self._far:
                    errors[name] = str(error).removeprefix(f"{name}: ")
                    self._late.add(name)
                elif self._everyone:
                    del states[name]
                else:
                    raise
                continue
            self._late.discard(name)
            states[name] = now.info["state"]
            found += rows(name, now, self._before.get(name))
            self._before[name] = now
        if self._everyone:
            found += [Row(name, NOBODY, "-", state="no answer") for name in errors if name in states]
            if self._wrong:
                errors["remotes.toml"] = self._wrong
        return Snapshot(states, found, errors)

    def _names(self) -> list[str]:
        if self._everyone:
            here = places.running()
            self._far, self._wrong = remotes.besides(here)
            alive = [*here, *self._far]
            for gone in {*self._clients, *self._asked} - set(alive):
                if gone not in self._asked or self._asked[gone].wait(0.0):
                    self._asked.pop(gone, None)
                    self._drop(gone)
            return alive
        if not self._clients:
            client = Client(self._where, PATIENCE)
            self._name, self._clients[client.name] = client.name, client
        return [self._name]

    def where(self, name: str) -> str | None:
        """Return what to give to Client() for a VM that was seen."""
        if not self._everyone:
            return self._where
        return name if name in self._far else places.vm_dir(name)

    def _look(self, name: str) -> Look:
        """Look at one VM, in the thread of its errand, the only one that uses its client."""
        if name not in self._clients:
            self._clients[name] = Client(self.where(name), PATIENCE)
        try:
            return _look(self._clients[name])
        finally:
            if self._closed:
                self._drop(name)

    def _drop(self, name: str) -> None:
        self._before.pop(name, None)
        client = self._clients.pop(name, None)
        if client is not None:
            client.close()

    def close(self) -> None:
        """Disconnect: at once from those that do not owe an answer, from the others when they have given it."""
        self._closed = True
        for name in list(self._clients):
            if name not in self._asked or self._asked[name].wait(0.0):
                self._drop(name)


def _look(client: Client) -> Look:
    try:
        info = client.call("info", processes=True)
        moment = time.monotonic()
        devices = client.call("devices")["devices"]
    except NotFound as error:
        if error.code != "not-created":
            raise
        return Look(time.monotonic(), {"state": "Empty"}, (), {})
    try:
        counters = client.call("counters")
    except NotFound:
        raise
    except CellvisorError:  # it is starting, or not booted
        counters = {}
    return Look(moment, info, devices, counters)
