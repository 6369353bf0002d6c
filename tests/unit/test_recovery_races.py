"""What happens to a device while something else is being waited for: nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from dataclasses import replace

import pytest

from cellvisor.controlplane import parking
from cellvisor.controlplane.incarnation import State
from cellvisor.controlplane.nurseries import DIED
from cellvisor.controlplane.waiting import wait_pidfd
from cellvisor.core.errors import NotFound, TryAgain, UsageError
from tests.unit.test_recovery_fleet import Vm, play

LONG = 20.0


def test_many_may_wait_for_a_process_whose_pidfd_is_closed_meanwhile() -> None:
    async def run() -> None:
        with subprocess.Popen(["sleep", "60"]) as process:
            pidfd = os.pidfd_open(process.pid)
            waiting = [asyncio.create_task(wait_pidfd(pidfd)) for _ in range(3)]
            await asyncio.sleep(0)
            waiting.pop().cancel()
            await asyncio.sleep(0)
            asyncio.get_running_loop().remove_reader(pidfd)
            os.close(pidfd)
            process.kill()
            await asyncio.wait_for(asyncio.gather(*waiting), LONG)

    asyncio.run(run())


def test_a_drain_process_whose_end_is_told_before_it_is_seen() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")
        draining = asyncio.create_task(vm.fleet.parking.drain("data"))
        await vm.until(2)
        vm.say("ready")
        await draining
        reviving = asyncio.create_task(vm.fleet.parking.revive("data"))
        await asyncio.sleep(0)
        vm.exited(-signal.SIGKILL)
        await vm.until(3)
        vm.say("ready")
        assert (await asyncio.wait_for(reviving, LONG)).state == "serving"

    play(scene, restart_budget=0)


def test_a_device_removed_while_its_nursery_dies_is_not_started_again() -> None:
    async def scene(vm: Vm) -> None:
        died = vm.hold(2, TryAgain("data: its nursery hung", code=DIED))
        vm.exited(-signal.SIGKILL)
        while len(vm.attached) < 2:
            await asyncio.sleep(0)
        vm.fleet.retire("data")
        died.set()
        await quiet(vm)
        assert (vm.fleet.latest(), len(vm.attached)) == ([], 2)

    play(scene)


def test_a_successor_that_comes_too_late_does_not_harm_the_next_device_of_that_name() -> None:
    async def scene(vm: Vm) -> None:
        forked = vm.hold(2)
        vm.exited(-signal.SIGKILL)
        while len(vm.attached) < 2:
            await asyncio.sleep(0)
        vm.fleet.retire("data")
        other = await vm.fleet.start(replace(vm.device))
        vm.say("ready")
        forked.set()
        assert (await vm.until(3))["generation"] == 2
        while vm.processes[-1].poll() is None:
            await asyncio.sleep(0.01)
        assert (vm.latest(), other.state) == (other, "serving")
        assert "device.failed" not in vm.names()

    play(scene)


def test_a_start_that_fails_late_does_not_park_who_serves_by_then() -> None:
    async def scene(vm: Vm) -> None:
        forked = vm.hold(2, TryAgain("data: its nursery hung", code=DIED))
        vm.exited(-signal.SIGKILL)
        while len(vm.attached) < 2:
            await asyncio.sleep(0)
        vm.say("failed", reason="it was forked, and died")
        await vm.until(2)
        vm.say("ready")
        forked.set()
        await quiet(vm)
        assert (vm.latest().generation, vm.latest().state) == (3, "serving")
        assert "device.parked" not in vm.names()

    play(scene)


def test_who_waits_for_a_device_gets_its_next_process_when_the_first_one_dies() -> None:
    async def scene(vm: Vm) -> None:
        vm.failures = [UsageError("no memory")]
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")
        reviving = asyncio.create_task(vm.fleet.parking.revive("data"))
        await vm.until(2)
        vm.exited(-signal.SIGKILL)
        await vm.until(3)
        vm.say("ready")
        assert (await asyncio.wait_for(reviving, LONG)).generation == 4

    play(scene)


@pytest.mark.parametrize("verb", ["revive", "drain"])
def test_who_waits_for_a_device_that_is_removed_is_told(verb: str) -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")
        waiting = asyncio.create_task(getattr(vm.fleet.parking, verb)("data"))
        await vm.until(2)
        vm.fleet.retire("data")
        with pytest.raises(NotFound, match="data: was removed"):
            await asyncio.wait_for(waiting, LONG)

    play(scene, restart_budget=0)


def test_a_process_that_does_not_come_up_is_a_refusal(monkeypatch: pytest.MonkeyPatch) -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")
        with pytest.raises(TryAgain, match=r"data: its process was not ready within 0\.05 s"):
            await vm.fleet.parking.drain("data")

    monkeypatch.setattr(parking, "READY_TIMEOUT", 0.05)
    play(scene, restart_budget=0)


def test_a_late_drain_leaves_the_next_device_of_that_name_alone() -> None:
    async def scene(vm: Vm) -> None:
        vm.exited(-signal.SIGKILL)
        await vm.event("device.parked")
        vm.say("reset-waits")  # its drain process comes with the next turn of the loop
        vm.fleet.retire("data")
        other = await vm.fleet.start(replace(vm.device))
        other.state = State.PARKED
        await quiet(vm)
        assert (vm.latest(), len(vm.spawned)) == (other, 2)

    play(scene, restart_budget=0)


async def quiet(vm: Vm) -> None:
    """Wait until nothing that the fleet does by itself is under way."""
    while vm.fleet._restarts:
        await asyncio.wait(list(vm.fleet._restarts), timeout=LONG)
