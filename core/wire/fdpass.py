"""Descriptors over AF_UNIX: SOCK_SEQPACKET, one msgpack map per packet, descriptors by SCM_RIGHTS.

The fds socket of core answers {"identity", "take"} with {"names": [...]} and the descriptors in that order,
and {"identity", "deposit": name} with a descriptor attached by {"ok": true}.
"""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Callable
from typing import Any

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.messages import pack, unpack

SCM_MAX_FD = 253  # the kernel's
MAX_FDS = 250
MAX_PACKET = 1 << 17
Discard = Callable[[list[int]], None]


def send(sock: socket.socket, body: dict[str, Any], fds: list[int] | tuple[int, ...] = ()) -> None:
    """Send one packet with `fds`. Raises OSError as sendmsg does, ValueError if the peer would refuse it."""
    data = pack(body)
    if len(fds) > MAX_FDS:
        raise ValueError(f"{len(fds)} descriptors in one packet, at most {MAX_FDS}")
    if len(data) > MAX_PACKET:
        raise ValueError(f"packet of {len(data)} bytes, at most {MAX_PACKET}")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket, discard: Discard | None = None) -> tuple[dict[str, Any], list[int]] | None:
    """Receive one packet; None when the peer is gone. The caller owns the descriptors.

    Raises UsageError for a packet that is no map or was cut (its descriptors go to `discard`, which closes them),
    BlockingIOError on a non-blocking socket with nothing to read.
    """
    try:
        data, fds, flags = read(sock, MAX_PACKET)
    except ConnectionError:
        return None
    if not data and not fds:
        return None  # an empty packet looks the same: its sender hangs up on itself
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC) or len(fds) > MAX_FDS:
            raise UsageError("packet was cut: too long or too many descriptors")
        return unpack(data), fds
    except BaseException:
        (discard or _close)(fds)
        raise


def read(sock: socket.socket, size: int) -> tuple[bytes, list[int], int]:
    """Receive up to `size` bytes, every descriptor that came with them, and flags. Raises OSError.

    There is always room for all descriptors: those without one would be closed by the kernel, on our time.
    """
    data, ancillary, flags, _ = sock.recvmsg(size, socket.CMSG_SPACE(SCM_MAX_FD * 4), socket.MSG_CMSG_CLOEXEC)
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % 4])
            fds.extend(numbers)
    return data, fds, flags


def _close(fds: list[int]) -> None:
    for fd in fds:
        os.close(fd)


def listen(path: str) -> socket.socket:
    """Make a listening SOCK_SEQPACKET socket at `path`, non-blocking. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.bind(path)
        sock.listen(256)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock


def connect(path: str) -> socket.socket:
    """Connect to `path`, blocking. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock
