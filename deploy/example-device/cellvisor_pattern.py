"""A device of one file: an entropy source (virtio id 4) whose bytes count upwards, so that one can see them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, ClassVar

from cellvisor.devices.device import DeviceBase, DeviceOptions, Host, Queue, Spec, option


class Pattern(DeviceBase):
    """Answer every request with `start`, start+1, start+2 and so on."""

    help: ClassVar[str] = "bytes that count upwards"
    spec: ClassVar[Spec] = Spec(virtio_id=4, queues=(64,), counters=("bytes",), title="pattern")

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(DeviceOptions):
        start: int = option(0, help="the first byte", min=0, max=255)

    def __init__(self, options: Any, host: Host) -> None:
        super().__init__(options, host)
        self._given = 0

    def on_queue(self, index: int, queue: Queue) -> None:
        for chain in queue.harvest():
            first = self.options.start + self._given
            data = bytes((first + at) & 0xFF for at in range(min(chain.writable_size, 4096)))
            queue.complete(chain, chain.write(data))
            self._given += len(data)

    def counters(self) -> dict[str, int]:
        return {"bytes": self._given}
