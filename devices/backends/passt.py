"""A network card for people who may make no tap: frames to and from `passt`, which speaks for the guest in user mode.

passt is a daemon that the card's process starts. It outlives that process, for our end of its socket is in core's
store, and ends with the last copy of that end. When it dies another one is started; only its connections are lost.
On the socket each frame has its length before it (32 bits, big-endian). A frame is taken or given in one system call
or not at all, so whoever dies leaves the stream between two frames.
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import struct
import termios
from collections.abc import Callable, Sequence
from typing import Any

from cellvisor.core.errors import CellvisorError, UsageError
from cellvisor.devices.backends import forward, passtdaemon
from cellvisor.devices.backends.passtdaemon import NAME
from cellvisor.devices.backends.tap import HEADER_SIZE, Tap

MTU = 65520         # what passt itself tells guests
SHORTEST, LONGEST = 14, 65535
BACKOFF = (0.0, 0.1, 0.5, 2.0)  # before each start that follows a failed one or an early end; the last one again
LENGTH = struct.Struct("!I")
_INT = struct.Struct("i")


class Passt(Tap):
    """A passt process in a tap's place; owns `fd`. epoll tells of its end, or of a stream that makes no sense."""

    offloads = False
    repeats = True

    def __init__(self, fd: int, mtu: int | None = None, arguments: Sequence[str] = ()) -> None:
        self.fd, self.name, self.takes_several, self._mtu, self._arguments = fd, NAME, False, mtu, arguments
        self._socket = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM, fileno=fd)
        self._socket.setblocking(False)
        self._room = self._socket.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
        self._frame = bytearray(HEADER_SIZE + LONGEST)  # its first bytes stay 0: the guest's header
        self._starts, self._starting = 0, False
        self._pending = 0  # bytes of a frame that was read and is still in the socket

    @property
    def mtu(self) -> int:
        return self._mtu or MTU

    def offload(self, flags: int) -> None:
        pass

    def carrier(self, there: bool) -> None:
        pass

    def read(self, views: Sequence[memoryview]) -> int:
        """Read a frame behind a header of zeros; returns 0 if none is there as a whole.

        It stays in the socket until taken(), or until the next one is read: a successor would read it again.
        """
        self.taken()
        waiting = self._count(termios.FIONREAD)
        if waiting < LENGTH.size:
            return 0
        (size,) = LENGTH.unpack(self._socket.recv(LENGTH.size, socket.MSG_PEEK))
        if waiting < LENGTH.size + size and size <= LONGEST:
            return 0
        at = HEADER_SIZE - LENGTH.size
        got = self._socket.recv_into(memoryview(self._frame)[at:HEADER_SIZE + size], 0, socket.MSG_PEEK)
        if got != LENGTH.size + size or size < SHORTEST:
            self._hang_up()  # it speaks of no frame
            return 0
        self._pending = got
        self._frame[at:HEADER_SIZE] = bytes(LENGTH.size)
        left = memoryview(self._frame)[:HEADER_SIZE + size]
        for view in views:
            part = min(len(view), len(left))
            view[:part] = left[:part]
            left = left[part:]
        return HEADER_SIZE + int(size) - len(left)

    def taken(self) -> None:
        if self._pending:  # its pages are there by now, so no signal ends the call half-way
            pending, self._pending = self._pending, 0
            self._socket.recv_into(self._frame, pending)
            self._frame[:HEADER_SIZE] = bytes(HEADER_SIZE)

    def write(self, views: Sequence[memoryview]) -> bool:
        """Write a frame without its header; False if there is no room now."""
        frame = b"".join(views)[HEADER_SIZE:]
        if not SHORTEST <= len(frame) <= LONGEST:
            raise OSError(errno.EMSGSIZE, f"a frame of {len(frame)} bytes")
        if 4 * self._count(termios.TIOCOUTQ) > self._room:  # when epoll tells of room, it is for the largest frame
            return False
        message = LENGTH.pack(len(frame)) + frame  # of our own memory: no page of the guest can be missing half-way
        if self._socket.send(message) != len(message):
            self._hang_up()
        return True

    def empty(self, scratch: memoryview) -> None:
        with contextlib.suppress(OSError):  # whoever watches it notices
            waiting = self._count(termios.FIONREAD)  # a flood must not keep us
            while waiting > 0 and (size := self.read([scratch])):
                waiting -= LENGTH.size + size - HEADER_SIZE
            self.taken()

    def lost(self, host: Any, found: Callable[[], None]) -> None:
        """It has ended: start another one, now or later, then call `found`."""
        if not self._starting:
            self._starting = True
            host.backend("lost", f"{NAME} has ended")
            self._hang_up()
            self._again(host, found)

    def _again(self, host: Any, found: Callable[[], None]) -> None:
        def attempt() -> None:
            try:
                fresh, pidfd = passtdaemon.start(self._arguments)
            except CellvisorError as error:
                host.log(str(error))
                self._again(host, found)
                return
            host.unwatch(self.fd)  # epoll knows the old one by its number
            with fresh:
                fresh.setblocking(False)
                passtdaemon.keep(host, fresh, pidfd)
                os.dup2(fresh.fileno(), self.fd, inheritable=False)
                self._pending = 0
            host.backend("found", f"another {NAME} was started")
            self._starting = False
            found()

        delay = BACKOFF[min(self._starts, len(BACKOFF) - 1)]
        self._starts += 1
        host.after(delay, attempt)

    def _count(self, request: int) -> int:
        found: int = _INT.unpack(fcntl.ioctl(self.fd, request, bytes(_INT.size)))[0]
        return found

    def _hang_up(self) -> None:
        with contextlib.suppress(OSError):  # it was first
            self._socket.shutdown(socket.SHUT_RDWR)

    def close(self) -> None:
        self._socket.close()


def is_wanted(options: Any) -> bool:
    """Say whether these options leave the host's end to us: nothing that only a tap has."""
    return options.fd is None and all(getattr(options, key) is None for key in ("tap", "ip", "mask", "host_mac"))


def open_passt(options: Any, host: Any) -> Passt:
    """Return the passt of a card, from the store or a new one. Raises UsageError."""
    if options.num_queues != 2:
        raise UsageError(f"num_queues={options.num_queues} without tap or fd: {NAME} has one pair",
                         hint="name a tap, or leave num_queues out")
    stored = host.take(NAME)
    if stored is not None:
        if not has_ended(stored):
            return Passt(stored, options.mtu, arguments(options))
        os.close(stored)
    try:
        fresh, pidfd = passtdaemon.start(arguments(options))
    except UsageError as error:
        raise forward.blame(error, options.forward or ()) from None
    passtdaemon.keep(host, fresh, pidfd)
    return Passt(fresh.detach(), options.mtu, arguments(options))


def arguments(options: Any) -> list[str]:
    """Return passt's arguments for a card. Raises UsageError."""
    return [*(["--mtu", str(options.mtu)] if options.mtu else []), *forward.arguments(options.forward or ())]


def has_ended(fd: int) -> bool:
    """Say that the process at the other end is gone."""
    watch = select.poll()
    watch.register(fd, select.POLLRDHUP)
    return bool(watch.poll(0))
