"""What becomes of a parked device: it is brought back, or given up to a process that fails whatever is asked of it.

    parked --revive()--> spawning --> serving
       |
       +--drain(), or a reset waits--> spawning --> draining --the driver's reset--> parked
"""

from __future__ import annotations

import asyncio
from typing import TYPE_CHECKING

from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.incarnation import READY_TIMEOUT, Incarnation, State, cannot_serve
from cellvisor.controlplane.processes import kill_pidfd
from cellvisor.controlplane.recovery import Budget
from cellvisor.controlplane.waiting import wait_pidfd
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, TryAgain

if TYPE_CHECKING:
    from cellvisor.controlplane.fleet import Fleet
    from cellvisor.controlplane.inventory import Device


class Parking:
    """The parked devices of a fleet, and the resets that wait for one of them."""

    def __init__(self, fleet: Fleet, events: EventLog) -> None:
        self._fleet, self._events = fleet, events
        self._loop = asyncio.get_running_loop()
        self._drains: dict[str, Budget] = {}
        self._reset_waits: set[str] = set()

    def forget(self, device_id: str) -> None:
        """The device is gone."""
        self._drains.pop(device_id, None)
        self._reset_waits.discard(device_id)

    def reset_waits(self, one: Incarnation) -> None:
        """A driver or a machine waits for a reset that only a living process can finish."""
        self._reset_waits.add(one.device.id)
        self.finish_reset(one)

    def reset_goes_on(self, one: Incarnation) -> None:
        """There is a process: core has it finish the reset first."""
        self._reset_waits.discard(one.device.id)

    def finish_reset(self, one: Incarnation) -> None:
        """See to a reset that waits, if one does and the device is parked."""
        if one.device.id in self._reset_waits and one.is_parked and not self._fleet.is_stopping:
            self._reset_waits.discard(one.device.id)
            self._fleet.later(self._start_drain(one.device))

    async def _start_drain(self, device: Device) -> None:
        try:
            delay = self._drains.setdefault(device.id, Budget()).next_delay(self._loop.time())
            if delay is None:
                raise TryAgain("its drain processes die")
            await asyncio.sleep(delay)
            one = self._fleet.find(device.id)
            if one is not None and one.device is device:
                await self.drain(device.id)
        except CellvisorError as error:
            log.get("fleet").error("%s: nobody finishes its reset: %s", device.id, error)

    async def drain(self, device_id: str) -> Incarnation:
        """Give a parked device up: all that the guest asks of it fails, until its driver resets it.

        Then it is parked again. Returns when that has begun. Raises NotFound, Conflict, UsageError, TryAgain.
        """
        one = self._parked(device_id)
        drain = await self._fleet.start(one.device, drains=True)
        drain.reason = one.reason
        return await self._up(drain)

    async def see_out(self, device_id: str) -> None:
        """Have a device that is to leave answer its driver: a parked one is drained, a dead one waits no longer.

        Raises CellvisorError.
        """
        one = self._fleet.find(device_id)
        if one is not None and one.is_parked:
            await self.drain(device_id)
        elif one is not None and one.state is State.DEAD:
            await self._fleet.replace(one, 0.0)

    def drained(self, one: Incarnation) -> None:
        """Its drain process has ended."""
        one.state = State.PARKED
        if not one.ready.done():
            one.ready.set_exception(cannot_serve(one.device.id, one.reason))
        self._events.emit("device.drained", device=one.device.id, generation=one.generation, pid=one.pid,
                          reason=one.reason)

    async def revive(self, device_id: str) -> Incarnation:
        """Start a parked device anew, its budget refilled. Raises NotFound, Conflict, UsageError, TryAgain."""
        one = self._fleet.find(device_id)
        if one is not None and one.drains and one.is_alive:
            kill_pidfd(one.pidfd)
            await wait_pidfd(one.pidfd)
            self._fleet.lost(one)
        one = self._parked(device_id)
        self._fleet.budget(one.device).refill()
        return await self._up(await self._fleet.start(one.device))

    async def _up(self, one: Incarnation) -> Incarnation:
        """Wait until a device is served; returns by whom: `one` may have died, and another one followed."""
        try:
            await asyncio.wait_for(asyncio.shield(one.ready), READY_TIMEOUT)
        except TimeoutError:
            raise TryAgain(f"{one.device.id}: its process was not ready within {READY_TIMEOUT:g} s") from None
        return self._fleet.get(one.device.id)

    def _parked(self, device_id: str) -> Incarnation:
        one = self._fleet.find(device_id)
        if one is None:
            raise NotFound(f"no device {device_id!r}", hint="see `cellvisor devices`")
        if not one.is_parked:
            raise Conflict(f"{device_id}: is {one.state}, not parked", hint="it looks after itself")
        return one
