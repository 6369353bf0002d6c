"""What a VM costs: its processes with their proportional memory, and how long each step of the boot took."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from cellvisor.core import log

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Supervisor


def memory_kib(pid: int) -> dict[str, int]:
    """Return {"pss", "pss_shmem"} of a process in KiB, {} if it is gone.

    Guest RAM is shared memory: it counts in `pss`, divided among those who map it, and is told apart in
    `pss_shmem`.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            words = {line.split()[0]: line.split() for line in lines}
    except OSError:
        return {}
    found = {"pss": words.get("Pss:"), "pss_shmem": words.get("Pss_Shmem:")}
    return {key: int(value[1]) for key, value in found.items() if value}


def cpu_seconds(pid: int, thread: int | None = None) -> float | None:
    """Return the CPU time, user and system, of a process or of one of its threads; None if it is gone."""
    task = "" if thread is None else f"/task/{thread}"
    try:
        with open(f"/proc/{pid}{task}/stat") as file:
            fields = file.read().rpartition(")")[2].split()
    except OSError:
        return None
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def process(role: str, pid: int, parent: int, **more: Any) -> dict[str, Any]:
    """Describe one process of the VM."""
    cpu = cpu_seconds(pid)
    return {"role": role, "pid": pid, "parent": parent, **memory_kib(pid), **more,
            **({} if cpu is None else {"cpu": cpu})}


class Stages:
    """Moments of the boot, in ns of CLOCK_MONOTONIC, which is one clock for all processes."""

    def __init__(self, began: int) -> None:
        self._began = began
        self._found: list[tuple[str, int]] = []

    def add(self, name: str, moment: int) -> None:
        """Record `name`, the first time it is seen since boot; at most 256 of them."""
        if len(self._found) < 256 and all(name != known for known, _ in self._found):
            self._found.append((name, moment))

    def as_wire(self) -> list[dict[str, Any]]:
        """Return [{"name", "ms"}] since the command was started, in order of time."""
        ordered: Sequence[tuple[str, int]] = sorted(self._found, key=lambda entry: entry[1])
        return [{"name": name, "ms": round((moment - self._began) / 1e6, 3)} for name, moment in ordered]


def processes(vm: Supervisor) -> list[dict[str, Any]]:
    """Describe every living process of the VM with its memory."""
    found = [process("controlplane", os.getpid(), os.getppid()), process("core", vm.core_child.pid, os.getpid())]
    found += [process("nursery", pid, os.getpid()) for pid in vm.nurseries.pids()]
    workers = vm.fleet.latest() if vm.fleet is not None else []
    return found + [process("worker", one.pid, vm.nurseries.pid_of(one.device.id), device=one.device.id,
                            type=one.device.type, generation=one.generation)
                    for one in workers if one.is_alive and one.pid]


def write(path: str, vm: Supervisor, end: str, status: int) -> None:
    """Write what there is to tell of the VM as JSON."""
    body = {"name": vm.rundir.name, "end": end, "status": status, "stages": vm.stages.as_wire(),
            "processes": processes(vm), "events": [event.as_wire() for event in vm.events.since(0)]}
    try:
        with open(path, "w") as file:
            json.dump(body, file, indent=2, default=str)
            file.write("\n")
    except OSError as error:
        log.get().error("--report %s: %s", path, error.strerror)
