"""Where a guest's bytes go and come from: off, null, tty, pty, file=PATH or socket=PATH.

Core's serial port and the console device share it. Nothing here blocks or spins: what the other side does
not take stays with the caller, and while nobody is there the newest 64 KiB wait for who comes.

    pty      away --probe sees no hang-up--> there --EIO or hang-up--> away
    socket   listening --accept--> connected --end of file or error--> listening
"""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import select
import socket
import stat
import struct
import termios
import tty
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Protocol

from cellvisor.core._native import _native
from cellvisor.core.errors import UsageError
from cellvisor.core.wire import bytepath
from cellvisor.core.wire.reactor import Reactor

BACKLOG = 64 << 10
PROBE_SECONDS = 0.2  # opening a pty's slave wakes nobody who watches its master
Put = Callable[[int, Any], int]
MODES = ("off", "null", "tty", "pty", "file", "socket")


class Loop(Protocol):
    """What a channel needs of an event loop; a device's Host is one."""

    def watch(self, fd: int, callback: Callable[[int], None], events: int = ...) -> None: ...
    def unwatch(self, fd: int) -> None: ...
    def after(self, seconds: float, callback: Callable[[], None]) -> int: ...
    def cancel(self, timer: int) -> None: ...


class ReactorLoop:
    """A Reactor as Loop."""

    def __init__(self, reactor: Reactor) -> None:
        self.watch = reactor.add
        self.unwatch = reactor.remove
        self.after = reactor.after
        self.cancel = reactor.cancel


@dataclass(frozen=True, slots=True)
class Target:
    """One of MODES and, for file and socket, the path."""

    mode: str
    path: str = ""


def target(mode: str, file: str | None = None, socket: str | None = None, flag: str = "") -> Target:
    """Make the Target from the option keys `mode`, `file` and `socket`. Raises UsageError if they clash."""
    if file and socket:
        raise UsageError(f"{flag}: file={file} and socket={socket} together", hint="give one of them")
    if (mode == "file" and not file) or (mode == "socket" and not socket):
        raise UsageError(f"{flag}: {mode} has no path", hint=f"write {mode}=PATH")
    if file or socket:
        return Target("file" if file else "socket", file or socket or "")
    return Target(mode)


def raw_terminal(fd: int) -> list[Any] | None:
    """Make the user's terminal raw; returns what restore_terminal() needs, None if `fd` is no terminal."""
    if not os.isatty(fd):
        return None
    saved = termios.tcgetattr(fd)
    tty.setraw(fd)
    return saved


def restore_terminal(fd: int, saved: list[Any] | None) -> None:
    """Undo raw_terminal(); a terminal that is gone is ignored."""
    if saved is not None:
        with contextlib.suppress(termios.error, OSError):
            termios.tcsetattr(fd, termios.TCSADRAIN, saved)


