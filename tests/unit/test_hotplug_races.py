"""Adding and removing while the VM ends, or while the guest is faster than core's answer."""

from __future__ import annotations

import asyncio
import errno
import os
from typing import Any, cast

import pytest

from cellvisor.controlplane import plug as module
from cellvisor.controlplane import plugverbs
from cellvisor.controlplane.inventory import Wanted
from cellvisor.controlplane.operations import OpState
from cellvisor.controlplane.supervisor import Supervisor
from cellvisor.core.errors import Internal
from tests.unit.test_hotplug_plug import DISK, Vm, is_empty, run, settle


@pytest.mark.parametrize("event", ["vm.crashed", "slot.enumerated"])
def test_an_addition_that_fails_after_its_operation_has_ended(event: str) -> None:
    async def work(vm: Vm) -> None:
        assert vm.core is not None
        plain = vm.core.request

        async def request(verb: str, timeout: float = 0, /, **args: Any) -> dict[str, Any]:
            answer = await plain(verb, timeout, **args)
            if verb == "plug":
                if event == "vm.crashed":
                    vm.events.emit(event)
                else:
                    vm.says(event, "data", how="ost")
                raise Internal("core is gone")
            return answer

        vm.core.request = request  # type: ignore[method-assign]
        with pytest.raises(Internal, match="core is gone"):
            await vm.plug.add("add-disk", DISK)
        assert vm.plug.operations.get("data").is_over
        assert is_empty(vm)

    run(work)


def test_a_removal_that_ends_late_leaves_the_next_device_of_that_name(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(vm: Vm) -> None:
        gone = asyncio.Event()

        async def see_off(one: Any, patience: float) -> None:
            await gone.wait()

        monkeypatch.setattr(module, "see_off", see_off)
        await vm.plug.add("add-disk", DISK)
        await vm.plug.remove("data")
        vm.says("slot.ejected", "data", how="guest")
        await settle()
        vm.events.emit("vm.shutdown")
        vm.state = "Created"
        device = await vm.plug.add("add-disk", DISK)
        gone.set()
        await settle()
        assert (list(vm.inventory.devices.values()), vm.config.devices) == ([device], (device,))

    run(work)


def test_a_removal_that_the_end_of_the_machine_has_settled_stays_settled() -> None:
    async def work(vm: Vm) -> None:
        assert vm.fleet is not None
        await vm.plug.add("add-disk", DISK)
        asked, ended = asyncio.Event(), asyncio.Event()

        async def see_out(key: str) -> None:
            asked.set()
            await ended.wait()
            raise Internal("core is gone")

        vm.fleet.see_out = see_out  # type: ignore[method-assign]
        removing = asyncio.create_task(vm.plug.remove("data"))
        await asked.wait()
        vm.events.emit("vm.shutdown")
        ended.set()
        with pytest.raises(Internal, match="core is gone"):
            await removing
        assert vm.plug.operations.get("data").state is OpState.DONE
        assert (vm.config.devices, dict(vm.inventory.devices)) == ((), {})

    run(work)


def test_descriptors_that_cannot_all_be_kept_are_let_go(monkeypatch: pytest.MonkeyPatch) -> None:
    async def work(vm: Vm) -> None:
        add = plugverbs.table(cast("Supervisor", vm))["add-net"]
        with pytest.raises(OSError, match="Too many open files"):
            await add({}, [0, 0, 0])

    real, made = os.dup, list[int]()

    def dup(fd: int) -> int:
        if len(made) == 2:
            raise OSError(errno.EMFILE, os.strerror(errno.EMFILE))
        made.append(real(fd))
        return made[-1]

    monkeypatch.setattr(plugverbs.os, "dup", dup)
    run(work)
    for fd in made:
        with pytest.raises(OSError, match="Bad file descriptor"):
            os.fstat(fd)


def test_what_the_guest_does_while_a_successor_settles_other_devices_is_heard() -> None:
    async def work(vm: Vm) -> None:
        assert vm.core is not None
        plain = vm.core.request

        async def request(verb: str, timeout: float = 0, /, **args: Any) -> dict[str, Any]:
            if verb == "detach":
                vm.says("slot.enumerated", "later", how="ost")
            return await plain(verb, timeout, **args)

        vm.core.request = request  # type: ignore[method-assign]
        vm.inventory.add([DISK, Wanted("add-disk", "disk", "path=/y,id=later")])
        vm.core.slots = {"data": "ejected", "later": "inserting"}
        vm.plug.operations.begin("add-disk", "later", "")
        kept = vm.plug.as_state()
        vm.plug.operations._kept.clear()
        await vm.plug.adopt(kept)
        assert vm.plug.operations.get("later").state is OpState.DONE
        assert list(vm.inventory.devices) == ["later"]
        assert not vm.plug.pending.timers

    run(work)
