"""What happens to a device while something else is being waited for: nobody waits for ever."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess

from cellvisor.controlplane.waiting import wait_pidfd
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
