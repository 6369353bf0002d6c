"""The API for other machines: `--api tcp://ADDR:PORT`, with CURVE and an allow-list or not at all.

    client --TCP--> Front: at most MAX_CLIENTS, bytes both ways --Unix socket--> libzmq: CURVE --ZAP--> Gate: allowed?

libzmq accepts without end, and out of descriptors it aborts the process: so no stranger reaches its listener. Whoever
connects proves to own a key, and the gate (rfc.zeromq.org/spec/27) looks whether the allow-list has it. The list is
read again when it has changed: who is struck off it cannot connect again.
"""

from __future__ import annotations

import asyncio
import contextlib
import ipaddress
import os
from dataclasses import dataclass
from typing import Any

import zmq
import zmq.asyncio
import zmq.utils.z85

from cellvisor.controlplane import httpsocket
from cellvisor.core import log
from cellvisor.core.errors import CellvisorError, NotFound, UsageError
from cellvisor.core.wire import keys
from cellvisor.core.wire.options import build, describe, option, parse_kv

ZAP = "inproc://zeromq.zap.01"
DOMAIN = b"cellvisor"
MAX_CLIENTS = 64     # connections at each of the two ports
MAX_REQUEST = 1 << 18  # bytes; a stranger's first frame may be as long
CHUNK = 1 << 16
HANDSHAKE_MS = 5000  # until a connection must have proved its key
IDLE_MS = 15000      # a peer that is silent for so long is pinged, and dropped when it stays so


@dataclass(frozen=True, slots=True, kw_only=True)
class RemoteOptions:
    """The keys of `--api` after the address."""

    key: str = option("", help="the VM's pair of keys (keys/server.key)", path=True)
    allow: str = option("", help="the allow-list (clients.toml)", path=True)
    events: int = option(0, help="port of the events, the next one if 0", min=0, max=65535)


@dataclass(frozen=True, slots=True)
class Remote:
    """Where to listen, as whom, and for whom."""

    host: str
    port: int
    events: int
    key: str
    allow: str


def parse(text: str) -> Remote:
    """Read `tcp://ADDR:PORT[,key=FILE][,allow=FILE][,events=PORT]`. Raises UsageError."""
    address, _, rest = text.partition(",")
    host, colon, port = address.removeprefix("tcp://").rpartition(":")
    bare = host[1:-1] if host.startswith("[") and host.endswith("]") else host
    try:
        is_address = ipaddress.ip_address(bare).version == (6 if bare != host else 4)
    except ValueError:
        is_address = False
    if not address.startswith("tcp://") or not colon or not is_address or not port.isdecimal() \
            or not 0 < int(port) < 65535:
        raise UsageError(f"--api {address[:80]!r}: not an address to listen at",
                         hint="write tcp://ADDRESS:PORT, for example tcp://192.0.2.1:7300 or tcp://[::1]:7300")
    given = build(RemoteOptions, parse_kv(rest, describe(RemoteOptions), "--api"), "--api")
    return Remote(host, int(port), given.events or int(port) + 1,
                  os.path.abspath(given.key) if given.key else keys.key_file("server"),
                  os.path.abspath(given.allow) if given.allow else os.path.join(keys.config_dir(), keys.CLIENTS))


def check(text: str) -> str:
    """Return `text` with whole paths if a VM can be served so now. Raises UsageError that says what is missing."""
    remote = parse(text)
    try:
        keys.read_pair(remote.key)
    except NotFound as error:
        raise UsageError(f"--api: tcp only with keys, and {error}", hint="cellvisor keys new server") from None
    try:
        if not keys.read_clients(remote.allow):
            raise UsageError(f"--api: {remote.allow} allows nobody", hint='add lines: NAME = "PUBLIC KEY"')
    except NotFound as error:
        raise UsageError(f"--api: tcp only with an allow-list, and {error}",
                         hint='lines are NAME = "PUBLIC KEY", of cellvisor keys new on the client') from None
    return (f"tcp://{remote.host}:{remote.port},key={_quoted(remote.key)},allow={_quoted(remote.allow)},"
            f"events={remote.events}")


def _quoted(path: str) -> str:
    return f'"{path}"' if set(path) & set(',[]"') else path


