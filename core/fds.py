"""The descriptor socket of core (AF_UNIX SOCK_SEQPACKET): workers take theirs, deposit and get back others.

    {"identity", "take": true}       -> {"names": [...]} and the descriptors, once the device is known
    {"identity", "get": name}        -> {"ok": bool} and the descriptor
    {"identity", "deposit": name}    -> {"ok": true}; one descriptor attached
    {"identity", "pidfd": device}    -> {"ok": bool} and the worker's pidfd; for the controlplane alone
The first packet of a connection binds it to its identity; a peer that says anything else is hung up on.
"""

from __future__ import annotations

import socket
from collections.abc import Callable
from typing import Any, Protocol

from cellvisor.core import log
from cellvisor.core.closer import Closer
from cellvisor.core.door import Door, Peer
from cellvisor.core.errors import CellvisorError, UsageError
from cellvisor.core.store import Store
from cellvisor.core.wire import fdpass
from cellvisor.core.wire.allowance import Allowance
from cellvisor.core.wire.reactor import Reactor

MAX_NAME = 128
RATE, BURST = 2000, 2000  # packets of one peer: a second, and at once
AT_ONCE = 16  # in one turn


class Peers(Protocol):
    """Who may use the socket, and what a worker is given."""

    def owner_of(self, identity: str) -> str | None:
        """Return the device that `identity` speaks for ("" for the controlplane), or None for a stranger."""

    def connected(self, identity: str, connection: Connection) -> None:
        """A peer has shown a good identity on `connection`."""

    def left(self, connection: Connection) -> None:
        """A peer that had shown its identity is gone from here, by itself or because it was hung up on."""

    def take(self, identity: str) -> tuple[list[str], list[int]] | None:
        """Return names and descriptors of a worker's device, None if its Hello has not come yet."""

    def pidfd_of(self, device: str) -> int | None:
        """Return the pidfd of the device's living worker, or None."""


class Connection(Peer):
    """A worker or the controlplane."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.waits_for_take = False
        self.allowance = Allowance(RATE, BURST)


class FdsServer:
    """Accepts, checks and serves."""

    def __init__(self, path: str, reactor: Reactor, store: Store, peers: Peers, closer: Closer) -> None:
        self._store, self._peers = store, peers
        self._door = Door(fdpass.listen(path), reactor, closer, Connection, self._ready)

    def hang_up(self, connection: Connection) -> None:
        """Forget a peer."""
        if connection.is_open:
            self._door.leave(connection)
            if connection.identity:
                self._peers.left(connection)

    def _ready(self, connection: Connection, events: int) -> None:
        try:
            for _ in range(AT_ONCE):
                if not connection.is_open:
                    return
                packet = fdpass.receive(connection.sock, lambda fds: self._door.discard(connection, fds))
                if packet is None:
                    self.hang_up(connection)
                    return
                body, fds = packet
                try:
                    self._serve(connection, body, fds)
                finally:
                    self._door.discard(connection, fds)
                wait = connection.allowance.spend()
                if wait:
                    self._door.rest(connection, wait)
                    return
        except BlockingIOError:
            return
        except (UsageError, OSError) as error:
            log.get("fds").warning("hanging up on pid %d: %s", connection.pid, error)
            self.hang_up(connection)

    def _serve(self, connection: Connection, body: dict[str, Any], fds: list[int]) -> None:
        """Answer one packet. A descriptor that is kept is taken out of `fds`."""
        identity = body.get("identity")
        device = self._peers.owner_of(identity) if isinstance(identity, str) else None
        if device is None or not isinstance(identity, str):
            raise UsageError(f"stranger {str(identity)[:80]!r}")
        if not connection.identity:
            self._peers.connected(identity, connection)
            self._door.known(connection, identity)
        elif connection.identity != identity:
            raise UsageError(f"{connection.identity} now says it is {identity[:80]!r}")
        if body.get("take") is True:
            connection.waits_for_take = True
            self.offer(connection)
        elif "get" in body:
            device, name = _scope(device, _name(body["get"]))
            _lend(connection, self._store.get(device, name))
        elif "pidfd" in body and not device:
            _lend(connection, self._peers.pidfd_of(_name(body["pidfd"])))
        elif "deposit" in body:
            device, name = _scope(device, _name(body["deposit"]))
            if len(fds) != 1:
                raise UsageError(f"deposit of {name!r} carries {len(fds)} descriptors, not 1")
            self._answer(connection, lambda: self._store.deposit(device, name, fds.pop()))
        else:
            raise UsageError(f"request with keys {[str(key)[:20] for key in list(body)[:8]]}")

    def _answer(self, connection: Connection, action: Callable[[], None]) -> None:
        try:
            action()
        except CellvisorError as error:
            fdpass.send(connection.sock, {"ok": False, "error": error.as_wire()})
        else:
            fdpass.send(connection.sock, {"ok": True})

    def offer(self, connection: Connection) -> None:
        """Answer a take() that waits, if the device is known by now."""
        given = self._peers.take(connection.identity) if connection.waits_for_take else None
        if given is not None:
            connection.waits_for_take = False
            names, fds = given
            try:
                fdpass.send(connection.sock, {"names": names}, fds)
            except OSError:  # it died while it waited; its pidfd tells
                self.hang_up(connection)

    def close(self) -> None:
        """Stop listening and hang up on everybody."""
        self._door.close()


def _lend(connection: Connection, fd: int | None) -> None:
    fdpass.send(connection.sock, {"ok": fd is not None}, [] if fd is None else [fd])


def _name(value: object) -> str:
    if not isinstance(value, str) or not 0 < len(value) <= MAX_NAME:
        raise UsageError(f"descriptor name {str(value)[:40]!r}")
    return value


def _scope(device: str, name: str) -> tuple[str, str]:
    """A worker's names are its own; the controlplane ("") names them <device>/<name>."""
    if device:
        return device, name
    scope, slash, rest = name.partition("/")
    if not slash or not rest:
        raise UsageError(f"descriptor {name!r} is not <device>/<name>")
    return scope, rest
