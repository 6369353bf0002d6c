"""What a VM tells Prometheus: its text format (0.0.4), made anew for each scrape from what the verbs answer.

Devices count for themselves and are asked when somebody scrapes: no message per request. A device's counters begin
at 0 with each of its processes, which rate() understands.
"""

from __future__ import annotations

import math
from collections.abc import Awaitable, Callable, Iterable, Mapping
from types import MappingProxyType
from typing import Any

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire.control import Request, parse_request, request

Serve = Callable[[Request], Awaitable[Any]]
Sample = tuple[str, dict[str, str], float]

VM_STATES = ("Empty", "Created", "Running", "Paused", "Shutdown")
DEVICE_STATES = ("created", "spawning", "running", "serving", "draining", "dead", "parked", "failed", "ended")
OPERATION_STATES = ("requested", "guest-notified", "done", "refused", "timed-out", "cancelled")

FAMILIES: Mapping[str, tuple[str, str]] = MappingProxyType({
    "cellvisor_vm_state": ("gauge", "1 for the state that the VM is in, 0 for the others."),
    "cellvisor_vm_uptime_seconds": ("gauge", "Seconds since the VM was started."),
    "cellvisor_vm_memory_bytes": ("gauge", "Memory that the guest has."),
    "cellvisor_vm_vcpus": ("gauge", "Number of vCPUs."),
    "cellvisor_vm_resets_total": ("counter", "Resets of the machine since it was booted."),
    "cellvisor_vcpu_cpu_seconds_total": ("counter", "Host CPU time of a vCPU's thread."),
    "cellvisor_vcpu_entries_total": ("counter", "Entries of a vCPU into the guest."),
    "cellvisor_process_pss_bytes": ("gauge", "Proportional memory of a process, its share of guest RAM included."),
    "cellvisor_process_cpu_seconds_total": ("counter", "Host CPU time of a process, user and system."),
    "cellvisor_device_state": ("gauge", "1 for the state that a device's process is in, 0 for the others."),
    "cellvisor_device_restarts_total": ("counter", "Processes that took over from an earlier one of the device."),
    "cellvisor_device_counter_total": ("counter", "What a device has counted, by the name of the counter."),
    "cellvisor_operations": ("gauge", "Operations by state, among those that are remembered."),
})


async def collect(serve: Serve, name: str) -> str:
    """Return the text for VM `name`; what does not answer now is left out."""
    async def ask(verb: str, **args: Any) -> dict[str, Any]:
        try:
            answer = await serve(parse_request(request("metrics", verb, args)))
        except CellvisorError:
            return {}
        return dict(answer)

    info = await ask("info", processes=True)
    found = list(_of_vm(info))
    if info:
        found += _of_devices((await ask("devices")).get("devices", ()), await ask("counters"))
        states = [one["state"] for one in (await ask("ops", action="list")).get("operations", ())]
        found += [("cellvisor_operations", {"state": state}, states.count(state)) for state in OPERATION_STATES]
    return render([(family, {"vm": name, **labels}, value) for family, labels, value in found])


def _of_vm(info: Mapping[str, Any]) -> Iterable[Sample]:
    state = info.get("state", "Empty")
    for known in VM_STATES:
        yield "cellvisor_vm_state", {"state": known}, known == state
    if not info:
        return
    yield "cellvisor_vm_uptime_seconds", {}, info["uptime"]
    yield "cellvisor_vm_memory_bytes", {}, info["memory_actual_size"]
    yield "cellvisor_vm_vcpus", {}, info["config"]["cpus"]["boot_vcpus"]
    core = info["core"]
    if "resets" in core:
        yield "cellvisor_vm_resets_total", {}, core["resets"]
    for number, vcpu in enumerate(core.get("vcpus", ())):
        labels = {"vcpu": str(number)}
        yield "cellvisor_vcpu_entries_total", labels, vcpu["entries"]
        if "cpu" in vcpu:
            yield "cellvisor_vcpu_cpu_seconds_total", labels, vcpu["cpu"]
    for process in info.get("processes", ()):
        # Nurseries may be several, so the process id tells them apart.
        labels = {"role": process["role"], "device": process.get("device", ""), "pid": str(process["pid"])}
        if "pss" in process:
            yield "cellvisor_process_pss_bytes", labels, process["pss"] * 1024
        if "cpu" in process:
            yield "cellvisor_process_cpu_seconds_total", labels, process["cpu"]


def _of_devices(devices: Iterable[Mapping[str, Any]], counters: Mapping[str, Mapping[str, int]]) -> Iterable[Sample]:
    for device in devices:
        labels = {"device": device["id"], "type": device["type"]}
        for state in DEVICE_STATES:
            yield "cellvisor_device_state", {**labels, "state": state}, state == device["state"]
        yield "cellvisor_device_restarts_total", labels, max(0, device.get("generation", 1) - 1)
        for name, value in counters.get(device["id"], {}).items():
            yield "cellvisor_device_counter_total", {**labels, "counter": name}, value


def render(samples: Iterable[Sample]) -> str:
    """Return the text format: each family once, with HELP and TYPE before its samples."""
    by_family: dict[str, list[str]] = {family: [] for family in FAMILIES}
    for family, labels, value in samples:
        shown = ",".join(f'{key}="{_escape(text)}"' for key, text in labels.items())
        by_family[family].append(f"{family}{{{shown}}} {_number(value)}\n")
    return "".join(f"# HELP {family} {FAMILIES[family][1]}\n# TYPE {family} {FAMILIES[family][0]}\n{''.join(lines)}"
                   for family, lines in by_family.items() if lines)


def _escape(text: str) -> str:
    return text.replace("\\", "\\\\").replace("\n", "\\n").replace('"', '\\"')


def _number(value: float) -> str:
    return str(int(value)) if math.floor(value) == value else repr(float(value))
