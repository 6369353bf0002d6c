"""HTTP on `--api-socket`: h11 over our own accept loop, so that descriptors sent along reach their request.

No client can hold up another: each has a task of its own, a request must arrive within a time, replies that are not
read are given up, and when all places are taken the connection that has been quiet longest makes room.

    waiting --first byte--> reading --request complete--> serving --reply sent--> waiting   (keep-alive)
       |                       |                             |
       +-- idle, evicted ------+-- too slow, malformed ------+-- `Connection: close` --> closed
"""

from __future__ import annotations

import asyncio
import collections
import contextlib
import functools
import os
import socket
import time

import h11

from cellvisor.controlplane import routes
from cellvisor.controlplane.desk import Desk
from cellvisor.controlplane.httpsocket import Wire
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, TryAgain, UsageError

MAX_CONNECTIONS = 64
IDLE_SECONDS = 300.0
REQUEST_SECONDS = 30.0  # from a request's first byte to its last
REPLY_SECONDS = 30.0
LINGER_SECONDS = 1.0    # to read on after a refusal, so that the client gets to read it
MAX_HEAD = 16 << 10
EMFILE_PAUSE = 0.5


class HttpApi:
    """Serves `listener`; `path` is its socket file, removed at the end, None if it is not ours."""

    def __init__(self, listener: socket.socket, path: str | None, desk: Desk) -> None:
        self._listener, self._path, self._desk = listener, path, desk
        self._loop = asyncio.get_running_loop()
        self._open: dict[asyncio.Task[None], Client] = {}
        self._turned_away: collections.deque[socket.socket] = collections.deque()
        self._is_closed = False
        self._loop.add_reader(listener.fileno(), self._accept)

    def _accept(self) -> None:
        while True:
            try:
                sock, _ = self._listener.accept()
            except BlockingIOError:
                return
            except OSError as error:  # out of descriptors: try again when some may be free
                log.get("http").warning("accept: %s", error)
                self._loop.remove_reader(self._listener.fileno())
                self._loop.call_later(EMFILE_PAUSE, self._listen_again)
                return
            if len(self._open) >= MAX_CONNECTIONS and not self._evict():
                self._turn_away(sock)
                continue
            client = Client(Wire(sock), self._desk)
            task = self._loop.create_task(client.serve())
            self._open[task] = client
            task.add_done_callback(functools.partial(self._ended, client))

    def _ended(self, client: Client, task: asyncio.Task[None]) -> None:
        self._open.pop(task, None)
        client.close()  # here, not in the task: one that is cancelled before its first step never ran

    def _listen_again(self) -> None:
        if not self._is_closed:
            self._loop.add_reader(self._listener.fileno(), self._accept)

    def _evict(self) -> bool:
        """Close the connection that has been quiet longest; False if all are being served."""
        quiet = [(client.since, task) for task, client in self._open.items() if not client.is_serving]
        if not quiet:
            return False
        _, task = min(quiet, key=lambda entry: entry[0])
        del self._open[task]
        task.cancel()
        return True

    def _turn_away(self, sock: socket.socket) -> None:
        """Tell a client that no place is free, without waiting for it; its request may still be under way."""
        reply = routes.refusal(TryAgain(f"{MAX_CONNECTIONS} requests are being served", code="busy"))
        headers = (f"{name}: {value}" for name, value in reply.headers(close=True))
        head = "\r\n".join([f"HTTP/1.1 {reply.status} ", *headers, "", ""])
        sock.setblocking(False)
        with contextlib.suppress(OSError):
            sock.send(head.encode() + reply.body, socket.MSG_NOSIGNAL)
            sock.shutdown(socket.SHUT_WR)
        self._turned_away.append(sock)
        if len(self._turned_away) > MAX_CONNECTIONS:
            self._turned_away.popleft().close()
        self._loop.call_later(LINGER_SECONDS, sock.close)

    def release(self) -> None:
        """Close and remove the listening socket."""
        if self._path is not None and self._listener.fileno() >= 0:
            with contextlib.suppress(OSError):
                os.unlink(self._path)
        self._listener.close()

    async def close(self) -> None:
        """Answer what is being served, as far as it is done, and nobody who comes now."""
        self._is_closed = True
        self._loop.remove_reader(self._listener.fileno())
        tasks = list(self._open)
        serving = [task for task, client in self._open.items() if client.is_serving]
        if serving:
            await asyncio.wait(serving, timeout=1.0)
        for task in tasks:
            task.cancel()
        for sock in self._turned_away:
            sock.close()
        if tasks:
            await asyncio.wait(tasks, timeout=1.0)


