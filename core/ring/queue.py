"""A virtqueue as its device sees it: harvest chains, complete them, publish in batches (virtio 1.2, 2.7).

Everything that touches ring words or the state memfd is C (core/_native/ring.c); this is one call per batch
and the views into guest RAM.
"""

from __future__ import annotations

import os
from collections import deque
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass
from struct import Struct
from typing import Any

from cellvisor.core._native import _native
from cellvisor.core.errors import Internal, RingError
from cellvisor.core.mem.view import GuestMemory
from cellvisor.core.ring.reasons import reason
from cellvisor.core.ring.state import StateMap

_INDIRECT = 1 << _native.lib.VIRTIO_RING_F_INDIRECT_DESC
_EVENT_IDX = 1 << _native.lib.VIRTIO_RING_F_EVENT_IDX
# struct cv_chain: head, starts, used_len, counter, first, readable, writable, their sizes
_CHAIN = Struct("=HBxIQIIIII4x")


@dataclass(frozen=True, slots=True)
class QueueConfig:
    """What the driver set up: the ring's size and the gpas of its three parts."""

    size: int
    desc: int
    avail: int
    used: int


class Chain:
    """One descriptor chain.

    `head` is its descriptor index; `readable` and `writable` are lists of memoryviews into guest RAM, in
    order (guest memory may change under them at any time: copy what you check). `resume` is the progress
    that a predecessor recorded, `starts` how often execution began and never ended.
    """

    __slots__ = ("counter", "head", "readable", "readable_size", "resume", "starts", "writable",
                 "writable_size")

    def __init__(self, head: int, readable: list[memoryview], writable: list[memoryview], readable_size: int,
                 writable_size: int, counter: int = 0, resume: int = 0, starts: int = 0) -> None:
        self.head = head
        self.readable = readable
        self.writable = writable
        self.readable_size = readable_size
        self.writable_size = writable_size
        self.counter = counter
        self.resume = resume
        self.starts = starts

    def read(self, size: int = -1, offset: int = 0) -> bytes:
        """Copy `size` bytes (default: all) of the readable part from `offset`; fewer if it is shorter."""
        if size < 0:
            size = self.readable_size
        if not offset and len(self.readable) == 1:
            return bytes(self.readable[0][:size])
        parts: list[memoryview] = []
        for view in self.readable:
            length = len(view)
            if offset >= length:
                offset -= length
                continue
            part = view[offset:offset + size]
            offset = 0
            parts.append(part)
            size -= len(part)
            if not size:
                break
        return b"".join(parts)

    def write(self, data: bytes | bytearray | memoryview, offset: int = 0) -> int:
        """Copy `data` into the writable part at `offset`; returns how many bytes fitted."""
        source = memoryview(data).cast("B")
        done, total = 0, len(source)
        for view in self.writable:
            length = len(view)
            if offset >= length:
                offset -= length
                continue
            count = min(length - offset, total - done)
            view[offset:offset + count] = source[done:done + count]
            offset = 0
            done += count
            if done == total:
                break
        return done


