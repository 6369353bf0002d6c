"""What one controlplane leaves to the next, and how the next goes on: half-made steps are finished or begun anew.

    take_over: the pilot's lock -> core listens to us, our predecessor is a stranger -> its record, its descriptors
    go_on:     nurseries found or started -> each device's incarnation taken over, or its next one started
               -> a boot that was under way is finished -> the API answers
"""

from __future__ import annotations

import contextlib
import os
import socket
import time
from collections.abc import Awaitable, Callable
from dataclasses import dataclass, replace
from functools import partial
from typing import TYPE_CHECKING, Any

import zmq.asyncio

from cellvisor.controlplane import booting, swap
from cellvisor.controlplane.blob import Life, Record, read
from cellvisor.controlplane.corelink import OURS, CoreLink
from cellvisor.controlplane.events import Monitor
from cellvisor.controlplane.inventory import Device, Inventory
from cellvisor.controlplane.processes import Child
from cellvisor.controlplane.terminal import Terminal
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, NotFound
from cellvisor.core.wire import fdpass, places
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.rundir import RunDir
    from cellvisor.controlplane.supervisor import Supervisor

STDIO = ("stdin", "stdout", "stderr")
LOCK, MONITOR, API_SOCKET = "lock", "monitor", "api-socket"
STATES = {"created": "Created", "running": "Running", "paused": "Paused", "resetting": "Running",
          "stopped": "Shutdown", "crashed": "Shutdown"}

Workers = dict[tuple[str, int], tuple[int, int]]


@dataclass(frozen=True, slots=True)
class Legacy:
    """What a successor has: its link to core, and the record. `began`: CLOCK_MONOTONIC ns when it was needed."""

    context: zmq.asyncio.Context
    core: CoreLink
    record: Record
    began: int
    monitor: Monitor | None


# ---- leaving


def leave_descriptors(core: CoreLink, rundir: RunDir, monitor: Monitor | None, api_socket: str | None) -> None:
    """Give core what a successor cannot open again: the name's lock, our terminal or log, the event monitor.

    `api_socket` is `--api-socket`: one that was inherited as fd=N is among them.
    """
    kept = {LOCK: rundir.lock_fd, **{name: fd for fd, name in enumerate(STDIO)}}
    if monitor is not None:
        kept[MONITOR] = monitor.fileno()
    if api_socket is not None and api_socket.startswith("fd="):
        kept[API_SOCKET] = int(api_socket[3:])
    for name, fd in kept.items():
        with contextlib.suppress(OSError):  # closed by who started us
            os.fstat(fd)
            core.deposit(OURS, name, fd)


def record(vm: Supervisor) -> Record:
    """Return the state of `vm` as of now."""
    fleet = vm.fleet
    return Record(
        flags=vm.flags, config=vm.config, began=vm.began, created=vm.state != "Empty", configured=vm.configured,
        inventory=vm.inventory.state(), lives=fleet.lives() if fleet is not None else {},
        present=vm.nurseries.present, homes=vm.nurseries.homes, terminal=vm.terminal.settings(),
        memory_effects=vm.memory_effects, parts={name: part() for name, part in vm.parts.items()})


# ---- taking over


def core_of(rundir: RunDir) -> Child:
    """Return core as a process that others started. Raises NotFound if it is gone."""
    try:
        with fdpass.connect(rundir.file(places.FDS)) as sock:
            pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
            core = Child("core", pid, os.pidfd_open(pid))
    except OSError as error:
        raise NotFound(f"{rundir.name}: core does not answer: {error.strerror}", code="no-vm") from None
    if not core.is_alive():
        raise NotFound(f"{rundir.name}: core is gone", code="no-vm")
    return core


async def take_over(rundir: RunDir, began: int, *, stdio: bool) -> Legacy:
    """Become the controlplane that core listens to. Raises CellvisorError if there is nothing to go on with.

    With `stdio` our standard descriptors become those of the predecessor.
    """
    context = zmq.asyncio.Context()
    core = CoreLink(context, rundir)
    try:
        kept = (await core.request(CoreVerb.STATE)).get("blob")
        if not kept:
            await core.request(CoreVerb.QUIT)
            raise Conflict(f"{rundir.name}: it had not begun when its controlplane died", code="no-vm")
        found = read(kept)
        lock = core.stored(OURS, LOCK)
        if lock is not None:
            rundir.inherit(lock)
        monitor = core.stored(OURS, MONITOR)
        listener = core.stored(OURS, API_SOCKET)
        if listener is not None:
            found = replace(found, flags=replace(found.flags, api_socket=f"fd={listener}"))
        for number, name in enumerate(STDIO):
            fd = core.stored(OURS, name)
            if fd is None:
                continue
            if number == 0:  # whoever has it in his foreground now finds it as it was
                terminal = Terminal(fd)
                terminal.inherit(found.terminal)
                terminal.restore()
            if stdio:
                os.dup2(fd, number)
            os.close(fd)
    except BaseException:
        await core.close()
        context.term()
        raise
    return Legacy(context, core, found, began, Monitor("", monitor) if monitor is not None else None)


