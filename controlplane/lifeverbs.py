"""The verbs about the VM as a whole: create, boot, shutdown, delete, and what its devices count.

With `--api-socket` the process lives until shutdown-vmm, as Cloud Hypervisor's does; without it, it is one VM's
process and ends with it.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cellvisor.controlplane import booting, vmconfig
from cellvisor.core.errors import CellvisorError, Conflict, TryAgain
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.inventory import Device
    from cellvisor.controlplane.supervisor import Supervisor

Handler = Callable[[dict[str, Any]], Awaitable[Any]]
COUNT_TIMEOUT = 2.0
RESIZE_TIMEOUT = 30.0


def table(vm: Supervisor, turn: asyncio.Lock) -> dict[str, Handler]:
    """Return verb -> handler(args); handlers raise CellvisorError. `turn` is held while the VM changes."""
    life = Life(vm, turn)
    return {"create": life.create, "boot": life.boot, "shutdown": life.shutdown, "shutdown-vmm": life.end,
            "delete": life.delete, "counters": life.counters, "resize-disk": life.resize_disk,
            "set-link": life.set_link}


def checks(vm: Supervisor, turn: asyncio.Lock) -> dict[str, Handler]:
    """Return verb -> dry run of it: the same arguments and refusals, and what it is about."""
    life = Life(vm, turn)
    return {"create": life.check_create, "boot": life.check_boot, "resize-disk": life.check_resize,
            "set-link": life.check_link}


class Life:
    """What is done to one VM."""

    def __init__(self, vm: Supervisor, turn: asyncio.Lock) -> None:
        self._vm, self._turn = vm, turn

    async def create(self, args: dict[str, Any]) -> dict[str, Any]:
        """Take a VmConfig."""
        async with self._turn:
            self._vm.create(self._order(args))
            await self._vm.require_core().keep_state()  # a successor knows what we answered
            self._vm.events.emit("vm.created")
        return {}

    async def check_create(self, args: dict[str, Any]) -> tuple[Device, ...]:
        """Return the devices that the VM would have."""
        async with self._turn:
            return self._vm.plan(self._order(args)).config.devices

    def _order(self, args: dict[str, Any]) -> vmconfig.Order:
        if self._vm.state != "Empty":
            raise Conflict("create: a VM was created already", hint="delete it first")
        return vmconfig.read(args)

    async def boot(self, args: dict[str, Any]) -> dict[str, Any]:
        """Boot what was created; a VM that cannot boot stays created."""
        async with self._turn:
            self._refuse_boot()
            await self._vm.change(self._boot())
        return {}

    async def check_boot(self, args: dict[str, Any]) -> tuple[Device, ...]:
        """Return the devices that would be started."""
        async with self._turn:
            self._refuse_boot()
            await booting.try_devices(self._vm)
            return self._vm.config.devices

    def _refuse_boot(self) -> None:
        self._refuse_while_booting("boot")
        if self._vm.state != "Created":
            raise Conflict(f"boot: the VM is {self._vm.state} already")

    async def _boot(self) -> None:
        try:
            await booting.boot(self._vm)
        except Exception:
            await self._vm.renew()
            raise

    async def shutdown(self, args: dict[str, Any]) -> dict[str, Any]:
        """End the VM without asking the guest; tells whether the process ends too."""
        if not self._stays():
            return await self.end(args)
        async with self._turn:
            self._refuse_while_booting("shutdown")
            if self._vm.state == "Created":
                raise Conflict("shutdown: the VM is not running", hint="shutdown-vmm ends the process")
            await self._halt()
        return {"ends": False}

    async def delete(self, args: dict[str, Any]) -> dict[str, Any]:
        """End the VM, if it runs, and forget it; nothing to do is fine."""
        if not self._stays():
            return await self.end(args)
        async with self._turn:
            if self._vm.state == "Empty":
                return {"ends": False}
            self._refuse_while_booting("delete")
            if self._vm.state != "Created":
                await self._halt()
            self._vm.delete()
            await self._ordered_otherwise()
            self._vm.events.emit("vm.deleted")
        return {"ends": False}

    async def end(self, args: dict[str, Any]) -> dict[str, Any]:
        """End the process. The reply leaves first: its sockets are closed last."""
        self._vm.end(0, "shut down by request")
        return {"ends": True}

    async def _halt(self) -> None:
        self._vm.events.emit("vm.shutdown")
        self._vm.state = "Shutdown"
        await self._vm.change(self._vm.renew())
        self._vm.state = "Created"
        await self._ordered_otherwise()

    async def _ordered_otherwise(self) -> None:
        """From now on the flags' VM is not what a successor should boot."""
        self._vm.flags = replace(self._vm.flags, payload=None)
        await self._vm.require_core().keep_state()

    def _stays(self) -> bool:
        return self._vm.flags.api_socket is not None

    def _refuse_while_booting(self, verb: str) -> None:
        if self._vm.booting:
            raise TryAgain(f"{verb}: the VM is booting", hint="wait for the event vm.booted")

    async def counters(self, args: dict[str, Any]) -> dict[str, dict[str, int]]:
        """Ask every device that has a process; what does not answer in time has what it told last."""
        core = self._vm.require_core()
        if self._vm.state == "Created":
            raise Conflict("counters: the VM is not running")
        listed = (await core.request(CoreVerb.DEVICES, COUNT_TIMEOUT)).get("devices", ())
        found = {str(entry.get("device")): dict(entry.get("counters") or {}) for entry in listed}

        async def ask(device: str) -> None:
            try:
                answer = await core.request(CoreVerb.CALL, COUNT_TIMEOUT, device=device, verb="counters", args={})
            except CellvisorError:
                return
            result = answer.get("result")
            if isinstance(result, dict):
                found[device] = {str(name): value for name, value in result.items() if type(value) is int}

        await asyncio.gather(*(ask(device) for device in list(found)))
        return {device: values for device, values in sorted(found.items()) if values}

    async def resize_disk(self, args: dict[str, Any]) -> dict[str, Any]:
        """Have a disk's process change its size and tell the guest."""
        device = self._to_resize(args)
        core = self._vm.require_core()
        with self._vm.plug.operations.step("resize-disk", device.id, device.bdf) as operation:
            await core.request(CoreVerb.CALL, RESIZE_TIMEOUT, device=device.id, verb="resize",
                               args={"size": args["desired_size"]})
            self._vm.events.emit("device.resized", device=device.id, size=args["desired_size"])
        return {"id": device.id, "operation": operation.id}

    async def check_resize(self, args: dict[str, Any]) -> Device:
        """Ask the disk's process."""
        device = self._to_resize(args)
        await self._vm.require_core().request(CoreVerb.CALL, RESIZE_TIMEOUT, device=device.id, verb="check",
                                              args={"verb": "resize", "size": args["desired_size"]})
        return device

    def _to_resize(self, args: dict[str, Any]) -> Device:
        device = self._vm.inventory.require("resize-disk", args["id"], "a disk")
        if self._vm.state == "Created":
            raise Conflict("resize-disk: the VM is not running", hint="its disks can be changed on the host")
        return device

    async def set_link(self, args: dict[str, Any]) -> dict[str, Any]:
        """Have a network card's process pull its cable, put it in, or ask the guest to announce itself."""
        device = self._to_link(args)
        verb, more = ("announce", {}) if args["link"] == "announce" else ("link", {"up": args["link"] == "up"})
        answer = await self._vm.require_core().request(CoreVerb.CALL, RESIZE_TIMEOUT, device=device.id, verb=verb,
                                                       args=more)
        result = answer.get("result")
        return {"id": device.id, "link": result.get("link") if isinstance(result, dict) else None}

    async def check_link(self, args: dict[str, Any]) -> Device:
        """See that a process is there to do it."""
        device = self._to_link(args)
        await self._vm.require_core().request(CoreVerb.CALL, RESIZE_TIMEOUT, device=device.id, verb="counters", args={})
        return device

    def _to_link(self, args: dict[str, Any]) -> Device:
        device = self._vm.inventory.require("set-link", args["id"], "a network card")
        if self._vm.state == "Created":
            raise Conflict("set-link: the VM is not running")
        return device
