"""The common configuration structure: features, device_status, queues (virtio 1.2, 2.1, 3.1, 4.1.4.3).

    0 --ACKNOWLEDGE, DRIVER--> set up --FEATURES_OK, if they are--> negotiated --DRIVER_OK--> live
    ^                                                                                          |
    |<----- 0 written, never live: at once                  NEEDS_RESET (core), FAILED (driver) may join
    +------ reset_done(epoch) ---- resetting (status keeps its value) <------ 0 written -------+

Queue registers may change until queue_enable or DRIVER_OK, features until FEATURES_OK; while resetting,
nothing. A refused FEATURES_OK reads back clear, a refused DRIVER_OK too. Each activation is an epoch.
"""

from __future__ import annotations

from dataclasses import dataclass
from struct import Struct
from typing import Protocol

from cellvisor.core import log
from cellvisor.core.abi import virtio

_LAYOUT = Struct("<IIIIHHBBHHHHHQQQ")
_SETUP = virtio.S_ACKNOWLEDGE | virtio.S_DRIVER
_DRIVERS = _SETUP | virtio.S_FEATURES_OK | virtio.S_DRIVER_OK | virtio.S_FAILED
_MOST_WARNINGS = 16  # per machine start: the guest decides how often it misbehaves
OFFERED = virtio.F_VERSION_1 | virtio.F_RING_INDIRECT_DESC | virtio.F_RING_EVENT_IDX
_WIDTHS = {
    virtio.COMMON_DEVICE_FEATURE_SELECT: 4, virtio.COMMON_DRIVER_FEATURE_SELECT: 4,
    virtio.COMMON_DRIVER_FEATURE: 4, virtio.COMMON_CONFIG_VECTOR: 2, virtio.COMMON_STATUS: 1,
    virtio.COMMON_QUEUE_SELECT: 2, virtio.COMMON_QUEUE_SIZE: 2, virtio.COMMON_QUEUE_VECTOR: 2,
    virtio.COMMON_QUEUE_ENABLE: 2,
}
_ADDRESSES = {
    virtio.COMMON_QUEUE_DESC: "desc", virtio.COMMON_QUEUE_AVAIL: "avail", virtio.COMMON_QUEUE_USED: "used",
}


@dataclass(slots=True)
class QueueRegisters:
    """What the driver said of one queue."""

    largest: int
    size: int
    vector: int = virtio.NO_VECTOR
    enabled: bool = False
    desc: int = 0
    avail: int = 0
    used: int = 0


class Listener(Protocol):
    """What the registers set in motion."""

    def went_live(self) -> None:
        """DRIVER_OK was accepted."""

    def reset_begins(self, live: bool) -> None:
        """0 was written; if `live`, somebody must call reset_done."""

    def config_vector_set(self, vector: int) -> None:
        """The config interrupt's vector changed."""

    def queue_vector_set(self, index: int, vector: int) -> None:
        """A queue's vector changed."""