class ByteChannel:
    """A non-blocking two-way byte stream.

    `given` holds descriptors that exist already (a store's or the user's; the channel owns them from now
    on): "pty" (master), "listener", "client", "tty" (output, and input unless "tty-in" is there too).
    `keep(name, fd)` is called for each one that a later incarnation will want. `append` keeps a file's bytes.
    `on_input` is called when read() may have bytes, `on_output` when write() took less than it was given
    and may take more now.
    """

    def __init__(self, loop: Loop, where: Target, *, given: Mapping[str, int] | None = None,
                 on_input: Callable[[], None] = lambda: None, on_output: Callable[[], None] = lambda: None,
                 keep: Callable[[str, int], None] = lambda name, fd: None, append: bool = False) -> None:
        self.mode = where.mode
        self.path = where.path
        self._loop, self._on_input, self._on_output, self._keep = loop, on_input, on_output, keep
        self._in = self._out = -1
        self._listener: socket.socket | None = None
        self._watched: dict[int, int] = {}
        self._want_input, self._want_output = True, False
        self._timer: int | None = None
        self._backlog = bytearray()
        given = given or {}
        if self.mode == "pty":
            self._open_pty(given.get("pty"))
        elif self.mode == "socket":
            self._open_socket(given.get("listener"), given.get("client"))
        elif self.mode == "file":
            self._open_file(append)
        elif self.mode == "tty":
            self._open_tty(given.get("tty"), given.get("tty-in"))
        self._update()

    @property
    def there(self) -> bool:
        """Whether somebody takes the bytes (a file and a terminal always do)."""
        return self._out >= 0 and self._timer is None

    def read(self, size: int) -> bytes:
        """Return up to `size` bytes, b"" if there are none now."""
        if self._in < 0 or self._timer is not None:
            return b""
        try:
            data = os.read(self._in, size)
        except BlockingIOError:
            return b""
        except OSError:
            data = b""
        if not data:
            self._hang_up(self._in)
        return data

    def write(self, data: bytes | memoryview, put: Put = os.write) -> int:
        """Take what fits and return how many bytes that were; the rest after `on_output`. `put` stands for os.write."""
        if not self.there:
            if self.mode in ("pty", "socket"):
                self._remember(data)
            return len(data)
        if not self._flush():
            self._want_output = True
            self._update()
            return 0
        done = self._write_some(data, put)
        if done < len(data):
            self._want_output = True
            self._update()
        return done

    def size(self) -> int | None:
        """Return how long the file is that the bytes go to, None if it is no file."""
        status = os.fstat(self._out) if self.mode == "file" and self._out >= 0 else None
        return status.st_size if status is not None and stat.S_ISREG(status.st_mode) else None

    def want_input(self, wanted: bool) -> None:
        """Say whether `on_input` shall be called; say no while there is no room for bytes."""
        if wanted != self._want_input:
            self._want_input = wanted
            self._update()

    def deaf(self) -> None:
        """Take no input any more: it is somebody else's from now on."""
        fd, self._in = self._in, -1
        self._update()
        if fd not in (-1, self._out):
            os.close(fd)

    def close(self, *, unlink: bool = False) -> None:
        """Close every descriptor; with `unlink` remove the socket's file too."""
        if self._timer is not None:
            self._loop.cancel(self._timer)
            self._timer = None
        for fd in {self._in, self._out} - {-1}:
            self._forget(fd)
            os.close(fd)
        self._in = self._out = -1
        if self._listener is not None:
            self._forget(self._listener.fileno())
            self._listener.close()
            self._listener = None
            if unlink:
                with contextlib.suppress(OSError):
                    os.unlink(self.path)
        self.mode = "off"

    # --- opening ------------------------------------------------------------------------------------------

    def _open_pty(self, master: int | None) -> None:
        if master is None:
            master, slave = os.openpty()
            tty.setraw(slave)
            os.close(slave)  # opened and closed once, the slave's absence shows as a hang-up of the master
            self._keep("pty", master)
        os.set_blocking(master, False)
        self.path = _slave_name(master)
        self._in = self._out = master
        if _hung_up(master):
            self._timer = self._loop.after(PROBE_SECONDS, self._probe)

    def _open_socket(self, listener: int | None, client: int | None) -> None:
        if listener is None:
            self._listener = bytepath.listen(self.path)
            self._keep("listener", self._listener.fileno())
        else:
            self._listener = socket.socket(fileno=listener)
        self._listener.setblocking(False)
        if client is not None:
            os.set_blocking(client, False)
            self._in = self._out = client

    def _open_file(self, append: bool) -> None:
        self._out = bytepath.open_file(self.path, append=append)

    def _open_tty(self, output: int | None, source: int | None) -> None:
        if output is None and source is None:
            output, source = os.dup(1), os.dup(0)
        if output is not None:
            self._out = _own(output, os.O_RDWR if source is None else os.O_WRONLY)
        self._in = self._out if source is None else _own(source, os.O_RDONLY)

    # --- events -------------------------------------------------------------------------------------------

    def _update(self) -> None:
        """Watch exactly what is wanted: epoll reports a hang-up even to who wants nothing."""
        wanted: dict[int, int] = {}
        if self._timer is None:
            if self._in >= 0 and self._want_input:
                wanted[self._in] = select.EPOLLIN
            if self._out >= 0 and self._want_output:
                wanted[self._out] = wanted.get(self._out, 0) | select.EPOLLOUT
        if self._listener is not None and self._in < 0:
            wanted[self._listener.fileno()] = select.EPOLLIN
        for fd in [fd for fd, events in self._watched.items() if wanted.get(fd) != events]:
            self._forget(fd)
        for fd, events in wanted.items():
            if fd in self._watched:
                continue
            try:
                self._loop.watch(fd, lambda seen, fd=fd: self._ready(fd, seen), events)  # type: ignore[misc]
                self._watched[fd] = events
            except PermissionError:  # a regular file or /dev/null never waits
                if fd == self._in and fd != self._out:
                    os.close(fd)
                    self._in = -1

    def _forget(self, fd: int) -> None:
        if self._watched.pop(fd, None) is not None:
            self._loop.unwatch(fd)

    def _ready(self, fd: int, events: int) -> None:
        if self._listener is not None and fd == self._listener.fileno():
            self._accept()
            return
        if events & select.EPOLLOUT and self._flush():
            self._want_output = False
            self._update()
            self._on_output()
        if events & select.EPOLLIN:
            self._on_input()
        elif events & (select.EPOLLHUP | select.EPOLLERR):
            self._hang_up(fd)

    def _accept(self) -> None:
        assert self._listener is not None
        try:
            client, _ = self._listener.accept()
        except OSError:
            return
        client.setblocking(False)
        self._in = self._out = client.detach()
        self._keep("client", self._in)
        self._arrived()

    def _arrived(self) -> None:
        self._want_output = True  # for the backlog and for a caller that was refused before
        self._update()

    def _hang_up(self, fd: int) -> None:
        if self.mode == "pty":
            self._timer = self._loop.after(PROBE_SECONDS, self._probe)
        else:
            self._forget(fd)
            if fd == self._out:
                self._out = -1
            if fd == self._in:
                self._in = -1
            os.close(fd)
        refused, self._want_output = self._want_output, False
        self._update()
        if refused and not self.there:
            self._on_output()

    def _probe(self) -> None:
        if _hung_up(self._in):
            self._timer = self._loop.after(PROBE_SECONDS, self._probe)
        else:
            self._timer = None
            self._arrived()

    # --- bytes --------------------------------------------------------------------------------------------

    def _remember(self, data: bytes | memoryview) -> None:
        self._backlog += data[-BACKLOG:]
        del self._backlog[:-BACKLOG]

    def _flush(self) -> bool:
        if self._backlog:
            del self._backlog[: self._write_some(bytes(self._backlog))]
        return not self._backlog

    def _write_some(self, data: bytes | memoryview, put: Put = os.write) -> int:
        done = 0
        while done < len(data) and self._out >= 0:
            try:
                done += put(self._out, data[done:])
            except BlockingIOError:
                break
            except OSError as error:
                if self.mode == "pty" or error.errno in (errno.EPIPE, errno.ECONNRESET, errno.EIO):
                    self._hang_up(self._out)
                return len(data)  # nobody there, or the disk is full: the guest must not wait for it
        return done


def _slave_name(master: int) -> str:
    # os.ptsname is new in Python 3.13
    number: int = struct.unpack("I", fcntl.ioctl(master, _native.lib.TIOCGPTN, bytes(4)))[0]
    return f"/dev/pts/{number}"


def _hung_up(fd: int) -> bool:
    poll = select.poll()
    poll.register(fd, 0)
    return any(events & (select.POLLHUP | select.POLLERR) for _, events in poll.poll(0))


def _own(fd: int, access: int) -> int:
    """Return an open file of our own: O_NONBLOCK on the user's would stay with his shell. Closes `fd`."""
    kind = os.fstat(fd).st_mode
    if stat.S_ISCHR(kind) or stat.S_ISFIFO(kind):
        for mode in (access, os.O_WRONLY):
            try:
                mine = os.open(f"/proc/self/fd/{fd}", mode | os.O_NOCTTY | os.O_NONBLOCK | os.O_CLOEXEC)
            except OSError:
                continue
            os.close(fd)
            return mine
    if stat.S_ISSOCK(kind):
        os.set_blocking(fd, False)
    return fd
