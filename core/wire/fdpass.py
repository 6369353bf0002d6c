"""Descriptors over AF_UNIX: SOCK_SEQPACKET, one msgpack map per packet, descriptors by SCM_RIGHTS.

The fds socket of core answers {"identity", "take"} with {"names": [...]} and the descriptors in that order,
and {"identity", "deposit": name} with a descriptor attached by {"ok": true}.
"""

from __future__ import annotations

import array
import os
import socket
from typing import Any

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.messages import pack, unpack

MAX_FDS = 250  # SCM_MAX_FD is 253
MAX_PACKET = 1 << 17


def send(sock: socket.socket, body: dict[str, Any], fds: list[int] | tuple[int, ...] = ()) -> None:
    """Send one packet with `fds`. Raises OSError as sendmsg does, ValueError if the peer would refuse it."""
    data = pack(body)
    if len(fds) > MAX_FDS:
        raise ValueError(f"{len(fds)} descriptors in one packet, at most {MAX_FDS}")
    if len(data) > MAX_PACKET:
        raise ValueError(f"packet of {len(data)} bytes, at most {MAX_PACKET}")
    ancillary = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([data], ancillary, socket.MSG_NOSIGNAL)


def receive(sock: socket.socket) -> tuple[dict[str, Any], list[int]] | None:
    """Receive one packet; None when the peer is gone. The caller owns the descriptors.

    Raises UsageError for a packet that is no map or was cut (its descriptors are closed), BlockingIOError on
    a non-blocking socket with nothing to read.
    """
    try:
        data, ancillary, flags, _ = sock.recvmsg(
            MAX_PACKET, socket.CMSG_SPACE(MAX_FDS * 4), socket.MSG_CMSG_CLOEXEC)
    except ConnectionError:
        return None
    fds: list[int] = []
    for level, kind, payload in ancillary:
        if level == socket.SOL_SOCKET and kind == socket.SCM_RIGHTS:
            numbers = array.array("i")
            numbers.frombytes(payload[: len(payload) - len(payload) % 4])
            fds.extend(numbers)
    if not data and not fds:
        return None  # an empty packet looks the same: its sender hangs up on itself
    try:
        if flags & (socket.MSG_TRUNC | socket.MSG_CTRUNC):
            raise UsageError("packet was cut: too long or too many descriptors")
        return unpack(data), fds
    except BaseException:
        for fd in fds:
            os.close(fd)
        raise


def listen(path: str) -> socket.socket:
    """Make a listening SOCK_SEQPACKET socket at `path`, non-blocking. Raises OSError."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    try:
        sock.bind(path)
        sock.listen(64)
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
