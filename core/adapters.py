"""What vCPU threads call: exits go to the platform at once, everything for workers to the main thread."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable

from cellvisor.core.link import Link
from cellvisor.core.platform import Platform

MAX_WRITES = 256
Post = Callable[[Callable[[], None]], None]


class Exits:
    """core.kvm.vcpu.Exits over the platform; `ended(index, reason)` runs on the main thread."""

    def __init__(self, platform: Platform, post: Post, ended: Callable[[int, str], None]) -> None:
        self.io_read, self.io_write = platform.io_read, platform.io_write
        self.mmio_read, self.mmio_write = platform.mmio_read, platform.mmio_write
        self._post, self._ended = post, ended

    def ended(self, index: int, reason: str) -> None:
        """Hand over to the main thread."""
        self._post(lambda: self._ended(index, reason))


class LinkOwner:
    """core.pci.ports.Owner: from vCPU threads to the link on the main thread."""

    def __init__(self, post: Post, link: Link, activated: Callable[[Link], None]) -> None:
        """`activated(link)` is called at once, under the board lock."""
        self._post, self._link, self._activated = post, link, activated
        self._writes: deque[tuple[int, bytes]] = deque()

    def activate(self, epoch: int, queues: list[dict[str, int]], features: int) -> None:
        """DRIVER_OK."""
        self._activated(self._link)
        self._post(lambda: self._link.activate(epoch, queues, features))

    def reset(self, epoch: int) -> None:
        """The driver wrote 0 to device_status."""
        self._post(lambda: self._link.reset(epoch))

    def config_write(self, offset: int, data: bytes) -> None:
        """The driver wrote to device config space: lost if MAX_WRITES earlier ones are still to be passed on."""
        if len(self._writes) < MAX_WRITES:
            self._writes.append((offset, data))
            self._post(lambda: self._link.config_write(*self._writes.popleft()))
