"""ZeroMQ to the sockets in a VM's run directory."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator, Sequence
from typing import Any

import zmq

from cellvisor.core.errors import CellvisorError, NotFound, TryAgain, UsageError, from_wire
from cellvisor.core.wire import places
from cellvisor.core.wire.control import repeats, request
from cellvisor.core.wire.messages import MAX_MESSAGE, pack, unpack

POLL_MS = 250  # how often a silent VM is checked for being alive
SUCCESSOR_SECONDS = 1.0  # for the answer to a request that only a successor got


def prepare(sock: zmq.Socket[bytes]) -> None:
    """Set what every socket of a client has."""
    for option, value in ((zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_MESSAGE), (zmq.RECONNECT_IVL, 20)):
        sock.setsockopt(option, value)


class ZmqLink:
    """A connection to the VM of run directory `path`; `timeout` in seconds is for each answer."""

    _context: zmq.Context[zmq.Socket[bytes]]
    _socket: zmq.Socket[bytes]

    def __init__(self, path: str, timeout: float) -> None:
        self._path = path
        if not self.is_alive():
            raise NotFound(f"no VM is running in {path}", hint="see cellvisor ls", code="no-vm")
        self._context = zmq.Context()
        self._socket = self._connect(zmq.DEALER, places.API)
        self._set_up(f"the VM in {path}", timeout)

    def _set_up(self, where: str, timeout: float) -> None:
        self._where, self.timeout = where, timeout

    def _connect(self, kind: int, name: str) -> zmq.Socket[bytes]:
        sock = self._context.socket(kind)
        prepare(sock)
        sock.connect(f"ipc://{os.path.join(self._path, name)}")
        return sock

    def _subscribe(self) -> zmq.Socket[bytes]:
        return self._connect(zmq.SUB, places.EVENTS)

    def call(self, verb: str, args: dict[str, Any], fds: Sequence[int] = ()) -> Any:
        """Ask for `verb`. Raises the CellvisorError that is answered, NotFound or TryAgain."""
        if fds:
            raise UsageError(f"{verb}: descriptors cannot come this way",
                             hint="start the VM with --api-socket PATH, and give PATH as the VM")
        pilot = self._pilot()
        key = self.send(verb, args)
        until = time.monotonic() + self.timeout
        while True:
            if not self._socket.poll(POLL_MS):
                if time.monotonic() > until or not self.is_alive():
                    raise self._no_answer(verb, pilot)
                if self._pilot() != pilot:  # a request that it had taken died with it
                    if repeats(verb, args):
                        pilot = self._pilot()
                        self.send(verb, args, key)
                    else:
                        until = min(until, time.monotonic() + SUCCESSOR_SECONDS)
                continue
            asked, answer = self.receive()
            if asked not in (key, None):
                continue  # the late answer to a call that was given up
            if isinstance(answer, CellvisorError):
                raise answer
            return answer

    def send(self, verb: str, args: dict[str, Any], key: str | None = None) -> str:
        """Ask without waiting; returns what receive() will call the answer. The same `key` is the same request."""
        key = os.urandom(12).hex() if key is None else key
        self._socket.send(pack(request(key, verb, args)))
        return key

    def receive(self) -> tuple[object, Any]:
        """Wait for an answer and return which request it is to, None if that is unknown, and the value or error."""
        body = unpack(self._socket.recv())
        error = body.get("error")
        return body.get("id"), from_wire(error) if isinstance(error, dict) else body.get("ok")

    def _pilot(self) -> str:
        """Return what tells one controlplane from the next; "" if it is not to be seen from here."""
        try:
            with open(os.path.join(self._path, places.PILOT)) as file:
                return file.read()
        except OSError:
            return ""

    def _no_answer(self, verb: str, pilot: str) -> CellvisorError:
        if not self.is_alive():
            return NotFound(f"{verb}: {self._where} has ended", code="no-vm")
        if self._pilot() != pilot:
            return TryAgain(f"{verb}: the controlplane died over it and a successor goes on",
                            hint="see cellvisor ops and devices for what became of it", code="no-answer")
        return TryAgain(f"{verb}: no answer within {self.timeout:g} s", hint="cellvisor logs may say why",
                        code="no-answer")

    def events(self, since: int, follow: bool) -> Iterator[dict[str, Any]]:
        """Yield kept events with a number above `since`, then new ones until the VM ends."""
        with self._subscribe() as sock:
            sock.setsockopt(zmq.SUBSCRIBE, b"")
            seen = since
            while True:
                # What is kept covers what the subscription missed while it was being made.
                try:
                    kept = self.call("events", {"since": seen})["events"]
                except NotFound:
                    return
                for event in kept:
                    seen = max(seen, event["seq"])
                    yield event
                if not follow:
                    return
                while sock.poll(1000):
                    event = unpack(sock.recv_multipart()[-1])
                    if event["seq"] > seen + 1:
                        break  # the subscription stood only after the one before, which is kept
                    if event["seq"] > seen:
                        seen = event["seq"]
                        yield event

    def is_alive(self) -> bool:
        """Tell whether a VM holds the directory."""
        return places.holder(self._path) is not None

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()
        self._context.term()
