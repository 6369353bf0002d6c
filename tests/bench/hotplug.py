"""How long it takes until a device is there, and until it is gone; and what a full bus costs."""

from __future__ import annotations

import time
from typing import Any

from cellvisor.ctl.client import Client
from tests.bench.effort import Effort, Place, wait_until
from tests.bench.figures import Row, show_times, summary
from tests.native.guest import make_disk

STEPS = {"reply": "add-disk → reply", "guest-notified": "add-disk → guest notified", "enumerated": "→ enumerated",
         "bound": "→ driver bound", "ejected": "remove-device → ejected, process gone"}
FULL = 29  # beside console and rng


def hotplug(effort: Effort, place: Place) -> dict[str, Any]:
    """Add and remove a disk `forks` times, then fill every slot. The guest is freestanding: it answers at once."""
    disk = make_disk(place.where / "plugged.raw", 16 << 20)
    seen: dict[str, list[float]] = {step: [] for step in STEPS}
    with place.steer(f"test=hotplug irq=poll removals={effort.forks + 1}", console="null") as vmm:
        vmm.running.wait_for("listening=1")
        client = vmm.client
        for turn in range(effort.forks):
            if turn % 20 == 0:
                place.tell(f"disk {turn + 1} of {effort.forks}")
            began = time.perf_counter()
            client.call("add-disk", path=str(disk), id="plugged")
            seen["reply"].append((time.perf_counter() - began) * 1000)
            wait_until(lambda: "bound" in _latest(client)["times"], "driver")
            times = _latest(client)["times"]
            for step in ("guest-notified", "enumerated", "bound"):
                seen[step].append(times[step])
            client.call("remove-device", id="plugged")
            ended = client.call("ops", action="wait", id="plugged")
            if ended["state"] != "done":
                raise RuntimeError(f"removal {turn}: {ended}")
            seen["ejected"].append(ended["times"]["done"])
        full = _fill(client, place)
    return {"turns": effort.forks, "steps_ms": {step: summary(found) for step, found in seen.items()}, **full}


def _latest(client: Client) -> dict[str, Any]:
    found: dict[str, Any] = client.call("ops", action="show", id="plugged")
    return found


def _fill(client: Client, place: Place) -> dict[str, Any]:
    place.tell(f"{FULL} devices at once")
    began = time.perf_counter()
    added = [client.call("add-rng")["id"] for _ in range(FULL)]
    for key in added:
        client.call("ops", action="wait", id=key)
    took = (time.perf_counter() - began) * 1000
    processes = client.call("info", processes=True)["processes"]
    private = [one["pss"] - one["pss_shmem"] for one in processes]
    return {"full_ms": round(took, 1), "full_pss_kib": sum(private), "full_processes": len(processes)}


def hotplug_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    rows = [Row(what, *show_times(found["steps_ms"][step]), f"{found['turns']} times")
            for step, what in STEPS.items()]
    return [*rows, Row(f"31 devices: {FULL} plugged one after the other", f"{found['full_ms']:.0f} ms", "",
                       f"whole VM {found['full_pss_kib'] / 1024:.0f} MiB, {found['full_processes']} processes")]
