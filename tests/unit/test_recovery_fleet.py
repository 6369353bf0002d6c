"""What the controlplane makes of deaths: successors, back-off, parking, drain processes, by a fake core and nursery."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Awaitable, Callable
from typing import Any, cast

import pytest

from cellvisor.controlplane import fleet as module
from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.fleet import Fleet, Incarnation
from cellvisor.controlplane.inventory import Device
from cellvisor.controlplane.nurseries import DIED, Nurseries
from cellvisor.controlplane.recovery import CALM, Budget, Policy, is_self_inflicted
from cellvisor.core.errors import Conflict, TryAgain, UsageError

FAST = {"restart_backoff": [0.0], "hang_timeout": 1.5}


class Vm:
    """A fleet; each worker is a process that sleeps. `attached` and `spawned` are what core and nursery were asked."""

    def __init__(self, **options: Any) -> None:
        self.device = Device("data", "blk", "disk", 3, {**FAST, **options})
        self.attached: list[dict[str, Any]] = []
        self.spawned: list[dict[str, Any]] = []
        self.failures: list[Exception] = []
        self.processes: list[subprocess.Popen[bytes]] = []
        self.events = EventLog()
        self.fleet = Fleet(cast("CoreLink", self), cast("Nurseries", self), self.events, "/nowhere")

    async def request(self, verb: str, /, **args: Any) -> dict[str, Any]:
        self.attached.append(args)
        return {}

    async def spawn(self, device: str, generation: int, **args: Any) -> tuple[int, int]:
        if self.failures:
            raise self.failures.pop(0)
        process = subprocess.Popen(["sleep", "60"])
        self.processes.append(process)
        self.spawned.append({"generation": generation, **args})
        return process.pid, os.pidfd_open(process.pid)

    def leave(self, device: str) -> None:
        pass

    def hold(self, generation: int, error: Exception | None = None) -> asyncio.Event:
        """Have the fork of one generation wait for the event that is returned, and fail then if there is an `error`."""
        go_on, fork = asyncio.Event(), self.spawn

        async def spawn(device: str, number: int, **args: Any) -> tuple[int, int]:
            if number == generation:
                await go_on.wait()
                if error is not None:
                    raise error
            return await fork(device, number, **args)

        self.spawn = spawn  # type: ignore[method-assign]
        return go_on

    def say(self, name: str, **properties: Any) -> None:
        """Be core."""
        about = {"device": "data", "generation": len(self.attached), **properties}
        self.fleet.on_core_event(f"device.{name}", about)

    def exited(self, status: int | None, generation: int = 0) -> None:
        """Be the nursery, and the worker that ends."""
        self.processes[-1].kill()
        self.fleet.on_exited("data", generation or len(self.attached), self.processes[-1].pid, status)

    async def until(self, spawned: int) -> dict[str, Any]:
        """Wait for the so-many-th worker; returns what the nursery was asked."""
        for _ in range(500):
            if len(self.spawned) >= spawned:
                await asyncio.sleep(0)
                return self.spawned[spawned - 1]
            await asyncio.sleep(0.01)
        raise AssertionError(f"{len(self.spawned)} workers, {self.names()}")

    async def event(self, name: str) -> dict[str, Any]:
        for _ in range(500):
            for event in self.events.since(0):
                if event.name == name:
                    return dict(event.properties)
            await asyncio.sleep(0.01)
        raise AssertionError(f"no {name}: {self.names()}")

    def names(self) -> list[str]:
        return [event.name for event in self.events.since(0)]

    def latest(self) -> Incarnation:
        return self.fleet.latest()[0]

    def close(self) -> None:
        self.fleet.stopping()
        self.fleet.close()
        for process in self.processes:
            process.kill()
            process.wait()


def play(scene: Callable[[Vm], Awaitable[None]], **options: Any) -> None:
    """Run `scene` with a VM whose device serves."""

    async def run() -> None:
        vm = Vm(**options)
        try:
            await vm.fleet.start(vm.device)
            vm.say("ready")
            await scene(vm)
        finally:
            vm.close()

    asyncio.run(run())


@pytest.mark.parametrize(("status", "suspect"), [
    (-signal.SIGKILL, False), (-signal.SIGTERM, False), (-signal.SIGHUP, False), (None, False), (0, False),
    (-signal.SIGSEGV, True), (-signal.SIGBUS, True), (-signal.SIGSYS, True), (1, True), (70, True),
])
def test_the_successor_knows_whether_the_death_was_self_inflicted(status: int | None, suspect: bool) -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(status)
        assert (await vm.until(2))["suspect"] is suspect
        vm.say("ready")
        assert vm.names() == ["device.ready", "device.died", "device.ready", "device.restarted"]
        assert vm.attached[1]["hang_timeout"] == 1.5
        assert vm.attached[1]["token"] != vm.attached[0]["token"]

    assert is_self_inflicted(status) is suspect
    play(scene)


def test_core_alone_reports_a_death() -> None:
    async def scene(vm: Vm) -> None:
        vm.say("failed", reason="its process died")
        assert (await vm.until(2))["suspect"] is False
        assert (await vm.event("device.died"))["reason"] == "its process died"

    play(scene)


def test_neither_reports_a_death() -> None:
    async def scene(vm: Vm) -> None:
        vm.processes[0].kill()
        await vm.until(2)

    play(scene)


def test_a_worker_that_said_why_is_waited_for() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(1)
        vm.say("failed", reason="IndexError: list index out of range")
        await vm.until(2)
        assert (await vm.event("device.died"))["reason"] == "IndexError: list index out of range"

    play(scene)


def test_successors_that_never_serve_spend_the_budget_then_it_is_parked() -> None:
    async def scene(vm: Vm) -> None:
        for generation in range(2, 5):
            vm.exited(-signal.SIGKILL)
            await vm.until(generation)
        vm.exited(-signal.SIGKILL)
        assert (await vm.event("device.parked"))["reason"] == "killed by SIGKILL"
        assert vm.latest().state == "parked"
        vm.exited(-signal.SIGKILL)  # a late report changes nothing
        assert vm.names().count("device.parked") == 1

    play(scene, restart_budget=3)


def test_a_device_that_never_served_has_failed() -> None:
    async def run() -> None:
        vm = Vm()
        one = await vm.fleet.start(vm.device)
        vm.exited(1)
        vm.say("failed", reason="path=x: No such file", refused=True)
        with pytest.raises(UsageError, match="data: path=x: No such file"):
            await one.ready
        assert vm.names() == ["device.failed"]
        vm.close()

    asyncio.run(run())


def test_a_successor_that_is_refused_is_parked_at_once() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.until(2)
        vm.say("failed", reason="path=x is in use by qemu (pid 7)", refused=True)
        vm.exited(1)
        assert (await vm.event("device.parked"))["reason"] == "path=x is in use by qemu (pid 7)"
        assert len(vm.spawned) == 2

    play(scene)


def test_budget_zero_never_restarts() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")

    play(scene, restart_budget=0)


def test_a_parked_device_is_revived_with_a_full_budget() -> None:
    async def scene(vm: Vm) -> None:
        with pytest.raises(Conflict, match="is serving, not parked"):
            await vm.fleet.parking.revive("data")
        for _ in range(2):
            vm.exited(-signal.SIGKILL)
            await vm.until(len(vm.attached) + (len(vm.spawned) < 2))
        await vm.event("device.parked")
        reviving = asyncio.create_task(vm.fleet.parking.revive("data"))
        assert (await vm.until(3))["drain"] is False
        vm.say("ready")
        assert (await reviving).generation == 3
        vm.exited(-signal.SIGKILL)
        await vm.until(4)

    play(scene, restart_budget=1)


def test_a_reset_that_waits_is_finished_by_a_drain_process() -> None:
    async def scene(vm: Vm) -> None:
        vm.say("reset-waits")  # while it serves core asks the worker itself
        vm.exited(-signal.SIGKILL)
        assert (await vm.until(2))["drain"] is True
        vm.say("ready")
        assert vm.latest().state == "draining"
        assert vm.names() == ["device.ready", "device.parked", "device.draining"]
        vm.exited(0)
        assert vm.latest().state == "parked"
        assert (await vm.event("device.drained"))["reason"] == "killed by SIGKILL"

    play(scene, restart_budget=0)


def test_a_reset_that_begins_while_parked() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")
        vm.say("reset-waits")
        assert (await vm.until(2))["drain"] is True

    play(scene, restart_budget=0)


def test_a_successor_that_is_coming_finishes_the_reset() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        vm.say("reset-waits")
        assert (await vm.until(2))["drain"] is False
        vm.say("ready")
        await asyncio.sleep(0.1)
        assert len(vm.spawned) == 2

    play(scene)


def test_drain_processes_that_die_are_not_started_for_ever() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        for generation in range(2, 7):
            await vm.event("device.parked")
            vm.say("reset-waits")
            assert (await vm.until(generation))["drain"] is True
            vm.exited(1)
            vm.say("failed", reason="x")
            while vm.latest().state != "parked":
                await asyncio.sleep(0.01)
        vm.say("reset-waits")
        await asyncio.sleep(0.1)
        assert len(vm.spawned) == 6

    play(scene, restart_budget=0)


def test_a_drain_process_that_cannot_serve_is_an_error_of_who_wanted_it() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")
        draining = asyncio.create_task(vm.fleet.parking.drain("data"))
        await vm.until(2)
        vm.say("failed", reason="no room")
        with pytest.raises(UsageError, match=r"^data: killed by SIGKILL"):
            await draining
        assert vm.latest().state == "parked"

    play(scene, restart_budget=0)


def test_reviving_ends_the_drain_process() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")
        draining = asyncio.create_task(vm.fleet.parking.drain("data"))
        await vm.until(2)
        vm.say("ready")
        assert (await draining).state == "draining"
        reviving = asyncio.create_task(vm.fleet.parking.revive("data"))
        assert (await vm.until(3))["drain"] is False
        assert vm.processes[1].wait(5) == -signal.SIGKILL
        vm.say("ready")
        assert (await reviving).state == "serving"

    play(scene, restart_budget=0)


def test_a_nursery_that_dies_over_a_start_costs_a_generation_only() -> None:
    async def scene(vm: Vm) -> None:
        vm.failures = [TryAgain("gone", code=DIED), TryAgain("gone", code=DIED)]
        vm.exited(-signal.SIGKILL)
        assert (await vm.until(2))["generation"] == 4
        vm.say("ready")
        assert vm.latest().state == "serving"

    play(scene)


def test_a_start_that_fails_parks_and_can_be_repeated() -> None:
    async def scene(vm: Vm) -> None:
        vm.failures = [UsageError("no memory")]
        vm.exited(-signal.SIGKILL)
        assert (await vm.event("device.parked"))["reason"] == "no memory"
        reviving = asyncio.create_task(vm.fleet.parking.revive("data"))
        await vm.until(2)
        vm.say("ready")
        await reviving

    play(scene)


def test_a_successor_that_does_not_come_up_is_killed(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.until(3)
        reasons = [event.properties["reason"] for event in vm.events.since(0) if event.name == "device.died"]
        assert reasons[1] == "did not come up within 0.05 s"

    monkeypatch.setattr(module, "START_TIMEOUT", 0.05)
    play(scene)


def test_an_adopted_drain_process_never_meets_a_successor() -> None:
    async def run() -> None:
        old, new = Vm(), Vm()
        old.say("ready")
        await old.fleet.start(old.device)
        old.say("ready")
        old.exited(-signal.SIGKILL)
        await old.until(2)
        old.latest().drains = True
        old.say("ready")
        life = old.fleet.lives()["data"]
        assert life.parked
        pidfd = os.pidfd_open(old.processes[1].pid)
        new.attached = list(old.attached)
        new.fleet.take_over(new.device, life, pid=old.processes[1].pid, pidfd=pidfd, serving=True)
        reviving = asyncio.create_task(new.fleet.parking.revive("data"))
        await new.until(1)
        assert old.processes[1].wait(0) == -signal.SIGKILL
        new.say("ready")
        assert (await reviving).generation == 3
        old.close()
        new.close()

    asyncio.run(run())


def test_back_off_is_for_deaths_in_a_row() -> None:
    budget = Budget(Policy(budget=6, window=100, backoff=(0.0, 1.0, 5.0)))
    assert [budget.next_delay(now) for now in (0.0, 0.5, 2.0)] == [0.0, 1.0, 5.0]
    assert budget.next_delay(7.0 + CALM + 0.1) == 0.0  # it was up for a while
    assert budget.next_delay(8.2) == 1.0
    assert budget.next_delay(8.3) == 5.0
    assert budget.next_delay(8.4) is None
    assert budget.next_delay(200.0) == 0.0
    budget.refill()
    assert budget.next_delay(200.1) == 0.0


def test_a_policy_is_read_from_the_options() -> None:
    assert Policy.of({}) == Policy()
    assert Policy.of({"restart_budget": 0, "restart_window": 3.0, "restart_backoff": []}) == Policy(0, 3.0, (0.0,))
