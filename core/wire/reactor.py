"""One epoll loop: descriptors, ZeroMQ sockets and timers. Used by core's main thread and by every worker.

A ZeroMQ socket's descriptor is edge-triggered (libzmq, ZMQ_FD): after any send or receive its EVENTS must
be read until nothing is left, so the loop drains each socket after every turn and before it sleeps.
"""

from __future__ import annotations

import heapq
import itertools
import select
import time
from collections.abc import Callable
from typing import Any

import zmq

Callback = Callable[[], None]


class Reactor:
    """Callbacks on readiness. Not thread-safe except for nothing: wake it through an eventfd you add."""

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._callbacks: dict[int, Callable[[int], None]] = {}
        self._zmq: list[tuple[zmq.Socket[bytes], Callable[[list[bytes]], None]]] = []
        self._timers: list[tuple[float, int, Callback]] = []
        self._cancelled: set[int] = set()
        self._ids = itertools.count()
        self.running = True

    def add(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call `callback(events)` while `fd` is ready (level-triggered). Regular files raise PermissionError."""
        self._epoll.register(fd, events)
        self._callbacks[fd] = callback

    def modify(self, fd: int, events: int) -> None:
        """Change what is waited for on `fd`."""
        self._epoll.modify(fd, events)

    def remove(self, fd: int) -> None:
        """Forget `fd`; unknown ones are ignored."""
        if self._callbacks.pop(fd, None) is not None:
            try:
                self._epoll.unregister(fd)
            except (OSError, ValueError):
                pass  # closed before it was removed

    def add_zmq(self, sock: zmq.Socket[bytes], callback: Callable[[list[bytes]], None]) -> None:
        """Call `callback(frames)` for each multipart message."""
        self._zmq.append((sock, callback))
        self.add(sock.getsockopt(zmq.FD), lambda events: None)

    def remove_zmq(self, sock: zmq.Socket[bytes]) -> None:
        """Forget a ZeroMQ socket."""
        self._zmq = [entry for entry in self._zmq if entry[0] is not sock]
        self.remove(sock.getsockopt(zmq.FD))

    def after(self, seconds: float, callback: Callback) -> int:
        """Call `callback` once in `seconds`; returns an id for cancel()."""
        key = next(self._ids)
        heapq.heappush(self._timers, (time.monotonic() + seconds, key, callback))
        return key

    def cancel(self, key: int) -> None:
        """Drop a timer that has not fired."""
        self._cancelled.add(key)

    def stop(self) -> None:
        """Make run() return after this turn."""
        self.running = False

    def run(self) -> None:
        """Turn until stop()."""
        while self.running:
            self.turn()

    def turn(self, timeout: float | None = None) -> None:
        """Wait once and call what is ready."""
        if self._drain_zmq():
            timeout = 0
        while self._timers and self._timers[0][1] in self._cancelled:
            self._cancelled.discard(heapq.heappop(self._timers)[1])
        if self._timers:
            until = max(0.0, self._timers[0][0] - time.monotonic())
            timeout = until if timeout is None else min(timeout, until)
        if not self.running:
            return
        for fd, events in self._epoll.poll(timeout):
            callback: Callable[[int], Any] | None = self._callbacks.get(fd)
            if callback is not None:
                callback(events)
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            _, key, fire = heapq.heappop(self._timers)
            if key in self._cancelled:
                self._cancelled.discard(key)
            else:
                fire()

    def _drain_zmq(self) -> bool:
        """Deliver up to 64 messages per socket; True if some socket may still have more."""
        more = False
        for sock, callback in list(self._zmq):
            for _ in range(64):
                if sock.closed:
                    break
                try:
                    frames = sock.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                callback(frames)
            else:
                more = True
        return more

    def close(self) -> None:
        """Release the epoll descriptor."""
        self._epoll.close()
