"""The verbs that add, remove and watch devices: from checked requests to Plug, and back to plain data."""

from __future__ import annotations

import contextlib
import os
import re
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cellvisor.controlplane.inventory import SLOTS, Device, Wanted
from cellvisor.controlplane.vmconfig import flat
from cellvisor.core.errors import UsageError
from cellvisor.core.wire.control import TEXT, VERBS

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Supervisor

Handler = Callable[..., Awaitable[Any]]
ADDS = {"add-disk": "disk", "add-net": "net", "add-rng": "rng", "add-console": "console"}


def table(vm: Supervisor) -> dict[str, Handler]:
    """Return verb -> handler(args), for verbs that take descriptors handler(args, fds); they raise CellvisorError."""

    def adds(verb: str) -> Handler:
        async def add(args: dict[str, Any], fds: Sequence[int] = ()) -> dict[str, Any]:
            want = wanted(verb, args, fds)
            with contextlib.ExitStack() as stack:
                held = []
                for fd in fds:  # whoever sent them may be gone while we wait
                    held.append(os.dup(fd))
                    stack.callback(os.close, held[-1])
                device = await vm.plug.add(verb, want, fds=held)
            operation = vm.plug.operations.latest(device.id, "add")
            return {"id": device.id, "bdf": device.bdf, "operation": operation.id if operation else "",
                    "plugged": vm.state != "Created"}
        return add

    async def remove(args: dict[str, Any]) -> dict[str, Any]:
        operation = await vm.plug.remove(args["id"], timeout=args["timeout"], host_only=args["host_only"])
        return {"id": operation.device, "bdf": operation.bdf, "operation": operation.id}

    async def ops(args: dict[str, Any]) -> dict[str, Any]:
        operations, action, key = vm.plug.operations, args["action"], args["id"]
        if action == "list":
            return {"operations": [one.as_wire() for one in operations.listed()]}
        if key is None:
            raise UsageError(f"ops {action}: id is missing", hint="an operation's id, or a device's for its latest")
        if action == "wait":
            return (await operations.wait(key, args["timeout"], args["seen"])).as_wire()
        if action == "cancel":
            return (await vm.plug.cancel(key)).as_wire()
        return operations.get(key).as_wire()

    async def capacity(args: dict[str, Any]) -> dict[str, Any]:
        free = vm.inventory.free_slots()
        return {"slots": {"total": len(SLOTS), "free": len(free), "next": free[0] if free else None},
                "memory": {"hotplug_free": 0}}

    return {**{verb: adds(verb) for verb in (*ADDS, "add-virtio")}, "remove-device": remove, "ops": ops,
            "capacity": capacity}


def checks(vm: Supervisor) -> dict[str, Handler]:
    """Return verb -> dry run of it: the same arguments, the same refusals, and the device that it is about."""

    def adds(verb: str) -> Handler:
        async def add(args: dict[str, Any], fds: Sequence[int] = ()) -> Device:
            return await vm.plug.check(verb, wanted(verb, args, fds), fds)
        return add

    async def remove(args: dict[str, Any]) -> Device:
        return await vm.plug.check_removal(args["id"], host_only=args["host_only"])

    return {**{verb: adds(verb) for verb in (*ADDS, "add-virtio")}, "remove-device": remove}


def wanted(verb: str, args: Mapping[str, Any], fds: Sequence[int] = ()) -> Wanted:
    """Read what an add-* verb was given: a JSON object of options or, under TEXT, options as text; descriptors."""
    want = _wanted(verb, args)
    return with_fds(want, fds) if VERBS[verb].takes_fds else want


def _wanted(verb: str, args: Mapping[str, Any]) -> Wanted:
    options = dict(args)
    kind, by_verb = ADDS.get(verb, ""), verb in ADDS
    if not by_verb:
        kind = options.pop("type", None)
        if not isinstance(kind, str) or not kind:
            raise UsageError(f"{verb}: type={str(kind)[:40]!r} is not the name of a device type",
                             hint="see cellvisor run --help, --device-type")
    if TEXT not in options:
        return Wanted(verb, kind, by_verb=by_verb, body=flat(options))
    text = options.pop(TEXT)
    if options or not isinstance(text, str):
        raise UsageError(f"{verb}: options are either text or keys")
    return Wanted(verb, kind, text, by_verb=by_verb)


def with_fds(want: Wanted, fds: Sequence[int]) -> Wanted:
    """Return `want` for the descriptors that came with the request; only these count. Raises UsageError for others."""
    if want.body is not None:
        given = want.body.get("fd")
    else:
        found = re.search(r"(?:^|,)fd=(\[[^]]*]?|[^,]*)", want.text)
        given = found and found[1]
    if given:
        raise UsageError(f"{want.flag}: fd={str(given)[:60]}: a number means nothing here",
                         hint="send the descriptors along with a request on --api-socket")
    if not fds:
        return want
    if want.body is not None:
        return replace(want, body={**want.body, "fd": list(fds)})
    return replace(want, text=f"{want.text}{',' if want.text else ''}fd=[{','.join(map(str, fds))}]")
