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
RECORDED = frozenset({CoreVerb.CONFIGURE, CoreVerb.ATTACH, CoreVerb.PLUG, CoreVerb.UNPLUG, CoreVerb.DETACH,
                      CoreVerb.BOOT})
OURS = "__controlplane"  # under this name core keeps what the next controlplane needs of us


class CoreLink:
    """One DEALER. Closed once: when core died every pending request fails.

    With the steps in RECORDED goes our state, as `record()` returns it, which core keeps for a successor.
    """

    def __init__(self, context: zmq.asyncio.Context, rundir: RunDir) -> None:
        self._rundir = rundir
        self._identity = f"controlplane/{rundir.generation}/{rundir.token}"
        self.on_event: Callable[[str, dict[str, Any]], None] = lambda name, properties: None
        self._record: Callable[[], bytes] = bytes
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

    def serve(self, on_event: Callable[[str, dict[str, Any]], None], record: Callable[[], bytes]) -> None:
        """Say who takes core's events, and what our state is."""
        self.on_event, self._record = on_event, record

    async def request(self, verb: CoreVerb, timeout: float = TIMEOUT, /, **args: Any) -> dict[str, Any]:
        """Ask core. Raises what core answers, TryAgain after `timeout` s, Internal when it is gone."""
        if self._closed:
            raise Internal(f"{verb}: core is gone")
        if verb in RECORDED:
            args["blob"] = self._record()
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

    async def keep_state(self) -> None:
        """Have core keep our state as it is now, apart from any step."""
        await self.request(CoreVerb.STATE, blob=self._record())

    def deposit(self, device: str, name: str, fd: int) -> None:
        """Put a descriptor of the user into core's store for `device`. Raises OSError, Internal."""
        ok, _ = self._ask_fds({"deposit": f"{device}/{name}"}, fd)
        if not ok:
            raise Internal(f"core did not take descriptor {device}/{name}")

    def stored(self, device: str, name: str) -> int | None:
        """Return a stored descriptor, the caller's to close. Raises OSError, Internal."""
        return self._ask_fds({"get": f"{device}/{name}"})[1]

    def worker_pidfd(self, device: str) -> int | None:
        """Return the pidfd of the device's living worker, the caller's to close. Raises OSError, Internal."""
        return self._ask_fds({"pidfd": device})[1]

    def _ask_fds(self, body: dict[str, Any], *fds: int) -> tuple[bool, int | None]:
        with fdpass.connect(self._rundir.file(places.FDS)) as sock:
            sock.settimeout(TIMEOUT)
            fdpass.send(sock, {"identity": self._identity, **body}, fds)
            packet = fdpass.receive(sock)
        if packet is None:
            raise Internal("core hung up on the descriptor socket")
        return packet[0].get("ok") is True, packet[1][0] if packet[1] else None

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
            self.on_event(str(body["event"]), properties if isinstance(properties, dict) else {})
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
