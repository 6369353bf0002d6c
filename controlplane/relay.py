"""Consoles from afar: the verb `console` reads a pty or socket for clients on other machines, and types into it.

    guest --pty or socket--> Port: the newest RING bytes, numbered --"read since N"--> any number of clients
    guest <--pty or socket-- Port <--"write", as much as fits-- clients, one after the other

A client asks for what follows the last byte it has, so whoever is slow costs nothing: the guest's bytes are taken as
they come, and who falls more than RING behind is told how many it missed. A port stays open while somebody asks.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import os
from collections.abc import Iterator
from typing import TYPE_CHECKING, Any

from cellvisor.core.errors import Conflict, NotFound, UsageError
from cellvisor.core.wire import ports
from cellvisor.core.wire.messages import CoreVerb

if TYPE_CHECKING:
    from cellvisor.controlplane.supervisor import Supervisor

RING = 1 << 20          # bytes that are kept of a console
PIECE = 16 << 10        # bytes of an answer
CHUNK = 64 << 10        # bytes taken from the console at a time
LEASE = 3.0             # seconds without a question until a port is closed
RETRY = 0.05            # seconds until a console that took nothing is tried again
PER_GENERATION = 1 << 40  # bytes: a successor's numbers are above those of its predecessor


class Relay:
    """The ports of one VM, by device."""

    def __init__(self, vm: Supervisor) -> None:
        self._vm = vm
        self._ports: dict[str, Port] = {}

    async def serve(self, args: dict[str, Any]) -> dict[str, Any]:
        """Answer `console`; see ConsoleArgs. Raises CellvisorError."""
        key, place = ports.choose(self._vm.config.as_json(), args["id"], self._vm.rundir.name)
        if args["action"] == "resize":
            return await self._resize(key, args["columns"], args["rows"])
        if key not in self._ports:
            self._ports[key] = Port(self._vm.rundir.generation * PER_GENERATION)
        port = self._ports[key]
        with port.used(place):
            if args["action"] == "write":
                return {"id": key, "written": await port.write(_bytes(args["data"]), args["timeout"])}
            return {"id": key, **await port.read(args["since"], args["timeout"])}

    async def _resize(self, key: str, columns: int, rows: int) -> dict[str, Any]:
        if key != "__serial":  # which has no size
            await self._vm.require_core().request(CoreVerb.CALL, device=key, verb="resize",
                                                  args={"columns": columns, "rows": rows})
        return {"id": key}


class Port:
    """One console's latest bytes; `base` is the number of the first."""

    def __init__(self, base: int) -> None:
        self._base = self._start = self._seen = base  # of all, of those kept, of those that nobody has read
        self._kept = bytearray()
        self._fd = -1
        self._place: ports.Place | None = None
        self._users = 0
        self._news = asyncio.Event()
        self._loop = asyncio.get_running_loop()
        self._lease: asyncio.TimerHandle | None = None

    @contextlib.contextmanager
    def used(self, place: ports.Place) -> Iterator[None]:
        """Have it open, at `place`, and for LEASE seconds more. Raises Conflict or NotFound if it cannot be opened."""
        if self._fd >= 0 and self._place != place:
            self.close()  # the VM was booted anew
        if self._fd < 0:
            self._fd, self._place = _open(*place), place
            self._loop.add_reader(self._fd, self._take)
        self._users += 1
        if self._lease is not None:
            self._lease.cancel()
        try:
            yield
        finally:
            self._users -= 1
            if not self._users:
                self._lease = self._loop.call_later(LEASE, self.close)

    def close(self) -> None:
        """Let the console go; what was kept of it stays."""
        if self._fd >= 0:
            self._loop.remove_reader(self._fd)
            os.close(self._fd)
            self._fd = -1
        self._tell()

    async def read(self, since: int, timeout: float) -> dict[str, Any]:
        """Return the bytes from number `since` on, waiting for the first: {data (base64), next, lost, closed}.

        Who knows no number, or one that was never given out here, gets what nobody has read.
        """
        end = self._start + len(self._kept)
        is_known = self._base <= since <= end
        begin = since if is_known else max(self._seen, self._start)
        if begin == end and self._fd >= 0:
            news = self._news
            with contextlib.suppress(TimeoutError):
                async with asyncio.timeout(timeout):
                    await news.wait()
        at = max(self._start, begin)
        data = bytes(self._kept[at - self._start:at - self._start + PIECE])
        self._seen = max(self._seen, at + len(data))
        return {"data": base64.b64encode(data).decode(), "next": at + len(data), "lost": at - begin,
                "closed": self._fd < 0 and not data}

    async def write(self, data: bytes, timeout: float) -> int:
        """Type what fits, trying for `timeout` seconds; returns how many bytes that were."""
        until = self._loop.time() + timeout
        while self._fd >= 0:
            try:
                return os.write(self._fd, data)
            except BlockingIOError:
                if self._loop.time() >= until:
                    return 0
            except OSError:
                self.close()
                break
            await asyncio.sleep(RETRY)
        raise NotFound("the console was closed")

    def _take(self) -> None:
        try:
            data = os.read(self._fd, CHUNK)
        except BlockingIOError:
            return
        except OSError:  # a pty whose other end is gone says EIO
            data = b""
        if not data:
            self.close()
            return
        self._kept += data
        over = max(0, len(self._kept) - RING)
        del self._kept[:over]
        self._start += over
        self._tell()

    def _tell(self) -> None:
        news, self._news = self._news, asyncio.Event()
        news.set()


def _open(kind: str, path: str) -> int:
    """Open it as somebody at a terminal of its machine would. Raises Conflict, NotFound."""
    try:
        return ports.take((kind, path), blocking=False)
    except BlockingIOError:
        if kind == "socket":
            raise Conflict(f"{path}: somebody else is attached") from None
        raise Conflict(f"{path}: somebody on its own machine is attached", hint="who leaves with Ctrl-]") from None
    except OSError as error:
        raise NotFound(f"{path}: {error.strerror}") from None


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except binascii.Error as error:
        raise UsageError(f"console: data is not base64: {error}") from None
