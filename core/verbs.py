"""The verbs that the controlplane asks of core (CoreVerb): checks at the edge, then the machine."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from cellvisor.core.config import machine_config
from cellvisor.core.custody import Custody
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, UsageError
from cellvisor.core.link import Link
from cellvisor.core.machine import Machine
from cellvisor.core.platform import SERIAL_DEVICE
from cellvisor.core.server import Reply
from cellvisor.core.store import Store
from cellvisor.core.wire.messages import CoreVerb, ToWorker

MAX_PCI_SLOT = 31


class Verbs:
    """The table: verb -> method(args, reply)."""

    def __init__(self, machine: Machine, custody: Custody, messages: Mapping[str, int], store: Store) -> None:
        self._machine, self._custody, self._messages, self._store = machine, custody, messages, store
        self._table: dict[str, Callable[[dict[str, Any], Reply], None]] = {
            CoreVerb.CONFIGURE: self._configure, CoreVerb.ATTACH: self._attach, CoreVerb.BOOT: self._boot,
            CoreVerb.PAUSE: self._pause, CoreVerb.RESUME: self._resume, CoreVerb.RESET: self._reset,
            CoreVerb.POWER_BUTTON: self._power_button, CoreVerb.NMI: self._nmi, CoreVerb.INFO: self._info,
            CoreVerb.DEVICES: self._devices, CoreVerb.CALL: self._call, CoreVerb.QUIT: self._quit,
            CoreVerb.STATE: self._state, CoreVerb.QUIESCE: self._quiesce, CoreVerb.UNQUIESCE: self._unquiesce,
            CoreVerb.RELEASE: self._release,
            CoreVerb.PLUG: self._plug, CoreVerb.UNPLUG: self._unplug, CoreVerb.DETACH: self._detach,
        }

    def serve(self, verb: str, args: dict[str, Any], reply: Reply) -> None:
        """Serve a request of the controlplane; `reply` is called once, now or later.

        The controlplane's state that comes along is kept unless the step is refused.
        """
        handler = self._table.get(verb)
        if handler is None:
            raise UsageError(f"{verb}: core has no such verb")
        blob = Custody.checked(args["blob"]) if "blob" in args else None
        handler(args, reply)
        if blob is not None:
            self._custody.blob = blob

    def _state(self, args: dict[str, Any], reply: Reply) -> None:
        reply({} if "blob" in args else {"blob": self._custody.blob})

    def _configure(self, args: dict[str, Any], reply: Reply) -> None:
        machine = self._machine
        machine.configure(machine_config(args))
        reply({"memory": machine.ram.effects if machine.ram else {}, "serial": machine.serial_path()})

    def _attach(self, args: dict[str, Any], reply: Reply) -> None:
        device, kind, slot = args.get("device"), args.get("type"), args.get("slot")
        generation, token = args.get("generation"), args.get("token")
        if not (isinstance(device, str) and isinstance(kind, str) and isinstance(token, str)
                and type(slot) is int and type(generation) is int and "/" not in device + token):
            raise UsageError("attach: device, type, slot, generation or token has the wrong type")
        if not 1 <= slot <= MAX_PCI_SLOT:
            raise UsageError(f"attach: slot {slot} is outside 1..{MAX_PCI_SLOT}")
        self._machine.attach(device, kind, slot, generation, token)
        link = self._machine.links[device]
        link.hang_timeout = _seconds(args, "hang_timeout", link.hang_timeout)
        link.io_timeout = _seconds(args, "io_timeout", link.io_timeout)
        reply({})

    def _plug(self, args: dict[str, Any], reply: Reply) -> None:
        state = self._machine.hotplug.plug(str(args.get("device")), self._machine.state)
        reply({"state": str(state)})

    def _unplug(self, args: dict[str, Any], reply: Reply) -> None:
        state = self._machine.hotplug.unplug(str(args.get("device")), self._machine.state,
                                             force=args.get("force") is True, cancel=args.get("cancel") is True,
                                             check=args.get("check") is True)
        reply({"state": str(state)})

    def _detach(self, args: dict[str, Any], reply: Reply) -> None:
        self._machine.detach(str(args.get("device")))
        reply({})

    def _boot(self, args: dict[str, Any], reply: Reply) -> None:
        self._machine.boot()
        reply({})

    def _pause(self, args: dict[str, Any], reply: Reply) -> None:
        self._machine.pause(lambda late: reply({"late": sorted(late)}))

    def _resume(self, args: dict[str, Any], reply: Reply) -> None:
        self._machine.resume()
        reply({})

    def _reset(self, args: dict[str, Any], reply: Reply) -> None:
        self._machine.reset(lambda error: reply(error or {}))

    def _power_button(self, args: dict[str, Any], reply: Reply) -> None:
        self._machine.power_button()
        reply({})

    def _nmi(self, args: dict[str, Any], reply: Reply) -> None:
        if not self._machine.vcpus:
            raise Conflict(f"nmi: the VM is {self._machine.state}")
        for vcpu in self._machine.vcpus:  # a paused one gets it when it goes on
            vcpu.request_nmi()
        reply({})

    def _info(self, args: dict[str, Any], reply: Reply) -> None:
        machine = self._machine
        board = machine.platform.board if machine.platform else None
        reply({
            "state": str(machine.state), "reason": machine.reason, "resets": machine.resets,
            "memory": machine.ram.size if machine.ram else 0,
            "memory_effects": machine.ram.effects if machine.ram else {},
            "vcpus": [{**vcpu.counters(), "thread": vcpu.thread, "where": vcpu.where() if machine.paused else ""}
                      for vcpu in machine.vcpus],
            "first_entry_ns": board.first_entry_ns if board else 0,
            "stages": [list(stage) for stage in machine.platform.stages()] if machine.platform else [],
            "serial": machine.serial_path(), "messages": dict(self._messages),
            "memory_slots": machine.vm.memory_slots if machine.vm else 0, "processes": self._store.processes(),
        })

    def _devices(self, args: dict[str, Any], reply: Reply) -> None:
        machine = self._machine
        plugs = machine.hotplug if machine.platform else None
        reply({"devices": [{**_describe(link), "plug": plugs.state(link) if plugs else "unplugged"}
                           for link in machine.links.values()],
               "slots": {str(slot): state for slot, state in (plugs.states() if plugs else {}).items()}})

    def _link(self, args: dict[str, Any]) -> Link:
        link = self._machine.links.get(str(args.get("device")))
        if link is None:
            raise NotFound(f"no device {args.get('device')!r}", hint="see `cellvisor devices`")
        return link

    def _quiesce(self, args: dict[str, Any], reply: Reply) -> None:
        link = self._link(args)
        self._machine.quiesce(link, lambda late: reply({"late": bool(late), "alive": link.alive}))

    def _unquiesce(self, args: dict[str, Any], reply: Reply) -> None:
        link = self._link(args)
        if not self._machine.paused:
            link.send(ToWorker.RESUME)
        reply({})

    def _release(self, args: dict[str, Any], reply: Reply) -> None:
        self._link(args).send(ToWorker.END)
        reply({})

    def _call(self, args: dict[str, Any], reply: Reply) -> None:
        serial = self._machine.platform.serial if self._machine.platform else None
        if args.get("device") == SERIAL_DEVICE and args.get("verb") == "deaf" and serial is not None:
            serial.channel.deaf()
            reply({"result": None})
            return
        link = self._link(args)
        verb, given = args.get("verb"), args.get("args") or {}
        if not isinstance(verb, str) or not isinstance(given, dict):
            raise UsageError("call: verb or args has the wrong type")
        link.call(verb, given, lambda result, error: reply(error or {"result": result}))

    def _quit(self, args: dict[str, Any], reply: Reply) -> None:
        reply({})
        self._machine.quit()


def _private_version(link: Link) -> int:
    try:
        return link.state.load_private()[0] if link.state else 0
    except CellvisorError:  # a worker wrote nonsense there; its successor says so
        return 0


def _seconds(args: dict[str, Any], key: str, default: float) -> float:
    value = args.get(key, default)
    if type(value) not in (int, float) or not 0 <= value < 1e6:
        raise UsageError(f"{key}={value!r}: no number of seconds")
    return float(value)


def _describe(link: Link) -> dict[str, Any]:
    worker = link.worker
    return {
        "device": link.device, "type": link.kind, "slot": link.slot,
        "bdf": f"0000:00:{link.slot:02x}.0", "title": link.spec.title if link.spec else "",
        "state": worker.state.value if worker else "absent", "pid": worker.pid if worker else 0,
        "generation": worker.generation if worker else 0, "active": link.activation is not None,
        "failure": link.failure, "reset_waits": link.pending_reset is not None and not link.alive,
        "counters": dict(link.values), "private_version": _private_version(link),
    }


