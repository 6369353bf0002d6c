"""virtio-blk (virtio 1.2, 5.2): a raw file or block device as a disk.

Requests run one after the other in the order in which they were fetched; I/O goes straight between the file
and the guest's buffers. Whatever the guest says is checked against the capacity before anything is touched.
"""

from __future__ import annotations

import os
import time
from collections import deque
from dataclasses import dataclass
from typing import Any, ClassVar

from cellvisor.core.abi import virtio
from cellvisor.core.errors import Conflict, RingError, UsageError
from cellvisor.devices.backends.disk import FENCE_SECONDS, SECTOR, Disk, drop, take, wait_released
from cellvisor.devices.backends.limiter import LimitedOptions, Waits, limiter_of
from cellvisor.devices.device import Chain, DeviceBase, Host, Queue, Spec, option

MAX_SEGMENTS = 32              # of one discard; a page full would be 256
MAX_DISCARD = (1 << 30) // SECTOR
MAX_ZEROES = (64 << 20) // SECTOR  # what has to be written by hand if the file system cannot zero
SWAP_SECONDS = 30.0  # who had the next image opened and then nothing more has died


@dataclass(frozen=True, slots=True)
class QueueAffinity:
    """Which host CPUs serve a queue."""

    queue_index: int = option(min=0)
    host_cpus: list[int] = option(min=0)


