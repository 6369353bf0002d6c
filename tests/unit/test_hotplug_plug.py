"""Adding and removing with a fake core and fleet: each step fails once, and nothing half-made is left."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Coroutine
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any, cast

import pytest

from cellvisor.controlplane import descriptors, plugverbs
from cellvisor.controlplane.config import Cpus, Memory, Payload, Serial, VmConfig
from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.inventory import Device, Inventory, Wanted
from cellvisor.controlplane.nurserylink import parse_catalog
from cellvisor.controlplane.operations import OpState
from cellvisor.controlplane.plug import Plug
from cellvisor.controlplane.supervisor import Supervisor
from cellvisor.core.errors import CellvisorError, Conflict, Internal, NotFound, UsageError
from cellvisor.core.wire.control import TEXT
from tests.fakes.control_nursery import CATALOG


@dataclass
class Worker:
    device: Device
    ready: asyncio.Future[None]
    state: str = "serving"
    pidfd: int = -1

    def close(self) -> None:
        self.state = "closed"


class Core:
    """Does what it is asked and notes it; `refuse` has verbs that fail."""

    def __init__(self) -> None:
        self.asked: list[tuple[str, str]] = []
        self.refuse: dict[str, CellvisorError] = {}
        self.slots: dict[str, str] = {}

    async def request(self, verb: str, timeout: float = 0, /, **args: Any) -> dict[str, Any]:
        await asyncio.sleep(0)
        device = str(args.get("device", ""))
        self.asked.append((str(verb), device))
        if str(verb) in self.refuse:
            raise self.refuse[str(verb)]
        if verb == "unplug" and device not in self.slots:
            raise Conflict(f"{device} is not plugged")
        if verb == "plug":
            self.slots[device] = "inserting"
        if verb == "detach":
            self.slots.pop(device, None)
        return {"devices": [{"device": key, "plug": state} for key, state in self.slots.items()], "slots": {}}


class Fleet:
    """Workers that are ready at once, or refuse with `reason`."""

    def __init__(self) -> None:
        self.workers: dict[str, Worker] = {}
        self.reason = ""
        self.seen_out: list[str] = []

    def latest(self) -> list[Worker]:
        return list(self.workers.values())

    async def start(self, device: Device) -> Worker:
        one = Worker(device, asyncio.get_running_loop().create_future())
        self.workers[device.id] = one
        if self.reason:
            one.ready.set_exception(UsageError(self.reason))
        else:
            one.ready.set_result(None)
        return one

    def retire(self, key: str) -> Worker | None:
        return self.workers.pop(key, None)

    @property
    def parking(self) -> Fleet:
        return self

    async def see_out(self, key: str) -> None:
        self.seen_out.append(key)


@dataclass
class Vm:
    """What Plug needs of the supervisor."""

    state: str = "Running"
    booting: bool = False
    core: Core | None = field(default_factory=Core)
    fleet: Fleet | None = field(default_factory=Fleet)
    events: EventLog = field(default_factory=EventLog)
    parts: dict[str, Any] = field(default_factory=dict)
    config: VmConfig = field(default_factory=lambda: VmConfig(Cpus(), Memory(), Payload("k"), Serial()))
    inventory: Inventory = field(default_factory=lambda: Inventory(parse_catalog(CATALOG)))

    def __post_init__(self) -> None:
        self.plug = Plug(cast("Supervisor", self))

    def changed(self) -> None:
        pass

    @property
    def names(self) -> list[str]:
        return [event.name for event in self.events.since(0)]

    def says(self, name: str, device: str, **more: Any) -> None:
        assert self.core is not None
        if name == "slot.ejected":
            self.core.slots[device] = "ejected"
        self.plug.on_core_event(name, {"device": device, "slot": 1, **more})


DISK = Wanted("add-disk", "disk", "path=/x,id=data")


def run(work: Callable[[Vm], Coroutine[Any, Any, None]]) -> Vm:
    async def main() -> Vm:
        vm = Vm()
        await work(vm)
        return vm

    return asyncio.run(main())


def is_empty(vm: Vm) -> bool:
    assert vm.fleet is not None
    assert vm.core is not None
    return not (vm.inventory.devices or vm.config.devices or vm.fleet.workers or vm.core.slots or vm.plug.pending.adding
                or vm.plug.pending.leaving or vm.plug.pending.timers)


async def settle() -> None:
    for _ in range(20):
        await asyncio.sleep(0)


def test_add_and_remove() -> None:
    async def work(vm: Vm) -> None:
        device = await vm.plug.add("add-disk", DISK)
        assert (device.id, device.bdf, vm.config.devices) == ("data", "0000:00:01.0", (device,))
        assert vm.plug.operations.get("data").state is OpState.NOTIFIED
        vm.says("slot.enumerated", "data", how="ost")
        assert vm.plug.operations.get("data").state is OpState.DONE
        operation = await vm.plug.remove("data")
        assert operation.state is OpState.NOTIFIED
        assert (vm.config.devices, list(vm.inventory.devices)) == ((), ["data"])
        vm.says("slot.ejected", "data", how="guest")
        await settle()
        assert operation.state is OpState.DONE
        assert is_empty(vm)

    vm = run(work)
    assert [name for name in vm.names if not name.startswith("slot.")] == [
        "operation.requested", "device.added", "operation.guest-notified", "operation.done",
        "operation.requested", "operation.guest-notified", "device.removed", "operation.done"]
    assert vm.core is not None
    assert vm.core.asked == [("plug", "data"), ("unplug", "data"), ("detach", "data")]


@pytest.mark.parametrize("step", ["ready", "plug", "both"])
def test_a_step_that_fails_takes_back_all_before_it(step: str) -> None:
    async def work(vm: Vm) -> None:
        assert vm.core is not None
        assert vm.fleet is not None
        if step == "ready":
            vm.fleet.reason = "the lock is held by cv-other"
        else:
            vm.core.refuse["plug"] = Conflict("no MMIO room")
        if step == "both":
            vm.core.refuse["detach"] = Internal("core is gone")
        with pytest.raises(CellvisorError, match=r"lock is held|no MMIO room") as refused:
            await vm.plug.add("add-disk", DISK)
        operation = vm.plug.operations.get("data")
        assert (operation.state, operation.reason) == (OpState.REFUSED, str(refused.value))
        assert is_empty(vm)

    run(work)


def test_a_cancelled_request_leaves_nothing() -> None:
    async def work(vm: Vm) -> None:
        assert vm.fleet is not None
        vm.fleet.start = forever  # type: ignore[assignment, method-assign]
        task = asyncio.create_task(vm.plug.add("add-disk", DISK))
        await settle()
        task.cancel()
        with pytest.raises(asyncio.CancelledError):
            await task
        assert vm.plug.operations.get("data").state is OpState.CANCELLED
        assert is_empty(vm)

    async def forever(device: Device) -> None:
        await asyncio.sleep(3600)

    run(work)


def test_a_refused_removal_keeps_the_device() -> None:
    async def work(vm: Vm) -> None:
        assert vm.core is not None
        device = await vm.plug.add("add-disk", DISK)
        vm.core.refuse["unplug"] = Conflict("the VM is stopped")
        with pytest.raises(Conflict, match="stopped"):
            await vm.plug.remove("data")
        assert vm.config.devices == (device,)
        vm.core.refuse.clear()
        await vm.plug.remove("data")
        vm.says("slot.ost", "data", event=3, status=0x81)
        operation = vm.plug.operations.get("data")
        assert (operation.state, operation.reason) == (
            OpState.REFUSED, "the guest: an application uses it (_OST 0x81)")
        assert vm.config.devices == (device,)
        with pytest.raises(NotFound, match="no device 'other'"):
            await vm.plug.remove("other")

    run(work)


def test_an_event_before_the_answer_is_put_in_order() -> None:
    async def work(vm: Vm) -> None:
        assert vm.core is not None
        plain = vm.core.request

        async def eager(verb: str, timeout: float = 0, /, **args: Any) -> dict[str, Any]:
            answer = await plain(verb, timeout, **args)
            if verb == "plug":
                vm.says("slot.enumerated", "data", how="ost")
            return answer

        vm.core.request = eager  # type: ignore[method-assign]
        await vm.plug.add("add-disk", DISK)
        assert vm.plug.operations.get("data").state is OpState.DONE
        assert not vm.plug.pending.timers

    assert [name for name in run(work).names if name.startswith("operation")] == [
        "operation.requested", "operation.guest-notified", "operation.done"]


def test_a_time_out_may_be_followed_by_anything() -> None:
    async def work(vm: Vm) -> None:
        await vm.plug.add("add-disk", DISK)
        vm.says("slot.enumerated", "data", how="ost")
        operation = await vm.plug.remove("data", timeout=0.01)
        assert (await vm.plug.operations.wait(operation.id, 5)).state is OpState.TIMED_OUT
        assert await vm.plug.remove("data") is operation
        assert operation.state is OpState.NOTIFIED
        await vm.plug.cancel("data")
        assert operation.state is OpState.CANCELLED
        assert [one.id for one in vm.config.devices] == ["data"]
        with pytest.raises(Conflict, match="is cancelled"):
            await vm.plug.cancel(operation.id)
        late = await vm.plug.remove("data", timeout=0.01)
        await vm.plug.operations.wait(late.id, 5)
        vm.says("slot.ejected", "data", how="guest")
        await settle()
        assert late.state is OpState.DONE
        assert is_empty(vm)

    run(work)


def test_two_of_one_name_or_slot() -> None:
    async def work(vm: Vm) -> None:
        texts = ["id=a", "id=a", "pci_device_id=9", "pci_device_id=9"]
        done = await asyncio.gather(*(vm.plug.add("add-rng", Wanted("add-rng", "rng", text)) for text in texts),
                                    return_exceptions=True)
        assert [isinstance(one, Device) for one in done] == [True, False, True, False]
        assert all(isinstance(one, Device | Conflict) for one in done)

    run(work)


def test_somebody_serves_a_device_until_it_has_left() -> None:
    async def work(vm: Vm) -> None:
        assert vm.fleet is not None
        await vm.plug.add("add-disk", DISK)
        vm.events.emit("device.parked", device="data")
        assert vm.fleet.seen_out == []
        await vm.plug.remove("data")
        assert vm.fleet.seen_out == ["data"]
        vm.events.emit("device.parked", device="data")  # while it leaves
        await asyncio.sleep(0)
        assert vm.fleet.seen_out == ["data"] * 2
        await vm.plug.remove("data", host_only=True)
        assert vm.fleet.seen_out == ["data"] * 2

    run(work)


@pytest.mark.parametrize(("slot", "state", "left"), [
    ("unplugged", OpState.REFUSED, []), ("", OpState.REFUSED, []), ("inserting", OpState.NOTIFIED, ["data"]),
    ("bound", OpState.DONE, ["data"]), ("enumerated", OpState.DONE, ["data"]),
])
def test_a_successor_takes_an_addition_over(slot: str, state: OpState, left: list[str]) -> None:
    async def work(vm: Vm) -> None:
        assert vm.core is not None
        vm.plug.operations.begin("add-disk", "data", "")
        kept = vm.plug.as_state()
        if slot:
            vm.inventory.add([DISK])
            vm.core.slots["data"] = slot
        vm.plug.operations._kept.clear()
        await vm.plug.adopt(kept)
        assert vm.plug.operations.get("op1").state is state
        assert [one.id for one in vm.config.devices] == list(vm.inventory.devices) == left

    run(work)


@pytest.mark.parametrize(("slot", "state", "left", "wanted"), [
    ("removing", OpState.NOTIFIED, ["data"], []), ("ejected", OpState.DONE, [], []), ("", OpState.DONE, [], []),
    ("bound", OpState.REFUSED, ["data"], ["data"]),
])
def test_a_successor_takes_a_removal_over(slot: str, state: OpState, left: list[str], wanted: list[str]) -> None:
    async def work(vm: Vm) -> None:
        assert vm.core is not None
        vm.plug.operations.begin("remove-device", "data", "")
        kept = vm.plug.as_state()
        if slot:
            vm.inventory.add([DISK])
            vm.core.slots["data"] = slot
        vm.plug.operations._kept.clear()
        await vm.plug.adopt(kept)
        assert vm.plug.operations.get("op1").state is state
        assert list(vm.inventory.devices) == left
        assert [one.id for one in vm.config.devices] == wanted

    run(work)


def test_before_boot_and_after_the_end() -> None:
    async def work(vm: Vm) -> None:
        vm.state = "Created"
        device = await vm.plug.add("add-disk", DISK)
        assert vm.config.devices == (device,)
        assert (await vm.plug.remove("data")).state is OpState.DONE
        assert is_empty(vm)
        vm.state = "Shutdown"
        with pytest.raises(Conflict, match="the VM is shutdown"):
            await vm.plug.add("add-disk", DISK)
        vm.state, vm.booting = "Created", True
        waiting = asyncio.create_task(vm.plug.add("add-disk", DISK))
        await asyncio.sleep(0.05)
        assert not waiting.done()
        vm.state, vm.booting = "Running", False
        await waiting
        assert vm.core is not None
        assert ("plug", "data") in vm.core.asked
        await vm.plug.remove("data")
        vm.events.emit("vm.shutdown")
        assert vm.plug.operations.get("data").state is OpState.DONE
        assert not vm.inventory.devices

    run(work)


def test_what_verbs_are_given() -> None:
    assert plugverbs.wanted("add-disk", {TEXT: "path=/x"}) == Wanted("add-disk", "disk", "path=/x")
    assert plugverbs.wanted("add-disk", {"path": "/x", "id": None}).body == {"path": "/x", "id": None}
    typed = plugverbs.wanted("add-virtio", {"type": "rng", "src": "/dev/zero"})
    assert (typed.kind, typed.by_verb, typed.body) == ("rng", False, {"src": "/dev/zero"})
    for verb, args in (("add-disk", {TEXT: "path=/x", "id": "a"}), ("add-disk", {TEXT: 7}), ("add-virtio", {}),
                       ("add-virtio", {"type": 3})):
        with pytest.raises(UsageError):
            plugverbs.wanted(verb, args)


def test_one_descriptor_that_is_not_open_leaves_none_of_them_in_core() -> None:
    given: list[str] = []
    core = cast("Any", SimpleNamespace(deposit=lambda device, name, fd: given.append(name)))
    with pytest.raises(UsageError, match="lan: fd=999: Bad file descriptor"):
        descriptors.give(core, Device("lan", "net", "net", 4, {}), [0, 999])
    assert given == []