async def go_on(vm: Supervisor, left: Legacy) -> None:
    """Bring `vm` to where its predecessor was, or further."""
    found, core = left.record, left.core
    early: list[tuple[str, dict[str, Any]]] = []
    core.serve(lambda name, properties: early.append((name, properties)), found.pack)
    vm.events.emit("vmm.adopting", name=vm.rundir.name, pid=os.getpid(), generation=vm.rundir.generation)
    workers = await vm.nurseries.find(found.present, dict(found.homes))
    try:
        vm.config, vm.memory_effects = found.config, dict(found.memory_effects)
        vm.configured = found.configured
        vm.inventory = Inventory(vm.nurseries.catalog(), [group.id for group in found.config.groups])
        if found.created:
            vm.inventory.restore(found.inventory)
            vm.state = "Created"
        info = await core.request(CoreVerb.INFO)
        if found.configured:
            vm.state = STATES.get(str(info.get("state")), vm.state)
            vm.memory_effects = info.get("memory_effects") or vm.memory_effects
            await _take_devices(vm, found, info.get("state") != "created", workers)
            vm.nurseries.ward()
        core.serve(vm.on_core_event, vm.record)
        for name, properties in early:
            vm.on_core_event(name, properties)
    finally:
        for _, pidfd in workers.values():
            os.close(pidfd)
    if found.terminal is not None:
        await booting.consoles_of(vm, core).give_up_input()
    if found.configured and info.get("state") != "created":
        with contextlib.suppress(CellvisorError):
            await vm.plug.adopt(found.parts.get("plug"))
        await swap.settle_all(vm, found.parts)
    vm.changed()
    vm.open_api()
    vm.events.emit("vmm.adopted", name=vm.rundir.name, pid=os.getpid(), generation=vm.rundir.generation,
                   ms=round((time.monotonic_ns() - left.began) / 1e6, 3))
    await _go_on_running(vm, found, info)


async def _go_on_running(vm: Supervisor, found: Record, info: dict[str, Any]) -> None:
    state = str(info.get("state"))
    if found.configured and state == "created":
        vm.booting = True  # who wants to add a device meanwhile waits
        try:
            await booting.finish(vm, vm.require_core(), booting.consoles_of(vm, vm.require_core()))
        finally:
            vm.booting = False
    elif found.flags.dry_run:
        vm.end(1, "the dry run was cut short")
    elif not found.configured and found.flags.order is not None:
        if not found.created:
            vm.create(found.flags.order)
        await booting.boot(vm)
    elif found.configured:
        if state == "stopped":
            vm.end(0, "the guest powered off")
        elif state == "crashed":
            vm.end(1, f"the VM crashed: {info.get('reason') or 'no reason given'}")


async def _take_devices(vm: Supervisor, found: Record, booted: bool, workers: Workers) -> None:
    """First all that is known without a step, so that whatever is recorded from now on is complete; then steps."""
    core = vm.require_core()
    fleet = booting.make_fleet(vm, core)
    seen = {entry["device"]: entry for entry in (await core.request(CoreVerb.DEVICES)).get("devices", ())}
    steps: list[Callable[[], Awaitable[Any]]] = []
    for device in list(vm.inventory.devices.values()):
        life, entry = found.lives.get(device.id), seen.pop(device.id, None)
        if life is not None and entry is not None:
            steps.append(_take_device(vm, device, replace(life, served=life.served or booted), entry, workers))
        elif booted:
            log.get("adopt").warning("%s: its addition had only begun, or its removal was all but done", device.id)
            vm.inventory.release(device.id)
            if entry is not None:
                steps.append(partial(core.request, CoreVerb.DETACH, device=device.id))
        else:
            steps.append(partial(fleet.start, device))
    steps += [partial(core.request, CoreVerb.DETACH, device=leftover) for leftover in seen]
    core.serve(core.on_event, vm.record)
    for step in steps:
        with contextlib.suppress(CellvisorError) if booted else contextlib.nullcontext():
            await step()


def _take_device(vm: Supervisor, device: Device, life: Life, entry: dict[str, Any],
                 workers: Workers) -> Callable[[], Awaitable[Any]]:
    """Take over its incarnation; returns the step that is left to do."""
    fleet, core = vm.fleet, vm.require_core()
    assert fleet is not None
    state, forked = entry.get("state"), workers.get((device.id, life.generation))
    pidfd = core.worker_pidfd(device.id)
    if pidfd is None and forked is not None and state in ("waiting", "greeted"):
        pidfd = os.dup(forked[1])  # on its way to core
    one = fleet.take_over(device, life, pidfd=-1 if pidfd is None else pidfd, serving=state == "serving",
                          pid=int(entry.get("pid") or (forked[0] if forked else 0)))

    async def step() -> None:
        if entry.get("reset_waits"):  # nobody heard core ask for somebody to finish it
            fleet.parking.reset_waits(one)
        if life.parked:
            return
        if pidfd is not None:
            if state == "serving":  # our predecessor may have been about to upgrade it
                await core.request(CoreVerb.UNQUIESCE, device=device.id)
        elif life.served and state == "dead":
            fleet.on_core_event("device.failed", {"device": device.id, "generation": life.generation,
                                                  "reason": entry.get("failure")})
        else:  # core expects it, and nobody forked it, or it could not serve
            fleet.forget(device.id)
            await fleet.start(device)

    return step