class Queue:
    """The device side of one split virtqueue.

        fresh ----------------------------------------> active --release--> gone (driver reset)
        resumed --recover--> active                        |
                                                           +--close--> left for the next incarnation

    It is `resumed` when the state memfd holds this queue under the same `epoch`, else fresh. After
    release or close every call does nothing: late completions of a reset device end here.
    """

    def __init__(self, index: int, state: StateMap, memory: GuestMemory, config: QueueConfig,
                 features: int = 0, call_fd: int = -1, *, epoch: int = 0) -> None:
        """Bind to the driver's rings. `call_fd` is the eventfd that interrupts it (-1: none).

        `epoch` is core's number of the activation; 0 never resumes. Raises RingError if the rings are not
        wholly in RAM, misaligned or of a wrong size, or if the state memfd contradicts `config`.
        """
        native = memory.native
        self.index = index
        self.size = config.size
        self.more = False
        self.held = False  # harvest() gives only what was requeued: see devices/poison.py
        self.on_complete: Callable[[Chain], None] | None = None
        self._call_fd = call_fd
        self._memory = memory
        self._state = state
        self._lib, self._ffi = native.lib, native.ffi
        self._harvest, self._complete = native.lib.cv_queue_harvest, native.lib.cv_queue_complete
        self._queued: deque[Chain] = deque()
        self._c: Any = None
        if not 0 <= index < len(state.layout.areas):
            raise RingError(f"queue {index}: the device has {len(state.layout.areas)}")
        if not 0 < config.size <= state.layout.queue_sizes[index]:
            raise RingError(f"queue {index}: size {config.size}, at most {state.layout.queue_sizes[index]}")
        ffi, lib = self._ffi, self._lib
        self._c = ffi.gc(lib.cv_queue_new(config.size), lib.cv_queue_free)
        if self._c == ffi.NULL:
            raise MemoryError
        # A chain has at most `size` buffers; each may be cut where two RAM ranges meet.
        self._room = 2 * config.size + 2 * lib.CV_TABLE_RANGES
        allocate = ffi.new_allocator(should_clear_after_alloc=False)
        self._chains = allocate("struct cv_chain[]", config.size)
        self._segments = allocate("struct cv_segment[]", self._room)
        self._chain_bytes = memoryview(ffi.buffer(self._chains))
        self._segment_words = memoryview(ffi.buffer(self._segments)).cast("B").cast("Q")
        entry, area = state.area(index)
        setup = ffi.new("struct cv_setup *", {
            "desc": config.desc, "avail": config.avail, "used": config.used, "size": config.size,
            "epoch": epoch, "event_idx": bool(features & _EVENT_IDX), "indirect": bool(features & _INDIRECT),
        })
        self.resumed = self._check(lib.cv_queue_attach(self._c, memory.c, entry, area, setup)) == 1
        self._recovered = not self.resumed

    def recover(self) -> list[Chain]:
        """Settle what the predecessor left; returns the chains to run again, in their order.

        What it had executed is published here without running again, and the driver is interrupted once.
        Give the chains to requeue() (or execute them), then harvest. Returns [] for a fresh queue.
        """
        if self._c is None or self._recovered:
            return []
        heads = self._ffi.new("uint16_t[]", self.size)
        count = self._check(self._lib.cv_queue_recover(self._c, heads))
        self._recovered = True
        chains: list[Chain] = []
        for head in heads[0:count]:
            self._check(self._lib.cv_queue_walk(self._c, head, self._chains, self._segments, self._room))
            chains += self._build(1)
        self._interrupt()
        return chains

    def requeue(self, chains: Iterable[Chain]) -> None:
        """Have harvest() return these fetched chains first: what recover() gave, or what cannot run yet."""
        self._queued.extend(chains)

    def harvest(self, limit: int = 0) -> list[Chain]:
        """Fetch every chain made available (at most `limit` if not 0): FREE -> FETCHED.

        Afterwards `more` says that the limit cut it short: harvest again, no kick will come. Otherwise the
        driver's next buffer is kicked for. Raises RingError when the driver broke a rule; the queue then
        harvests no more.
        """
        self.more = False
        if self._c is None:
            return []
        if not self._recovered:
            raise Internal(f"queue {self.index}: harvest before recover")
        chains: list[Chain] = []
        while self._queued:
            if limit and len(chains) == limit:
                self.more = True
                return chains
            chains.append(self._queued.popleft())
        if self.held:
            return chains
        c = self._c
        while True:
            room = min(self.size, limit - len(chains)) if limit else self.size
            count = self._harvest(c, self._chains, room, self._segments, self._room)
            if count > 0:
                chains += self._build(count)
            elif count < 0:
                self._check(count)
            if not c.more:
                return chains
            if limit and len(chains) >= limit:
                self.more = True
                return chains

    def begin(self, chain: Chain) -> None:
        """Count that `chain` begins to execute (for requests that could kill their worker)."""
        if self._c is not None:
            self._check(self._lib.cv_queue_begin(self._c, chain.head, chain.counter))

    def absolve(self, chain: Chain) -> None:
        """Forget how often `chain` began: it did not kill its worker."""
        chain.starts = 0
        if self._c is not None:
            self._check(self._lib.cv_queue_absolve(self._c, chain.head, chain.counter))

    def progress(self, chain: Chain, done: int) -> None:
        """Record that `done` bytes of `chain` have taken effect; a successor sees it as chain.resume."""
        if self._c is not None:
            self._check(self._lib.cv_queue_progress(self._c, chain.head, chain.counter, done))

    def write(self, chain: Chain, fd: int, data: bytes) -> int:
        """Write `data`, which begins at chain.resume, to `fd` as os.write() does; what was written is progress.

        If the worker is killed meanwhile, the bytes count as written: the system call ends before the process.
        """
        if self._c is None:
            return len(data)
        count = int(self._lib.cv_queue_write(self._c, chain.head, chain.counter, chain.resume, fd, data, len(data)))
        if count == self._lib.CV_WRITE_REFUSED:
            raise Internal(f"queue {self.index}: write of head {chain.head}, which is not being executed")
        if count < 0:
            raise OSError(-count, os.strerror(-count))  # BlockingIOError and others by the number
        chain.resume += count
        return count

    def sending(self, chain: Chain) -> None:
        """Mark `chain` as leaving now: after a crash it counts as done. One per queue at a time."""
        if self._c is not None:
            self._check(self._lib.cv_queue_sending(self._c, chain.head, chain.counter))

    def complete(self, chain: Chain, written: int = 0) -> None:
        """`written` bytes are in the chain's writable part: FETCHED -> EXECUTED.

        Raises Internal if the chain was completed before or belongs to an earlier activation.
        """
        if written > chain.writable_size:
            raise Internal(f"queue {self.index}: {written} bytes written to head {chain.head}, "
                           f"which takes {chain.writable_size}")
        if self._c is not None:
            code = self._complete(self._c, chain.head, chain.counter, written)
            if code:
                self._check(code)
            if self.on_complete is not None:
                self.on_complete(chain)

    def publish(self) -> None:
        """Publish every EXECUTED chain in one batch and interrupt the driver if it wants to know."""
        if self._c is not None and self._check(self._lib.cv_queue_publish(self._c)):
            self._interrupt()

    def publish_together(self, chains: Sequence[tuple[Chain, int]]) -> None:
        """Publish fetched chains and their written lengths under one commit: all reach the driver or none.

        For what spans buffers (mergeable rx): after a crash before the commit they are all FETCHED again.
        """
        if self._c is None:
            return
        ffi = self._ffi
        heads = ffi.new("uint16_t[]", [chain.head for chain, _ in chains])
        counters = ffi.new("uint64_t[]", [chain.counter for chain, _ in chains])
        lengths = ffi.new("uint32_t[]", [written for _, written in chains])
        if self._check(self._lib.cv_queue_publish_together(self._c, heads, counters, lengths, len(chains))):
            self._interrupt()

    def release(self) -> None:
        """Forget everything: the driver reset the device. Outstanding chains will never be published."""
        if self._c is not None:
            self._lib.cv_queue_forget(self._c)
            self.close()

    def close(self) -> None:
        """Let go of the rings; outstanding chains stay in the state memfd for the next incarnation."""
        self._queued.clear()
        self._c = None

    def _interrupt(self) -> None:
        if self._call_fd >= 0:
            os.eventfd_write(self._call_fd, 1)

    def _check(self, code: int) -> int:
        if code >= 0:
            return code
        raise reason(self._lib, -code, self.index, self._c.value)

    def _build(self, count: int) -> list[Chain]:
        # The segments of all chains lie one after the other: one list of views serves every chain.
        raw = self._chain_bytes
        fields = [_CHAIN.unpack_from(raw)] if count == 1 else _CHAIN.iter_unpack(raw[:count * _CHAIN.size])
        last = _CHAIN.unpack_from(raw, (count - 1) * _CHAIN.size)
        words = iter(self._segment_words[:2 * (last[4] + last[5] + last[6])].tolist())
        ram = self._memory.ram
        views = [ram[offset:offset + length] for offset, length in zip(words, words, strict=True)]
        chains: list[Chain] = []
        for head, starts, used_len, counter, first, reads, writes, readable_size, writable_size in fields:
            middle = first + reads
            chains.append(Chain(head, views[first:middle], views[middle:middle + writes], readable_size,
                                writable_size, counter, used_len, starts))
        return chains
