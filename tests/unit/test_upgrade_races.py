"""Live upgrades over which a device dies, is removed, or core is silent: somebody serves it, or it is parked."""

from __future__ import annotations

import asyncio
import signal
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from cellvisor.controlplane import upgrade as module
from cellvisor.controlplane.inventory import Catalog, Device, DeviceType
from cellvisor.controlplane.supervisor import Supervisor
from cellvisor.controlplane.upgrade import Upgrade
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, TryAgain
from tests.unit.test_recovery_fleet import Vm

LONG = 20.0
Scene = Callable[["Upgraded", "asyncio.Task[Any]"], Awaitable[None]]


class Upgraded(Vm):
    """A VM with one disk that serves, and everything else that an upgrade asks; `refuse` has verbs of core that fail.

    What core is asked in the course of it waits for `go`, if `held` names it.
    """

    booting = False

    def __init__(self) -> None:
        super().__init__()
        self.core = self.nurseries = self.inventory = self.plug = self
        self.devices: dict[str, Device] = {"data": self.device}
        self.homes: dict[str, int] = {"data": 0}
        self.present = 0
        self.refuse: dict[str, CellvisorError] = {}
        self.held, self.asked, self.go = "", list[str](), asyncio.Event()
        self.lock = asyncio.Lock()

    async def request(self, verb: str, timeout: float = 0, /, **args: Any) -> dict[str, Any]:
        if verb == "attach":
            return await super().request(verb, **args)
        self.asked.append(str(verb))
        if verb == self.held:
            await self.go.wait()
        if verb in self.refuse:
            raise self.refuse[verb]
        if verb == "release":
            self.processes[-1].kill()
        return {"devices": [{"device": "data", "private_version": 0}]}

    def require_core(self) -> Upgraded:
        return self

    def changed(self) -> None:
        pass

    def tidy(self) -> None:
        pass

    def relearn(self, catalog: Catalog) -> None:
        pass

    def get(self, key: str) -> Device:
        return self.devices[key]

    def locked(self, key: str) -> asyncio.Lock:
        return self.lock

    def catalog(self, number: int) -> Catalog:
        return Catalog((DeviceType("blk", "disk", "", {}),))

    async def start(self) -> int:
        return 1

    async def asks(self, verb: str) -> None:
        """Wait until core is asked that."""
        for _ in range(500):
            if verb in self.asked:
                return
            await asyncio.sleep(0.01)
        raise AssertionError(f"{self.asked}")


def play(scene: Scene, held: str = "") -> None:
    """Run `scene` with an upgrade that has just begun."""

    async def run() -> None:
        vm = Upgraded()
        try:
            await vm.fleet.start(vm.device)
            vm.say("ready")
            vm.held = held
            async with asyncio.timeout(LONG):
                await scene(vm, asyncio.create_task(Upgrade(cast("Supervisor", vm)).serve({"id": "data"})))
        finally:
            vm.close()

    asyncio.run(run())


def test_an_upgrade() -> None:
    async def scene(vm: Upgraded, task: asyncio.Task[Any]) -> None:
        await vm.until(2)
        vm.say("ready")
        assert [one["generation"] for one in (await task)["upgraded"]] == [2]
        assert (vm.latest().state, vm.homes) == ("serving", {"data": 1})

    play(scene)


def test_a_core_that_does_not_answer_does_not_leave_the_device_without_a_process() -> None:
    async def scene(vm: Upgraded, task: asyncio.Task[Any]) -> None:
        vm.refuse["release"] = TryAgain("release: core did not answer")
        await vm.until(2)
        vm.say("ready")
        assert [one["generation"] for one in (await task)["upgraded"]] == [2]
        assert vm.processes[0].wait(LONG) == -signal.SIGKILL

    play(scene)


def test_a_device_that_dies_meanwhile_has_its_successor() -> None:
    async def scene(vm: Upgraded, task: asyncio.Task[Any]) -> None:
        await vm.asks("devices")
        vm.exited(-signal.SIGKILL)
        await vm.until(2)
        vm.say("ready")
        vm.go.set()
        with pytest.raises(TryAgain, match="data: died meanwhile"):
            await task
        assert "release" not in vm.asked
        assert (vm.latest().generation, vm.latest().state, vm.homes) == (2, "serving", {"data": 0})

    play(scene, held="devices")


def test_a_device_that_is_removed_meanwhile_gets_no_process() -> None:
    async def run() -> None:
        vm = Upgraded()
        await vm.lock.acquire()  # the guest has let go of it
        task = asyncio.create_task(Upgrade(cast("Supervisor", vm)).serve({"id": "data"}))
        await vm.fleet.start(vm.device)
        vm.say("ready")
        for _ in range(20):
            await asyncio.sleep(0)
        assert vm.asked == []
        vm.fleet.retire("data")
        del vm.devices["data"]
        vm.lock.release()
        with pytest.raises(NotFound, match="data"):
            await task
        assert (len(vm.spawned), vm.asked) == (1, [])
        vm.close()

    asyncio.run(run())


@pytest.mark.parametrize("is_late", [False, True])
def test_a_device_that_neither_code_can_serve_is_parked(is_late: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(vm: Upgraded, task: asyncio.Task[Any]) -> None:
        for generation in (2, 3):
            await vm.until(generation)
            if not is_late:
                vm.say("failed", reason="path=x is in use by qemu (pid 7)", refused=True)
        with pytest.raises(Conflict, match="data: neither the new code nor the old can serve"):
            await task
        assert vm.latest().state == "parked"
        reason = "not ready in time" if is_late else "path=x is in use by qemu (pid 7)"
        assert (await vm.event("device.parked"))["reason"] == reason
        reviving = asyncio.create_task(vm.fleet.parking.revive("data"))
        await vm.until(4)
        vm.say("ready")
        assert (await reviving).state == "serving"

    if is_late:
        monkeypatch.setattr(module, "READY_TIMEOUT", 0.2)
    play(scene)
