"""What each verb of the API does; whatever carries a request, it ends here."""

from __future__ import annotations

import asyncio
import os
import time
from collections.abc import Awaitable, Callable
from functools import partial
from typing import TYPE_CHECKING, Any

from cellvisor import __version__
from cellvisor.controlplane import lifeverbs, logtail, plugverbs, ratelimit, relay, report, swap, upgrade, validate
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, TryAgain
from cellvisor.core.wire.control import VERBS, Request, Verb
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.fleet import Fleet
    from cellvisor.controlplane.supervisor import Supervisor

CHANGE_TIMEOUT = 60.0  # a pause waits for I/O in execution


class Verbs:
    """Serves requests that passed the verb table; changes are made one after the other."""

    def __init__(self, vm: Supervisor) -> None:
        self._vm = vm
        self._turn = asyncio.Lock()
        change = self._change
        self._serving: dict[str, Callable[..., Awaitable[Any]]] = {
            "ping": self._ping, "info": self._info, "devices": self._devices, "events": self._events,
            "logs": partial(logtail.serve, vm), "console": relay.Relay(vm).serve,
            "pause": change(CoreVerb.PAUSE), "resume": change(CoreVerb.RESUME),
            "reset": change(CoreVerb.RESET), "power-button": change(CoreVerb.POWER_BUTTON),
            "restart-device": self._restart_device, "drain-device": self._drain_device,
            "nmi": change(CoreVerb.NMI), **lifeverbs.table(vm, self._turn), **plugverbs.table(vm),
            **upgrade.table(vm), **ratelimit.table(vm), **swap.table(vm),
            **validate.table(vm, self._turn, self._admit),
        }

    async def serve(self, request: Request) -> Any:
        """Return the answer. Raises CellvisorError."""
        self._admit(VERBS[request.verb])
        more = (request.fds,) if VERBS[request.verb].takes_fds else ()
        return await self._serving[request.verb](request.args, *more)

    def _admit(self, verb: Verb) -> None:
        if self._vm.state == "Empty" and not verb.empty:
            raise NotFound(f"{verb.name}: no VM was created", hint="create one first", code="not-created")

    async def _core(self, verb: CoreVerb, timeout: float, **args: Any) -> dict[str, Any]:
        if self._vm.core is None:
            raise TryAgain(f"{verb}: core is not there", hint="the VM is starting or ending")
        return await self._vm.core.request(verb, timeout, **args)

    def _change(self, verb: CoreVerb) -> Callable[[dict[str, Any]], Awaitable[Any]]:
        async def change(args: dict[str, Any]) -> dict[str, Any]:
            async with self._turn:
                if self._vm.booting:
                    raise TryAgain(f"{verb}: the VM is still starting", hint="wait for the event vm.booted")
                if self._vm.state == "Created":
                    raise Conflict(f"{verb}: the VM is not running", hint="boot it first")
                return await self._core(verb, CHANGE_TIMEOUT)
        return change

    async def _ping(self, args: dict[str, Any]) -> dict[str, Any]:
        return {"build_version": f"cellvisor {__version__}", "version": __version__, "pid": os.getpid(),
                "features": ["kvm"], "name": self._vm.rundir.name,
                "log_file": logtail.path_of(self._vm)}

    async def _restart_device(self, args: dict[str, Any]) -> dict[str, Any]:
        one = await self._fleet().parking.revive(args["id"])
        return {"id": args["id"], "generation": one.generation, "pid": one.pid}

    async def _drain_device(self, args: dict[str, Any]) -> dict[str, Any]:
        one = await self._fleet().parking.drain(args["id"])
        return {"id": args["id"], "generation": one.generation, "pid": one.pid}

    def _fleet(self) -> Fleet:
        if self._vm.fleet is None:
            raise TryAgain("the VM is still starting", hint="wait for the event vm.booted")
        return self._vm.fleet

    async def _events(self, args: dict[str, Any]) -> dict[str, Any]:
        return {"events": [event.as_wire() for event in self._vm.events.since(args["since"])]}

    async def _info(self, args: dict[str, Any]) -> dict[str, Any]:
        vm = self._vm
        core = await vm.ask_core()
        body = {
            "config": vm.config.as_json(), "state": vm.state, "memory_actual_size": vm.config.memory.size,
            "device_tree": {device.id: {"id": device.id, "pci_bdf": device.bdf, "resources": [],
                                        "parent": None, "children": []} for device in vm.config.devices},
            "name": vm.rundir.name, "pid": os.getpid(), "run_dir": vm.rundir.path,
            "uptime": round(time.monotonic() - vm.began / 1e9, 3),
            "stages": vm.stages.as_wire(), "memory": vm.memory_effects, "core": core,
        }
        if args["processes"]:
            report.add_cpu(vm, core)
            body["processes"] = report.processes(vm, core)
        return body

    async def _devices(self, args: dict[str, Any]) -> dict[str, Any]:
        try:
            seen = {str(entry.get("device") or entry.get("id")): entry
                    for entry in (await self._core(CoreVerb.DEVICES, 5.0)).get("devices", ())}
        except CellvisorError:
            seen = {}
        workers = {one.device.id: one for one in (self._vm.fleet.latest() if self._vm.fleet else ())}
        listed = []
        kept = {device.id for device in self._vm.config.devices}
        for device in sorted(self._vm.inventory.devices.values(), key=lambda one: one.slot):
            entry: dict[str, Any] = {
                "id": device.id, "type": device.type, "slot": device.slot, "bdf": device.bdf,
                "state": "created", "options": device.options, "wanted": device.id in kept,
                "plug": (seen.get(device.id) or {}).get("plug", "unplugged")}
            one = workers.get(device.id)
            if one is not None:
                entry |= {"state": str(one.state), "pid": (one.pid or None) if one.is_alive else None,
                          "generation": one.generation, "reason": one.reason}
            listed.append(entry | {"core": seen.get(device.id)})
        return {"devices": listed}