class Blk(DeviceBase):
    """One disk."""

    verb: ClassVar[str] = "disk"
    help: ClassVar[str] = "disk on a raw file or a block device"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(LimitedOptions):
        path: str = option(help="raw image or block device", path=True)
        readonly: bool = option(False, help="refuse writes; several readers may share a file")
        direct: bool = option(False, help="bypass the host's page cache (O_DIRECT)")
        num_queues: int = option(1, help="request queues", min=1, max=64)
        queue_size: int = option(128, help="requests per queue", min=4, max=32768, power_of_two=True)
        serial: str | None = option(None, help="serial number, default: the device's id", length=20)
        sparse: bool = option(True, help="let the guest's discards make holes in the file")
        image_type: str = option("raw", help="only raw: a format is never guessed", choices=("raw",))
        queue_affinity: list[QueueAffinity] = option([], help="host CPUs of each queue: [0@[1,2]]",
                                                     separator="@")

    def __init__(self, options: Any, host: Host) -> None:
        super().__init__(options, host)
        for pin in options.queue_affinity:
            if pin.queue_index >= options.num_queues:
                raise UsageError(f"queue_affinity: queue {pin.queue_index} of {options.num_queues} queues")
        self._limiter = limiter_of(options, host)
        self._waiting: dict[int, deque[Chain]] = {}  # fetched, by queue: what the limits hold up
        self._waits = Waits(host)
        self.disk = Disk(options.path, readonly=options.readonly, direct=options.direct,
                         patience=FENCE_SECONDS if host.generation > 1 else 0.0, trial=host.trial)
        self._next: Disk | None = None  # the image that is to follow, open and locked
        self._next_timer = -1
        self._pin(sorted({cpu for pin in options.queue_affinity for cpu in pin.host_cpus}))
        self._sectors = self.disk.size // SECTOR
        self._shown = self._config()
        self._write_through = False
        self._counts = dict.fromkeys(self.COUNTERS, 0)
        self._busy = 0.0  # seconds, which its counter tells in us
        self._serve = {virtio.BLK_T_IN: self._read, virtio.BLK_T_OUT: self._write,
                       virtio.BLK_T_FLUSH: self._flush, virtio.BLK_T_GET_ID: self._get_id}
        if not options.readonly:
            self._serve[virtio.BLK_T_WRITE_ZEROES] = self._write_zeroes
            if options.sparse:
                self._serve[virtio.BLK_T_DISCARD] = self._discard

    COUNTERS: ClassVar[tuple[str, ...]] = ("read_bytes", "write_bytes", "read_ops", "write_ops", "errors", "busy_us",
                                          "throttled")

    @staticmethod
    def _pin(cpus: list[int]) -> None:
        if cpus:  # one process serves every queue: it may use the CPUs of all of them
            try:
                os.sched_setaffinity(0, cpus)
            except OSError:
                raise UsageError(f"queue_affinity: no such host CPU in {cpus}") from None

    @property
    def spec(self) -> Spec:
        options = self.options
        features = (virtio.BLK_F_FLUSH | virtio.BLK_F_BLK_SIZE | virtio.BLK_F_SEG_MAX | virtio.BLK_F_TOPOLOGY
                    | (virtio.BLK_F_MQ if options.num_queues > 1 else 0))
        if options.readonly:
            features |= virtio.BLK_F_RO
        else:
            features |= virtio.BLK_F_WRITE_ZEROES | (virtio.BLK_F_DISCARD if options.sparse else 0)
        return Spec(virtio_id=virtio.ID_BLOCK, pci_class=0x018000, features=features, config=self._config(),
                    queues=(options.queue_size,) * options.num_queues, title="virtio-blk",
                    counters=self.COUNTERS)

    def _config(self) -> bytes:
        options, disk = self.options, self.disk
        ratio = max(1, disk.physical // disk.logical)
        return virtio.BLK_CONFIG.pack(
            self._sectors, 0, options.queue_size - 2, 0, 0, 0, disk.logical,
            ratio.bit_length() - 1, 0, ratio, 0, 0, options.num_queues,
            MAX_DISCARD, MAX_SEGMENTS, disk.logical // SECTOR, MAX_ZEROES, 1, int(options.sparse))

    def on_activate(self, features: int) -> None:
        # 5.2.6.2: without FLUSH the driver takes every completed write for durable
        self._write_through = not features & virtio.BLK_F_FLUSH
        self._let_go()  # the ring's recovery hands out again what was fetched

    def on_queue(self, index: int, queue: Queue) -> None:
        if self._limiter.idle and not self._waiting:
            for chain in queue.harvest():
                queue.begin(chain)
                queue.complete(chain, self._request(chain))
            return
        waiting = self._waiting.setdefault(index, deque())
        waiting += queue.harvest()
        while waiting:
            size = max(waiting[0].writable_size - 1, 0) + max(waiting[0].readable_size - virtio.BLK_REQUEST.size, 0)
            if wait := self._limiter.take(size):
                self._waits.begin(index, wait)  # it stays fetched, so a successor finds it
                return
            chain = waiting.popleft()
            queue.begin(chain)
            queue.complete(chain, self._request(chain))
        del self._waiting[index]

    def _let_go(self) -> None:
        self._waits.clear()
        self._waiting.clear()

    def on_reset(self) -> None:
        self._let_go()

    def on_pause(self) -> None:
        self._waits.clear()  # every queue is kicked after the pause

    def _request(self, chain: Chain) -> int:
        """Serve one request; return how many bytes of the writable part are valid."""
        header = chain.read(virtio.BLK_REQUEST.size)
        if len(header) < virtio.BLK_REQUEST.size or not chain.writable_size:
            raise RingError(f"request with {len(header)} bytes of header, {chain.writable_size} writable")
        kind, _, sector = virtio.BLK_REQUEST.unpack(header)
        room = chain.writable_size - 1
        serve = self._serve.get(kind)
        written, status = 0, virtio.BLK_S_UNSUPP
        if serve is not None:
            self.host.enter_syscall()
            began = time.perf_counter()
            try:
                written, status = serve(chain, sector, room), virtio.BLK_S_OK
            except Refused as refusal:
                status = refusal.status
                self._counts["errors"] += 1
            except OSError as error:
                status = virtio.BLK_S_IOERR
                self._counts["errors"] += 1
                if self._counts["errors"] <= 10:  # a broken disk must not fill the log
                    self.host.log(f"request type {kind} at sector {sector}: {error}")
            finally:
                self._busy += time.perf_counter() - began
                self.host.leave_syscall()
        chain.write(bytes([status]), room)
        return written + 1

    def _place(self, sector: int, size: int) -> int:
        """Return the offset of `size` bytes at `sector`."""
        if size % SECTOR or size // SECTOR > self._sectors - sector:
            raise Refused(virtio.BLK_S_IOERR)
        return sector * SECTOR

    def _read(self, chain: Chain, sector: int, room: int) -> int:
        self.disk.read(take(chain.writable, room), self._place(sector, room))
        self._counts["read_bytes"] += room
        self._counts["read_ops"] += 1
        return room

    def _write(self, chain: Chain, sector: int, room: int) -> int:
        size = chain.readable_size - virtio.BLK_REQUEST.size
        offset = self._place(sector, size)
        if self.options.readonly:
            raise Refused(virtio.BLK_S_IOERR)
        self.disk.write(drop(chain.readable, virtio.BLK_REQUEST.size), offset)
        if self._write_through:
            self.disk.flush()
        self._counts["write_bytes"] += size
        self._counts["write_ops"] += 1
        return 0

    def _flush(self, chain: Chain, sector: int, room: int) -> int:
        if not self.options.readonly:
            self.disk.flush()
        return 0

    def _get_id(self, chain: Chain, sector: int, room: int) -> int:
        name = (self.options.serial or self.host.device_id).encode()[: virtio.BLK_ID_BYTES]
        return chain.write(name.ljust(virtio.BLK_ID_BYTES, b"\0")[:room])

    def _discard(self, chain: Chain, sector: int, room: int) -> int:
        for offset, size, _ in self._segments(chain, MAX_SEGMENTS, MAX_DISCARD, 0):
            self.disk.discard(offset, size)
        return 0

    def _write_zeroes(self, chain: Chain, sector: int, room: int) -> int:
        for offset, size, flags in self._segments(chain, 1, MAX_ZEROES, virtio.BLK_WRITE_ZEROES_UNMAP):
            self.disk.zero(offset, size, unmap=bool(flags) and self.options.sparse)
        if self._write_through:
            self.disk.flush()
        return 0

    def _segments(self, chain: Chain, most: int, longest: int, allowed: int) -> list[tuple[int, int, int]]:
        """Check every segment before the first is acted on: (offset, size, flags)."""
        size = chain.readable_size - virtio.BLK_REQUEST.size
        if not 0 < size <= most * virtio.BLK_SEGMENT.size or size % virtio.BLK_SEGMENT.size:
            raise Refused(virtio.BLK_S_IOERR)
        segments = []
        data = chain.read(size, virtio.BLK_REQUEST.size)
        for sector, count, flags in virtio.BLK_SEGMENT.iter_unpack(data):
            if flags & ~allowed:
                raise Refused(virtio.BLK_S_UNSUPP)  # 5.2.6.2: unknown flags, or unmap of a discard
            if not 0 < count <= longest:
                raise Refused(virtio.BLK_S_IOERR)
            segments.append((self._place(sector, count * SECTOR), count * SECTOR, flags))
        return segments

    def call(self, verb: str, args: dict[str, Any]) -> Any:
        """Change the disk while its driver uses it. Raises CellvisorError; nothing has changed then.

        resize {size}: another size in bytes; requests that were made for a larger disk fail when they are served.
        limit {bw_size, ...}: other rate limits, at once; without keys those of its group have changed.
        open {path}: open and lock the image that is to follow; swap {path}: go on with it.
        check {verb: resize | open, ...}: nothing but what that one would refuse.
        """
        verbs = {"resize": self._resize, "limit": self._limit, "open": self._open, "swap": self._swap,
                 "check resize": self._check_resize, "check open": self._check_open}
        if verb == "check":
            verb = f"check {args.get('verb')}"
        if verb not in verbs:
            return super().call(verb, args)
        self.host.enter_syscall()
        try:
            return verbs[verb](args)
        finally:
            self.host.leave_syscall()

    def _resize(self, args: dict[str, Any]) -> dict[str, Any]:
        size = _size_of(args)
        self.disk.resize(size, sparse=self.options.sparse)
        self._show()
        return {"size": size}

    def _check_resize(self, args: dict[str, Any]) -> dict[str, Any]:
        self.disk.check_resize(_size_of(args), sparse=self.options.sparse)
        return {}

    def _show(self) -> None:
        """Tell the driver what the disk is like now."""
        self._sectors = self.disk.size // SECTOR
        if self._config() != self._shown:
            self._shown = self._config()
            self.host.set_config(self._shown)

    def _limit(self, args: dict[str, Any]) -> dict[str, Any]:
        self._limiter.change(args)
        self._waits.kick()  # they were for the old ones
        return {}

    def _open(self, args: dict[str, Any]) -> dict[str, Any]:
        path = str(args.get("path"))
        self._refuse_present(path)
        self._forget_next()
        self._next = self._other(path)
        self._next_timer = self.host.after(SWAP_SECONDS, self._forget_next)
        return {"size": self._next.size}

    def _check_open(self, args: dict[str, Any]) -> dict[str, Any]:
        path = str(args.get("path"))
        self._refuse_present(path)
        self._other(path, trial=True).close()
        return {}

    def _refuse_present(self, path: str) -> None:
        if self.disk.is_at(path):
            raise Conflict(f"path={path} is what the disk has already")

    def _other(self, path: str, *, trial: bool = False) -> Disk:
        """Open an image that could take the present one's place."""
        found = Disk(path, readonly=self.options.readonly, direct=self.options.direct, trial=trial)
        if found.logical != self.disk.logical:
            found.close()
            raise UsageError(f"path={path} has blocks of {found.logical} bytes, its driver was told "
                             f"{self.disk.logical}", hint="remove the disk and add another")
        return found

    def _swap(self, args: dict[str, Any]) -> dict[str, Any]:
        if self.disk.path == args.get("path"):  # a successor has begun with it, or there is none to follow any more
            self._forget_next()
            return {}
        if self._next is None or self._next.path != args.get("path"):
            raise Conflict(f"path={args.get('path')} has not been opened")
        old, self.disk, self._next = self.disk, self._next, None
        self._forget_next()
        self._show()
        if not old.readonly:
            try:
                old.flush()
            except OSError as error:
                self.host.log(f"path={old.path}: what was written last may be lost: {error}")
        old.close()
        return {}

    def _forget_next(self) -> None:
        self.host.cancel(self._next_timer)
        if self._next is not None:
            self._next.close()
            self._next = None

    @staticmethod
    def drain(index: int, chain: Chain) -> int | None:
        if not chain.writable_size:
            return 0
        chain.write(bytes([virtio.BLK_S_IOERR]), chain.writable_size - 1)
        return 1

    @staticmethod
    def fence(options: Any) -> None:
        wait_released(options.path)

    def counters(self) -> dict[str, int]:
        return {**self._counts, "busy_us": int(self._busy * 1e6), "throttled": self._waits.count}

    def close(self) -> None:
        self._forget_next()
        self.disk.close()
        self._limiter.close()


def _size_of(args: dict[str, Any]) -> int:
    size = args.get("size")
    if type(size) is not int:
        raise UsageError(f"desired_size={size!r} is no number of bytes")
    return size


class Refused(Exception):
    """A request that ends with `status` without being done."""

    def __init__(self, status: int) -> None:
        super().__init__(status)
        self.status = status
