"""A device given up: no back end is touched, everything offered is answered as failed until the driver resets it.

Without it a guest that waits for a parked device's requests waits for ever, and with it its driver's removal.
How a type says "failed" is its class's `drain`; what must have ended before a reset may, its `fence`.
"""

from __future__ import annotations

from typing import Any

from cellvisor.core.errors import Conflict
from cellvisor.devices.device import DeviceBase, Queue


class Drain(DeviceBase):
    """Stands in for a device of class `cls`."""

    def __init__(self, cls: type[Any], options: Any, host: Any) -> None:
        super().__init__(options, host)
        self._answer = getattr(cls, "drain", DeviceBase.drain)
        getattr(cls, "fence", DeviceBase.fence)(options)
        self._count = 0

    def on_queue(self, index: int, queue: Queue) -> None:
        """Fail whatever is there; an input buffer stays with us until the reset."""
        for chain in queue.harvest():
            written = self._answer(index, chain)
            if written is not None:
                queue.complete(chain, written)
                self._count += 1

    def call(self, verb: str, args: dict[str, Any]) -> Any:
        """Refuse: there is no device behind this."""
        raise Conflict(f"{self.host.device_id} has been given up", hint="restart-device brings it back")

    def counters(self) -> dict[str, int]:
        """Return how many requests were answered."""
        return {"drained": self._count}
