"""This terminal and a console's pty or socket: every byte both ways, until the escape key."""

from __future__ import annotations

import contextlib
import os
import select
import termios
import tty
from collections.abc import Callable, Iterator

from cellvisor.core.errors import CellvisorError, Conflict, NotFound
from cellvisor.core.wire import ports

ESCAPE = b"\x1d"  # Ctrl-]
CHUNK = 1 << 16
TICK_MS = 250  # until the window's size is looked at again


def attach(kind: str, path: str, stdin: int = 0, stdout: int = 1,
           resized: Callable[[int, int], None] = lambda columns, rows: None) -> str:
    """Copy until Ctrl-], the end of stdin, or the console's end; returns which one it was, as a sentence.

    `resized` is told the size of the terminal (columns, rows), and each other one that it gets.
    """
    try:
        fd = ports.take((kind, path))
    except BlockingIOError:
        raise Conflict(f"{path}: somebody else is attached", hint="who leaves with Ctrl-]") from None
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}", hint="is somebody else attached?") from None
    try:
        with raw(stdin):
            return _copy(fd, stdin, stdout, resized)
    finally:
        os.close(fd)


def size(fd: int) -> tuple[int, int] | None:
    """Return (columns, rows) of a terminal, None for what is none or does not know."""
    try:
        found = os.get_terminal_size(fd)
    except OSError:
        return None
    return (found.columns, found.lines) if found.columns and found.lines else None


@contextlib.contextmanager
def raw(fd: int) -> Iterator[None]:
    """Pass every key on; nothing to do if `fd` is no terminal."""
    if not os.isatty(fd):
        yield
        return
    saved = termios.tcgetattr(fd)
    tty.setraw(fd, termios.TCSANOW)
    try:
        yield
    finally:
        termios.tcsetattr(fd, termios.TCSADRAIN, saved)


def _copy(fd: int, stdin: int, stdout: int, resized: Callable[[int, int], None]) -> str:
    last: tuple[int, int] | None = None
    poll = select.poll()
    for source in (fd, stdin):
        poll.register(source, select.POLLIN)
    while True:
        now = size(stdin)
        if now is not None and now != last:
            last = now
            resized(*now)
        for ready, _ in poll.poll(TICK_MS if now is not None else None):
            try:
                data = os.read(ready, CHUNK)
            except OSError as error:  # a pty whose other end is gone says EIO
                if ready == fd:
                    return "the console was closed"
                raise CellvisorError(f"stdin: {error.strerror}") from None
            if ready == fd:
                if not data:
                    return "the console was closed"
                write(stdout, data)
                continue
            keys, escape, _ = data.partition(ESCAPE)
            try:
                write(fd, keys)
            except OSError:
                return "the console was closed"
            if escape:
                return "left"
            if not data:
                return "stdin ended"


def write(fd: int, data: bytes) -> None:
    """Write all of it. Raises OSError."""
    while data:
        data = data[os.write(fd, data):]
