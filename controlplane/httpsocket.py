"""Stream sockets: where to listen (`--api-socket`, `--metrics`, `--api`); a connection whose reads bring descriptors.

recvmsg on a non-blocking socket: asyncio's own streams would throw the descriptors of SCM_RIGHTS away.
"""

from __future__ import annotations

import array
import asyncio
import contextlib
import os
import socket
import stat

from cellvisor.controlplane.waiting import settle, wait_readable
from cellvisor.core.errors import Conflict, UsageError

BACKLOG = 128
CHUNK = 1 << 16
MAX_FDS = 64  # of one request


def listen(where: str, flag: str = "--api-socket") -> tuple[socket.socket, str | None]:
    """Listen at a path, mode 0600, or on inherited descriptor `fd=N`; returns the path that is ours to remove.

    The socket file of a process that is gone is replaced. Raises UsageError or Conflict.
    """
    if where.startswith("fd="):
        return _inherited(int(where[3:])), None
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        os.fchmod(sock.fileno(), 0o600)  # bind gives the file this mode
        _make_room(where, flag)
        _appear(sock, where)
        sock.setblocking(False)
    except OSError as error:
        sock.close()
        raise UsageError(f"{flag} {where}: {error.strerror}") from None
    except BaseException:
        sock.close()
        raise
    return sock, where


def listen_tcp(flag: str, host: str, port: int, backlog: int, hint: str) -> socket.socket:
    """Listen at an address, [IPv6] in brackets. Raises UsageError with `hint` for one that is taken or not ours."""
    sock = socket.socket(socket.AF_INET6 if host.startswith("[") else socket.AF_INET, socket.SOCK_STREAM)
    try:
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        sock.bind((host.strip("[]"), port))
        sock.listen(backlog)
    except OSError as error:
        sock.close()
        raise UsageError(f"{flag} tcp://{host}:{port}: {error.strerror}", hint=hint) from None
    sock.setblocking(False)
    return sock


def _appear(sock: socket.socket, path: str) -> None:
    """Listen at `path`, which is not there before it answers. Raises OSError."""
    folder = os.open(os.path.dirname(path), os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    name = f".{os.urandom(6).hex()}"
    try:
        sock.bind(f"/proc/self/fd/{folder}/{name}")
        try:
            sock.listen(BACKLOG)
            os.rename(name, os.path.basename(path), src_dir_fd=folder, dst_dir_fd=folder)
        except OSError:
            os.unlink(name, dir_fd=folder)
            raise
    finally:
        os.close(folder)


def _inherited(fd: int) -> socket.socket:
    try:
        sock = socket.socket(fileno=fd)
    except OSError as error:
        raise UsageError(f"--api-socket fd={fd}: {error.strerror}") from None
    listening = sock.family == socket.AF_UNIX and sock.getsockopt(socket.SOL_SOCKET, socket.SO_ACCEPTCONN)
    if not listening or sock.type != socket.SOCK_STREAM:
        sock.detach()
        raise UsageError(f"--api-socket fd={fd}: not a listening Unix stream socket")
    os.set_inheritable(fd, False)
    sock.setblocking(False)
    return sock


def _make_room(path: str, flag: str) -> None:
    """Remove a socket file that nobody listens at."""
    try:
        if not stat.S_ISSOCK(os.stat(path, follow_symlinks=False).st_mode):
            raise Conflict(f"{flag} {path}: exists and is not a socket", hint="choose another path")
    except FileNotFoundError:
        return
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
        probe.setblocking(False)
        try:
            probe.connect(path)
        except ConnectionRefusedError:
            with contextlib.suppress(FileNotFoundError):
                os.unlink(path)
            return
        except BlockingIOError:
            pass  # its backlog is full: somebody is there
    raise Conflict(f"{flag} {path}: another process listens there", hint="choose another path")


class Wire:
    """One connection. `fds` are descriptors that came and that nobody took."""

    def __init__(self, sock: socket.socket) -> None:
        self._sock = sock
        sock.setblocking(False)
        self.fds: list[int] = []

    async def receive(self) -> bytes:
        """Return what came, b"" at the end. Raises OSError, UsageError for too many descriptors."""
        while True:
            try:
                data, ancillary, flags, _ = self._sock.recvmsg(
                    CHUNK, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
                break
            except BlockingIOError:
                await wait_readable(self._sock.fileno())
        for level, kind, payload in ancillary:
            if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
                numbers = array.array("i")
                numbers.frombytes(payload[: len(payload) - len(payload) % 4])
                self.fds.extend(numbers)
        if flags & socket.MSG_CTRUNC or len(self.fds) > MAX_FDS:
            raise UsageError(f"more than {MAX_FDS} descriptors with one request")
        return data

    async def send(self, data: bytes) -> None:
        """Send everything. Raises OSError."""
        view = memoryview(data)
        while view:
            try:
                view = view[self._sock.send(view, socket.MSG_NOSIGNAL):]
            except BlockingIOError:
                await self._writable()

    async def _writable(self) -> None:
        loop = asyncio.get_running_loop()
        writable: asyncio.Future[None] = loop.create_future()
        loop.add_writer(self._sock.fileno(), settle, writable)
        try:
            await writable
        finally:
            loop.remove_writer(self._sock.fileno())

    def finish(self) -> None:
        """Say that nothing more will be sent."""
        with contextlib.suppress(OSError):
            self._sock.shutdown(socket.SHUT_WR)

    def drop_fds(self) -> None:
        """Close the descriptors that nobody took."""
        while self.fds:
            os.close(self.fds.pop())

    def close(self) -> None:
        """Close the connection."""
        self.drop_fds()
        self._sock.close()
