"""The nurseries of one VM: the present one forks, one that dies is replaced, older ones stay for their workers.

    starting --its socket answers--> present --upgrade--> older --no device is at home there--> told to quit
                                        |
                                        +--died or hung--> gone: its workers live on, another one is started

A device's home is the nursery that its next incarnation comes from: what was not upgraded runs the code that it ran.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
from collections.abc import Callable, Sequence
from typing import Any

from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.incarnation import GAVE_UP, cannot_serve
from cellvisor.controlplane.inventory import Catalog, Device
from cellvisor.controlplane.nurserylink import Exited, NurseryLink
from cellvisor.controlplane.processes import Child, describe_exit, kill_pidfd
from cellvisor.controlplane.rundir import RunDir
from cellvisor.controlplane.waiting import wait_pidfd, wait_readable
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Internal, TryAgain
from cellvisor.core.wire import places

REPLACE_DELAYS = (0.0, 0.2, 1.0, 5.0)  # before the 1st, 2nd, ... attempt; calm for CALM seconds begins anew
CALM = 30.0
DIED = "nursery-died"

Launch = Callable[[int], Child]
Wards = Callable[[], list[tuple[int, int]]]


class Nurseries:
    """`launch(number)` starts one, `wards()` lists the living workers (pid, pidfd), `changed()` wants it recorded."""

    def __init__(self, launch: Launch, core: Child, rundir: RunDir, events: EventLog, on_exited: Exited, wards: Wards,
                 changed: Callable[[], None]) -> None:
        self._core = core
        self._launch, self._rundir, self._events, self._on_exited = launch, rundir, events, on_exited
        self._wards, self._changed = wards, changed
        self._loop = asyncio.get_running_loop()
        self._links: dict[int, NurseryLink] = {}
        self._processes: dict[int, Child] = {}
        self._catalogs: dict[int, Catalog] = {}
        self._replacing: asyncio.Task[None] | None = None
        self._deaths: list[float] = []
        self._stopping = False
        self.present = 0
        self.homes: dict[str, int] = {}

    # ---- coming

    async def open(self, number: int, child: Child) -> Catalog:
        """Connect to a nursery that has been started; returns its device types. Raises Internal if it ended."""
        self._processes[number] = child
        if child.ready >= 0:
            await wait_readable(child.ready)
            if not os.read(child.ready, 1):
                await wait_pidfd(child.pidfd)
                raise Internal(f"{child.role} {describe_exit(child.status())} at start")
        link = NurseryLink(self._path(number), self._on_exited, lambda: self._lost(number))
        self._links[number] = link
        self._catalogs[number] = await link.catalog()
        return self._catalogs[number]

    async def find(self, present: int, homes: dict[str, int]) -> dict[tuple[str, int], tuple[int, int]]:
        """Connect to what a predecessor left, starting a nursery if none is left; returns the workers that they
        have: (device, generation) -> pid and pidfd, the caller's to close."""
        children: dict[tuple[str, int], tuple[int, int]] = {}
        for number in range(places.MAX_NURSERIES):
            if not os.path.exists(self._path(number)):
                continue
            try:
                link = NurseryLink(self._path(number), self._on_exited, lambda number=number: self._lost(number))  # type: ignore[misc]
                self._links[number] = link
                self._processes[number] = Child("nursery", link.pid, os.pidfd_open(link.pid))
                self._catalogs[number] = await link.catalog()
                children.update(await link.children())
            except (OSError, TimeoutError, CellvisorError):
                self._forget(number)
        self.homes = {device: number for device, number in homes.items() if number in self._links}
        self.present = present if present in self._links else min(self._links, default=present)
        if not self._links:
            await self._replace()
        self.tidy()
        return children

    async def start(self) -> int:
        """Start another nursery, with what is on disk now; returns its number. Raises CellvisorError."""
        free = [number for number in range(places.MAX_NURSERIES) if number not in self._processes]
        if not free:
            raise TryAgain(f"all {places.MAX_NURSERIES} nurseries are still in use")
        number = free[0]
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self._path(number))
        try:
            await self.open(number, self._launch(number))
        except BaseException:
            self._forget(number)
            raise
        return number

    def catalog(self, number: int | None = None) -> Catalog:
        """Return the device types that a nursery knows, the present one's by default."""
        return self._catalogs.get(self.present if number is None else number, Catalog())

    # ---- forking

    async def spawn(self, device: str, generation: int, **rest: Any) -> tuple[int, int]:
        """Fork a worker from its home; returns pid and pidfd, ours to close. Raises TryAgain with code DIED if the
        nursery died over it: the worker may exist or not, so the next attempt is another generation's."""
        number = await self._number(device)
        link = self._links[number]
        self.homes[device] = number
        try:
            return await link.spawn(device, generation, **rest)
        except TryAgain:
            kill_pidfd(self._processes[number].pidfd)  # it hangs
            raise TryAgain(f"{device}: its nursery hung", code=DIED) from None
        except Internal as error:
            if self._links.get(number) is link:
                raise
            raise TryAgain(f"{device}: {error}", code=DIED) from None

    def leave(self, device: str) -> None:
        """It is gone: another one of its name is at home in the present nursery."""
        self.homes.pop(device, None)

    async def try_out(self, device: Device, timeout: float, fds: Sequence[int] = ()) -> None:
        """Have a process find out whether `device` can be made, with `fds` of the user. Raises what would be raised if
        it were wanted; nothing is left, and a nursery that dies over it is not waited for."""
        link = self._links[await self._number(device.id)]
        reason = await link.try_out(device.id, device.type, device.options, fds, timeout)
        if reason is None or reason:
            raise cannot_serve(device.id, GAVE_UP if reason is None else reason)

    async def _number(self, device: str) -> int:
        """Return the nursery that the next process of a device comes from."""
        number = self.homes.get(device, self.present)
        if number not in self._links:
            number, is_tried = self.present, False
            while number not in self._links:
                if self._replacing is None or self._replacing.done():
                    if self._stopping or is_tried:
                        raise Internal(f"{device}: there is no nursery", hint="see cellvisor events")
                    self._replacing, is_tried = self._loop.create_task(self._replace()), True
                await asyncio.shield(self._replacing)
                number = self.present
        return number

    # ---- going

    def _lost(self, number: int) -> None:
        """A nursery hung up, so it is dead or as good as that."""
        if self._stopping or not self._core.is_alive():
            return  # it does what it should
        child = self._processes[number]
        self._forget(number)
        self.homes = {device: home for device, home in self.homes.items() if home != number}
        if number != self.present:
            self.ward()
            return
        log.get("nursery").warning("the nursery died: workers live on, starting another one")
        self._events.emit("nursery.died", pid=child.pid)
        self._replacing = self._loop.create_task(self._replace())

    async def _replace(self) -> None:
        now = self._loop.time()
        self._deaths = [*(moment for moment in self._deaths if now - moment < CALM), now]
        for delay in REPLACE_DELAYS[min(len(self._deaths), len(REPLACE_DELAYS)) - 1:]:
            await asyncio.sleep(delay)
            try:
                self.present = await self.start()
                self.ward()
            except (OSError, TimeoutError, CellvisorError) as error:
                log.get("nursery").error("no nursery could be started: %s", error)
                continue
            self._events.emit("nursery.started", pid=self._processes[self.present].pid, number=self.present)
            self._changed()
            return
        self._events.emit("nursery.failed")

    def ward(self) -> None:
        """Have the present nursery answer for workers that lost theirs."""
        if self.present in self._links:
            self._links[self.present].ward(self._wards())

    def _forget(self, number: int) -> None:
        link, child = self._links.pop(number, None), self._processes.pop(number, None)
        self._catalogs.pop(number, None)
        if link is not None:
            link.close()
        if child is not None:
            child.kill()
            child.close()
        with contextlib.suppress(OSError):
            os.unlink(self._path(number))

    def tidy(self) -> None:
        """Have older nurseries end that no device is at home in any more."""
        for number in set(self._links) - {self.present, *self.homes.values()}:
            self._links[number].quit(spare=True)  # the present one answers for its wards next, see _lost()

    def stopping(self) -> None:
        """From now on a nursery that ends does what it should."""
        self._stopping = True

    def quit(self) -> None:
        """Ask every nursery to end, with whatever workers are left."""
        self._stopping = True
        if self._replacing is not None:
            self._replacing.cancel()
        for link in self._links.values():
            link.quit()

    async def wait_gone(self, timeout: float) -> None:
        """Wait until they have ended; who has not in `timeout` seconds is killed."""
        with contextlib.suppress(TimeoutError):
            async with asyncio.timeout(timeout):
                for child in list(self._processes.values()):
                    await wait_pidfd(child.pidfd)
        self.kill()
        for number in list(self._processes):
            self._forget(number)

    def kill(self) -> None:
        """SIGKILL every nursery."""
        self._stopping = True
        for child in self._processes.values():
            child.kill()

    def pids(self) -> list[int]:
        """Return the processes of the nurseries, the present one last."""
        numbers = sorted(self._processes, key=lambda number: (number == self.present, number))
        return [self._processes[number].pid for number in numbers]

    def pid_of(self, device: str) -> int:
        """Return the nursery that the device is at home in, 0 if it is gone."""
        child = self._processes.get(self.homes.get(device, self.present))
        return child.pid if child else 0

    def _path(self, number: int) -> str:
        return self._rundir.file(places.nursery(number))
