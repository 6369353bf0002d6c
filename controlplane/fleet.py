"""The VM's workers: one incarnation per device and generation, from its start to the report of its end.

    spawning --SPAWNED--> running --device.ready--> serving --+--> dead --back-off--> the next generation
        |                    |                                |     +-- budget spent --> failed (parked)
        +---- never served: failed (a bad option, a lock) ----+--> ended    we asked for it

Every way a worker can die ends in _lost(), the one place that decides what happens next (controlplane/
recovery.py). start() gives whoever follows the next generation; core drops what any other one says.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import os
import time
from dataclasses import dataclass
from enum import StrEnum
from typing import Any

from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.inventory import Device
from cellvisor.controlplane.nurserylink import NurseryLink
from cellvisor.controlplane.processes import describe_exit, kill_pidfd
from cellvisor.controlplane.recovery import Budget, is_self_inflicted
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, TryAgain, UsageError
from cellvisor.core.wire.messages import CoreVerb

READY_TIMEOUT = 60.0
REPORT_DELAY = 0.05  # core's report of a death and the nursery's come one shortly after the other
GAVE_UP = "its process ended"


class State(StrEnum):
    SPAWNING = "spawning"
    RUNNING = "running"
    SERVING = "serving"
    DEAD = "dead"
    FAILED = "failed"
    ENDED = "ended"


@dataclass(slots=True)
class Incarnation:
    """One process of a device. `pidfd` is ours."""

    device: Device
    generation: int
    token: str
    ready: asyncio.Future[None]
    state: State = State.SPAWNING
    pid: int = 0
    pidfd: int = -1
    reason: str = ""
    how: str = ""
    status: int | None = None
    served: bool = False

    @property
    def is_alive(self) -> bool:
        return self.state in (State.SPAWNING, State.RUNNING, State.SERVING)

    def close(self) -> None:
        """Let the pidfd go."""
        if self.pidfd >= 0:
            os.close(self.pidfd)
            self.pidfd = -1


class Fleet:
    """The latest incarnation of every device."""

    def __init__(self, core: CoreLink, nursery: NurseryLink, events: EventLog, run_dir: str) -> None:
        self._core, self._nursery, self._events, self._run_dir = core, nursery, events, run_dir
        self._loop = asyncio.get_running_loop()
        self._latest: dict[str, Incarnation] = {}
        self._used: dict[str, int] = {}  # last generation of devices that were retired: late reports name it
        self._budgets: dict[str, Budget] = {}
        self._died_at: dict[str, float] = {}
        self._restarts: set[asyncio.Task[None]] = set()
        self._stopping = False

    def latest(self) -> list[Incarnation]:
        """Return every device's latest incarnation, in slot order."""
        return sorted(self._latest.values(), key=lambda one: one.device.slot)

    async def start(self, device: Device, *, suspect: bool = False) -> Incarnation:
        """Announce the next generation of `device` to core and fork it. Raises CellvisorError.

        `suspect`: its predecessor killed itself, so requests that had begun are replayed one at a time.
        """
        before = self._latest.get(device.id)
        if before is not None and before.is_alive:
            raise Conflict(f"{device.id}: generation {before.generation} is alive")
        last = before.generation if before else self._used.get(device.id, 0)
        one = Incarnation(device, last + 1, os.urandom(16).hex(),
                          self._loop.create_future())
        one.ready.add_done_callback(lambda ready: ready.cancelled() or ready.exception())  # may go unseen
        self._latest[device.id] = one
        await self._core.request(CoreVerb.ATTACH, device=device.id, generation=one.generation,
                                 token=one.token, slot=device.slot, type=device.type)
        one.pid, one.pidfd = await self._nursery.spawn(
            device.id, one.generation, type=device.type, options=device.options, token=one.token,
            run_dir=self._run_dir, suspect=suspect)
        if one.state is State.SPAWNING:
            one.state = State.RUNNING
        if self._latest.get(device.id) is not one:
            kill_pidfd(one.pidfd)
            one.close()
            raise Conflict(f"{device.id}: was removed meanwhile")
        return one

    def retire(self, device_id: str) -> Incarnation | None:
        """Forget a device: it gets no successor. Its process, if there is one, and its pidfd are the caller's."""
        one = self._latest.pop(device_id, None)
        self._budgets.pop(device_id, None)
        self._died_at.pop(device_id, None)
        if one is not None:
            self._used[device_id] = one.generation
            one.state = State.ENDED
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
        """Follow device.ready and device.failed."""
        one = self._latest.get(str(properties.get("device", "")))
        if one is None or properties.get("generation", one.generation) != one.generation or not one.is_alive:
            return
        if name == "device.ready":
            one.state, one.served = State.SERVING, True
            if not one.ready.done():
                one.ready.set_result(None)
            self._events.emit("device.ready", device=one.device.id, generation=one.generation, pid=one.pid)
            died = self._died_at.pop(one.device.id, None)
            if died is not None:
                self._events.emit("device.restarted", device=one.device.id, generation=one.generation,
                                  pid=one.pid, ms=round((time.monotonic() - died) * 1000, 3))
        elif name == "device.failed":
            one.reason = str(properties.get("reason", ""))[:1000]
            self._loop.call_later(REPORT_DELAY, self._lost, one)

    def on_exited(self, device: str, generation: int, pid: int, status: int | None) -> None:
        """Take the nursery's report that a worker ended."""
        one = self._latest.get(device)
        if one is None or one.generation != generation:
            return
        one.status = status
        one.how = describe_exit(status) if status not in (0, 1) else ""
        # Core's report, which is on its way, says what the worker said; only a failed start needs it.
        if one.reason or one.served:
            self._lost(one)
        else:
            self._loop.call_later(REPORT_DELAY, self._lost, one)

    def nursery_lost(self) -> None:
        """Without the nursery workers live on, but nobody can report how they end."""
        if not self._stopping:
            log.get("fleet").error("the nursery died: workers live on, none can be started")
            self._events.emit("nursery.died")

    def _lost(self, one: Incarnation) -> None:
        if not one.is_alive:
            return
        if self._stopping:
            one.state = State.ENDED
            return
        one.reason = f"{one.reason}: {one.how}" if one.reason and one.how else one.reason or one.how or GAVE_UP
        one.close()
        delay = self._budget(one.device).next_delay(self._loop.time()) if one.served else None
        if delay is None:
            self._park(one)
            return
        one.state = State.DEAD
        log.get("fleet").warning("%s/%d died: %s: starting its successor", one.device.id, one.generation, one.reason)
        self._events.emit("device.died", device=one.device.id, generation=one.generation, pid=one.pid,
                          reason=one.reason)
        self._died_at.setdefault(one.device.id, time.monotonic())
        task = self._loop.create_task(self._replace(one, delay))
        self._restarts.add(task)
        task.add_done_callback(self._restarts.discard)

    async def _replace(self, dead: Incarnation, delay: float) -> None:
        """Start the successor of `dead`; a start that fails counts as a death of its own."""
        await asyncio.sleep(delay)
        if self._stopping or self._latest.get(dead.device.id) is not dead:
            return
        try:
            await self.start(dead.device, suspect=is_self_inflicted(dead.status))
        except CellvisorError as error:
            one = self._latest[dead.device.id]
            one.reason = one.reason or str(error)
            self._park(one)

    def _park(self, one: Incarnation) -> None:
        """Give up for now: what the guest asks of the device waits."""
        one.state = State.FAILED
        self._died_at.pop(one.device.id, None)
        # A device that never served is refused in one line, by whoever wanted it.
        level = logging.ERROR if one.served else logging.INFO
        log.get("fleet").log(level, "%s failed: %s", one.device.id, one.reason)
        self._events.emit("device.failed", device=one.device.id, generation=one.generation, pid=one.pid,
                          reason=one.reason)
        if not one.ready.done():
            one.ready.set_exception(UsageError(f"{one.device.id}: {one.reason}"))

    def _budget(self, device: Device) -> Budget:
        return self._budgets.setdefault(device.id, Budget())

    async def revive(self, device_id: str) -> Incarnation:
        """Start a parked device again, its budget refilled. Raises NotFound, Conflict, UsageError."""
        one = self._latest.get(device_id)
        if one is None:
            raise NotFound(f"no device {device_id!r}", hint="see `cellvisor devices`")
        if one.state is not State.FAILED:
            raise Conflict(f"{device_id}: is {one.state}, not failed", hint="only a failed device is restarted")
        self._budget(one.device).refill()
        revived = await self.start(one.device)
        await asyncio.wait_for(revived.ready, READY_TIMEOUT)
        return revived

    # ---- the end

    def stopping(self) -> None:
        """From now on a worker that ends does what it should."""
        self._stopping = True

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


async def wait_pidfd(pidfd: int) -> None:
    """Wait until the process of `pidfd` ended; nothing to wait for if it is -1."""
    if pidfd < 0:
        return
    loop = asyncio.get_running_loop()
    ended: asyncio.Future[None] = loop.create_future()
    loop.add_reader(pidfd, settle, ended)
    try:
        await ended
    finally:
        loop.remove_reader(pidfd)



def settle(future: asyncio.Future[None]) -> None:
    """Resolve `future` unless it is done."""
    if not future.done():
        future.set_result(None)
