"""The verb swap-disk: another image for a disk whose guest runs on, for whoever serves it from then on.

    open (the new image, locked) -> recorded: every next incarnation begins with it -> swap (the old one is let go)
Before the record nothing has changed, after it the swap is done by the process of the day or, if that cannot be
told, by its successor: so a process that does not answer is killed.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable, Mapping
from typing import TYPE_CHECKING, Any

from cellvisor.controlplane.processes import kill_pidfd
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.inventory import Device
    from cellvisor.controlplane.supervisor import Supervisor

VERB = "swap-disk"
TIMEOUT = 20.0  # seconds; less than an opened image is kept (devices/virtio/blk.py)


def table(vm: Supervisor) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
    """Return verb -> handler(args); handlers raise CellvisorError."""

    async def swap_disk(args: dict[str, Any]) -> dict[str, Any]:
        key, path = args["id"], args["path"]
        async with vm.plug.locked(key):
            device = _to_swap(vm, key)
            core, before = vm.require_core(), device.options["path"]
            with vm.plug.operations.step(VERB, key, device.bdf) as operation:
                await core.request(CoreVerb.CALL, TIMEOUT, device=key, verb="open", args={"path": path})
                remember(vm, key, {"path": path})
                try:
                    await core.keep_state()
                except CellvisorError:
                    remember(vm, key, {"path": before})
                    vm.changed()
                    raise
                await settle(vm, key)
                vm.events.emit("device.swapped", device=key, path=path)
            return {"id": key, "path": path, "operation": operation.id}

    return {VERB: swap_disk}


def checks(vm: Supervisor) -> dict[str, Callable[[dict[str, Any]], Awaitable[Device]]]:
    """Return verb -> dry run of it: the same arguments and refusals, and the device."""

    async def swap_disk(args: dict[str, Any]) -> Device:
        async with vm.plug.locked(args["id"]):
            device = _to_swap(vm, args["id"])
            await vm.require_core().request(CoreVerb.CALL, TIMEOUT, device=device.id, verb="check",
                                            args={"verb": "open", "path": args["path"]})
            return device

    return {VERB: swap_disk}


def _to_swap(vm: Supervisor, key: str) -> Device:
    device = vm.inventory.require(VERB, key, "a disk")
    if vm.state not in ("Running", "Paused"):
        raise Conflict(f"{VERB}: the VM is not running", hint="give the path when it is created")
    return device


def remember(vm: Supervisor, key: str, options: Mapping[str, Any]) -> None:
    """Have other options for all that a successor, a reboot or an adoption begins from."""
    known = [vm.inventory.devices.get(key), *vm.config.devices]
    known += [one.device for one in vm.fleet.latest()] if vm.fleet else []
    for one in known:
        if one is not None and one.id == key:
            one.options.update(options)


async def settle(vm: Supervisor, key: str, *, pending: bool = True) -> None:
    """Have a disk's process use the recorded image and no other one; if `pending`, one that cannot say so ends."""
    try:
        await vm.require_core().request(CoreVerb.CALL, device=key, verb="swap",
                                        args={"path": vm.inventory.get(key).options["path"]})
    except CellvisorError as error:
        one = vm.fleet.get(key) if vm.fleet is not None and pending else None
        if one is not None and one.pidfd >= 0 and one.is_alive:
            log.get("swap").warning("%s: %s: its next process begins with the new image", key, error)
            kill_pidfd(one.pidfd)


async def settle_all(vm: Supervisor, parts: Mapping[str, Any]) -> None:
    """Finish what a predecessor of ours had begun, recorded or not."""
    kept = parts.get("plug", {}).get("operations", {}).get("kept", ())
    pending = {one["device"] for one in kept if one["verb"] == VERB and one["state"] == "requested"}
    disks = [device.id for device in vm.inventory.devices.values() if device.verb == "disk"]
    await asyncio.gather(*(settle(vm, key, pending=key in pending) for key in disks))
