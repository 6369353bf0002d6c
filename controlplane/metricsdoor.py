"""The door for Prometheus (`--metrics`): `GET /metrics` over HTTP at a Unix socket or at 127.0.0.1.

Anybody who can reach 127.0.0.1 may look; nothing can be changed here. A client that is slow or says too much is
let go, and what costs something (reading smaps) is done at most once a second however many ask.
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import time
from collections.abc import Awaitable, Callable

from cellvisor.controlplane import httpsocket
from cellvisor.core import log
from cellvisor.core.errors import UsageError
from cellvisor.core.wire.places import MAX_SOCKET_PATH

LOCAL = "tcp://127.0.0.1:"
MAX_CLIENTS = 32
PATIENCE = 10.0   # seconds for one request and its answer
FRESH = 1.0       # seconds for which an answer is good
TEXT = "text/plain; version=0.0.4; charset=utf-8"


class MetricsDoor:
    """Serves what `collect` returns. Listens at once; raises UsageError if it cannot."""

    def __init__(self, where: str, collect: Callable[[], Awaitable[str]]) -> None:
        self._collect = collect
        self._path: str | None = None
        if where.startswith(LOCAL):
            self._socket = httpsocket.listen_tcp("--metrics", "127.0.0.1", int(where.removeprefix(LOCAL)), MAX_CLIENTS,
                                                 "choose another port")
        else:
            self._socket, self._path = httpsocket.listen(where, "--metrics")
        self._clients = 0
        self._kept, self._until = "", 0.0
        self._collecting: asyncio.Task[str] | None = None
        self._serving = asyncio.get_running_loop().create_task(
            asyncio.start_server(self._client, sock=self._socket, limit=8192) if self._path is None else
            asyncio.start_unix_server(self._client, sock=self._socket, limit=8192))

    async def close(self) -> None:
        """Stop listening and remove the socket."""
        with contextlib.suppress(Exception):
            (await self._serving).close()
        if self._path is not None:
            with contextlib.suppress(OSError):
                os.unlink(self._path)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self._clients += 1
        try:
            if self._clients <= MAX_CLIENTS:
                async with asyncio.timeout(PATIENCE):
                    await self._answer(reader, writer)
        except (OSError, TimeoutError, asyncio.IncompleteReadError, asyncio.LimitOverrunError):
            pass  # gone, slow, or no HTTP
        finally:
            self._clients -= 1
            writer.transport.abort() if writer.transport.get_write_buffer_size() else writer.close()

    async def _answer(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        head = await reader.readuntil(b"\r\n\r\n")
        method, _, rest = head.split(b"\r\n", 1)[0].partition(b" ")
        path = rest.split(b" ")[0].split(b"?")[0]
        kind, body = TEXT, ""
        if method not in (b"GET", b"HEAD"):
            status, body = "405 Method Not Allowed", "only GET\n"
        elif path not in (b"/metrics", b"/"):
            status, body = "404 Not Found", "see /metrics\n"
        else:
            status, body = "200 OK", await self._text()
        data = body.encode()
        writer.write(f"HTTP/1.1 {status}\r\nContent-Type: {kind}\r\nContent-Length: {len(data)}\r\n"
                     "Connection: close\r\n\r\n".encode() + (b"" if method == b"HEAD" else data))
        await writer.drain()
        writer.write_eof()
        while writer.transport.get_write_buffer_size():
            await asyncio.sleep(0.02)

    async def _text(self) -> str:
        if time.monotonic() < self._until:
            return self._kept
        if self._collecting is None or self._collecting.done():
            self._collecting = asyncio.get_running_loop().create_task(self._fresh())
        return await asyncio.shield(self._collecting)

    async def _fresh(self) -> str:
        try:
            self._kept = await self._collect()
        except Exception:
            log.get("metrics").exception("collecting")
            raise OSError("no metrics now") from None
        self._until = time.monotonic() + FRESH
        return self._kept


def check_place(text: str) -> str:
    """Return an absolute path or `tcp://127.0.0.1:PORT`. Raises UsageError."""
    if "://" in text:
        port = text.removeprefix(LOCAL)
        if port == text or not port.isdecimal() or not 0 < int(port) < 65536:
            raise UsageError(f"--metrics {text[:80]!r}: only the local host may look, for nobody is asked for a key",
                             hint=f"write a path or {LOCAL}PORT")
        return text
    if not text or len(os.fsencode(os.path.abspath(text))) > MAX_SOCKET_PATH:
        raise UsageError(f"--metrics {text[:80]!r}: no path for a socket (1 to {MAX_SOCKET_PATH} bytes)",
                         hint=f"write a shorter path or {LOCAL}PORT")
    return os.path.abspath(text)
