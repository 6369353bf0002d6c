"""virtio-rng (virtio 1.2, 5.4): bytes of a host file for the guest's entropy pool."""

from __future__ import annotations

import errno
import os
import stat
from dataclasses import dataclass
from typing import Any, ClassVar

from cellvisor.core.abi.virtio import ID_RNG
from cellvisor.core.errors import UsageError
from cellvisor.devices.device import Chain, DeviceBase, DeviceOptions, Host, Queue, Spec, option

MAX_REQUEST = 64 << 10  # a guest may describe 4 GiB by overlapping buffers; no driver needs more than this
RETRY_SECONDS = 0.1


class Rng(DeviceBase):
    """Fill whatever the driver offers."""

    verb: ClassVar[str] = "rng"
    help: ClassVar[str] = "entropy source"
    spec: ClassVar[Spec] = Spec(virtio_id=ID_RNG, queues=(256,), title="virtio-rng",
                                counters=("bytes", "requests"))

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(DeviceOptions):
        src: str = option("/dev/urandom", help="file that the bytes come from", path=True)

    def __init__(self, options: Any, host: Host) -> None:
        super().__init__(options, host)
        self._pending: list[Chain] = []
        self._waiting = False
        self._begun: Chain | None = None
        self._bytes = self._requests = 0
        try:
            if host.trial and stat.S_ISFIFO(os.stat(options.src).st_mode):  # who writes there would lose a byte
                if not os.access(options.src, os.R_OK):
                    raise PermissionError(errno.EACCES, os.strerror(errno.EACCES))
                self._fd = os.open(os.devnull, os.O_RDONLY | os.O_CLOEXEC)
                return
            self._fd = os.open(options.src, os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            os.set_blocking(self._fd, False)
            os.readv(self._fd, [bytearray(1)])
        except BlockingIOError:
            pass
        except OSError as error:
            raise UsageError(f"src={options.src}: {error.strerror}") from None

    def on_queue(self, index: int, queue: Queue) -> None:
        self._pending += queue.harvest()
        while self._pending and not self._waiting:
            chain = self._pending[0]
            if chain is not self._begun:  # once, however often the source is dry
                self._begun = chain
                queue.begin(chain)
            size = self._fill(chain)
            if size or not chain.writable_size:
                queue.complete(self._pending.pop(0), size)
                self._bytes, self._requests = self._bytes + size, self._requests + 1

    def _fill(self, chain: Chain) -> int:
        views, room = [], MAX_REQUEST
        for view in chain.writable[:64]:
            views.append(view[:room])
            room -= len(views[-1])
        try:
            size = os.readv(self._fd, views)
        except (BlockingIOError, InterruptedError):
            size = 0
        if size == 0 and chain.writable_size:  # dry for now; a fifo without a writer is always "readable"
            self._waiting = True
            self.host.after(RETRY_SECONDS, self._again)
        return size

    def _again(self) -> None:
        self._waiting = False
        self.host.kick(0)

    def on_reset(self) -> None:
        self._pending.clear()

    def counters(self) -> dict[str, int]:
        return {"bytes": self._bytes, "requests": self._requests}

    def close(self) -> None:
        os.close(self._fd)
