"""The controlplane's side of a nursery's socket: the catalog, new workers, and how they ended."""

from __future__ import annotations

import asyncio
import contextlib
import os
import socket
from collections.abc import Callable, Sequence
from typing import Any

from cellvisor.controlplane.inventory import Catalog, DeviceType
from cellvisor.controlplane.waiting import wait_readable
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, Internal, TryAgain, UsageError, from_wire
from cellvisor.core.wire import fdpass
from cellvisor.core.wire.messages import FromNursery, ToNursery, unpack

TIMEOUT = 20.0
SPAWN_TIMEOUT = 5.0  # a fork takes milliseconds
WARDS_AT_ONCE = 200

Exited = Callable[[str, int, int, int | None], None]


class NurseryLink:
    """One SEQPACKET connection. `on_exited(device, generation, pid, status)` reports ends of workers.

    `status` is as Popen has it (negative: the signal), None when the nursery does not know.
    """

    def __init__(self, path: str, on_exited: Exited, on_lost: Callable[[], None]) -> None:
        self._sock = sock = fdpass.connect(path)
        self._on_exited, self._on_lost = on_exited, on_lost
        self._waiting: dict[tuple[str, int], asyncio.Future[tuple[int, int]]] = {}
        self._catalog: asyncio.Future[Catalog] | None = None
        self._children: asyncio.Future[dict[tuple[str, int], tuple[int, int]]] | None = None
        self.pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        self._loop = asyncio.get_running_loop()
        sock.setblocking(False)
        self._loop.add_reader(sock.fileno(), self._readable)

    async def catalog(self) -> Catalog:
        """Ask for the device types."""
        self._catalog = self._loop.create_future()
        self._send({"k": ToNursery.CATALOG})
        async with asyncio.timeout(TIMEOUT):
            return await self._catalog

    async def children(self) -> dict[tuple[str, int], tuple[int, int]]:
        """Ask which workers it has: (device, generation) -> pid and pidfd, ours to close."""
        self._children = self._loop.create_future()
        self._send({"k": ToNursery.CHILDREN})
        async with asyncio.timeout(TIMEOUT):
            return await self._children

    def ward(self, workers: list[tuple[int, int]]) -> None:
        """Have it kill these too (pid, pidfd) when core is gone: the workers of a nursery that died."""
        for start in range(0, len(workers), WARDS_AT_ONCE):
            part = workers[start:start + WARDS_AT_ONCE]
            self._send({"k": ToNursery.WARD, "pids": [pid for pid, _ in part]}, [pidfd for _, pidfd in part])

    async def spawn(self, device: str, generation: int, **rest: Any) -> tuple[int, int]:
        """Fork a worker; returns its pid and pidfd, ours to close. Raises what the nursery says."""
        answer: asyncio.Future[tuple[int, int]] = self._loop.create_future()
        self._waiting[device, generation] = answer
        try:
            self._send({"k": ToNursery.SPAWN, "device": device, "generation": generation, **rest})
            async with asyncio.timeout(SPAWN_TIMEOUT):
                return await answer
        except TimeoutError:
            raise TryAgain(f"{device}: the nursery did not fork within {SPAWN_TIMEOUT:g} s") from None
        finally:
            self._waiting.pop((device, generation), None)

    async def try_out(self, device: str, kind: str, options: dict[str, Any], fds: Sequence[int],
                      timeout: float) -> str | None:
        """Have a process find out whether a device can be made; returns why not, "" if it can, None if it said nothing.

        `fds` are what the device would find in core's store as fd0, fd1, ... Raises Internal if it has not ended after
        `timeout` seconds.
        """
        source, sink = os.pipe2(os.O_CLOEXEC | os.O_NONBLOCK)
        try:
            try:
                self._send({"k": ToNursery.TRY, "device": device, "type": kind, "options": options}, [sink, *fds])
            finally:
                os.close(sink)
            said = b""
            async with asyncio.timeout(timeout):
                while part := await _read(source):
                    said += part
        except TimeoutError:
            raise Internal(f"{device}: its process was not ready within {timeout:g} s") from None
        finally:
            os.close(source)
        return str(unpack(said).get("reason")) if said else None

    def quit(self, *, spare: bool = False) -> None:
        """Ask the nursery to end, with whatever workers are left; `spare` those that others forked."""
        with contextlib.suppress(OSError, CellvisorError):
            self._send({"k": ToNursery.QUIT, "spare": spare})

    def close(self) -> None:
        """Stop listening to it."""
        if self._sock.fileno() >= 0:
            self._loop.remove_reader(self._sock.fileno())
            self._sock.close()
        self._fail(Internal("the nursery is gone"))

    def _send(self, body: dict[str, Any], fds: list[int] | None = None) -> None:
        try:
            fdpass.send(self._sock, body, fds or [])
        except BlockingIOError:
            raise TryAgain("the nursery does not read its messages") from None
        except OSError as error:
            raise Internal(f"the nursery is gone: {error.strerror}") from None

    def _readable(self) -> None:
        while True:
            try:
                packet = fdpass.receive(self._sock)
            except BlockingIOError:
                return
            except (UsageError, OSError) as error:
                log.get("nursery").warning("nursery: %s", error)
                packet = None
            if packet is None:
                self.close()
                self._on_lost()
                return
            body, fds = packet
            try:
                self._take(body, fds)
            except Exception:  # one bad report must not end the link
                log.get("nursery").exception("serving %r", body.get("k"))
            for fd in fds:
                os.close(fd)

    def _take(self, body: dict[str, Any], fds: list[int]) -> None:
        kind = body.get("k")
        key = (str(body.get("device", "")), int(body.get("generation") or 0))
        waiting = self._waiting.get(key)
        if kind == FromNursery.CATALOG and self._catalog is not None and not self._catalog.done():
            self._catalog.set_result(parse_catalog(body))
        elif kind == FromNursery.SPAWNED and waiting is not None and not waiting.done() and fds:
            waiting.set_result((int(body["pid"]), fds.pop(0)))
        elif kind == FromNursery.CHILDREN and self._children is not None and not self._children.done():
            found = zip(body.get("children", ()), list(fds), strict=True)
            self._children.set_result({(str(device), int(generation)): (int(pid), fds.pop(0))
                                       for (device, generation, pid), _ in found})
        elif kind == FromNursery.EXITED:
            self._on_exited(*key, int(body.get("pid") or 0), exit_status(body.get("status")))
        elif kind == FromNursery.ERROR:
            error = body.get("error")
            failure = from_wire(error) if isinstance(error, dict) else Internal(f"nursery: {error}")
            if waiting is not None and not waiting.done():
                waiting.set_exception(failure)
            elif self._catalog is not None and not self._catalog.done():
                self._catalog.set_exception(failure)
            else:
                log.get("nursery").warning("nursery: %s", failure)

    def _fail(self, error: CellvisorError) -> None:
        pending: list[asyncio.Future[Any]] = [*self._waiting.values()]
        pending += [asked for asked in (self._catalog, self._children) if asked is not None]
        for answer in pending:
            if not answer.done():
                answer.set_exception(error)


async def _read(fd: int) -> bytes:
    await wait_readable(fd)
    return os.read(fd, 1 << 16)


def parse_catalog(body: dict[str, Any]) -> Catalog:
    """Read the nursery's catalog: {types: {name: {verb, help, schema, reads}}, broken: {name: reason}}."""
    types, broken = body.get("types"), body.get("broken")
    if not isinstance(types, dict):
        raise Internal(f"the nursery's catalog is {type(types).__name__}, not a map")
    found = [DeviceType(str(name), str(entry.get("verb", "")), str(entry.get("help", "")), entry["schema"],
                        tuple(entry.get("reads", (1,))))
             for name, entry in types.items()]
    return Catalog(tuple(found), broken if isinstance(broken, dict) else {})


def exit_status(told: object) -> int | None:
    """Read "exit 1" or "signal 9" as Popen would give it, None for anything else."""
    how, _, number = told.partition(" ") if isinstance(told, str) else ("", "", "")
    if how not in ("exit", "signal") or not number.isdecimal():
        return None
    return int(number) if how == "exit" else -int(number)