class Gate:
    """Answers libzmq's question who may connect; opens doors only together with itself."""

    def __init__(self, context: zmq.asyncio.Context, text: str) -> None:
        self.remote = parse(text)
        self._pair = keys.read_pair(self.remote.key)
        self._clients: dict[str, str] = {}
        self._seen: tuple[int, ...] = ()
        self._zap = context.socket(zmq.REP)
        self._zap.bind(ZAP)
        self._fronts: list[Front] = []
        self._asked = asyncio.get_running_loop().create_task(self._serve())

    def bind(self, door: zmq.Socket[Any], port: int, path: str) -> None:
        """Have a socket serve who is allowed, at `port` by way of `path`. Raises UsageError."""
        for option_, value in (
                (zmq.CURVE_SERVER, 1), (zmq.CURVE_SECRETKEY, self._pair.secret.encode()), (zmq.ZAP_DOMAIN, DOMAIN),
                (zmq.ZAP_ENFORCE_DOMAIN, 1), (zmq.HANDSHAKE_IVL, HANDSHAKE_MS), (zmq.HEARTBEAT_IVL, IDLE_MS),
                (zmq.HEARTBEAT_TIMEOUT, IDLE_MS), (zmq.MAXMSGSIZE, MAX_REQUEST)):
            door.setsockopt(option_, value)
        door.bind(f"ipc://{path}")
        self._fronts.append(Front(self.remote.host, port, path))

    async def close(self) -> None:
        """Let nobody in any more."""
        for front in self._fronts:
            await front.close()
        self._asked.cancel()
        with contextlib.suppress(asyncio.CancelledError):
            await self._asked
        self._zap.close(linger=0)

    async def _serve(self) -> None:
        while True:
            frames = await self._zap.recv_multipart()
            if len(frames) < 6:  # not libzmq
                await self._zap.send_multipart([b"1.0", b"", b"500", b"", b"", b""])
                continue
            _, key, domain, _, _, mechanism = frames[:6]
            name = self._known(frames[6]) if (mechanism, domain, len(frames)) == (b"CURVE", DOMAIN, 7) else None
            if name is None:
                log.get("api").warning("refused a client: its key is not in %s", self.remote.allow)
            else:
                log.get("api").info("%s connected", name)
            verdict = [b"400", b"not allowed", b""] if name is None else [b"200", b"", name.encode()[:255]]
            await self._zap.send_multipart([b"1.0", key, *verdict, b""])

    def _known(self, key: bytes) -> str | None:
        """Return the name of a client's key (32 bytes), None for a stranger's."""
        try:
            now = os.stat(self.remote.allow)
            stamp = (now.st_mtime_ns, now.st_ino, now.st_size)
            if stamp != self._seen:
                self._clients = {}
                self._clients, self._seen = keys.read_clients(self.remote.allow), stamp
        except (OSError, CellvisorError) as error:  # nobody is allowed by a list that cannot be read
            log.get("api").error("allow-list: %s", error)
            self._clients, self._seen = {}, ()
        return self._clients.get(zmq.utils.z85.encode(key).decode())


class Front:
    """Listens at a TCP port and passes bytes on to the Unix socket at `path`. Raises UsageError for a taken port."""

    def __init__(self, host: str, port: int, path: str) -> None:
        self._path = path
        self._open: set[asyncio.Task[Any]] = set()
        sock = httpsocket.listen_tcp("--api", host, port, MAX_CLIENTS, "choose another address or port")
        self._serving = asyncio.get_running_loop().create_task(asyncio.start_server(self._client, sock=sock))

    async def close(self) -> None:
        """Listen no more, and cut the connections, once they had time to pass on what libzmq sent at its end."""
        with contextlib.suppress(Exception):
            (await self._serving).close()
        if self._open:
            await asyncio.wait(self._open, timeout=0.5)
        for task in self._open:
            task.cancel()
        if self._open:
            await asyncio.wait(self._open, timeout=1.0)

    async def _client(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        task = asyncio.current_task()
        assert task is not None
        if len(self._open) >= MAX_CLIENTS:
            writer.transport.abort()
            return
        self._open.add(task)
        inner = None
        try:
            near, inner = await asyncio.open_unix_connection(self._path)
            pumps = [asyncio.ensure_future(_pump(reader, inner)), asyncio.ensure_future(_pump(near, writer))]
            try:
                await asyncio.wait(pumps, return_when=asyncio.FIRST_COMPLETED)
                await asyncio.wait(pumps, timeout=0.2)  # what was on its way the other way
            finally:
                for pump in pumps:
                    pump.cancel()
        except (OSError, asyncio.CancelledError):
            pass  # the one or the other is gone, or we are closing
        finally:
            self._open.discard(task)
            for side in (writer, inner):
                if side is not None:
                    side.transport.abort()


async def _pump(source: asyncio.StreamReader, sink: asyncio.StreamWriter) -> None:
    with contextlib.suppress(OSError):
        while data := await source.read(CHUNK):
            sink.write(data)
            await sink.drain()
