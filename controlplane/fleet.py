"""The VM's workers: one incarnation per device and generation, from its start to the report of its end.

    spawning --SPAWNED--> running --device.ready--> serving --+--> dead --back-off--> the next generation
        |                    |                                |     +-- budget spent, refused --> parked
        +---- never served: failed (a bad option, a lock) ----+--> ended    we asked for it

Every way a worker can die ends in lost(), the one place that decides what happens next (controlplane/
recovery.py; of a parked one, parking.py). start() gives whoever follows the next generation; core drops what any
other one says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from collections.abc import Coroutine
from typing import Any

from cellvisor.controlplane import ratelimit
from cellvisor.controlplane.blob import Life
from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.incarnation import GAVE_UP, READY_TIMEOUT, cannot_serve
from cellvisor.controlplane.incarnation import Incarnation as Incarnation
from cellvisor.controlplane.incarnation import State as State
from cellvisor.controlplane.inventory import Device
from cellvisor.controlplane.nurseries import DIED, Nurseries
from cellvisor.controlplane.parking import Parking
from cellvisor.controlplane.processes import describe_exit, kill_pidfd
from cellvisor.controlplane.recovery import Budget, Policy, is_self_inflicted
from cellvisor.controlplane.waiting import wait_pidfd as wait_pidfd
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, TryAgain
from cellvisor.core.wire.messages import CoreVerb

START_TIMEOUT = 30.0  # of a successor: it may wait 10 s for the fence
LIMITS = ("hang_timeout", "io_timeout")  # options that core acts on
REPORT_DELAY = 0.05  # core's report of a death and the nursery's come one shortly after the other
SAID_DELAY = 2.0  # after status 1, which says that the worker has told core why: a busy core takes its time
START_ATTEMPTS = 3  # when a nursery dies over it


class Fleet:
    """The latest incarnation of every device."""

    def __init__(self, core: CoreLink, nursery: Nurseries, events: EventLog, run_dir: str) -> None:
        self._core, self._nursery, self._events, self._run_dir = core, nursery, events, run_dir
        self._loop = asyncio.get_running_loop()
        self._latest: dict[str, Incarnation] = {}
        self._used: dict[str, int] = {}  # last generation of devices that were retired: late reports name it
        self._budgets: dict[str, Budget] = {}
        self._died_at: dict[str, float] = {}
        self._restarts: set[asyncio.Task[None]] = set()
        self.is_stopping = False
        self.parking = Parking(self, events)

    def latest(self) -> list[Incarnation]:
        """Return every device's latest incarnation, in slot order."""
        return sorted(self._latest.values(), key=lambda one: one.device.slot)

    async def start(self, device: Device, *, suspect: bool = False, drains: bool = False) -> Incarnation:
        """Announce the next generation of `device` to core and fork it. Raises CellvisorError.

        `suspect`: its predecessor killed itself, so requests that had begun are replayed one at a time.
        `drains`: fail all requests instead of serving them, until the driver resets the device.
        """
        for _ in range(START_ATTEMPTS - 1):
            try:
                return await self._start(device, suspect, drains)
            except TryAgain as error:
                if error.code != DIED:
                    raise
        return await self._start(device, suspect, drains)

    async def _start(self, device: Device, suspect: bool, drains: bool) -> Incarnation:
        before = self._latest.get(device.id)
        if before is not None and before.is_alive:
            raise Conflict(f"{device.id}: generation {before.generation} is alive")
        if before is not None and before.pidfd >= 0:  # whatever it is: never two processes on one ring
            kill_pidfd(before.pidfd)
            await wait_pidfd(before.pidfd)
            before.close()
            if self._latest.get(device.id) is not before:
                raise Conflict(f"{device.id}: somebody else starts it")
        last = before.generation if before else self._used.get(device.id, 0)
        # Who waits for the device waits on when a process dies before it is ready, and another one follows.
        ready = before.ready if before is not None and not before.ready.done() else self._loop.create_future()
        one = Incarnation(device, last + 1, os.urandom(16).hex(), ready,
                          served=before is not None and before.served, drains=drains)
        one.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # may go unseen
        self._latest[device.id] = one
        limits = {key: device.options[key] for key in LIMITS if key in device.options}
        try:
            await self._core.request(CoreVerb.ATTACH, device=device.id, generation=one.generation,
                                     token=one.token, slot=device.slot, type=device.type, **limits)
            if before is None:
                ratelimit.give_group(self._core, device)
            one.pid, one.pidfd = await self._nursery.spawn(
                device.id, one.generation, type=device.type, options=device.options, token=one.token,
                run_dir=self._run_dir, suspect=suspect, drain=drains)
        except CellvisorError:
            one.state = State.ENDED
            if self._latest.get(device.id) is not one:  # and whoever is there by now is not to be tried again
                raise Conflict(f"{device.id}: was removed meanwhile") from None
            raise
        if one.state is State.SPAWNING:
            one.state = State.RUNNING
        if self._latest.get(device.id) is not one:
            kill_pidfd(one.pidfd)
            one.close()
            raise Conflict(f"{device.id}: was removed meanwhile")
        self._watch(one)
        return one

    def _watch(self, one: Incarnation) -> None:
        """Notice its end even if neither core nor its nursery live to tell; they know more, so they come first."""

        def ended() -> None:
            self._loop.remove_reader(one.pidfd)
            self._loop.call_later(4 * REPORT_DELAY, self.lost, one)

        if one.pidfd >= 0 and one.is_alive:
            self._loop.add_reader(one.pidfd, ended)
            if not one.ready.done():
                timer = self._loop.call_later(START_TIMEOUT, self._too_slow, one)
                one.ready.add_done_callback(lambda ready: timer.cancel())

    def _too_slow(self, one: Incarnation) -> None:
        if one.state is State.RUNNING and one.served:  # a first one is waited for by who wants it
            one.reason = f"did not come up within {START_TIMEOUT:g} s"
            kill_pidfd(one.pidfd)

    # ---- from one controlplane to the next

    def lives(self) -> dict[str, Life]:
        """Return what a successor must know of each device's latest incarnation."""
        return {one.device.id: Life(one.generation, one.token, one.is_parked or one.drains, one.reason, one.served,
                                    self.budget(one.device).moments()) for one in self.latest()}

    def take_over(self, device: Device, life: Life, *, pid: int, pidfd: int, serving: bool) -> Incarnation:
        """Go on with an incarnation that a predecessor of ours started. `pidfd` is ours, -1 if it has ended."""
        state = State.SERVING if serving else State.RUNNING
        if life.parked:
            state = State.PARKED if life.served else State.FAILED
        one = Incarnation(device, life.generation, life.token, self._loop.create_future(), state, pid, pidfd,
                          life.reason, served=life.served or serving)
        one.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())
        if serving:
            one.ready.set_result(None)
        self._latest[device.id] = one
        self.budget(device).inherit(life.restarts)
        self._watch(one)
        return one

    def find(self, device_id: str) -> Incarnation | None:
        """Return the latest incarnation of a device, if there is one."""
        return self._latest.get(device_id)

    def get(self, device_id: str) -> Incarnation:
        """Return the latest incarnation of a device. Raises NotFound."""
        one = self._latest.get(device_id)
        if one is None:
            raise NotFound(f"no device {device_id[:80]!r}", hint="see `cellvisor devices`")
        return one

    def relieve(self, one: Incarnation) -> None:
        """Its end is wanted: no successor follows by itself."""
        one.state = State.ENDED

    def forget(self, device_id: str) -> None:
        """The latest incarnation ended without having served: the next one is started by who says so."""
        self._latest[device_id].state = State.ENDED

    def give_up(self, device_id: str, reason: str) -> None:
        """The latest incarnation could not serve, and nobody has another one: until restart-device."""
        one = self._latest[device_id]
        if one.state is State.ENDED:
            one.served, one.reason = True, one.reason or reason
            self._park(one)

    def retire(self, device_id: str) -> Incarnation | None:
        """Forget a device: it gets no successor. Its process, if there is one, and its pidfd are the caller's."""
        one = self._latest.pop(device_id, None)
        self._budgets.pop(device_id, None)
        self._died_at.pop(device_id, None)
        self.parking.forget(device_id)
        self._nursery.leave(device_id)
        if one is not None:
            self._used[device_id] = one.generation
            one.state = State.ENDED
            if not one.ready.done():
                one.ready.set_exception(NotFound(f"{device_id}: was removed meanwhile"))
        return one

    async def wait_ready(self, timeout: float = READY_TIMEOUT) -> None:
        """Wait until every device serves. Raises UsageError with the reason of the first that cannot."""
        waiting = [one.ready for one in self.latest()]
        try:
            async with asyncio.timeout(timeout):
                for ready in asyncio.as_completed(waiting):
                    await ready
        except TimeoutError:
            late = ", ".join(one.device.id for one in self.latest() if not one.ready.done())
            raise TryAgain(f"{late}: not ready within {timeout:g} s") from None

    # ---- what core and the nursery report

    def on_core_event(self, name: str, properties: dict[str, Any]) -> None:
        """Follow device.ready, .failed, .expelled, .poison, .backend and .reset-waits."""
        one = self._latest.get(str(properties.get("device", "")))
        if one is None:
            return
        if name == "device.reset-waits":
            self.parking.reset_waits(one)
        if properties.get("generation", one.generation) != one.generation or not one.is_alive:
            return
        if name == "device.ready":
            self._ready(one)
        elif name == "device.failed":
            one.reason = one.reason or str(properties.get("reason", ""))[:1000]
            one.refused = properties.get("refused") is True
            self._loop.call_later(REPORT_DELAY, self.lost, one)
        elif name == "device.expelled":
            one.reason = str(properties.get("reason", ""))[:1000]
        elif name == "device.poison":
            self._events.emit(name, **properties)
        elif name == "device.backend":
            self._events.emit(f"backend.{properties.pop('change')}", **properties)

    def _ready(self, one: Incarnation) -> None:
        self.parking.reset_goes_on(one)
        one.state = State.DRAINING if one.drains else State.SERVING
        one.served = True
        if not one.ready.done():
            one.ready.set_result(None)
        about = {"device": one.device.id, "generation": one.generation, "pid": one.pid}
        self._events.emit("device.draining" if one.drains else "device.ready", **about)
        died = self._died_at.pop(one.device.id, None)
        if died is not None:
            self._events.emit("device.restarted", **about, ms=round((time.monotonic() - died) * 1000, 3))

    def on_exited(self, device: str, generation: int, pid: int, status: int | None) -> None:
        """Take the nursery's report that a worker ended."""
        one = self._latest.get(device)
        if one is None or one.generation != generation:
            return
        one.status = status
        one.how = describe_exit(status) if status not in (0, 1) else ""
        # Core's report, which is on its way, says what the worker said; after a signal it has said nothing.
        if one.reason or (one.served and status != 1):
            self.lost(one)
        else:
            self._loop.call_later(SAID_DELAY if status == 1 else REPORT_DELAY, self.lost, one)

    def lost(self, one: Incarnation) -> None:
        """A process has ended, or is as good as that: decide what follows it."""
        if not one.is_alive:
            return
        if self.is_stopping:
            one.state = State.ENDED
            return
        one.reason = f"{one.reason}: {one.how}" if one.reason and one.how else one.reason or one.how or GAVE_UP
        kill_pidfd(one.pidfd)  # core may have given up on one that lives on
        one.close()
        if one.drains:
            self.parking.drained(one)
            return
        delay = None
        if one.served and not one.refused:
            delay = self.budget(one.device).next_delay(self._loop.time())
        if delay is None:
            self._park(one)
            return
        one.state = State.DEAD
        self._died_at.setdefault(one.device.id, time.monotonic())
        self.later(self.replace(one, delay))
        self._loop.call_soon(self._tell_death, one)  # the guest waits: its successor first

    def _tell_death(self, one: Incarnation) -> None:
        log.get("fleet").warning("%s/%d died: %s: starting its successor", one.device.id, one.generation, one.reason)
        self._events.emit("device.died", device=one.device.id, generation=one.generation, pid=one.pid,
                          reason=one.reason)

    def later(self, work: Coroutine[Any, Any, None]) -> None:
        """Have something done that nobody waits for."""
        task = self._loop.create_task(work)
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def replace(self, dead: Incarnation, delay: float) -> None:
        """Start the successor of `dead` after `delay` seconds."""
        if delay:
            await asyncio.sleep(delay)
        if self.is_stopping or self._latest.get(dead.device.id) is not dead:
            return
        try:
            await self.start(dead.device, suspect=is_self_inflicted(dead.status))
        except CellvisorError as error:
            one = self._latest.get(dead.device.id)
            # Another process or device may have come by that name while this one's process was being forked.
            if one is not None and one.device is dead.device and one.state is State.ENDED and not self.is_stopping:
                one.reason = one.reason or str(error).removeprefix(f"{one.device.id}: ")
                self._park(one)

    def _park(self, one: Incarnation) -> None:
        """Give up for now: what the guest asks of the device waits."""
        one.state = State.PARKED if one.served else State.FAILED
        self._died_at.pop(one.device.id, None)
        # A device that never served is refused in one line, by whoever wanted it.
        level = logging.ERROR if one.served else logging.INFO
        log.get("fleet").log(level, "%s %s: %s", one.device.id, one.state, one.reason)
        self._events.emit(f"device.{one.state}", device=one.device.id, generation=one.generation, pid=one.pid,
                          reason=one.reason)
        if not one.ready.done():
            one.ready.set_exception(cannot_serve(one.device.id, one.reason))
        self.parking.finish_reset(one)

    def budget(self, device: Device) -> Budget:
        """Return how often a device may still be restarted."""
        return self._budgets.setdefault(device.id, Budget(Policy.of(device.options)))

    # ---- the end

    def stopping(self) -> None:
        """From now on a worker that ends does what it should."""
        self.is_stopping = True

    async def wait_gone(self, timeout: float) -> None:
        """Wait until every worker ended, at most `timeout` seconds."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                for one in self.latest():
                    await wait_pidfd(one.pidfd)

    def kill(self) -> None:
        """SIGKILL every worker that is left."""
        for one in self.latest():
            if one.pidfd >= 0:
                kill_pidfd(one.pidfd)

    def close(self) -> None:
        """Let the pidfds go."""
        for one in self.latest():
            one.close()
