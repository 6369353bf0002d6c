"""Devices that come and go while the VM runs: steps with undo for adding, an operation with an outcome for both.

    add:    check, reserve id and slot -> start the process -> ready -> PLUG (guest told) -> reply ... enumerated
    remove: somebody serves it -> UNPLUG (guest told) -> reply ... _EJ0 -> DETACH -> process ended -> id and slot free
A step that fails takes back all before it. One lock per device: serial for a device, parallel for several.
"""

from __future__ import annotations

import asyncio
import contextlib
import weakref
from collections.abc import Coroutine, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cellvisor.controlplane import descriptors
from cellvisor.controlplane.events import Event
from cellvisor.controlplane.farewell import answer_of_guest, see_off
from cellvisor.controlplane.fleet import Fleet
from cellvisor.controlplane.incarnation import READY_TIMEOUT
from cellvisor.controlplane.inventory import Device, Wanted
from cellvisor.controlplane.operations import FINAL, Operation, Operations, OpState
from cellvisor.controlplane.pending import Pending
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, Internal, UsageError
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Supervisor

GUEST_TIMEOUT = 30.0  # seconds until a guest that does nothing about it is called silent
END_TIMEOUT = 5.0
ADD = "add"  # how the verbs that add begin
INSERT_EVENTS = (0, 1)
SLOW = ("ejected", "gone", "unplugged")  # states of a slot whose device is to be put away