class CommonConfig:
    """The registers of one device. `vectors` is how many MSI-X vectors there are."""

    def __init__(self, name: str, features: int, sizes: tuple[int, ...], vectors: int,
                 listener: Listener) -> None:
        self._name, self._vectors, self._listener = name, vectors, listener
        self._sizes = sizes
        self.offered = features & ~virtio.F_TRANSPORT | OFFERED
        self.epoch = 0
        self.generation = 0
        self.resetting = False
        self._warnings = 0
        self._clear()

    def _clear(self) -> None:
        self.status = 0
        self.accepted = 0
        self.config_vector = virtio.NO_VECTOR
        self.queues = [QueueRegisters(size, size) for size in self._sizes]
        self._beyond = False  # the driver accepted a feature above bit 63
        self._device_select = self._driver_select = self._queue_select = 0

    @property
    def live(self) -> bool:
        """From DRIVER_OK until the driver writes 0."""
        return bool(self.status & virtio.S_DRIVER_OK) and not self.resetting

    def enabled_queues(self) -> list[dict[str, int]]:
        """Return the queue table as the owner gets it."""
        return [{"index": index, "size": queue.size, "desc": queue.desc, "avail": queue.avail,
                 "used": queue.used} for index, queue in enumerate(self.queues) if queue.enabled]

    def set_needs_reset(self) -> None:
        """Set DEVICE_NEEDS_RESET unless the device was reset meanwhile."""
        if self.status & virtio.S_DRIVER_OK:
            self.status |= virtio.S_NEEDS_RESET

    def reset_done(self, epoch: int) -> bool:
        """End the reset of `epoch`; False if that is not what is under way."""
        if not self.resetting or epoch != self.epoch:
            return False
        self.resetting = False
        self._clear()
        return True

    def power_on(self) -> None:
        """Forget everything; a reset_done that is still to come is void."""
        self.resetting = False
        self._warnings = 0
        self.epoch += 1
        self._clear()

    def begin_reset(self) -> None:
        """Do what writing 0 to device_status does."""
        if self.resetting:
            return
        live = self.live
        if live:
            self.resetting = True
        else:
            self._clear()
        self._listener.reset_begins(live)

    # --- the driver -----------------------------------------------------------------------------------

    def read(self, offset: int, size: int) -> int:
        """Read any bytes; those past the structure are 0."""
        if offset == virtio.COMMON_STATUS and size == 1:
            return self.status
        index = self._queue_select
        queue = self.queues[index] if index < len(self.queues) else None
        data = _LAYOUT.pack(
            self._device_select, _word(self.offered, self._device_select),
            self._driver_select, _word(self.accepted, self._driver_select),
            self.config_vector, len(self.queues), self.status, self.generation & 0xFF, index,
            *((queue.size, queue.vector, int(queue.enabled), index, queue.desc, queue.avail, queue.used)
              if queue else (0,) * 7))
        return int.from_bytes(data[offset : offset + size], "little")

    def write(self, offset: int, size: int, value: int) -> None:
        """Write one register with its natural width; anything else is ignored."""
        if self.resetting:
            return
        for start, name in _ADDRESSES.items():
            if start <= offset < start + 8:
                self._write_address(name, offset - start, size, value)
                return
        if _WIDTHS.get(offset) != size:
            return
        if offset == virtio.COMMON_STATUS:
            self._write_status(value)
        elif offset == virtio.COMMON_DEVICE_FEATURE_SELECT:
            self._device_select = value
        elif offset == virtio.COMMON_DRIVER_FEATURE_SELECT:
            self._driver_select = value
        elif offset == virtio.COMMON_DRIVER_FEATURE:
            self._write_features(value)
        elif offset == virtio.COMMON_QUEUE_SELECT:
            self._queue_select = value
        elif offset == virtio.COMMON_CONFIG_VECTOR:
            self.config_vector = value if value < self._vectors else virtio.NO_VECTOR
            self._listener.config_vector_set(self.config_vector)
        elif self._queue_select < len(self.queues):
            self._write_queue(offset, self.queues[self._queue_select], value)

    # --- below ----------------------------------------------------------------------------------------

    def _write_features(self, value: int) -> None:
        if self.status & virtio.S_FEATURES_OK:
            return
        if self._driver_select > 1:
            self._beyond = self._beyond or value != 0
            return
        shift = 32 * self._driver_select
        self.accepted = self.accepted & ~(0xFFFF_FFFF << shift) | value << shift

    def _write_address(self, name: str, at: int, size: int, value: int) -> None:
        queue = self.queues[self._queue_select] if self._queue_select < len(self.queues) else None
        if queue is None or queue.enabled or self.status & virtio.S_DRIVER_OK:
            return
        if size == 8 and at == 0:
            setattr(queue, name, value)
        elif size == 4 and at in (0, 4):
            old: int = getattr(queue, name)
            setattr(queue, name, old & ~(0xFFFF_FFFF << 8 * at) | value << 8 * at)

    def _write_queue(self, offset: int, queue: QueueRegisters, value: int) -> None:
        if offset == virtio.COMMON_QUEUE_VECTOR:  # routing only: may change while live
            queue.vector = value if value < self._vectors else virtio.NO_VECTOR
            self._listener.queue_vector_set(self._queue_select, queue.vector)
        elif queue.enabled or self.status & virtio.S_DRIVER_OK:
            return
        elif offset == virtio.COMMON_QUEUE_SIZE:
            if 0 < value <= queue.largest and not value & (value - 1):
                queue.size = value
        elif offset == virtio.COMMON_QUEUE_ENABLE and value == 1:
            queue.enabled = True

    def _write_status(self, value: int) -> None:
        if value == 0:
            self.begin_reset()
            return
        new = self.status | value & _DRIVERS  # bits leave by a reset only
        fresh = new & ~self.status
        if fresh & virtio.S_FEATURES_OK and (new & _SETUP != _SETUP or not self._features_are_ok()):
            new &= ~virtio.S_FEATURES_OK
        if fresh & virtio.S_DRIVER_OK and not new & virtio.S_FEATURES_OK:
            self._warn("driver said DRIVER_OK without FEATURES_OK")
            new &= ~virtio.S_DRIVER_OK
        if fresh & virtio.S_FAILED:
            self._warn("driver gave up on the device (FAILED)")
        self.status = new
        if fresh & new & virtio.S_DRIVER_OK:
            self.epoch += 1
            self._listener.went_live()

    def _features_are_ok(self) -> bool:
        unknown = self.accepted & ~self.offered
        if self.accepted & virtio.F_VERSION_1 and not unknown and not self._beyond:
            return True
        self._warn(f"features {self.accepted:#x} refused: {unknown:#x} not offered, VERSION_1 "
                   f"{'set' if self.accepted & virtio.F_VERSION_1 else 'missing'}")
        return False

    def _warn(self, text: str) -> None:
        if self._warnings < _MOST_WARNINGS:
            self._warnings += 1
            log.get("pci").warning("%s: %s", self._name, text)


def _word(features: int, select: int) -> int:
    return features >> 32 * select & 0xFFFF_FFFF if select < 2 else 0
