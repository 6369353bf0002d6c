"""One VM from start to end: core and nursery up, devices attached and ready, boot, and a clean way out.

    empty --create--> created --boot--> running <--pause/resume--> paused
      ^                | ^                 |                          |
      +---- delete ----+ +-- vm shutdown --+--- power-off, crash, ----+--> shutdown: workers, nursery, core, sockets,
                             (renew)            signal, vmm shutdown       all gone
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import time
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any

import zmq.asyncio

from cellvisor.controlplane import adopt, booting, descriptors, report, vmconfig
from cellvisor.controlplane.api import Api
from cellvisor.controlplane.config import Payload, VmConfig
from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.desk import Desk
from cellvisor.controlplane.ending import end_machine
from cellvisor.controlplane.events import EventLog, Monitor
from cellvisor.controlplane.flags import RunFlags
from cellvisor.controlplane.fleet import Fleet
from cellvisor.controlplane.inventory import Catalog, Inventory
from cellvisor.controlplane.keeping import Keeping
from cellvisor.controlplane.nurseries import Nurseries
from cellvisor.controlplane.plug import Plug
from cellvisor.controlplane.processes import Child, Launcher, describe_exit
from cellvisor.controlplane.rundir import RunDir
from cellvisor.controlplane.terminal import Terminal
from cellvisor.controlplane.verbs import Verbs
from cellvisor.controlplane.vmconfig import Order
from cellvisor.controlplane.waiting import wait_pidfd, wait_readable
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Internal
from cellvisor.core.wire import places
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.metricsdoor import MetricsDoor

SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT)


@dataclass(frozen=True, slots=True)
class Ending:
    """Why the VM ends, and the exit status of `cellvisor run`; no reason means that it was told already."""

    status: int
    reason: str = ""


class Supervisor:
    """Runs one VM; whatever happens in run(), nothing of the VM is left when it returns."""

    def __init__(self, flags: RunFlags, rundir: RunDir, core: Child, nursery: Child | None, terminal: Terminal,
                 began: int, launcher: Launcher, left: adopt.Legacy | None = None) -> None:
        self.flags, self.rundir, self.terminal = flags, rundir, terminal
        self.core_child, self._nursery_child = core, nursery
        self.state = "Empty"
        self.booting = False
        self.config = VmConfig(flags.cpus, flags.memory, flags.payload or Payload(""), flags.serial)
        self.inventory = Inventory(Catalog())
        self.began = began
        self.stages = report.Stages(began)
        self.events = EventLog(rundir.generation)
        self.fleet: Fleet | None = None
        self.monitor = left.monitor if left is not None else None
        if flags.event_monitor and self.monitor is None:
            self.monitor = Monitor(flags.event_monitor)
        self._loop = asyncio.get_running_loop()
        self._ending: asyncio.Future[Ending] = self._loop.create_future()
        self._left = left
        self._context = left.context if left is not None else zmq.asyncio.Context()
        self._launcher = launcher
        self._change: asyncio.Task[None] | None = None
        self._keeping = Keeping(self._keep)
        self.core: CoreLink | None = None
        self.nurseries = self._new_nurseries()
        self.configured = False
        self.parts: dict[str, Callable[[], Any]] = {}  # what others want recorded in core, by their key
        self.plug = Plug(self)
        self._api: Api | None = None
        self._metrics: MetricsDoor | None = None
        self._stopping = False
        self.memory_effects: dict[str, Any] = {}

    # ---- the life of the VM

    async def run(self, pending: list[int]) -> Ending:
        """Start, serve until something ends the VM, clean up. Raises CellvisorError if it cannot start.

        `pending` holds signals that came before there was a loop.
        """
        for number in SIGNALS:
            self._loop.add_signal_handler(number, self._on_signal, number)
        self._loop.add_reader(self.core_child.pidfd, self._core_ended)
        if pending:
            self._on_signal(pending[0])
        if self.monitor is not None:
            self.events.add_sink(self.monitor.write)
        start = self._loop.create_task(self._start())
        try:
            first: set[asyncio.Future[Any]] = {start, self._ending}
            await asyncio.wait(first, return_when=asyncio.FIRST_COMPLETED)
            if not self._ending.done():
                start.result()
            ending = await self._ending
            if self.flags.report is not None:
                report.write(self.flags.report, self, await self.ask_core(), ending.reason, ending.status)
        finally:
            start.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await start
            if self._left is None or self._api is not None:
                await self._stop()  # else we could not adopt it: it lives on for whoever can
        return ending

    def end(self, status: int, reason: str = "") -> None:
        """End the VM; the first reason counts."""
        if not self._ending.done():
            self._ending.set_result(Ending(status, reason))

    async def _start(self) -> None:
        if self._left is not None:
            self.core = self._left.core
            await adopt.go_on(self, self._left)
            return
        self.events.emit("vmm.starting", name=self.rundir.name, pid=os.getpid())
        await self._connect()
        order = self.flags.order
        if order is not None:
            self.create(order)
            if self.flags.dry_run:
                await booting.try_devices(self)
                self.end(0)
                return
        self.open_api()
        if order is not None:
            await booting.boot(self)

    def require_core(self) -> CoreLink:
        """Return the link to core. Raises Internal while there is none."""
        if self.core is None:
            raise Internal("core is not there")
        return self.core

    def open_api(self) -> None:
        """Serve requests from now on."""
        verbs = Verbs(self)
        self._api = Api(self._context, self.rundir, self.events, Desk(verbs.serve), self.flags)
        if self.flags.metrics is not None:
            from cellvisor.controlplane import metrics, metricsdoor

            self._metrics = metricsdoor.MetricsDoor(
                self.flags.metrics, lambda: metrics.collect(verbs.serve, self.rundir.name))

    async def _connect(self) -> None:
        """Wait for core and the nursery, and learn which device types there are."""
        assert self._nursery_child is not None
        await self._wait_core()
        self.stages.add("core-ready", time.monotonic_ns())
        core = self.core = CoreLink(self._context, self.rundir)
        core.serve(self.on_core_event, self.record)
        if self.rundir.generation > 1:
            await core.request(CoreVerb.INFO)  # a fresh core takes a successor for a stranger until it speaks
        adopt.leave_descriptors(core, self.rundir, self.monitor, self.flags.api_socket)
        await core.keep_state()  # from here on core outlives us
        await self.nurseries.open(0, self._nursery_child)

    def _new_nurseries(self) -> Nurseries:
        core = self.core_child
        return Nurseries(lambda number: self._launcher.nursery(core, number), core, self.rundir, self.events,
                         self._worker_exited, self._wards, self.changed)

    def _wards(self) -> list[tuple[int, int]]:
        workers = self.fleet.latest() if self.fleet is not None else []
        return [(one.pid, one.pidfd) for one in workers if one.is_alive and one.pidfd >= 0]

    def record(self) -> bytes:
        """Return our state as core is to keep it."""
        return adopt.record(self).pack()

    def changed(self) -> None:
        """Have core keep our state soon: something changed without a step of core's."""
        self._keeping.changed()

    async def _keep(self) -> None:
        with contextlib.suppress(CellvisorError):
            if self.core is not None:
                await self.core.keep_state()

    def plan(self, order: Order) -> vmconfig.Plan:
        """Place the devices of `order`. Raises CellvisorError; nothing is changed."""
        plan = vmconfig.plan(order, self.nurseries.catalog())
        for device in plan.config.devices:
            descriptors.check(device, descriptors.named(device))
        return plan

    def create(self, order: Order) -> None:
        """Take `order` as the VM to boot. Raises CellvisorError, nothing is changed then."""
        plan = self.plan(order)
        descriptors.give_named(self.require_core(), plan.config.devices, self.rundir.generation)
        self.config, self.inventory = plan.config, plan.inventory
        self.state = "Created"
        self.changed()

    def delete(self) -> None:
        """Forget what was created."""
        descriptors.take_back(self.require_core(), self.config.devices)
        self.config = VmConfig(self.flags.cpus, self.flags.memory, Payload(""), self.flags.serial)
        self.inventory = Inventory(self.nurseries.catalog())
        self.state = "Empty"
        self.changed()

    async def renew(self) -> None:
        """End the machine but not the process: a fresh core and nursery wait for the next boot."""
        kept = descriptors.collect(self.core, self.config.devices)
        await self._end_machine()
        self.terminal.restore()
        for name in (places.CORE, places.FDS, places.CONTROL):
            with contextlib.suppress(FileNotFoundError):
                os.unlink(self.rundir.file(name))
        self.stages = report.Stages(time.monotonic_ns())
        self.config = replace(self.config, paths={})
        self.core_child, self.configured = self._launcher.core(), False
        self._nursery_child, self.nurseries = self._launcher.nursery(self.core_child), self._new_nurseries()
        self._loop.add_reader(self.core_child.pidfd, self._core_ended)
        await self._connect()
        descriptors.pass_on(self.require_core(), kept)

    async def change(self, work: Coroutine[Any, Any, None]) -> None:
        """Run a boot or a renewal, one at a time; the end of the process waits for it to be given up."""
        self._change = self._loop.create_task(work)
        await asyncio.shield(self._change)

    async def _wait_core(self) -> None:
        """Wait until core has bound its sockets. Raises Internal if it ends instead."""
        child = self.core_child
        await wait_readable(child.ready)
        if not os.read(child.ready, 1):
            await wait_pidfd(child.pidfd)
            self._core_ended()
            raise Internal(f"core {describe_exit(child.status())} at start")

    # ---- what happens to us

    def on_core_event(self, name: str, properties: dict[str, Any]) -> None:
        """Take an event of core."""
        if name.removeprefix("device.") in ("ready", "failed", "expelled", "poison", "backend", "reset-waits"):
            if self.fleet is not None:
                self.fleet.on_core_event(name, properties)
            return
        if name.startswith(("slot.", "eject.")):
            self.plug.on_core_event(name, properties)
            return
        states = {"vm.booted": "Running", "vm.paused": "Paused", "vm.resumed": "Running",
                  "vm.rebooted": "Running", "vm.shutdown": "Shutdown", "vm.crashed": "Shutdown"}
        self.state = states.get(name, self.state)
        self.events.emit(name, **properties)
        if name == "vm.shutdown":
            self.end(0, "the guest powered off")
        elif name == "vm.crashed":
            self.end(1, f"the VM crashed: {properties.get('reason', 'no reason given')}")

    def _core_ended(self) -> None:
        self._loop.remove_reader(self.core_child.pidfd)
        status = self.core_child.status()
        if self._stopping or self._ending.done():
            return
        how = describe_exit(status)
        if self.core is not None:
            self.core.fail(Internal(f"core {how}"))
        elif status == 2:  # it has said why
            self.end(2)
            return
        self.state = "Shutdown"
        self.events.emit("vm.crashed", reason=f"core {how}")
        self.end(2 if self.core is None else 1, f"core {how}: the VM is gone")

    def _worker_exited(self, device: str, generation: int, pid: int, status: int | None) -> None:
        if self.fleet is not None:
            self.fleet.on_exited(device, generation, pid, status)

    def _on_signal(self, number: int) -> None:
        if self._ending.done():
            self._kill_at_once(number)
        log.get().info("ending the VM; the same signal again kills it at once")
        self.end(128 + number, f"ended by {signal.Signals(number).name}")

    def _kill_at_once(self, number: int) -> None:
        """A second signal: no ceremony, but still nothing left behind."""
        if self.fleet is not None:
            self.fleet.kill()
        self.nurseries.kill()
        for child in (self._nursery_child, self.core_child):
            if child is not None:
                child.kill()
                child.close()
        self.terminal.restore()
        self.rundir.remove()
        if self._api is not None:
            self._api.release()
        os._exit(128 + number)

    # ---- what the VM costs

    async def ask_core(self) -> dict[str, Any]:
        """Return core's INFO, or {"error"}; what it tells of the boot is kept for the report."""
        if self.core is None:
            return {"error": "core is not there yet"}
        try:
            answer = await self.core.request(CoreVerb.INFO, 5.0)
        except CellvisorError as error:
            return {"error": str(error)}
        if answer.get("first_entry_ns"):
            self.stages.add("first guest instruction", int(answer["first_entry_ns"]))
        for code, moment in answer.get("stages", ()):
            self.stages.add(f"stage {int(code):#04x}", int(moment))
        return answer

    # ---- the end

    async def _stop(self) -> None:
        """End everything: the machine, then the API."""
        self._stopping = True
        if self._change is not None:
            self._change.cancel()
            with contextlib.suppress(asyncio.CancelledError, Exception):
                await self._change
        self.events.emit("vmm.shutdown")
        await self._end_machine()
        if self._metrics is not None:
            await self._metrics.close()
        if self._api is not None:
            await self._api.close()
        self._context.destroy(linger=200)
        if self.monitor is not None:
            self.monitor.close()
        self.terminal.restore()
        self.rundir.remove()
        if self._api is not None:
            self._api.release()

    async def _end_machine(self) -> None:
        if self.core_child.pidfd >= 0:
            self._loop.remove_reader(self.core_child.pidfd)
        self._keeping.cancel()
        await end_machine(self.core, self.core_child, self.nurseries, self._nursery_child, self.fleet)
        self.core, self.fleet = None, None
