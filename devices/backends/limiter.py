"""Token buckets: how many bytes and how many operations a device may do, for disks and network cards alike.

A bucket holds `size` tokens and is full again after `refill_time`; `one_time_burst` more are there once. What has
begun is paid off by what comes after it, so the rate is size/refill_time whatever the requests are like. The limits
are a device's own, and then a process that takes over from a dead one begins with nothing: no death wins tokens. Or
they are a group's, in a page that all its members take from.
"""

from __future__ import annotations

import mmap
import os
import time
from collections.abc import Callable, Mapping
from typing import Any, Protocol

from cellvisor.core._native import _native
from cellvisor.core.errors import UsageError
from cellvisor.core.wire import budget
from cellvisor.core.wire.budget import LimitedOptions as LimitedOptions

KEYS = budget.KEYS
SOONEST, LATEST = 0.001, 60.0  # seconds: less is not worth a timer; a group's limits may have changed meanwhile


class Limiter:
    """The limits of one device, or of a group of them if `shared` is a descriptor of its page; none until set().

    `clock` gives nanoseconds.
    """

    def __init__(self, shared: int | None = None, clock: Callable[[], int] = time.monotonic_ns) -> None:
        self.shared = shared is not None
        if shared is not None and os.fstat(shared).st_size != budget.SIZE:
            raise UsageError(f"{budget.GROUP}: its page has {os.fstat(shared).st_size} bytes, not {budget.SIZE}")
        self._page = mmap.mmap(-1 if shared is None else shared, budget.SIZE)
        self._clock, self._take = clock, _native.lib.cv_budget_take
        self._budget = _native.ffi.from_buffer("struct cv_budget *", self._page, require_writable=True)
        self.idle = not self.shared

    def set(self, limits: Mapping[str, int | None], *, empty: bool = False) -> None:
        """Begin anew with these limits (keys: KEYS, times in ms); `empty` without a token. Raises UsageError."""
        budget.put(self._page, limits, empty_at=self._clock() if empty else None)
        self.idle = not self.shared and not (limits.get("bw_size") or limits.get("ops_size"))

    def change(self, args: Mapping[str, Any]) -> None:
        """Do as a device's verb `limit` says: begin anew with its KEYS. A group's limits are not ours to change."""
        if not self.shared:
            self.set({key: value for key, value in args.items() if key in KEYS})

    def take(self, size: int) -> float:
        """Take one operation of `size` bytes and return 0, or take nothing and return for how many seconds to wait."""
        wait: int = self._take(self._budget, self._clock(), size)
        return min(max(wait / 1e9, SOONEST), LATEST) if wait else 0.0

    def close(self) -> None:
        """Let the page go."""
        _native.ffi.release(self._budget)
        self._page.close()


class Waits:
    """Queues whose limits are used up: each is kicked again after its time. `count`: how often one had to wait."""

    def __init__(self, host: Holder) -> None:
        self._host = host
        self._timers: dict[int, int] = {}
        self.count = 0

    def __contains__(self, index: int) -> bool:
        return index in self._timers

    def begin(self, index: int, seconds: float) -> None:
        """Leave queue `index` alone for so long, if it is not already."""
        def due() -> None:
            self._timers.pop(index, None)
            self._host.kick(index)

        if index not in self._timers:
            self.count += 1
            self._timers[index] = self._host.after(seconds, due)

    def kick(self) -> None:
        """Have them all served now."""
        for index in self._timers:
            self._host.kick(index)
        self.clear()

    def clear(self) -> None:
        """Drop every timer."""
        for timer in self._timers.values():
            self._host.cancel(timer)
        self._timers.clear()


class Holder(Protocol):
    """What is asked of a device's Host."""

    generation: int

    def after(self, seconds: float, callback: Callable[[], None]) -> int:
        """Call `callback` once; returns an id for cancel()."""

    def cancel(self, timer: int) -> None:
        """Drop a timer."""

    def kick(self, index: int) -> None:
        """Have queue `index` served again soon."""

    def take(self, name: str) -> int | None:
        """Return a duplicate of a stored descriptor, or None."""


def limiter_of(options: Any, host: Holder) -> Limiter:
    """Return the limiter that a device's options ask for (KEYS and `rate_limit_group`). Raises UsageError."""
    limits = {key: getattr(options, key) for key in KEYS}
    if options.rate_limit_group is None:
        limiter = Limiter()
        limiter.set(limits, empty=host.generation > 1)
        return limiter
    budget.check_member(options.rate_limit_group, limits)
    page = host.take(budget.GROUP)
    if page is None:
        raise UsageError(f"{budget.GROUP}={options.rate_limit_group}: nobody gave its page")
    try:
        return Limiter(page)
    finally:
        os.close(page)
