"""One life of a device as the controlplane sees it. What follows what: controlplane/fleet.py."""

from __future__ import annotations

import asyncio
import os
from dataclasses import dataclass
from enum import StrEnum

from cellvisor.controlplane.inventory import Device
from cellvisor.core.errors import UsageError

GAVE_UP = "its process ended"
READY_TIMEOUT = 60.0  # seconds for a process to serve, or to say that it cannot


class State(StrEnum):
    SPAWNING = "spawning"
    RUNNING = "running"
    SERVING = "serving"
    DRAINING = "draining"
    DEAD = "dead"
    PARKED = "parked"
    FAILED = "failed"
    ENDED = "ended"


def cannot_serve(device_id: str, reason: str) -> UsageError:
    """Return the refusal of whoever wanted a device that says why it cannot be."""
    return UsageError(f"{device_id}: {reason}")


@dataclass(slots=True)
class Incarnation:
    """One process of a device. `pidfd` is ours. `served`: the device has been served, by this or an earlier one.

    `drains`: there is no device behind it (devices/drain.py). `refused`: it said why it cannot serve.
    """

    device: Device
    generation: int
    token: str
    ready: asyncio.Future[None]
    state: State = State.SPAWNING
    pid: int = 0
    pidfd: int = -1
    reason: str = ""
    how: str = ""
    status: int | None = None
    served: bool = False
    drains: bool = False
    refused: bool = False

    @property
    def is_alive(self) -> bool:
        return self.state in (State.SPAWNING, State.RUNNING, State.SERVING, State.DRAINING)

    @property
    def is_parked(self) -> bool:
        return self.state in (State.PARKED, State.FAILED)

    def close(self) -> None:
        """Let the pidfd go."""
        if self.pidfd >= 0:
            asyncio.get_running_loop().remove_reader(self.pidfd)
            os.close(self.pidfd)
            self.pidfd = -1
