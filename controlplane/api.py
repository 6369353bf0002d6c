"""The VM's API over ZeroMQ: requests at `api.sock` (ROUTER), events at `events.sock` (PUB).

A request id is answered once: while it is being served and for a while after, the same request gets the same
answer, and another request under that id is refused. Nothing a client sends can do more than fail.
"""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Awaitable, Callable
from typing import Any

import zmq
import zmq.asyncio

from cellvisor.controlplane.events import Event, EventLog
from cellvisor.controlplane.rundir import RunDir
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Conflict, Internal, TryAgain, UsageError
from cellvisor.core.wire import places
from cellvisor.core.wire.control import Request, parse_request, reply, request_id
from cellvisor.core.wire.messages import MAX_MESSAGE, pack, unpack

MAX_SERVING = 256
REMEMBERED = 1024
QUEUE = 1000
LINGER_MS = 500  # the answer to "shutdown" is still on its way when we close

Serve = Callable[[Request], Awaitable[Any]]


class Api:
    """Owns both sockets."""

    def __init__(self, context: zmq.asyncio.Context, rundir: RunDir, events: EventLog, serve: Serve) -> None:
        self._serve = serve
        self._answers: dict[str, tuple[Request, asyncio.Task[Any]]] = {}  # oldest first
        self._tasks: set[asyncio.Task[None]] = set()
        self._socket = context.socket(zmq.ROUTER)
        self._publisher: zmq.Socket[bytes] = zmq.Context.shadow(context).socket(zmq.PUB)
        sockets: tuple[zmq.Socket[Any], ...] = (self._socket, self._publisher)
        for socket in sockets:
            for option, value in ((zmq.MAXMSGSIZE, MAX_MESSAGE), (zmq.LINGER, LINGER_MS),
                                  (zmq.SNDHWM, QUEUE), (zmq.RCVHWM, QUEUE)):
                socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.ROUTER_MANDATORY, 1)
        self._socket.bind(f"ipc://{rundir.file(places.API)}")
        self._publisher.bind(f"ipc://{rundir.file(places.EVENTS)}")
        events.add_sink(self._publish)
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def close(self) -> None:
        """Answer what is being served, as far as it is done, and close."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in [*self._tasks, *(task for _, task in self._answers.values())]:
            task.cancel()
        self._socket.close()
        self._publisher.close()

    def _publish(self, event: Event) -> None:
        with contextlib.suppress(zmq.ZMQError):  # closed already, at the very end
            self._publisher.send_multipart([event.name.encode(), pack(event.as_wire())], zmq.NOBLOCK)

    async def _read(self) -> None:
        while True:
            try:
                frames = await self._socket.recv_multipart()
            except zmq.ZMQError as error:
                log.get("api").warning("receiving: %s", error)
                await asyncio.sleep(0.1)
                continue
            # A DEALER sends [identity, body], a REQ socket [identity, "", body].
            if len(frames) not in (2, 3) or (len(frames) == 3 and frames[1]):
                log.get("api").info("message of %d frames dropped", len(frames))
                continue
            if len(self._tasks) >= MAX_SERVING:
                await self._send(frames, reply(_id_of(frames[-1]), TryAgain(
                    f"{MAX_SERVING} requests are being served", code="busy")))
                continue
            task = asyncio.get_running_loop().create_task(self._answer(frames))
            self._tasks.add(task)
            task.add_done_callback(self._tasks.discard)

    async def _answer(self, frames: list[bytes]) -> None:
        key: str | None = None
        try:
            body = unpack(frames[-1])
            key = request_id(body)
            request = parse_request(body)
            value = await asyncio.shield(self._once(request))
        except CellvisorError as error:
            value = error
        await self._send(frames, reply(key, value))

    def _once(self, request: Request) -> asyncio.Task[Any]:
        """Return the task that serves this request id, started now or earlier."""
        known = self._answers.get(request.id)
        if known is not None:
            if known[0] != request:
                raise Conflict(f"id {request.id!r} was used for another request", hint="use a new one")
            return known[1]
        task = asyncio.get_running_loop().create_task(self._guarded(request))
        self._answers[request.id] = (request, task)
        if len(self._answers) > REMEMBERED:
            for key, (_, old) in self._answers.items():
                if old.done():
                    del self._answers[key]
                    break
        return task

    async def _guarded(self, request: Request) -> Any:
        """Serve; errors are values, so that they can be given out again."""
        try:
            return await self._serve(request)
        except CellvisorError as error:
            return error
        except Exception as error:
            log.get("api").exception("serving %s", request.verb)
            return Internal(f"{request.verb}: {type(error).__name__}: {error}")

    async def _send(self, frames: list[bytes], body: dict[str, Any]) -> None:
        try:
            data = pack(body)
        except (ValueError, TypeError, OverflowError) as error:
            log.get("api").error("an answer cannot be packed: %s", error)
            data = pack(reply(body.get("id"), Internal(f"the answer cannot be packed: {error}")))
        try:
            await self._socket.send_multipart([*frames[:-1], data], zmq.NOBLOCK)
        except zmq.ZMQError as error:  # the client is gone or does not read
            log.get("api").info("answer dropped: %s", error)


def _id_of(data: bytes) -> str | None:
    try:
        return request_id(unpack(data))
    except UsageError:
        return None
