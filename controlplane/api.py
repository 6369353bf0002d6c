"""The VM's API over ZeroMQ: requests at `api.sock` (ROUTER), events at `events.sock` (PUB); HTTP beside it, and TCP.

Nothing a client sends can do more than fail.
"""

from __future__ import annotations

import asyncio
import contextlib
from typing import TYPE_CHECKING, Any

import zmq
import zmq.asyncio

from cellvisor.controlplane.desk import Desk
from cellvisor.controlplane.events import Event, EventLog
from cellvisor.controlplane.flags import RunFlags
from cellvisor.controlplane.rundir import RunDir
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Internal, TryAgain, UsageError
from cellvisor.core.wire import places
from cellvisor.core.wire.control import parse_request, reply, request_id
from cellvisor.core.wire.messages import MAX_MESSAGE, pack, unpack

if TYPE_CHECKING:
    from cellvisor.controlplane.remote import Gate

MAX_SERVING = 256
QUEUE = 1000
FAR_QUEUE = 100  # answers that wait for a client who does not read
LINGER_MS = 500  # the answer to "shutdown" is still on its way when we close


class Api:
    """Owns the sockets, those of `--api-socket` and `--api` too. Raises UsageError for a place that is taken."""

    def __init__(self, context: zmq.asyncio.Context, rundir: RunDir, events: EventLog, desk: Desk,
                 flags: RunFlags | None = None) -> None:
        self._desk = desk
        self._context = context
        self._gate: Gate | None = None
        self._doors: list[Door] = []
        self._publishers: list[zmq.Socket[bytes]] = []
        if flags is not None and flags.api is not None:
            try:
                self._open_remote(flags.api, rundir)
            except CellvisorError as error:
                if rundir.generation == 1:
                    raise
                log.get("api").error("no remote clients: %s", error)  # a VM that runs goes on
        self._http = None
        if flags is not None and flags.api_socket is not None:
            from cellvisor.controlplane import http, httpsocket  # h11, for those who ask for it

            self._http = http.HttpApi(*httpsocket.listen(flags.api_socket), desk)
        door, publisher = self._sockets()
        door.bind(f"ipc://{rundir.file(places.API)}")
        publisher.bind(f"ipc://{rundir.file(places.EVENTS)}")
        self._doors.append(Door(door, desk))
        events.add_sink(self._publish)

    def _sockets(self) -> tuple[zmq.asyncio.Socket, zmq.Socket[bytes]]:
        door = self._context.socket(zmq.ROUTER)
        publisher: zmq.Socket[bytes] = zmq.Context.shadow(self._context).socket(zmq.PUB)
        self._publishers.append(publisher)
        sockets: tuple[zmq.Socket[Any], ...] = (door, publisher)
        for socket in sockets:
            for option, value in ((zmq.MAXMSGSIZE, MAX_MESSAGE), (zmq.LINGER, LINGER_MS),
                                  (zmq.SNDHWM, QUEUE), (zmq.RCVHWM, QUEUE)):
                socket.setsockopt(option, value)
        door.setsockopt(zmq.ROUTER_MANDATORY, 1)
        return door, publisher

    def _open_remote(self, text: str, rundir: RunDir) -> None:
        from cellvisor.controlplane.remote import Gate  # for those who ask for it

        gate = self._gate = Gate(self._context, text)
        door, publisher = self._sockets()
        door.setsockopt(zmq.SNDHWM, FAR_QUEUE)
        try:
            gate.bind(door, gate.remote.port, rundir.file(places.TCP))
            gate.bind(publisher, gate.remote.events, rundir.file(places.TCP_EVENTS))
        except UsageError:
            door.close()
            self._publishers.pop().close()
            raise
        self._doors.append(Door(door, self._desk))

    async def close(self) -> None:
        """Answer what is being served, as far as it is done, and close."""
        if self._http is not None:
            await self._http.close()
        for door in self._doors:
            await door.close()
        self._desk.close()
        for publisher in self._publishers:
            publisher.close()
        if self._gate is not None:
            await self._gate.close()

    def release(self) -> None:
        """Let the HTTP socket go: who waits for our end watches it, so that is the last thing."""
        if self._http is not None:
            self._http.release()

    def _publish(self, event: Event) -> None:
        for publisher in self._publishers:
            with contextlib.suppress(zmq.ZMQError):  # closed already, at the very end
                publisher.send_multipart([event.name.encode(), pack(event.as_wire())], zmq.NOBLOCK)


class Door:
    """Serves what comes at one ROUTER socket; who fills one door leaves the others free."""

    def __init__(self, socket: zmq.asyncio.Socket, desk: Desk) -> None:
        self._socket, self._desk = socket, desk
        self._tasks: set[asyncio.Task[None]] = set()
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def close(self) -> None:
        """Answer what is being served, as far as it is done, and close."""
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        if self._tasks:
            await asyncio.wait(self._tasks, timeout=1.0)
        for task in self._tasks:
            task.cancel()
        self._socket.close()

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
