"""Rate limits as the controlplane sees them: the pages of groups in core's store, and the verb set-rate-limit.

What holds is in three places: in a device's process (or a group's page, which its members share), in the options
that its next incarnation begins with, and in core's record of both, for the next controlplane.
"""

from __future__ import annotations

import contextlib
import mmap
import os
from collections.abc import Awaitable, Callable, Iterator
from dataclasses import replace
from typing import TYPE_CHECKING, Any

from cellvisor.controlplane.corelink import OURS, CoreLink
from cellvisor.controlplane.swap import remember
from cellvisor.core.errors import CellvisorError, Conflict, Internal, NotFound, UsageError
from cellvisor.core.wire import budget
from cellvisor.core.wire.messages import CoreVerb
from cellvisor.core.wire.options import build

if TYPE_CHECKING:
    from cellvisor.controlplane.inventory import Device
    from cellvisor.controlplane.supervisor import Supervisor

VERB = "set-rate-limit"


# ---- groups


def settle_groups(core: CoreLink, groups: tuple[budget.RateLimitGroup, ...]) -> None:
    """Have a page in core's store for each group. One that a predecessor of ours changed last is put right."""
    for group in groups:
        limits = group.limits()
        with _page(core, group.id) as page:
            if page is not None:
                held = budget.get(page)
                if any(limits[key] != value for key, value in held.items()):
                    budget.put(page, limits)
                continue
        fd = budget.create(limits)
        try:
            core.deposit(OURS, _name(group.id), fd)
        finally:
            os.close(fd)


def give_group(core: CoreLink, device: Device) -> None:
    """Put the page of a device's group where its process will look for it. Raises Internal."""
    group = device.options.get(budget.GROUP)
    if group is None:
        return
    try:
        fd = core.stored(OURS, _name(group))
        if fd is None:
            raise Internal(f"{device.id}: {budget.GROUP}={group} has no page in core")
        try:
            core.deposit(device.id, budget.GROUP, fd)
        finally:
            os.close(fd)
    except OSError as error:
        raise Internal(f"{device.id}: {budget.GROUP}={group}: {error.strerror}") from None


def _name(group: str) -> str:
    return f"{budget.GROUP}.{group}"


@contextlib.contextmanager
def _page(core: CoreLink, group: str) -> Iterator[mmap.mmap | None]:
    fd = core.stored(OURS, _name(group))
    if fd is None:
        yield None
        return
    try:
        with mmap.mmap(fd, budget.SIZE) as page:
            yield page
    finally:
        os.close(fd)


# ---- the verb


def table(vm: Supervisor) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
    """Return verb -> handler(args); handlers raise CellvisorError."""

    async def set_rate_limit(args: dict[str, Any]) -> dict[str, Any]:
        _check_target(args)
        if args["group"] is not None:
            return await _change_group(vm, args["group"], args)
        return await _change_device(vm, args["id"], args)

    return {VERB: set_rate_limit}


def checks(vm: Supervisor) -> dict[str, Callable[[dict[str, Any]], Awaitable[Any]]]:
    """Return verb -> dry run of it: the same arguments and refusals, and what it is about."""

    async def set_rate_limit(args: dict[str, Any]) -> Device | dict[str, Any]:
        _check_target(args)
        if args["group"] is not None:
            limits, core = _of_group(vm, args["group"], args)
            with _group_page(core, args["group"]):
                return {"group": args["group"], **limits}
        device, _, core = _of_device(vm, args["id"], args)
        await core.request(CoreVerb.CALL, device=device.id, verb="counters", args={})  # is there a process to do it?
        return device

    return {VERB: set_rate_limit}


def _check_target(args: dict[str, Any]) -> None:
    if (args["id"] is None) == (args["group"] is None):
        raise UsageError("set-rate-limit: give id (of a disk) or group" if args["id"] is None else
                         f"set-rate-limit: id={args['id']} and group={args['group']}", hint="one of them")


def _of_device(vm: Supervisor, key: str, args: dict[str, Any]) -> tuple[Device, dict[str, int], CoreLink]:
    """Return the device, its limits to be, and whom to tell. Raises CellvisorError."""
    device = vm.inventory.require(VERB, key, "a device with limits")
    if group := device.options.get(budget.GROUP):
        raise Conflict(f"set-rate-limit: id={device.id} shares the limits of {budget.GROUP}={group}",
                       hint="change the group's")
    limits = _merged(args, device.options)
    return device, limits, _running(vm)


async def _change_device(vm: Supervisor, key: str, args: dict[str, Any]) -> dict[str, Any]:
    device, limits, core = _of_device(vm, key, args)
    with vm.plug.operations.step(VERB, device.id, device.bdf) as operation:
        await core.request(CoreVerb.CALL, device=device.id, verb="limit", args=limits)
        remember(vm, device.id, limits)
        await core.keep_state()
    return {"id": device.id, "operation": operation.id, **limits}


def _of_group(vm: Supervisor, name: str, args: dict[str, Any]) -> tuple[dict[str, int], CoreLink]:
    """Return the group's limits to be, and where its page is. Raises CellvisorError."""
    group = next((one for one in vm.config.groups if one.id == name), None)
    if group is None:
        raise NotFound(f"set-rate-limit: no rate limit group {name[:80]!r}",
                       hint=f"groups: {', '.join(one.id for one in vm.config.groups) or 'none'}")
    limits = _merged(args, group.limits())
    return limits, _running(vm)


@contextlib.contextmanager
def _group_page(core: CoreLink, name: str) -> Iterator[mmap.mmap]:
    with _page(core, name) as page:
        if page is None:
            raise Internal(f"set-rate-limit: group={name} has no page in core")
        yield page


async def _change_group(vm: Supervisor, name: str, args: dict[str, Any]) -> dict[str, Any]:
    limits, core = _of_group(vm, name, args)
    with _group_page(core, name) as page:
        budget.put(page, limits)
    changed = build(budget.RateLimitGroup, {"id": name, **limits})
    others = tuple(changed if one.id == name else one for one in vm.config.groups)
    vm.config = replace(vm.config, groups=others)
    await core.keep_state()
    for device in list(vm.inventory.devices.values()):
        if device.options.get(budget.GROUP) == name:
            with contextlib.suppress(CellvisorError):  # who does not hear it looks again by itself
                await core.request(CoreVerb.CALL, device=device.id, verb="limit", args={})
    return {"group": name, **limits}


def _running(vm: Supervisor) -> CoreLink:
    if vm.state not in ("Running", "Paused"):
        raise Conflict("set-rate-limit: the VM is not running", hint="give the limits when it is created")
    return vm.require_core()


def _merged(args: dict[str, Any], before: dict[str, Any]) -> dict[str, int]:
    """Return all limits: what is given, else what was; what has no size any more has nothing."""
    given = {key: args[key] for key in budget.KEYS if args[key] is not None}
    limits = {key: given.get(key, before.get(key) or 0) for key in budget.KEYS}
    for kind in ("bw", "ops"):
        if given.get(f"{kind}_size") == 0:
            limits |= {key: 0 for key in limits if key.startswith(f"{kind}_") and key not in given}
    budget.check_limits(limits, "set-rate-limit")
    return limits
