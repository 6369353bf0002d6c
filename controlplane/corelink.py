"""The controlplane's side of core's control socket: requests with answers (CoreVerb) and pushed events."""

from __future__ import annotations

import asyncio
import contextlib
from collections.abc import Callable
from typing import Any

import zmq
import zmq.asyncio

from cellvisor.controlplane.rundir import RunDir
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Internal, TryAgain, UsageError, from_wire
from cellvisor.core.wire import fdpass, places
from cellvisor.core.wire.messages import MAX_MESSAGE, CoreVerb, pack, unpack

TIMEOUT = 10.0
LIMIT = 1000  # messages queued either way


class CoreLink:
    """One DEALER. Closed once: when core died every pending request fails."""

    def __init__(self, context: zmq.asyncio.Context, rundir: RunDir, token: str,
                 on_event: Callable[[str, dict[str, Any]], None]) -> None:
        self._rundir = rundir
        self._identity = f"controlplane/{token}"
        self._on_event = on_event
        self._pending: dict[int, asyncio.Future[dict[str, Any]]] = {}
        self._next = 0
        self._closed = False
        self._socket = context.socket(zmq.DEALER)
        for option, value in ((zmq.MAXMSGSIZE, MAX_MESSAGE), (zmq.LINGER, 0), (zmq.RECONNECT_IVL, 10),
                              (zmq.SNDHWM, LIMIT), (zmq.RCVHWM, LIMIT)):
            self._socket.setsockopt(option, value)
        self._socket.setsockopt(zmq.IDENTITY, self._identity.encode())
        self._socket.connect(f"ipc://{rundir.file(places.CONTROL)}")
        self._reader = asyncio.get_running_loop().create_task(self._read())

    async def request(self, verb: CoreVerb, timeout: float = TIMEOUT, /, **args: Any) -> dict[str, Any]:
        """Ask core. Raises what core answers, TryAgain after `timeout` s, Internal when it is gone."""
        if self._closed:
            raise Internal(f"{verb}: core is gone")
        self._next += 1
        number = self._next
        answer: asyncio.Future[dict[str, Any]] = asyncio.get_running_loop().create_future()
        self._pending[number] = answer
        try:
            await self._socket.send(pack({"id": number, "verb": str(verb), "args": args}), zmq.NOBLOCK)
            async with asyncio.timeout(timeout):
                return await answer
        except zmq.Again:
            raise TryAgain(f"{verb}: core does not read its messages", code="core-busy") from None
        except TimeoutError:
            raise TryAgain(f"{verb}: core did not answer within {timeout:g} s", code="core-busy") from None
        finally:
            self._pending.pop(number, None)

    def deposit(self, device: str, name: str, fd: int) -> None:
        """Put a descriptor of the user into core's store for `device`. Raises OSError, Internal."""
        with fdpass.connect(self._rundir.file(places.FDS)) as sock:
            sock.settimeout(TIMEOUT)
            fdpass.send(sock, {"identity": self._identity, "deposit": f"{device}/{name}"}, [fd])
            packet = fdpass.receive(sock)
        if packet is None or packet[0].get("ok") is not True:
            raise Internal(f"core did not take descriptor {device}/{name}")

    async def _read(self) -> None:
        while True:
            frames = await self._socket.recv_multipart()
            try:
                self._take(unpack(frames[-1]))
            except UsageError as error:
                log.get("core").warning("core sent something wrong: %s", error)
            except Exception:  # one bad event must not end the link
                log.get("core").exception("serving a message of core")

    def _take(self, body: dict[str, Any]) -> None:
        if "event" in body:
            properties = body.get("properties")
            self._on_event(str(body["event"]), properties if isinstance(properties, dict) else {})
            return
        number = body.get("id")
        answer = self._pending.get(number) if isinstance(number, int) else None
        if answer is None or answer.done():
            log.get("core").debug("late answer %r dropped", number)
            return
        error = body.get("error")
        if isinstance(error, dict):
            answer.set_exception(from_wire(error))
        else:
            ok = body.get("ok")
            answer.set_result(ok if isinstance(ok, dict) else {"value": ok})

    def fail(self, error: CellvisorError) -> None:
        """Let every pending and future request fail."""
        self._closed = True
        for answer in self._pending.values():
            if not answer.done():
                answer.set_exception(error)

    async def close(self) -> None:
        """Stop reading and close the socket."""
        self.fail(Internal("the VM is ending"))
        self._reader.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._reader
        self._socket.close()
