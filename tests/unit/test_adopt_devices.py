"""How a successor takes devices over that something was waiting for while nobody steered."""

from __future__ import annotations

import asyncio
from types import SimpleNamespace
from typing import cast

import pytest

from cellvisor.controlplane.adopt import _take_device
from cellvisor.controlplane.blob import Life
from cellvisor.controlplane.supervisor import Supervisor
from tests.unit.test_recovery_fleet import Vm


@pytest.mark.parametrize("parked", [True, False])
@pytest.mark.parametrize("waits", [True, False])
def test_a_reset_that_began_while_nobody_steered_is_finished(waits: bool, parked: bool) -> None:
    async def run() -> None:
        vm = Vm(restart_budget=0)
        core = SimpleNamespace(worker_pidfd=lambda device: None)
        owner = cast("Supervisor", SimpleNamespace(fleet=vm.fleet, require_core=lambda: core))
        life = Life(1, "token", parked, "killed by SIGKILL", True, [])  # it may have died meanwhile
        await _take_device(owner, vm.device, life, {"state": "dead", "reset_waits": waits}, {})()
        if waits:
            assert (await vm.until(1))["drain"] is True
        elif not parked:
            await vm.event("device.parked")
        for _ in range(10):
            await asyncio.sleep(0)
        assert (len(vm.spawned), vm.latest().state) == ((1, "running") if waits else (0, "parked"))
        vm.close()

    asyncio.run(run())
