"""One boot of a VM: core gets the machine, each device a process, the consoles the terminal, and the guest runs.

    configured -> devices started -> all of them ready -> ptys known -> terminal raw -> BOOT
"""

from __future__ import annotations

import asyncio
import signal
import time
from dataclasses import replace
from typing import TYPE_CHECKING

from cellvisor.controlplane import descriptors, ratelimit
from cellvisor.controlplane.consoles import Consoles
from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.fleet import Fleet
from cellvisor.controlplane.incarnation import READY_TIMEOUT
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.inventory import Device
    from cellvisor.controlplane.supervisor import Supervisor

CORE_TIMEOUT = 60.0  # loading a big kernel and prefaulting guest RAM take their time


async def boot(vm: Supervisor) -> None:
    """Start the devices and run what was created. Raises CellvisorError; core is used up then."""
    vm.booting = True
    try:
        core = vm.require_core()
        await finish(vm, core, await _configure(vm, core))
    finally:
        vm.booting = False


def make_fleet(vm: Supervisor, core: CoreLink) -> Fleet:
    """Begin with workers."""
    ratelimit.settle_groups(core, vm.config.groups)
    vm.fleet = Fleet(core, vm.nurseries, vm.events, vm.rundir.path)
    return vm.fleet


def consoles_of(vm: Supervisor, core: CoreLink) -> Consoles:
    """Return the ties of the configured consoles to the outside."""
    return Consoles(core, vm.terminal, vm.config.devices, vm.config.serial.mode)


async def _configure(vm: Supervisor, core: CoreLink) -> Consoles:
    consoles, fleet, vm.configured = consoles_of(vm, core), make_fleet(vm, core), True
    consoles.give_terminal()
    made = await core.request(CoreVerb.CONFIGURE, CORE_TIMEOUT, **vm.config.for_core())
    vm.memory_effects = made.get("memory", {})
    vm.stages.add("configured", time.monotonic_ns())
    for device in vm.config.devices:
        await fleet.start(device)
    return consoles


async def finish(vm: Supervisor, core: CoreLink, consoles: Consoles) -> None:
    """Wait for the started devices and boot. Raises CellvisorError."""
    assert vm.fleet is not None
    await vm.fleet.wait_ready()
    paths = await consoles.ptys(str((await core.request(CoreVerb.INFO)).get("serial", "")))
    vm.config = replace(vm.config, paths=paths)
    for device_id, path in paths.items():
        vm.events.emit("console.pty", device=device_id, path=path)
    vm.stages.add("devices-ready", time.monotonic_ns())
    if vm.terminal.settings() is not None:
        await core.keep_state()  # a successor can undo what comes now
    consoles.make_raw()
    await core.request(CoreVerb.BOOT, CORE_TIMEOUT)
    vm.stages.add("boot", time.monotonic_ns())
    if vm.state == "Created":
        vm.state = "Running"
    asyncio.get_running_loop().add_signal_handler(signal.SIGWINCH, consoles.resized)


async def try_devices(vm: Supervisor) -> None:
    """Try every device of a VM that was created, each for itself: that two want the same is not seen.

    Raises what kept the first one from it.
    """
    async def attempt(device: Device) -> None:
        with descriptors.lent(vm.require_core(), device) as fds:
            await vm.nurseries.try_out(device, READY_TIMEOUT, fds)

    tried = [attempt(device) for device in vm.config.devices]
    for error in await asyncio.gather(*tried, return_exceptions=True):
        if error is not None:
            raise error
