"""Cloud Hypervisor's `ch-remote`, as far as a server notices: the bytes it sends, and how it reads the reply.

It reads 256 bytes at a time, each piece must be UTF-8 by itself; it looks for the letters `Content-Length: ` and for
nothing but a number between `HTTP/1.1 ` and the end of the line; without a length it stops after the head.
"""

from __future__ import annotations

import array
import socket


class Failed(Exception):
    """The server answered something else than 200 or 204."""

    def __init__(self, status: int, body: str | None) -> None:
        super().__init__(status, body)
        self.status, self.body = status, body


def connect(path: str) -> socket.socket:
    """Connect as it does: once per command."""
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.settimeout(30)
        sock.connect(path)
    except BaseException:
        sock.close()
        raise
    return sock


def send(sock: socket.socket, method: str, command: str, body: str | None = None, fds: tuple[int, ...] = ()) -> None:
    """Send a request in its four writes; descriptors go with the first."""
    head = f"{method} /api/v1/{command} HTTP/1.1\r\nHost: localhost\r\nAccept: */*\r\n".encode()
    rights = [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))] if fds else []
    sock.sendmsg([head], rights)
    if body is not None:
        sock.sendall(f"Content-Length: {len(body.encode())}\r\n".encode())
    sock.sendall(b"\r\n")
    if body is not None:
        sock.sendall(body.encode())


def receive(sock: socket.socket) -> tuple[int, str | None]:
    """Return status and body, None without a length."""
    seen = ""
    while True:
        piece = sock.recv(256)
        seen += piece.decode()
        head, end, rest = seen.partition("\r\n\r\n")
        if end:
            _, found, after = head.partition("Content-Length: ")
            length = int(after.split("\r")[0]) if found else None
            if length is None or len(rest) >= length:
                break
        if not piece:
            raise EOFError(seen)
    status = int(seen[seen.index("HTTP/1.1") + len("HTTP/1.1 "): seen.index("\r")].strip())
    return status, rest if length is not None else None


def call(path: str, method: str, command: str, body: str | None = None, fds: tuple[int, ...] = ()) -> str | None:
    """Do one command. Raises Failed."""
    with connect(path) as sock:
        send(sock, method, command, body, fds)
        status, answer = receive(sock)
    if status not in (200, 204):
        raise Failed(status, answer)
    return answer
