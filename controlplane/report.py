"""What a VM costs: its processes with their proportional memory, and how long each step of the boot took."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

from cellvisor.core import log

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Supervisor


def memory_kib(pid: int) -> dict[str, int]:
    """Return {"pss", "pss_shmem"} of a process in KiB, {} if it is gone.

    Guest RAM is shared memory: it counts in `pss`, divided among those who map it, and is told apart in
    `pss_shmem`. Of a process that lets nobody look (passt, unless we are root) `pss` is its anonymous memory.
    """
    try:
        with open(f"/proc/{pid}/smaps_rollup") as lines:
            words = {line.split()[0]: line.split() for line in lines}
    except PermissionError:
        return {"pss": kib, "pss_shmem": 0} if (kib := _anonymous_kib(pid)) else {}
    except OSError:
        return {}
    found = {"pss": words.get("Pss:"), "pss_shmem": words.get("Pss_Shmem:")}
    return {key: int(value[1]) for key, value in found.items() if value}


def _anonymous_kib(pid: int) -> int:
    try:
        with open(f"/proc/{pid}/statm") as file:
            resident, shared = map(int, file.read().split()[1:3])  # pages; the second: of files
    except OSError:
        return 0
    return (resident - shared) * os.sysconf("SC_PAGESIZE") >> 10


def add_cpu(vm: Supervisor, core: dict[str, Any]) -> None:
    """Add to each vCPU of core's INFO the CPU time of its thread, `cpu` in seconds, where /proc tells."""
    for vcpu in core.get("vcpus", ()):
        cpu = cpu_seconds(vm.core_child.pid, vcpu.get("thread"))
        if vcpu.get("thread") and cpu is not None:
            vcpu["cpu"] = cpu


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


def processes(vm: Supervisor, core: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Describe every living process of the VM with its memory; `core` is its INFO, which knows what devices started."""
    found = [process("controlplane", os.getpid(), os.getppid()), process("core", vm.core_child.pid, os.getpid())]
    found += [process("nursery", pid, os.getpid()) for pid in vm.nurseries.pids()]
    workers = vm.fleet.latest() if vm.fleet is not None else []
    alive = {one.device.id: one for one in workers if one.is_alive and one.pid}
    found += [process("worker", one.pid, vm.nurseries.pid_of(key), device=key, type=one.device.type,
                      generation=one.generation) for key, one in alive.items()]
    known = {entry["pid"] for entry in found}  # a device may say that any process is its own
    return found + [process(one["role"], one["pid"], alive[key].pid if key in alive else vm.nurseries.pid_of(key),
                            device=key) for one in core.get("processes", ()) for key in [one["device"]]
                    if one["pid"] not in known]


def write(path: str, vm: Supervisor, core: Mapping[str, Any], end: str, status: int) -> None:
    """Write what there is to tell of the VM as JSON; `core` is its INFO."""
    body = {"name": vm.rundir.name, "end": end, "status": status, "stages": vm.stages.as_wire(),
            "processes": processes(vm, core), "events": [event.as_wire() for event in vm.events.since(0)]}
    try:
        with open(path, "w") as file:
            json.dump(body, file, indent=2, default=str)
            file.write("\n")
    except OSError as error:
        log.get().error("--report %s: %s", path, error.strerror)
