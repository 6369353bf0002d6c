"""The VM's API over ZeroMQ: requests at `api.sock` (ROUTER), events at `events.sock` (PUB); HTTP beside it.

Nothing a client sends can do more than fail.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import Any

import zmq
import zmq.asyncio

from cellvisor.controlplane.desk import Desk
from cellvisor.controlplane.events import Event, EventLog
from cellvisor.controlplane.rundir import RunDir
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Internal, TryAgain, UsageError
from cellvisor.core.wire import places
from cellvisor.core.wire.control import parse_request, reply, request_id
from cellvisor.core.wire.messages import MAX_MESSAGE, pack, unpack

MAX_SERVING = 256
QUEUE = 1000
LINGER_MS = 500  # the answer to "shutdown" is still on its way when we close


class Api:
    """Owns the sockets; `http_socket` is `--api-socket`."""

    def __init__(self, context: zmq.asyncio.Context, rundir: RunDir, events: EventLog, desk: Desk,
                 http_socket: str | None = None) -> None:
        self._desk = desk
        self._http = None
        if http_socket is not None:
            from cellvisor.controlplane import http, httpsocket  # h11, for those who ask for it

            self._http = http.HttpApi(*httpsocket.listen(http_socket), desk)
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
        if self._http is not None:
            await self._http.close()
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in self._tasks:
            task.cancel()
        self._desk.close()
        self._socket.close()
        self._publisher.close()

    def release(self) -> None:
        """Let the HTTP socket go: who waits for our end watches it, so that is the last thing."""
        if self._http is not None:
            self._http.release()

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
            value = await self._desk.ask(parse_request(body))
        except CellvisorError as error:
            value = error
        await self._send(frames, reply(key, value))

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
