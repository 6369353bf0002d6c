"""HTTP on a Unix socket, as far as the API of a VM needs it: one request, one answer with a length.

Also speaks to Cloud Hypervisor itself, whose answers it takes as they are.
"""

from __future__ import annotations

import json
import os
import socket
import time
from collections.abc import Iterator, Sequence
from typing import Any

from cellvisor.core.errors import CellvisorError, NotFound, TryAgain, from_wire
from cellvisor.core.wire.control import VERBS

POLL_SECONDS = 0.3  # between looks for new events
MAX_HEAD = 64 << 10


class HttpLink:
    """A connection to `path`, made when it is needed and kept; `timeout` in seconds is for each answer."""

    def __init__(self, path: str, timeout: float) -> None:
        self._path, self._timeout = path, timeout
        self._sock: socket.socket | None = self._connect()

    def _connect(self) -> socket.socket:
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            sock.settimeout(self._timeout)
            sock.connect(self._path)
        except OSError as error:
            sock.close()
            raise NotFound(f"--api-socket {self._path}: {error.strerror or error}",
                           hint="is the VM running, and was it started with this socket?", code="no-vm") from None
        return sock

    def call(self, verb: str, args: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        """Ask for `verb`. Raises the CellvisorError that is answered, NotFound or TryAgain."""
        known = VERBS.get(verb)
        path = known.http_path if known is not None else f"vm.{verb}"
        as_query = known is not None and known.reads
        body = b"" if as_query or not args else json.dumps(args).encode()
        query = "&".join(f"{name}={_text(value)}" for name, value in args.items()) if as_query else ""
        head = (f"{'GET' if as_query else 'PUT'} /api/v1/{path}{'?' + query if query else ''} HTTP/1.1\r\n"
                "Host: localhost\r\nAccept: */*\r\nX-Cellvisor-Answer: full\r\n"
                f"X-Cellvisor-Request: {os.urandom(12).hex()}\r\n")
        data = head.encode() + (b"Content-Length: %d\r\n" % len(body) if body else b"") + b"\r\n" + body
        status, fields, answer = self._exchange(verb, data, fds)
        value = _load(answer)
        if status in (200, 204):
            return {} if value is None else value
        raise _error(status, fields, value)

    def _exchange(self, verb: str, data: bytes, fds: Sequence[int]) -> tuple[int, dict[str, str], bytes]:
        """Send and receive; once more if a connection that was kept has been closed. The request has an id."""
        kept = self._sock is not None
        try:
            if self._sock is None:
                self._sock = self._connect()
            sent = socket.send_fds(self._sock, [data], list(fds)) if fds else 0
            self._sock.sendall(data[sent:])
            return self._receive(self._sock)
        except TimeoutError:
            self.close()
            raise TryAgain(f"{verb}: no answer within {self._timeout:g} s", hint="see cellvisor events",
                           code="no-answer") from None
        except (EOFError, OSError):
            self.close()
            if not kept:
                raise NotFound(f"{verb}: {self._path} was closed before it answered", code="no-vm") from None
            return self._exchange(verb, data, fds)

    def _receive(self, sock: socket.socket) -> tuple[int, dict[str, str], bytes]:
        seen = b""
        until = time.monotonic() + self._timeout
        while b"\r\n\r\n" not in seen:
            seen += self._piece(sock, until)
            if len(seen) > MAX_HEAD:
                raise EOFError
        head, _, body = seen.partition(b"\r\n\r\n")
        first, *lines = head.decode("latin-1").split("\r\n")
        fields = {name.strip().lower(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
        length = int(fields.get("content-length", "0"))
        while len(body) < length:
            body += self._piece(sock, until)
        if fields.get("connection", "").lower() == "close":
            self.close()
        return int(first.split()[1]), fields, body[:length]

    @staticmethod
    def _piece(sock: socket.socket, until: float) -> bytes:
        sock.settimeout(max(0.001, until - time.monotonic()))
        data = sock.recv(1 << 16)
        if not data:
            raise EOFError
        return data

    def events(self, since: int, follow: bool) -> Iterator[dict[str, Any]]:
        """Yield events with a number above `since`, then new ones until the process ends."""
        while True:
            try:
                found = self.call("events", {"since": since})["events"]
            except NotFound:
                return
            for event in found:
                since = max(since, event["seq"])
                yield event
            if not follow:
                return
            time.sleep(POLL_SECONDS)

    def is_alive(self) -> bool:
        """Tell whether somebody listens."""
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:
            probe.settimeout(1.0)
            try:
                probe.connect(self._path)
            except TimeoutError:
                return True
            except OSError:
                return False
        return True

    def close(self) -> None:
        """Disconnect."""
        if self._sock is not None:
            self._sock.close()
            self._sock = None


def _text(value: object) -> str:
    from urllib.parse import quote

    return quote(str(value).lower() if isinstance(value, bool) else str(value), safe="")


def _load(body: bytes) -> Any:
    try:
        return json.loads(body) if body.strip() else None
    except ValueError:
        return body.decode(errors="replace")


def _error(status: int, fields: dict[str, str], value: object) -> CellvisorError:
    """Make the error of an answer: an array of sentences, from others also plain text."""
    chain = [str(entry) for entry in value] if isinstance(value, list) else [str(value or f"HTTP status {status}")]
    code = fields.get("x-cellvisor-error", "")
    body: dict[str, object] = {"status": status, "message": chain[0], "hint": "; ".join(chain[1:]), "code": code}
    error = from_wire(body)
    if not code:
        error.code = type(error).code
    return error
