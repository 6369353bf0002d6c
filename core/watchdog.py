"""Hang detection: a ping word in each device's state memfd that the worker's loop must echo.

    alive --no echo for HANG_TICKS--> hung: the worker is killed, what follows is a crash like another
      +--no echo, but a call to the back end is under way--> waiting --io_timeout--> hung
Time is counted in ticks of core's own loop, so a stopped or overloaded core, or a suspended host, blames nobody.
"""

from __future__ import annotations

import contextlib
import os
from collections.abc import Callable
from dataclasses import dataclass

from cellvisor.core.link import Link
from cellvisor.core.wire.reactor import Reactor

HANG_TICKS = 5
IDLE_SECONDS = 1.0


@dataclass(slots=True)
class _Seen:
    # What the last look at one incarnation showed; `missed` ticks without a sign of life.
    identity: str = ""
    missed: int = 0
    call_since: int = 0
    given_up: bool = False


class Watchdog:
    """Pings serving workers, each HANG_TICKS times in its hang_timeout; `hung(link, reason)` comes once for each."""

    def __init__(self, reactor: Reactor, hung: Callable[[Link, str], None]) -> None:
        self._reactor, self._hung = reactor, hung

    def watch(self, link: Link) -> None:
        """Watch whoever serves `link`, until it is closed."""
        self._arm(link, _Seen())

    def _arm(self, link: Link, seen: _Seen) -> None:
        self._reactor.after(link.hang_timeout / HANG_TICKS or IDLE_SECONDS, lambda: self._tick(link, seen))

    def _tick(self, link: Link, seen: _Seen) -> None:
        if link.ping_fd < 0:
            return
        if not link.alive or link.identity != seen.identity:
            seen = _Seen(link.identity)
            self._ping(link)
        elif link.hang_timeout and not seen.given_up:
            self._look(link, seen)
        self._arm(link, seen)

    @staticmethod
    def _ping(link: Link) -> None:
        if link.state is not None:
            link.state.ping = link.state.ping + 1
            with contextlib.suppress(BlockingIOError):  # it has not looked for hours
                os.eventfd_write(link.ping_fd, 1)

    def _look(self, link: Link, seen: _Seen) -> None:
        state = link.state
        assert state is not None
        since = state.in_syscall_since
        if state.echo == state.ping:
            seen.missed = 0
            self._ping(link)
        elif since and since != seen.call_since:
            seen.missed = 0  # one call after the other: slow, but alive
        else:
            seen.missed += 1
        seen.call_since = since
        waited = seen.missed * link.hang_timeout / HANG_TICKS
        if seen.missed < HANG_TICKS or (since and not self._call_is_over_time(link, waited)):
            return
        seen.given_up = True
        what = "its back end has not answered" if since and not _is_stopped(link) else "no sign of life"
        self._hung(link, f"{what} for {waited:g} s")

    @staticmethod
    def _call_is_over_time(link: Link, waited: float) -> bool:
        # A process that was stopped in the middle of a call is not waiting for its back end.
        return _is_stopped(link) or 0 < link.io_timeout <= waited


def _is_stopped(link: Link) -> bool:
    if link.worker is not None and link.worker.pid:
        with contextlib.suppress(OSError), open(f"/proc/{link.worker.pid}/stat", "rb") as stat:
            return stat.read().rpartition(b")")[2].split()[0] == b"T"
    return False
