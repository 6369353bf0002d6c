"""Core's end of the workers' ZeroMQ sockets: one-part messages of DEALERs, each of which shows its identity first.

Messages are taken as they come and never stored; a worker that sends more than ALLOWED finds its socket full. What it
does not read is dropped beyond MAX_UNREAD. The protocol, and why it is spoken here: core/wire/zmtp.py.
"""

from __future__ import annotations

import contextlib
import os
import select
import socket
from collections import deque
from typing import Protocol

from cellvisor.core.closer import Closer
from cellvisor.core.door import Door, Peer
from cellvisor.core.errors import UsageError
from cellvisor.core.wire import zmtp
from cellvisor.core.wire.allowance import Allowance
from cellvisor.core.wire.messages import MAX_MESSAGE
from cellvisor.core.wire.reactor import Reactor

MAX_UNREAD = 8 << 20  # bytes that a worker has not read
MAX_LATER = 256 << 10  # bytes of a message after the first, which may carry the contents of BAR windows
ALLOWED = 4 << 20  # bytes a second; at once twice that. A message counts as LEAST at least
LEAST = 4096
AT_ONCE = 64  # messages of one peer in one turn
CHUNK = 64 << 10


class Hosts(Protocol):
    """Who listens."""

    def expects(self, identity: str) -> bool:
        """Is `identity` a worker's of the day?"""

    def heard(self, identity: str, data: bytes) -> None:
        """Serve a message. Must not raise."""

    def broke(self, identity: str, why: str) -> None:
        """`identity` does not keep to the protocol."""


class Speaker(Peer):
    """A worker's DEALER."""

    def __init__(self, sock: socket.socket) -> None:
        super().__init__(sock)
        self.decoder = zmtp.Decoder(MAX_MESSAGE)
        self.allowance = Allowance(ALLOWED, 2 * ALLOWED)
        self.unread: deque[bytes] = deque()
        self.unread_bytes = 0


class Gate:
    """Binds `path`; tells `hosts`."""

    def __init__(self, path: str, reactor: Reactor, closer: Closer, hosts: Hosts) -> None:
        self._hosts = hosts
        self._speakers: dict[str, Speaker] = {}
        self._door = Door(_listen(path), reactor, closer, Speaker, self._ready, self._greet)

    def _greet(self, speaker: Speaker) -> None:
        self._put(speaker, zmtp.GREETING + zmtp.ready(b"ROUTER"))

    # ---- in

    def _ready(self, speaker: Speaker, events: int) -> None:
        try:
            if events & select.EPOLLOUT:
                self._flush(speaker)
            self._take(speaker)
        except (OSError, UsageError) as error:
            identity = speaker.identity
            self._leave(speaker)
            if identity and isinstance(error, UsageError):
                self._hosts.broke(identity, error.message)

    def _take(self, speaker: Speaker) -> None:
        for _ in range(AT_ONCE):
            if not speaker.is_open:
                return  # hung up on by what it said
            data = self._next(speaker)
            if data is None:
                try:
                    chunk = self._door.read(speaker, CHUNK if speaker.identity else zmtp.MAX_COMMAND)
                except BlockingIOError:
                    return
                if not chunk:
                    self._leave(speaker)
                    return
                speaker.decoder.feed(chunk)
                continue
            speaker.decoder.most = MAX_LATER
            self._hosts.heard(speaker.identity, data)
            wait = speaker.allowance.spend(max(LEAST, len(data)))
            if wait:
                self._door.rest(speaker, wait)
                return
        self._door.rest(speaker, 0)  # what was fed already raises no event

    def _next(self, speaker: Speaker) -> bytes | None:
        if not speaker.identity:
            if not speaker.decoder.hello():
                return None
            identity = (speaker.decoder.identity or b"").decode(errors="replace")
            if not identity or not self._hosts.expects(identity):
                raise UsageError("a stranger")
            before = self._speakers.pop(identity, None)
            if before is not None:  # a reconnection
                self._leave(before)
            self._door.known(speaker, identity)
            self._speakers[identity] = speaker
        return speaker.decoder.next()

    def _leave(self, speaker: Speaker) -> None:
        if self._speakers.get(speaker.identity) is speaker:
            del self._speakers[speaker.identity]
        self._door.leave(speaker)

    # ---- out

    def send(self, identity: str, data: bytes) -> bool:
        """Send to a worker; False if it does not read, so that the message is dropped. One that is gone is ignored."""
        speaker = self._speakers.get(identity)
        if speaker is None:
            return True
        packet = zmtp.frame(data)
        if speaker.unread_bytes + len(packet) > MAX_UNREAD:
            return False
        with contextlib.suppress(OSError):  # gone: reading tells
            self._put(speaker, packet)
        return True

    def _put(self, speaker: Speaker, data: bytes) -> None:
        speaker.unread.append(data)
        speaker.unread_bytes += len(data)
        self._flush(speaker)

    def _flush(self, speaker: Speaker) -> None:
        while speaker.unread:
            data = speaker.unread[0]
            try:
                done = speaker.sock.send(data, socket.MSG_NOSIGNAL)
            except BlockingIOError:
                break
            speaker.unread_bytes -= done
            if done < len(data):
                speaker.unread[0] = data[done:]
            else:
                speaker.unread.popleft()
        self._door.want(speaker, select.EPOLLIN | (select.EPOLLOUT if speaker.unread else 0))

    def hang_up(self, identity: str) -> None:
        """Hang up on a worker, if it is there."""
        speaker = self._speakers.get(identity)
        if speaker is not None:
            self._leave(speaker)

    def kill(self, identity: str) -> None:
        """End a worker's process, if it is there, and hang up."""
        speaker = self._speakers.get(identity)
        if speaker is not None:
            speaker.kill()
            self._leave(speaker)

    def close(self) -> None:
        """Hang up on everybody; what was sent still arrives."""
        self._speakers.clear()
        self._door.close()


def _listen(path: str) -> socket.socket:
    with contextlib.suppress(FileNotFoundError):
        os.unlink(path)
    sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    try:
        sock.bind(path)
        sock.listen(256)
        sock.setblocking(False)
    except BaseException:
        sock.close()
        raise
    return sock
