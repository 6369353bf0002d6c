"""One epoll loop: descriptors, ZeroMQ sockets and timers. Used by core's main thread and by every worker.

A ZeroMQ socket's descriptor is edge-triggered (libzmq, ZMQ_FD): after any send or receive its EVENTS must
be read until nothing is left, so the loop looks at each socket before it sleeps and after it woke.
"""

from __future__ import annotations

import heapq
import itertools
import os
import select
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass

import zmq

Callback = Callable[[], None]
ZMQ_BATCH = 64  # messages of one socket in one turn: a flood there must not starve the rest
_POLLIN = int(zmq.POLLIN)  # as a plain int: masking with the enum costs more than the call it checks


@dataclass(slots=True, eq=False)
class _Watch:
    # One add(): a new one of the same number is another object, so a stale event can be told.
    callback: Callable[[int], None]
    events: int


@dataclass(frozen=True, slots=True, eq=False)
class _Socket:
    sock: zmq.Socket[bytes]
    fd: int  # kept: a closed socket can't be asked any more
    callback: Callable[[list[bytes]], None]


class Reactor:
    """Callbacks on readiness, in one thread. From elsewhere only add(), remove(), stop() and wake() may be called.

    An exception of a callback ends the turn and reaches the caller of run().
    """

    def __init__(self) -> None:
        self._epoll = select.epoll()
        self._watches: dict[int, _Watch] = {}
        self._sockets: tuple[_Socket, ...] = ()
        self._timers: list[tuple[float, int]] = []
        self._due: dict[int, Callback] = {}
        self._ids = itertools.count()
        self._wake_fd = os.eventfd(0, os.EFD_NONBLOCK | os.EFD_CLOEXEC)
        self._zmq_ready = False
        self.running = True
        self.add(self._wake_fd, self._woken)

    def add(self, fd: int, callback: Callable[[int], None], events: int = select.EPOLLIN) -> None:
        """Call `callback(events)` while `fd` is ready (level-triggered).

        Raises PermissionError for a regular file, FileExistsError for one that is watched already.
        """
        before = self._watches.get(fd)
        self._watches[fd] = _Watch(callback, events)  # first: the loop may see an event at once
        try:
            self._epoll.register(fd, events)
        except BaseException:
            if before is None:
                del self._watches[fd]
            else:
                self._watches[fd] = before
            raise

    def modify(self, fd: int, events: int) -> None:
        """Change what is waited for on `fd`."""
        self._epoll.modify(fd, events)
        self._watches[fd].events = events

    def remove(self, fd: int) -> None:
        """Forget `fd`; unknown ones are ignored. An event of it that this turn still holds is dropped."""
        if self._watches.pop(fd, None) is not None:
            with suppress(OSError, ValueError):  # closed before it was removed
                self._epoll.unregister(fd)

    def add_zmq(self, sock: zmq.Socket[bytes], callback: Callable[[list[bytes]], None]) -> None:
        """Call `callback(frames)` for each multipart message."""
        fd = int(sock.getsockopt(zmq.FD))
        self.add(fd, self._zmq_is_ready)
        self._sockets = (*self._sockets, _Socket(sock, fd, callback))

    def remove_zmq(self, sock: zmq.Socket[bytes]) -> None:
        """Forget a ZeroMQ socket, closed already or not; unknown ones are ignored."""
        for entry in self._sockets:
            if entry.sock is sock:
                self.remove(entry.fd)
        self._sockets = tuple(entry for entry in self._sockets if entry.sock is not sock)

    def after(self, seconds: float, callback: Callback) -> int:
        """Call `callback` once in `seconds`; returns an id for cancel()."""
        key = next(self._ids)
        self._due[key] = callback
        heapq.heappush(self._timers, (time.monotonic() + seconds, key))
        return key

    def cancel(self, key: int) -> None:
        """Drop a timer; one that has fired or was cancelled already is no error."""
        if self._due.pop(key, None) is not None and len(self._timers) > 64 + 2 * len(self._due):
            self._timers = [timer for timer in self._timers if timer[1] in self._due]
            heapq.heapify(self._timers)

    def stop(self) -> None:
        """Make run() return after this turn. Safe in a signal handler and in another thread."""
        self.running = False
        self.wake()

    def wake(self) -> None:
        """End the wait of this or the next turn. Safe in a signal handler and in another thread."""
        if self._wake_fd >= 0:
            os.eventfd_write(self._wake_fd, 1)

    def run(self) -> None:
        """Turn until stop()."""
        while self.running:
            self.turn()

    def turn(self, timeout: float | None = None) -> None:
        """Wait once, at most `timeout` seconds (None: until something happens), and call what is ready."""
        if self._drain():  # what a send or receive since the last look left behind
            timeout = 0
        while self._timers and self._timers[0][1] not in self._due:
            heapq.heappop(self._timers)
        if self._timers:
            until = max(0.0, self._timers[0][0] - time.monotonic())
            timeout = until if timeout is None else min(timeout, until)
        if not self.running:
            return
        ready = [(fd, self._watches.get(fd), events) for fd, events in self._epoll.poll(timeout)]
        for fd, watch, events in ready:
            if watch is None:
                self._forget(fd)
            elif self._watches.get(fd) is watch:
                watch.callback(events)
        if self._zmq_ready:
            self._zmq_ready = False
            self._drain()
        now = time.monotonic()
        while self._timers and self._timers[0][0] <= now:
            fire = self._due.pop(heapq.heappop(self._timers)[1], None)
            if fire is not None:
                fire()

    def close(self) -> None:
        """Release the loop's own descriptors; the watched ones stay open."""
        self._epoll.close()
        if self._wake_fd >= 0:
            os.close(self._wake_fd)
            self._wake_fd = -1

    def _drain(self) -> bool:
        # Deliver up to ZMQ_BATCH messages of each socket; True if there was one, so there may be more.
        delivered = False
        for entry in self._sockets:
            for _ in range(ZMQ_BATCH):
                if entry.sock.closed or entry not in self._sockets:
                    break  # by one of the callbacks
                if not int(entry.sock.getsockopt(zmq.EVENTS)) & _POLLIN:
                    break
                try:
                    frames = entry.sock.recv_multipart(zmq.NOBLOCK)
                except zmq.Again:
                    break
                delivered = True
                entry.callback(frames)
        return delivered

    def _zmq_is_ready(self, events: int) -> None:
        self._zmq_ready = True

    def _woken(self, events: int) -> None:
        with suppress(BlockingIOError):
            os.eventfd_read(self._wake_fd)

    def _forget(self, fd: int) -> None:
        # A descriptor closed before remove() whose file lives on in another process: epoll goes on
        # reporting it and can't be told by number, so the set is made anew.
        try:
            self._epoll.unregister(fd)
        except FileNotFoundError:
            pass  # remove() in another thread was quicker
        except OSError:
            self._epoll.close()
            self._epoll = select.epoll()
            for number, watch in list(self._watches.items()):
                try:
                    self._epoll.register(number, watch.events)
                except OSError:
                    del self._watches[number]
