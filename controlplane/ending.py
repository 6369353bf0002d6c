"""How a machine ends: workers, nurseries and core, each asked first and killed if it does not listen."""

from __future__ import annotations

import asyncio
import contextlib

from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.fleet import Fleet
from cellvisor.controlplane.nurseries import Nurseries
from cellvisor.controlplane.processes import Child
from cellvisor.controlplane.waiting import wait_pidfd
from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire.messages import CoreVerb

END_TIMEOUT = 5.0


async def end_machine(core: CoreLink | None, core_child: Child, nurseries: Nurseries, first: Child | None,
                      fleet: Fleet | None) -> None:
    """End everything; `first` is the first nursery, which may not be among `nurseries` yet."""
    nurseries.stopping()
    if fleet is not None:
        fleet.stopping()
    patience = 0.2
    if core is not None and core_child.is_alive():
        try:
            await core.request(CoreVerb.QUIT, END_TIMEOUT)
            patience = END_TIMEOUT  # it has told its workers
        except CellvisorError:
            core_child.kill()
    if fleet is not None:
        await fleet.wait_gone(patience)
        fleet.kill()
    nurseries.quit()
    if core is None:
        core_child.kill()
    if first is not None and not nurseries.pids():
        first.kill()
        first.close()
    await nurseries.wait_gone(END_TIMEOUT)
    with contextlib.suppress(TimeoutError):
        async with asyncio.timeout(END_TIMEOUT):
            await wait_pidfd(core_child.pidfd)
    core_child.kill()
    core_child.close()
    if fleet is not None:
        await fleet.wait_gone(1.0)
        fleet.close()
    if core is not None:
        await core.close()
