"""How a removal or an addition ends: what the guest's _OST means, and waiting for a process that was told to go."""

from __future__ import annotations

import asyncio
import contextlib

from cellvisor.controlplane.incarnation import Incarnation
from cellvisor.controlplane.processes import kill_pidfd
from cellvisor.controlplane.waiting import wait_pidfd

KILL_TIMEOUT = 5.0
# _OST status codes (ACPI 6.5, Tables 6.63 to 6.65)
_GENERAL = {1: "failed", 2: "does not know this event"}
_INSERT = {0x81: "its driver could not be loaded", 0x82: "cannot take devices"}
_EJECT = {0x80: "cannot give devices back", 0x81: "an application uses it", 0x82: "it is busy",
          0x83: "something that depends on it is busy"}


def answer_of_guest(status: int, *, inserting: bool) -> str:
    """Put an _OST status into words."""
    meanings = _INSERT if inserting else _EJECT
    return f"the guest: {_GENERAL.get(status) or meanings.get(status) or 'no reason'} (_OST {status:#x})"


async def see_off(one: Incarnation, patience: float) -> None:
    """Wait until a process ended, killing it after `patience` seconds, and let its pidfd go."""
    try:
        if one.pidfd >= 0 and patience:
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wait_pidfd(one.pidfd), patience)
                return
        if one.pidfd >= 0:
            kill_pidfd(one.pidfd)
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(wait_pidfd(one.pidfd), KILL_TIMEOUT)
    finally:
        one.close()
