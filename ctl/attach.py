"""This terminal and a console's pty or socket: every byte both ways, until the escape key."""

from __future__ import annotations

import contextlib
import os
import select
import socket
import termios
import tty
from collections.abc import Iterator

from cellvisor.core.errors import CellvisorError, NotFound

ESCAPE = b"\x1d"  # Ctrl-]
CHUNK = 1 << 16


def attach(kind: str, path: str, stdin: int = 0, stdout: int = 1) -> str:
    """Copy until Ctrl-], the end of stdin, or the console's end; returns which one it was, as a sentence."""
    try:
        fd = _open(kind, path)
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}", hint="is somebody else attached?") from None
    try:
        with _raw(stdin):
            return _copy(fd, stdin, stdout)
    finally:
        os.close(fd)


def _open(kind: str, path: str) -> int:
    if kind == "pty":
        return os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_CLOEXEC)
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
        sock.connect(path)
        return sock.detach()


@contextlib.contextmanager
def _raw(fd: int) -> Iterator[None]:
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


def _copy(fd: int, stdin: int, stdout: int) -> str:
    poll = select.poll()
    for source in (fd, stdin):
        poll.register(source, select.POLLIN)
    while True:
        for ready, _ in poll.poll():
            try:
                data = os.read(ready, CHUNK)
            except OSError as error:  # a pty whose other end is gone says EIO
                if ready == fd:
                    return "the console was closed"
                raise CellvisorError(f"stdin: {error.strerror}") from None
            if ready == fd:
                if not data:
                    return "the console was closed"
                _write(stdout, data)
                continue
            keys, escape, _ = data.partition(ESCAPE)
            try:
                _write(fd, keys)
            except OSError:
                return "the console was closed"
            if escape:
                return "left"
            if not data:
                return "stdin ended"


def _write(fd: int, data: bytes) -> None:
    while data:
        data = data[os.write(fd, data):]