class Plug:
    """Adds and removes devices of one VM."""

    def __init__(self, vm: Supervisor) -> None:
        self._vm = vm
        self.operations = Operations(vm.events)
        # By device; whoever holds or waits for a lock keeps it alive.
        self._locks: weakref.WeakValueDictionary[str, asyncio.Lock] = weakref.WeakValueDictionary()
        self.pending = Pending(self.operations)
        self._adding, self._leaving = self.pending.adding, self.pending.leaving
        self._tasks: set[asyncio.Task[None]] = set()
        vm.events.add_sink(self._on_event)
        vm.parts["plug"] = self.as_state

    # ---- adding

    async def add(self, verb: str, wanted: Wanted, timeout: float = GUEST_TIMEOUT, fds: Sequence[int] = ()) -> Device:
        """Add a device; returns when the guest has been told. Raises CellvisorError, nothing is left then.

        `timeout` is how long the guest may take before the operation counts as timed out; `fds` stay the caller's.
        """
        vm = self._vm
        await self._settled(verb)
        # The one step in which two clients can collide: id and slot are ours from here on, or somebody else's.
        device = vm.inventory.add([wanted])[0]
        try:
            descriptors.give(self._core(), device, fds)
        except BaseException:
            vm.inventory.release(device.id)
            raise
        operation = self.operations.begin(verb, device.id, device.bdf)
        if vm.state == "Created":
            self._want(device)
            self.operations.move(operation, OpState.DONE, "there at the next boot")
            return device
        try:
            async with self.locked(device.id), contextlib.AsyncExitStack() as undo:
                undo.callback(vm.inventory.release, device.id)
                await self._bring(device, operation, undo)
                undo.pop_all()
        except CellvisorError as error:
            self._adding.pop(device.id, None)
            self._failed(operation, OpState.REFUSED, str(error))
            raise
        except BaseException:
            self._adding.pop(device.id, None)
            self._failed(operation, OpState.CANCELLED, "the VM ended")
            raise
        self.pending.notified(operation, timeout)
        return device

    async def check(self, verb: str, wanted: Wanted, fds: Sequence[int] = ()) -> Device:
        """Return the device that add() would make. Raises what add() would raise now; nothing is changed or left."""
        await self._settled(verb)
        device = self._vm.inventory.check(wanted)
        descriptors.check(device, fds)
        if self._vm.state != "Created":
            self._fleet()
            _check_mode(verb, device)
            await self._vm.nurseries.try_out(device, READY_TIMEOUT, fds)
        return device

    async def _bring(self, device: Device, operation: Operation, undo: contextlib.AsyncExitStack) -> None:
        vm, fleet, core = self._vm, self._fleet(), self._core()
        _check_mode(operation.verb, device)
        undo.push_async_callback(self._take_back, fleet, device.id)
        one = await fleet.start(device)
        try:
            await asyncio.wait_for(asyncio.shield(one.ready), READY_TIMEOUT)
        except TimeoutError:
            raise Internal(f"{device.id}: its process was not ready within {READY_TIMEOUT:g} s") from None
        self.operations.mark(operation, "ready")
        if device.mode == "pty":
            found = (await core.request(CoreVerb.CALL, device=device.id, verb="where", args={})).get("result")
            path = str(found.get("path", "")) if isinstance(found, dict) else ""
            vm.config = replace(vm.config, paths={**vm.config.paths, device.id: path})
            vm.events.emit("console.pty", device=device.id, path=path)
        self._adding[device.id] = operation
        undo.callback(self._unwant, device.id)
        self._want(device)  # goes into core's record with the step
        await core.request(CoreVerb.PLUG, device=device.id)
        vm.events.emit("device.added", id=device.id, bdf=device.bdf, type=device.type)

    def _failed(self, operation: Operation, state: OpState, reason: str) -> None:
        if not operation.is_over:  # the guest was faster than core's answer, or the machine ended
            self.operations.move(operation, state, reason)

    # ---- removing

    async def remove(self, key: str, *, timeout: float = GUEST_TIMEOUT, host_only: bool = False) -> Operation:
        """Have the guest give a device back; returns when it has been told, and asks again if it was before.

        `host_only` takes the device away without asking: the guest's driver is not prepared, loses what it has
        not written, and may hang until the guest reboots. Raises NotFound, Conflict.
        """
        vm = self._vm
        await self._settled("remove-device")
        device = vm.inventory.get(key)
        if vm.state == "Created":
            operation = self.operations.begin("remove-device", key, device.bdf)
            descriptors.take_back(self._core(), [device])
            vm.inventory.release(key)
            self._unwant(key)
            self.operations.move(operation, OpState.DONE)
            return operation
        async with self.locked(key):
            device = vm.inventory.get(key)
            pending = self._leaving.get(key)
            operation = pending or self.operations.begin("remove-device", key, device.bdf)
            self._leaving[key] = operation
            self._unwant(key)  # goes into core's record with the step
            try:
                if not host_only:
                    await self._fleet().parking.see_out(key)
                await self._core().request(CoreVerb.UNPLUG, device=key, force=host_only)
            except CellvisorError as error:
                if pending is None and not operation.is_over:  # the machine may have ended, and the device with it
                    self._leaving.pop(key, None)
                    self._want(device)
                    self.operations.move(operation, OpState.REFUSED, str(error))
                raise
            added = self._adding.pop(key, None)
            if added is not None and not added.is_over:
                self.pending.end(added, OpState.CANCELLED, "the device was removed")
        self.pending.notified(operation, timeout)
        return operation

    async def check_removal(self, key: str, *, host_only: bool = False) -> Device:
        """Return the device that remove() would be about. Raises what remove() would raise now; nothing is changed."""
        await self._settled("remove-device")
        device = self._vm.inventory.get(key)
        if self._vm.state != "Created":
            await self._core().request(CoreVerb.UNPLUG, device=key, force=host_only, check=True)
        return device

    async def _see_out(self, key: str) -> None:
        """The device was given up while the guest lets it go."""
        try:
            await self._fleet().parking.see_out(key)
        except CellvisorError as error:
            log.get("plug").error("%s: the guest cannot let go of it: %s", key, error)

    async def cancel(self, key: str) -> Operation:
        """Call a pending operation off: a removal is forgotten, a device that no guest took note of is taken out.

        Raises NotFound, and Conflict for one that has ended.
        """
        operation = self.operations.get(key)
        async with self.locked(operation.device):
            if operation.state in FINAL or operation.state is OpState.REQUESTED:
                raise Conflict(f"{operation.id}: is {operation.state}", hint="only what waits for the guest can be")
            removing = self._leaving.get(operation.device) is operation
            if removing:
                await self._core().request(CoreVerb.UNPLUG, device=operation.device, cancel=True)
                self._leaving.pop(operation.device, None)
                self._want(self._vm.inventory.get(operation.device))
            else:
                await self._core().request(CoreVerb.UNPLUG, device=operation.device, force=True)
                self._adding.pop(operation.device, None)
                self._unwant(operation.device)
            self.pending.end(operation, OpState.CANCELLED, "by request")
        return operation

    # ---- what core reports

    def on_core_event(self, name: str, properties: dict[str, Any]) -> None:
        """Follow slot.* and eject.unexpected."""
        device = str(properties.get("device", ""))
        self._vm.events.emit(name, **properties)
        adding, leaving = self._adding.get(device), self._leaving.get(device)
        if name == "slot.enumerated" and adding is not None:
            if adding.state is OpState.REQUESTED:  # core's event came before core's answer was looked at
                self.operations.move(adding, OpState.NOTIFIED)
            self.operations.mark(adding, "enumerated")
            self._adding.pop(device)
            self.pending.end(adding, OpState.DONE, "there since the reboot" if properties.get("how") == "reset" else "")
        elif name == "slot.bound":
            added = self.operations.latest(device, ADD)
            if added is not None and added.state is OpState.DONE:
                self.operations.mark(added, "bound")
        elif name == "slot.ost":
            event, status = int(properties.get("event", -1)), int(properties.get("status", -1))
            if adding is not None and event in INSERT_EVENTS:
                self._adding.pop(device)
                self.pending.end(adding, OpState.REFUSED, answer_of_guest(status, inserting=True))
            elif leaving is not None and event not in INSERT_EVENTS:
                self._leaving.pop(device)
                self._want(self._vm.inventory.get(device))
                self.pending.end(leaving, OpState.REFUSED, answer_of_guest(status, inserting=False))
        elif name == "slot.ejected":
            self._spawn(self._finish(device, self._vm.inventory.devices.get(device), str(properties.get("how", ""))))
        elif name == "slot.freed":
            self._vm.inventory.unblock(int(properties.get("slot", -1)))

    def _on_event(self, event: Event) -> None:
        """A machine that ended keeps nothing pending: what leaves has left, what came is there at the next boot."""
        if event.name.startswith("operation."):
            self._vm.changed()
        elif event.name == "device.parked" and event.properties["device"] in self._leaving:
            self._spawn(self._see_out(event.properties["device"]))
        if event.name not in ("vm.shutdown", "vm.crashed"):
            return
        for device, operation in list(self._leaving.items()):
            self._vm.inventory.release(device)
            self.pending.end(operation, OpState.DONE, "the machine ended")
        for operation in list(self._adding.values()):
            self.pending.end(operation, OpState.DONE, "there at the next boot")
        self._leaving.clear()
        self._adding.clear()
        self._vm.inventory.unblock()

    async def _finish(self, key: str, device: Device | None, how: str) -> None:
        """The guest has let go, or was not asked: release everything that the device had."""
        vm, fleet = self._vm, self._fleet()
        async with self.locked(key):
            if vm.inventory.devices.get(key) is not device:
                return  # taken back already, and there is another one of that name
            await self._put_away(fleet, key)
            if device is None or vm.inventory.devices.get(key, device) is not device:
                return  # the machine has ended meanwhile, and another one of that name was wanted for the next
            vm.inventory.release(key)
            self._unwant(key)
            if how == "force":
                await self._block_if_gone(device)
            vm.events.emit("device.removed", id=key, bdf=device.bdf, how=how)
            operation = self._leaving.pop(key, None)
            if operation is not None:
                self.pending.end(operation, OpState.DONE, "" if how == "guest" else f"by {how}")

    async def _block_if_gone(self, device: Device) -> None:
        with contextlib.suppress(CellvisorError):
            slots = (await self._core().request(CoreVerb.DEVICES)).get("slots", {})
            if slots.get(str(device.slot)) == "gone":
                self._vm.inventory.block(device.slot)

    async def _take_back(self, fleet: Fleet, key: str) -> None:
        """Undo whatever was done of adding a device."""
        with contextlib.suppress(CellvisorError):  # it is not plugged, unless core's answer to PLUG got lost
            await self._core().request(CoreVerb.UNPLUG, device=key, force=True)
        await self._put_away(fleet, key, kill=True)

    async def _put_away(self, fleet: Fleet, key: str, *, kill: bool = False) -> None:
        """End a device's process and have core forget it; when this returns its files and locks are free."""
        one = fleet.retire(key)
        try:
            await self._core().request(CoreVerb.DETACH, device=key)
        except CellvisorError as error:
            log.get("plug").info("%s: %s", key, error)
        if one is not None:
            await see_off(one, 0.0 if kill else END_TIMEOUT)

    # ---- from one controlplane to the next

    def as_state(self) -> dict[str, Any]:
        """Return what adopt() needs, as plain data."""
        return {"operations": self.operations.as_state()}

    async def adopt(self, state: Mapping[str, Any] | None) -> None:
        """Go on where a predecessor was: what the guest was told of goes on, what it was not is taken back."""
        if state:
            self.operations.restore(state["operations"])
        pending = {one.device: one for one in self.operations.listed() if not one.is_over}
        entries = (await self._core().request(CoreVerb.DEVICES)).get("devices", ())
        slots = {str(entry.get("device")): str(entry.get("plug")) for entry in entries}
        known = list(self._vm.inventory.devices.values())
        known.sort(key=lambda device: slots.get(device.id) in SLOW)  # they wait, and events come of the others
        for device in known:
            await self._adopt(device, slots.get(device.id, ""), pending.pop(device.id, None))
        for operation in pending.values():  # their devices are gone
            if operation.verb.startswith(ADD):
                self.pending.end(operation, OpState.REFUSED, "the controlplane died before the guest was told")
            else:
                self.pending.end(operation, OpState.DONE)

    async def _adopt(self, device: Device, slot: str, operation: Operation | None) -> None:
        removing = operation is not None and not operation.verb.startswith(ADD)
        if slot in ("ejected", "gone"):
            if operation is not None and removing:
                self._leaving[device.id] = operation
            await self._finish(device.id, device, "guest" if slot == "ejected" else "force")
        elif slot == "removing":
            operation = operation if operation and removing else self.operations.begin("remove-device", device.id,
                                                                                       device.bdf)
            self._leaving[device.id] = operation
            self._unwant(device.id)
            self.pending.notified(operation, GUEST_TIMEOUT)
        elif slot == "unplugged" and operation is not None and not removing:
            await self._take_back(self._fleet(), device.id)
            self._vm.inventory.release(device.id)
            self._unwant(device.id)
            self.pending.end(operation, OpState.REFUSED, "the controlplane died before the guest was told")
        elif operation is not None:
            self._want(device)
            if slot == "inserting" and not removing:
                self._adding[device.id] = operation
                self.pending.notified(operation, GUEST_TIMEOUT)
            elif not removing:
                self.pending.end(operation, OpState.DONE)
            else:
                self.pending.end(operation, OpState.REFUSED, "while the controlplane was away, or never asked")

    # ---- below

    async def _settled(self, verb: str) -> None:
        """Wait while the VM boots; what is asked then is done right after. Raises Conflict if there is no VM."""
        while self._vm.booting:
            await asyncio.sleep(0.01)
        if self._vm.state not in ("Created", "Running", "Paused"):
            raise Conflict(f"{verb}: the VM is {self._vm.state.lower()}", hint="create or boot it first")

    def _core(self) -> Any:
        if self._vm.core is None:
            raise Internal("core is not there")
        return self._vm.core

    def _fleet(self) -> Fleet:
        if self._vm.fleet is None:
            raise Conflict("the VM has not been booted")
        return self._vm.fleet

    def locked(self, key: str) -> asyncio.Lock:
        """Return the lock of a device: one change of it at a time."""
        lock = self._locks.get(key)
        if lock is None:
            lock = self._locks[key] = asyncio.Lock()
        return lock

    def _want(self, device: Device) -> None:
        config = self._vm.config
        others = [one for one in config.devices if one.id != device.id]
        self._vm.config = replace(config, devices=tuple(sorted([*others, device], key=lambda one: one.slot)))

    def _unwant(self, key: str) -> None:
        config = self._vm.config
        self._vm.config = replace(config, devices=tuple(one for one in config.devices if one.id != key),
                                  paths={name: path for name, path in config.paths.items() if name != key})

    def _spawn(self, work: Coroutine[Any, Any, None]) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)


def _check_mode(verb: str, device: Device) -> None:
    if device.mode == "tty":
        raise UsageError(f"{verb}: mode=tty needs the terminal that the VM was started from",
                         hint="use mode=pty, file=PATH or socket=PATH")
