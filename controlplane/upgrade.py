"""New code for a device whose guest runs on: a nursery started from disk forks the next incarnation.

    new nursery -> QUIESCE -> can it read what was saved? -> RELEASE, the fence is free -> next generation -> READY
                      |             +-- no: UNQUIESCE, the old incarnation carries on
                      +-- not quiet: the same      +-- could not serve: a fresh incarnation of the old code, else parked
The old nursery ends when no device is at home there any more.
"""

from __future__ import annotations

import asyncio
import contextlib
import time
from collections.abc import Awaitable, Callable
from typing import TYPE_CHECKING, Any

from cellvisor.controlplane.fleet import Fleet, wait_pidfd
from cellvisor.controlplane.incarnation import Incarnation, State
from cellvisor.controlplane.inventory import Device
from cellvisor.controlplane.processes import kill_pidfd
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, TryAgain
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Supervisor

EVERY = "all"
QUIESCE_TIMEOUT = 15.0  # core gives up on a worker after 10 s
READY_TIMEOUT = 30.0
END_TIMEOUT = 5.0
LATE = "not ready in time"


def table(vm: Supervisor) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
    """Return verb -> handler(args)."""
    upgrade = Upgrade(vm)
    return {"upgrade-device": upgrade.serve}


class Upgrade:
    """Upgrades the devices of one VM, one after the other."""

    def __init__(self, vm: Supervisor) -> None:
        self._vm = vm
        self._turn = asyncio.Lock()

    async def serve(self, args: dict[str, Any]) -> dict[str, Any]:
        """Upgrade device `id`, or all of them; returns {"upgraded": [{id, generation, pid, ms}]}.

        Raises what kept the first one from it; the others were upgraded then all the same.
        """
        async with self._turn:
            devices, fleet = self._wanted(args["id"]), self._fleet()
            nurseries = self._vm.nurseries
            number = await nurseries.start()
            done, failed = [], []
            try:
                for device in devices:
                    try:
                        async with self._vm.plug.locked(device.id):
                            if self._vm.inventory.devices.get(device.id) is not device:
                                raise NotFound(f"no device {device.id!r} any more")
                            done.append(await self._upgrade(fleet, device, number))
                    except CellvisorError as error:
                        log.get("upgrade").warning("%s", error)
                        self._vm.events.emit("device.upgrade-failed", device=device.id, reason=str(error))
                        failed.append(error)
                if done:
                    nurseries.present = number
                    self._vm.inventory.relearn(nurseries.catalog(number))
            finally:
                known = self._vm.inventory.devices
                nurseries.homes = {device: home for device, home in nurseries.homes.items() if device in known}
                nurseries.tidy()
                self._vm.changed()
            if failed:
                raise failed[0]
            return {"upgraded": done}

    def _fleet(self) -> Fleet:
        if self._vm.fleet is None or self._vm.booting:
            raise TryAgain("upgrade-device: the VM does not run", hint="wait for the event vm.booted")
        return self._vm.fleet

    def _wanted(self, key: str) -> list[Device]:
        devices = self._vm.inventory.devices
        if key in devices or key != EVERY:
            return [self._vm.inventory.get(key)]
        return sorted(devices.values(), key=lambda device: device.slot)

    async def _upgrade(self, fleet: Fleet, device: Device, number: int) -> dict[str, Any]:
        core, nurseries = self._vm.require_core(), self._vm.nurseries
        old = fleet.get(device.id)
        if old.is_parked:
            nurseries.homes[device.id] = number
            new = await fleet.parking.revive(device.id)
            return {"id": device.id, "generation": new.generation, "pid": new.pid, "ms": 0.0}
        if old.state is not State.SERVING:
            raise TryAgain(f"{device.id}: is {old.state}, not serving", hint="try again when it serves")
        began = time.monotonic()
        try:
            quiet = await core.request(CoreVerb.QUIESCE, QUIESCE_TIMEOUT, device=device.id)
            if quiet.get("late"):
                raise TryAgain(f"{device.id}: what it executes does not end", hint="the old code carries on")
            await self._check(device, number)
            if old.state is not State.SERVING:
                raise TryAgain(f"{device.id}: died meanwhile", hint="try again when it serves")
        except CellvisorError:
            with contextlib.suppress(CellvisorError):
                await core.request(CoreVerb.UNQUIESCE, device=device.id)
            raise
        fleet.relieve(old)
        with contextlib.suppress(CellvisorError):  # who was not told is killed, which harms no one who is quiet
            await core.request(CoreVerb.RELEASE, device=device.id)
        await _gone(old)
        home, nurseries.homes[device.id] = nurseries.homes.get(device.id, nurseries.present), number
        try:
            new = await self._start(fleet, device)
        except (CellvisorError, TimeoutError) as error:
            nurseries.homes[device.id] = home
            await self._start_old(fleet, device)
            raise Conflict(f"{device.id}: the new code cannot serve: {error or LATE}",
                           hint="the old code serves again", code="upgrade-failed") from None
        took = round((time.monotonic() - began) * 1000, 3)
        about = {"generation": new.generation, "pid": new.pid, "ms": took}
        self._vm.events.emit("device.upgraded", device=device.id, **about)
        return {"id": device.id, **about}

    async def _check(self, device: Device, number: int) -> None:
        """Refuse code that is not there or cannot read what the old code has saved."""
        catalog = self._vm.nurseries.catalog(number)
        kind = next((one for one in catalog.types if one.name == device.type), None)
        if kind is None:
            raise NotFound(f"{device.id}: there is no type {device.type} on disk any more",
                           hint=catalog.broken.get(device.type, "the old code carries on"))
        seen = (await self._vm.require_core().request(CoreVerb.DEVICES)).get("devices", ())
        version = next((one.get("private_version") for one in seen if one["device"] == device.id), 0)
        if version and version not in kind.reads:
            raise Conflict(f"{device.id}: its saved state has version {version}, the new code reads "
                           f"{', '.join(map(str, kind.reads)) or 'none'}", hint="the old code carries on",
                           code="upgrade-refused")

    async def _start_old(self, fleet: Fleet, device: Device) -> None:
        try:
            await self._start(fleet, device)
        except (CellvisorError, TimeoutError) as error:
            fleet.give_up(device.id, LATE if isinstance(error, TimeoutError) else str(error))
            raise Conflict(f"{device.id}: neither the new code nor the old can serve: {fleet.get(device.id).reason}",
                           hint="it is parked: see cellvisor restart-device", code="upgrade-failed") from None

    @staticmethod
    async def _start(fleet: Fleet, device: Device) -> Incarnation:
        one = await fleet.start(device)
        one.served = False  # if it cannot serve it gets no successor
        try:
            await asyncio.wait_for(asyncio.shield(one.ready), READY_TIMEOUT)
        except BaseException:
            fleet.relieve(one)
            kill_pidfd(one.pidfd)
            await _gone(one)
            raise
        return one


async def _gone(one: Incarnation) -> None:
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_TIMEOUT):
            await wait_pidfd(one.pidfd)
    kill_pidfd(one.pidfd)
    await wait_pidfd(one.pidfd)
    one.close()
