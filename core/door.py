"""Lets peers in at a listening AF_UNIX socket, without ever holding much for one that has not said who it is.

    accepted (a stranger) --known()--> known --leave()--> gone
        +-- too many strangers: the oldest one of the process with the most of them is hung up on
"""

from __future__ import annotations

import contextlib
import errno
import os
import select
import signal
import socket
from collections import Counter
from collections.abc import Callable
from typing import Generic, TypeVar

from cellvisor.core import log
from cellvisor.core.closer import Closer
from cellvisor.core.wire import fdpass
from cellvisor.core.wire.reactor import Reactor

MAX_STRANGERS = 64
MAX_PEERS = 1024
ACCEPTS = 16  # in one turn of the loop
SO_PEERPIDFD = 77  # Linux 6.5


class Peer:
    """One accepted connection. `pid` and `pidfd` stand for the process that connected."""

    def __init__(self, sock: socket.socket) -> None:
        """Raises OSError if the process is gone already."""
        self.sock = sock
        self.identity = ""  # until known()
        self.events = select.EPOLLIN
        self.resting: int | None = None  # a timer
        self.pid = int.from_bytes(sock.getsockopt(socket.SOL_SOCKET, socket.SO_PEERCRED, 12)[:4], "little")
        self.pidfd = _pidfd(sock, self.pid)

    @property
    def is_open(self) -> bool:
        """False once it was hung up on."""
        return self.sock.fileno() >= 0

    def kill(self) -> None:
        """SIGKILL its process."""
        if self.pidfd >= 0:
            with contextlib.suppress(ProcessLookupError):
                signal.pidfd_send_signal(self.pidfd, signal.SIGKILL)


def _pidfd(sock: socket.socket, pid: int) -> int:
    try:
        raw = sock.getsockopt(socket.SOL_SOCKET, SO_PEERPIDFD, 4)
    except OSError as error:
        if error.errno != errno.ENOPROTOOPT:
            raise
        return os.pidfd_open(pid)
    fd = int.from_bytes(raw, "little")
    os.set_inheritable(fd, False)
    return fd


P = TypeVar("P", bound=Peer)


class Door(Generic[P]):
    """`make(sock)` makes a peer of an accepted socket, `ready(peer, events)` is called when it can be read.

    `greet(peer)` speaks first; when it raises OSError the peer is gone.
    """

    def __init__(self, listener: socket.socket, reactor: Reactor, closer: Closer, make: Callable[[socket.socket], P],
                 ready: Callable[[P, int], None], greet: Callable[[P], None] = lambda peer: None) -> None:
        self._listener, self._reactor, self._closer = listener, reactor, closer
        self._make, self._ready, self._greet = make, ready, greet
        self._peers: dict[int, P] = {}
        self._strangers: dict[int, P] = {}  # by descriptor, oldest first
        reactor.add(listener.fileno(), self._accept)

    def _accept(self, events: int) -> None:
        for _ in range(ACCEPTS):
            try:
                sock, _ = self._listener.accept()
            except OSError as error:
                if error.errno in (errno.EMFILE, errno.ENFILE):
                    self._evict()
                return
            sock.setblocking(False)
            try:
                peer = self._make(sock)
            except OSError:  # gone already
                self._closer.close(0, sock.detach())
                continue
            fd = sock.fileno()
            self._peers[fd] = self._strangers[fd] = peer
            self._reactor.add(fd, lambda events, peer=peer: self._ready(peer, events))  # type: ignore[misc]
            try:
                self._greet(peer)
            except OSError:
                self.leave(peer)
            if len(self._strangers) > MAX_STRANGERS or len(self._peers) > MAX_PEERS:
                self._evict()

    def _evict(self) -> None:
        if self._strangers:
            crowd = Counter(peer.pid for peer in self._strangers.values()).most_common(1)[0][0]
            self.leave(next(peer for peer in self._strangers.values() if peer.pid == crowd))

    def known(self, peer: P, identity: str) -> None:
        """`peer` has proved to be `identity`."""
        peer.identity = identity
        self._strangers.pop(peer.sock.fileno(), None)

    def want(self, peer: P, events: int) -> None:
        """Wait for other events of `peer` than EPOLLIN alone."""
        if events != peer.events:
            peer.events = events
            if peer.is_open and peer.resting is None:
                self._reactor.modify(peer.sock.fileno(), events)

    def rest(self, peer: P, seconds: float) -> None:
        """Do not look at `peer` for so long: it asks for too much."""
        if peer.is_open and peer.resting is None:
            self._reactor.remove(peer.sock.fileno())
            peer.resting = self._reactor.after(seconds, lambda: self._rested(peer))

    def _rested(self, peer: P) -> None:
        peer.resting = None
        self._reactor.add(peer.sock.fileno(), lambda events: self._ready(peer, events), peer.events)
        self._ready(peer, 0)

    def read(self, peer: P, size: int) -> bytes:
        """Receive up to `size` bytes, b"" if the peer hung up. Descriptors that came with them are closed."""
        data, fds, _ = fdpass.read(peer.sock, size)
        self.discard(peer, fds)
        return data

    def leave(self, peer: P) -> None:
        """Hang up on `peer`."""
        fd = peer.sock.fileno()
        if fd < 0 or self._peers.pop(fd, None) is None:
            return
        self._strangers.pop(fd, None)
        if peer.resting is not None:
            self._reactor.cancel(peer.resting)
            peer.resting = None
        self._reactor.remove(fd)
        self.discard(peer, [peer.sock.detach()])
        if peer.pidfd >= 0:
            os.close(peer.pidfd)
            peer.pidfd = -1

    def discard(self, peer: P, fds: list[int]) -> None:
        """Close what `peer` gave us. One whose descriptors do not close must not leave us without any."""
        if not self._closer.close(peer.pid, *fds):
            log.get("door").warning("killing pid %d: its descriptors do not close", peer.pid)
            peer.kill()

    def close(self) -> None:
        """Let nobody in any more and hang up on everybody."""
        self._reactor.remove(self._listener.fileno())
        self._listener.close()
        for peer in list(self._peers.values()):
            self.leave(peer)
