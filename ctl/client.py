"""Talk to a running VM: `Client("web").call("pause")`, `for event in Client("web").events(): ...`."""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from typing import Any

import zmq

from cellvisor.core.errors import CellvisorError, NotFound, TryAgain, UsageError, from_wire
from cellvisor.core.wire import places
from cellvisor.core.wire.control import request
from cellvisor.core.wire.messages import MAX_MESSAGE, pack, unpack

TIMEOUT = 90.0  # a pause waits for I/O in execution
_POLL_MS = 250  # how often a silent VM is checked for being alive


def find(where: str | None = None) -> str:
    """Return the run directory of a VM given by name, by path, or by being the only one that runs.

    Raises NotFound (code "no-vm") or UsageError, naming the VMs that could be meant.
    """
    if where is not None and "/" in where:
        path = os.path.abspath(where)
        return path if os.path.isdir(path) else os.path.dirname(path)
    alive = places.running()
    if where is None:
        if len(alive) == 1:
            return places.vm_dir(next(iter(alive)))
        if alive:
            raise UsageError("several VMs are running: which one?", hint=f"name one of: {', '.join(alive)}")
        raise NotFound("no VM is running", hint="start one with cellvisor run", code="no-vm")
    if where not in alive:
        places.check_name(where)
        names = f"running: {', '.join(alive)}" if alive else "none is running; start one with cellvisor run"
        raise NotFound(f"no VM {where!r} is running", hint=names, code="no-vm")
    return places.vm_dir(where)


class Client:
    """A connection to one VM's API. Synchronous; not to be shared between threads."""

    def __init__(self, where: str | None = None, timeout: float = TIMEOUT) -> None:
        """Connect to the VM that `where` means (see find()); `timeout` in seconds is for each answer."""
        self.path = find(where)
        self._timeout = timeout
        if places.holder(self.path) is None:
            raise NotFound(f"no VM is running in {self.path}", hint="see cellvisor ls", code="no-vm")
        self._context = zmq.Context()
        self._socket = self._connect(zmq.DEALER, places.API)

    def _connect(self, kind: int, name: str) -> zmq.Socket[bytes]:
        sock = self._context.socket(kind)
        for option, value in ((zmq.LINGER, 0), (zmq.MAXMSGSIZE, MAX_MESSAGE), (zmq.RECONNECT_IVL, 20)):
            sock.setsockopt(option, value)
        sock.connect(f"ipc://{os.path.join(self.path, name)}")
        return sock

    def call(self, verb: str, /, **args: Any) -> Any:
        """Ask for `verb` and return the answer. Raises the CellvisorError that the VM answers.

        Raises TryAgain (code "no-answer") after the time-out: the VM may still do what was asked.
        """
        key = os.urandom(12).hex()
        self._socket.send(pack(request(key, verb, args)))
        until = time.monotonic() + self._timeout
        while True:
            if not self._socket.poll(_POLL_MS):
                if time.monotonic() > until or places.holder(self.path) is None:
                    raise self._no_answer(verb)
                continue
            body = unpack(self._socket.recv())
            if body.get("id") not in (key, None):
                continue  # the late answer to a call that was given up
            error = body.get("error")
            if isinstance(error, dict):
                raise from_wire(error)
            return body.get("ok")

    def _no_answer(self, verb: str) -> CellvisorError:
        if places.holder(self.path) is None:
            return NotFound(f"{verb}: the VM in {self.path} has ended", code="no-vm")
        return TryAgain(f"{verb}: no answer within {self._timeout:g} s", hint="see cellvisor events",
                        code="no-answer")

    def events(self, since: int = 0, follow: bool = True) -> Iterator[dict[str, Any]]:
        """Yield kept events with a number above `since`, then new ones until the VM ends."""
        with self._connect(zmq.SUB, places.EVENTS) as sock:
            sock.setsockopt(zmq.SUBSCRIBE, b"")
            seen = since
            while True:
                # What is kept covers what the subscription missed while it was being made.
                try:
                    kept = self.call("events", since=seen)["events"]
                except NotFound:
                    return
                for event in kept:
                    seen = max(seen, event["seq"])
                    yield event
                if not follow:
                    return
                while sock.poll(1000):
                    event = unpack(sock.recv_multipart()[-1])
                    if event["seq"] > seen:
                        seen = event["seq"]
                        yield event

    def wait_gone(self, timeout: float) -> bool:
        """Wait until the VM has ended and its directory is free; False after `timeout` seconds."""
        until = time.monotonic() + timeout
        while places.holder(self.path) is not None:
            if time.monotonic() > until:
                return False
            time.sleep(0.02)
        return True

    def close(self) -> None:
        """Disconnect."""
        self._socket.close()
        self._context.term()

    def __enter__(self) -> Client:
        return self

    def __exit__(self, *args: object) -> None:
        self.close()