class Client:
    """One connection. `since` is when something last happened on it, in monotonic seconds."""

    def __init__(self, wire: Wire, desk: Desk) -> None:
        self._wire, self._desk = wire, desk
        self._http = h11.Connection(h11.SERVER, max_incomplete_event_size=MAX_HEAD)
        self.since = time.monotonic()
        self.is_serving = False

    async def serve(self) -> None:
        """Serve requests one after the other until the client goes or does something wrong."""
        try:
            while await self._one():
                self._http.start_next_cycle()
        except (TimeoutError, OSError) as error:
            log.get("http").info("connection closed: %s", error or "too slow")
        except Exception:  # a mistake of ours costs one connection
            log.get("http").exception("serving a connection")

    def close(self) -> None:
        """Close the connection."""
        self._wire.close()

    async def _one(self) -> bool:
        """Serve one request; False when the connection is to be closed."""
        try:
            head, body = await self._read()
        except (h11.RemoteProtocolError, UsageError) as error:
            refused = error if isinstance(error, UsageError) else UsageError(f"not HTTP: {error}", code="bad-http")
            await self._refuse(refused)
            return False
        if head is None:
            return False
        self.is_serving = True
        await self._send(await self._answer(head, body), without_body=head.method == b"HEAD")
        self._wire.drop_fds()
        self.is_serving, self.since = False, time.monotonic()
        return self._http.our_state is h11.DONE and self._http.their_state is h11.DONE

    async def _read(self) -> tuple[h11.Request | None, bytes]:
        """Read a whole request; (None, b"") when there is no more. Raises h11.RemoteProtocolError, UsageError."""
        head: h11.Request | None = None
        parts: list[bytes] = []
        size = 0
        begun = False
        async with asyncio.timeout(IDLE_SECONDS) as limit:
            while True:
                event = self._http.next_event()
                if event is h11.NEED_DATA:
                    if not begun and (head is not None or self._http.trailing_data[0]):
                        begun = True
                        limit.reschedule(asyncio.get_running_loop().time() + REQUEST_SECONDS)
                    if self._http.they_are_waiting_for_100_continue:
                        await self._wire.send(self._http.send(h11.InformationalResponse(status_code=100, headers=[]))
                                              or b"")
                    self._http.receive_data(await self._wire.receive())
                    self.since = time.monotonic()
                elif isinstance(event, h11.Request):
                    head = event
                    _check_length(head)
                elif isinstance(event, h11.Data):
                    parts.append(bytes(event.data))
                    size += len(event.data)
                    if size > routes.MAX_BODY:
                        raise _too_long(size)
                elif isinstance(event, h11.EndOfMessage):
                    return head, b"".join(parts)
                else:  # ConnectionClosed, or PAUSED after an upgrade that nobody gets
                    return None, b""

    async def _answer(self, head: h11.Request, body: bytes) -> routes.Reply:
        key = next((value.decode("latin-1") for name, value in head.headers if name == routes.REQUEST_ID), None)
        try:
            target, method = head.target.decode("latin-1"), head.method.decode("ascii")
            verb, request = routes.parse(key, method, target, body, tuple(self._wire.fds))
        except CellvisorError as error:
            return routes.refusal(error)
        full = any(name == routes.FULL for name, _ in head.headers)
        return routes.answer(verb, await self._desk.ask(request, remember=key is not None), full=full)

    async def _send(self, reply: routes.Reply, *, close: bool = False, without_body: bool = False) -> None:
        response = h11.Response(status_code=reply.status, headers=reply.headers(close=close))
        data = self._http.send(response) or b""
        if reply.body and not without_body:
            data += self._http.send(h11.Data(data=reply.body)) or b""
        data += self._http.send(h11.EndOfMessage()) or b""
        async with asyncio.timeout(REPLY_SECONDS):
            await self._wire.send(data)

    async def _refuse(self, error: CellvisorError) -> None:
        """Say what was wrong and read on for a moment: a client that is still sending must not be cut off."""
        if self._http.our_state not in (h11.IDLE, h11.SEND_RESPONSE):
            return
        await self._send(routes.refusal(error), close=True)
        self._wire.finish()
        with contextlib.suppress(TimeoutError, UsageError):
            async with asyncio.timeout(LINGER_SECONDS):
                while await self._wire.receive():
                    self._wire.drop_fds()


def _check_length(head: h11.Request) -> None:
    for name, value in head.headers:
        if name == b"content-length" and int(value) > routes.MAX_BODY:
            raise _too_long(int(value))


def _too_long(size: int) -> UsageError:
    return UsageError(f"a body of {size} bytes, at most {routes.MAX_BODY}", code="too-long")
