"""How long a guest waits when its disk's process is killed, or upgraded, under load."""

from __future__ import annotations

from typing import Any

from tests.bench.effort import Effort, Place
from tests.bench.figures import Row, show_times, summary
from tests.native.guest import make_disk
from tests.native.storm import LOAD, OPTIONS, Storm, longest_stalls, stop_load

SEED = 7


def kills(effort: Effort, place: Place) -> dict[str, Any]:
    """Kill the disk's process while it serves writes at depth 32.

    The stalls are the guest's: the longest times without a completion, as many as there were kills. From the news
    of a death to the successor's READY is the controlplane's clock.
    """
    disk = make_disk(place.where / "storm.raw")
    killed = 0
    restarts: list[float] = []
    with place.steer(f"{LOAD} seed={SEED}", disks=[f"path={disk},{OPTIONS}"]) as vmm:
        vmm.running.wait_for("features=")
        storm = Storm(vmm.pid("nursery"), int(vmm.device()["pid"]), SEED,
                      lambda: vmm.running.process.poll() is None, early=0.0, shortest=0.08)
        vmm.mark()
        for killed in storm.blow(effort.kills):
            if killed % 50 == 0 or killed == effort.kills:
                place.tell(f"kill {killed} of {effort.kills}")
                restarted = [event for event in vmm.events() if event["event"] == "device.restarted"]
                restarts += [event["properties"]["ms"] for event in restarted]
                vmm.mark()
        stop_load(disk)
        said = vmm.running.finish()
    if not said.ok or killed != effort.kills:
        raise RuntimeError(f"the guest after {killed} kills: {said.reason or 'no result'}\n{said.stderr[-1000:]}")
    return {"kills": effort.kills, "stall_ms": summary(longest_stalls(said, effort.kills)),
            "restart_ms": summary(restarts), "requests": said.number("requests"), "errors": said.number("errors")}


def kills_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    return [Row("kill → first completion again, in the guest", *show_times(found["stall_ms"]),
                f"{found['kills']} kills, {found['requests']} requests, {found['errors']} errors"),
            Row("death noticed → successor ready", *show_times(found["restart_ms"]))]


def upgrades(effort: Effort, place: Place) -> dict[str, Any]:
    """Give the disk new code while it serves writes at depth 32; the stalls are the guest's."""
    disk = make_disk(place.where / "upgraded.raw")
    took = []
    with place.steer(f"{LOAD} seed={SEED}", disks=[disk]) as vmm:
        vmm.running.wait_for("features=")
        name = vmm.device()["id"]
        for number in range(effort.upgrades):
            place.tell(f"upgrade {number + 1} of {effort.upgrades}")
            took += [one["ms"] for one in vmm.client.call("upgrade-device", id=name)["upgraded"]]
        stop_load(disk)
        said = vmm.running.finish()
    if not said.ok:
        raise RuntimeError(f"the guest: {said.reason or 'no result'}\n{said.stderr[-1000:]}")
    return {"upgrades": effort.upgrades, "stall_ms": summary(longest_stalls(said, effort.upgrades)),
            "pause_ms": summary(took), "requests": said.number("requests"), "errors": said.number("errors")}


def upgrades_rows(found: dict[str, Any]) -> list[Row]:
    """Show it."""
    return [Row("live upgrade: longest stall, in the guest", *show_times(found["stall_ms"]),
                f"{found['upgrades']} upgrades, {found['requests']} requests, {found['errors']} errors"),
            Row("live upgrade: old one quiet → new one ready", *show_times(found["pause_ms"]))]
