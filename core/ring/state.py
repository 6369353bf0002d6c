"""The state memfd of a device: what its next incarnation needs, in memory that core owns (design 3).

    page 0     struct cv_state: header, ping and echo words, one entry per queue
    areas      per queue used_next and 16 bytes per head, 64-byte aligned (only C touches them)
    private    the device's own state, twice: a crash while saving leaves the other copy
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Sequence
from dataclasses import dataclass
from time import monotonic_ns
from typing import Any

from cellvisor.core._native import _native
from cellvisor.core.errors import Internal, UsageError
from cellvisor.core.mem.table import seal

_MASK32 = (1 << 32) - 1


def _align(value: int, to: int) -> int:
    return -(-value // to) * to


@dataclass(frozen=True, slots=True)
class StateLayout:
    """Offsets in bytes, derived from the queues' largest sizes and the private area's size alone."""

    queue_sizes: tuple[int, ...]
    private_size: int
    areas: tuple[int, ...]
    private_offset: int
    private_stride: int
    size: int

    @classmethod
    def of(cls, queue_sizes: Sequence[int], private_size: int) -> StateLayout:
        """Lay out a state memfd. Raises UsageError for sizes that cannot be."""
        lib, ffi = _native.lib, _native.ffi
        if len(queue_sizes) > lib.CV_STATE_QUEUES or not 0 <= private_size <= 1 << 20:
            raise UsageError(f"state: {len(queue_sizes)} queues and {private_size} private bytes, at most "
                             f"{lib.CV_STATE_QUEUES} and {1 << 20}")
        offset: int = lib.CV_STATE_HEADER
        areas: list[int] = []
        for size in queue_sizes:
            if not 1 <= size <= 32768 or size & (size - 1):
                raise UsageError(f"state: queue size {size} is not a power of two up to 32768")
            areas.append(offset)
            offset += _align(ffi.sizeof("struct cv_area") + size * ffi.sizeof("struct cv_head"), 64)
        stride = _align(private_size, 64)
        return cls(tuple(queue_sizes), private_size, tuple(areas), offset, stride,
                   _align(offset + 2 * stride, mmap.PAGESIZE))


def _describe(state: Any, layout: StateLayout, lib: Any) -> None:
    state.magic, state.version = lib.CV_STATE_MAGIC, lib.CV_STATE_VERSION
    state.size, state.queue_count = layout.size, len(layout.queue_sizes)
    state.private_offset, state.private_size = layout.private_offset, layout.private_size
    for entry, size, area in zip(state.queues, layout.queue_sizes, layout.areas, strict=False):
        entry.max_size, entry.area = size, area


def create_state(queue_sizes: Sequence[int], private_size: int = 0) -> int:
    """Make the state memfd of a device, sealed against resizing; the caller owns the descriptor."""
    layout = StateLayout.of(queue_sizes, private_size)
    ffi = _native.ffi
    state = ffi.new("struct cv_state *")
    _describe(state, layout, _native.lib)
    fd = os.memfd_create("cellvisor-state", os.MFD_CLOEXEC | os.MFD_ALLOW_SEALING)
    try:
        os.ftruncate(fd, layout.size)
        os.pwrite(fd, bytes(ffi.buffer(state)), 0)
        seal(fd)
    except BaseException:
        os.close(fd)
        raise
    return fd


class StateMap:
    """Map a state memfd, in core or in a worker. A context manager; the descriptor stays the caller's.

    The other side may have written anything: the header's layout is checked here and then kept privately,
    words are just numbers, and areas are judged by C when a queue recovers.
    """

    def __init__(self, fd: int, native: Any = _native) -> None:
        """Map `fd`. Raises Internal if the header is not one that this version can read."""
        self.native = native
        ffi, lib = native.ffi, native.lib
        size = os.fstat(fd).st_size
        if size < lib.CV_STATE_HEADER:
            raise Internal(f"state memfd has {size} bytes, fewer than its header")
        self._map = mmap.mmap(fd, size)
        self._buffer = ffi.from_buffer(self._map, require_writable=True)
        self._base = ffi.cast("uint8_t *", self._buffer)
        self.c = ffi.cast("struct cv_state *", self._buffer)
        self._since, self._store_word = ffi.addressof(self.c, "in_syscall_since"), lib.cv_word_store
        try:
            self.layout = self._check(size)
        except BaseException:
            self.close()
            raise

    def _check(self, size: int) -> StateLayout:
        c, lib = self.c, self.native.lib
        if c.magic != lib.CV_STATE_MAGIC or c.version != lib.CV_STATE_VERSION:
            raise Internal(f"state memfd: magic {c.magic:#x} version {c.version}, not "
                           f"{lib.CV_STATE_MAGIC:#x} version {lib.CV_STATE_VERSION}")
        count: int = c.queue_count
        if count > lib.CV_STATE_QUEUES:
            raise Internal(f"state memfd: {count} queues, at most {lib.CV_STATE_QUEUES}")
        try:
            layout = StateLayout.of([c.queues[i].max_size for i in range(count)], c.private_size)
        except UsageError as error:
            raise Internal(f"state memfd: {error.message}") from None
        areas = tuple(c.queues[i].area for i in range(count))
        if (layout.size, layout.size, layout.areas, layout.private_offset) != (
                size, c.size, areas, c.private_offset):
            raise Internal(f"state memfd: {size} bytes, header says {c.size}, its queues need {layout.size}")
        return layout

    def repair(self) -> None:
        """Write the part of the header that is core's again: a worker may have left anything there."""
        _describe(self.c, self.layout, self.native.lib)

    @property
    def generation(self) -> int:
        """Return the incarnation that owns the memfd."""
        return int(self.c.generation)

    @generation.setter
    def generation(self, value: int) -> None:
        self.c.generation = value & _MASK32

    @property
    def epoch(self) -> int:
        """Return the activation that the device works on, 0 if none."""
        return int(self.c.epoch)

    @epoch.setter
    def epoch(self, value: int) -> None:
        self.c.epoch = value & _MASK32

    @property
    def features(self) -> int:
        """Return the feature bits that the driver accepted."""
        return self._load("features")

    @features.setter
    def features(self, value: int) -> None:
        self._store("features", value)

    @property
    def ping(self) -> int:
        """Return the word that core counts up; the worker copies it to `echo`."""
        return self._load("ping")

    @ping.setter
    def ping(self, value: int) -> None:
        self._store("ping", value)

    @property
    def echo(self) -> int:
        """Return the last ping that the worker's loop has seen."""
        return self._load("echo")

    @echo.setter
    def echo(self, value: int) -> None:
        self._store("echo", value)

    @property
    def in_syscall_since(self) -> int:
        """Return since when (CLOCK_MONOTONIC, ns) the worker sits in blocking I/O, 0 if it does not."""
        return self._load("in_syscall_since")

    @in_syscall_since.setter
    def in_syscall_since(self, value: int) -> None:
        self._store("in_syscall_since", value)

    def enter_syscall(self) -> None:
        """Note that blocking I/O begins now."""
        self._store_word(self._since, monotonic_ns())

    def leave_syscall(self) -> None:
        """Note that it has ended."""
        self._store_word(self._since, 0)

    def area(self, index: int) -> tuple[Any, Any]:
        """Return queue `index`'s entry and area as C pointers."""
        ffi = self.native.ffi
        entry = ffi.addressof(self.c.queues, index)
        return entry, ffi.cast("struct cv_area *", self._base + self.layout.areas[index])

    def save_private(self, data: bytes, version: int) -> None:
        """Replace the private area by `data` of the device's format `version` (1..), all or nothing."""
        layout = self.layout
        if len(data) > layout.private_size or not 0 < version <= _MASK32:
            raise Internal(f"private state: {len(data)} bytes of version {version}, room for "
                           f"{layout.private_size} (Spec.private_size)")
        which = (self._load("private_current") & 1) ^ 1
        offset = layout.private_offset + which * layout.private_stride
        self._map[offset:offset + len(data)] = data
        self._store("private_current", version << 32 | len(data) << 1 | which)

    def load_private(self) -> tuple[int, bytes]:
        """Return (version, data) as last saved; (0, b"") if nothing was."""
        word = self._load("private_current")
        version, length, which = word >> 32, word >> 1 & 0x7FFFFFFF, word & 1
        if not version:
            return 0, b""
        if length > self.layout.private_size:
            raise Internal(f"private state: {length} bytes, room for {self.layout.private_size}")
        offset = self.layout.private_offset + which * self.layout.private_stride
        return version, bytes(self._map[offset:offset + length])

    def _load(self, name: str) -> int:
        return int(self.native.lib.cv_word_load(self.native.ffi.addressof(self.c, name)))

    def _store(self, name: str, value: int) -> None:
        self.native.lib.cv_word_store(self.native.ffi.addressof(self.c, name), value & (1 << 64) - 1)

    def close(self) -> None:
        """Unmap; queues on this state must be closed before."""
        if not self._map.closed:
            self.c = self._base = self._since = self.native.ffi.NULL
            self.native.ffi.release(self._buffer)
            self._map.close()

    def __enter__(self) -> StateMap:
        return self

    def __exit__(self, *exc: object) -> None:
        self.close()
