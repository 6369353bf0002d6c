"""Hang detection: a ping word in each device's state memfd that the worker's loop must echo.

    alive --echo missing for HANG_TICKS--> hung (the worker is killed; what follows is a crash like another)
Time is counted in ticks of core's own loop, so a stopped or overloaded core blames nobody. A worker that says
it sits in blocking I/O has its own, longer limit (in_syscall_since).
"""

from __future__ import annotations

import os
from collections.abc import Callable, Iterable

from cellvisor.core._native import _native
from cellvisor.core.link import Link
from cellvisor.core.wire.reactor import Reactor

TICK_SECONDS = 1.0
HANG_TICKS = 5
SYSCALL_NS = 30 * 1_000_000_000


class Watchdog:
    """Pings every serving worker once a tick; `hung(link, reason)` is called once per incarnation."""

    def __init__(self, reactor: Reactor, links: Callable[[], Iterable[Link]],
                 hung: Callable[[Link, str], None]) -> None:
        self._reactor, self._links, self._hung = reactor, links, hung
        self._missed: dict[str, int] = {}
        reactor.after(TICK_SECONDS, self._tick)

    def _tick(self) -> None:
        self._reactor.after(TICK_SECONDS, self._tick)
        seen: dict[str, int] = {}
        for link in self._links():
            if link.alive and link.state is not None:
                seen[link.identity] = self._look(link, self._missed.get(link.identity, -1))
        self._missed = seen

    def _look(self, link: Link, missed: int) -> int:
        """Return how many pings in a row `link`'s worker has not answered, and send the next one."""
        state = link.state
        assert state is not None
        answered = missed < 0 or state.echo == state.ping
        missed = 0 if answered else missed + 1
        if missed >= HANG_TICKS and not self._is_excused(state.in_syscall_since):
            self._hung(link, f"no sign of life for {missed * TICK_SECONDS:.0f} s")
            return -1
        state.ping = state.ping + 1
        os.eventfd_write(link.ping_fd, 1)
        return missed

    @staticmethod
    def _is_excused(since: int) -> bool:
        now = int(_native.lib.cv_monotonic_ns())
        return 0 < since <= now and now - since < SYSCALL_NS
