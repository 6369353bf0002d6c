"""A worker by hand, with as much good manners as a lie needs: what tests/fakes/lies_*.py are made of.

It tells the test what it sees by lines of JSON, and waits for it with wait().
"""

from __future__ import annotations

import errno
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Callable
from typing import Any

import zmq

from cellvisor.core.ring.state import StateMap
from cellvisor.core.wire import fdpass, places, zmtp
from cellvisor.core.wire.messages import PROTOCOL, ToCore, ToWorker, pack, unpack
from cellvisor.core.wire.spec import Spec

SPEC = Spec(virtio_id=4, pci_class=0xFF0000, queues=(64,), title="liar", config=bytes(8))
MIB = 1 << 20


def tell(what: Any) -> None:
    """Say something to the test."""
    print(json.dumps(what), flush=True)


def wait() -> None:
    """Wait for the test."""
    sys.stdin.readline()


class Liar:
    """The two channels of a worker, and as much good manners as a lie needs."""

    def __init__(self, run_dir: str, identity: str) -> None:
        self.run_dir, self.identity = run_dir, identity
        self.context = zmq.Context()
        self.sock = self.dealer(identity)
        self.fds = self.connect()
        self.given: dict[str, int] = {}

    def connect(self) -> socket.socket:
        """Connect to the descriptor socket."""
        sock = fdpass.connect(os.path.join(self.run_dir, places.FDS))
        sock.settimeout(20)
        return sock

    def dealer(self, identity: str) -> zmq.Socket[bytes]:
        """Connect a ZeroMQ socket."""
        sock: zmq.Socket[bytes] = self.context.socket(zmq.DEALER)
        sock.setsockopt(zmq.LINGER, 0)
        sock.setsockopt(zmq.IDENTITY, identity.encode())
        sock.setsockopt(zmq.RECONNECT_IVL, 1)
        sock.connect(f"ipc://{os.path.join(self.run_dir, places.CORE)}")
        return sock

    def raw(self, identity: str | None = None) -> socket.socket:
        """Connect as ZeroMQ does, as far as READY, without it."""
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        sock.connect(os.path.join(self.run_dir, places.CORE))
        hello = zmtp.ready(b"DEALER", (identity or self.identity).encode())
        sock.sendall(zmtp.GREETING + hello)
        return sock

    def say(self, kind: ToCore | str, **body: Any) -> None:
        """Send a message."""
        self.sock.send(pack({"k": kind, **body}))

    def hello(self, spec: Spec | Any = SPEC, **more: Any) -> None:
        """Say HELLO."""
        about = spec.as_wire() if isinstance(spec, Spec) else spec
        self.say(ToCore.HELLO, **{"spec": about, "type": "rng", "pid": 1, "protocol": PROTOCOL, **more})

    def ask(self, body: dict[str, Any], *fds: int, sock: socket.socket | None = None) -> dict[str, Any]:
        """Ask on the descriptor socket; descriptors of the answer are put into `given` by their names."""
        fdpass.send(sock or self.fds, {"identity": self.identity, **body}, fds)
        answer = fdpass.receive(sock or self.fds)
        if answer is None:
            raise ConnectionError("core hung up")
        self.given.update(zip(answer[0].get("names", ()), answer[1], strict=False))
        return answer[0]

    def serve(self, spec: Spec = SPEC, *, echo: bool = True) -> None:
        """Behave until READY; with `echo` answer pings for ever, whatever else is done."""
        self.hello(spec)
        self.ask({"take": True})
        if echo:
            state = StateMap(self.given["state"])
            threading.Thread(target=_echo, args=(state,), daemon=True).start()
        self.say(ToCore.READY)

    def behave(self) -> None:
        """Serve, and from now on answer whatever core says, in a thread that the ZeroMQ socket belongs to."""
        self.serve()
        threading.Thread(target=self._answer, daemon=True).start()

    def _answer(self) -> None:
        while True:
            body = unpack(self.sock.recv())
            if body["k"] == ToWorker.RESET:
                self.say(ToCore.RESET_DONE, epoch=body["epoch"])
            elif body["k"] == ToWorker.PAUSE:
                self.say(ToCore.PAUSED)

    def hear(self, kind: ToWorker) -> dict[str, Any]:
        """Wait for a message of core, behaving."""
        while True:
            body = unpack(self.sock.recv())
            if body["k"] == kind:
                return body


def _echo(state: StateMap) -> None:
    while True:
        state.echo = state.ping
        time.sleep(0.1)


def sleep() -> None:
    """Live on without doing anything."""
    while True:
        time.sleep(60)


def errno_of(action: Callable[[], Any]) -> str:
    """Return the name of the error that `action` ends with, "" for none."""
    try:
        action()
    except OSError as error:
        return errno.errorcode[error.errno or 0]
    except ValueError as error:
        return str(error)
    return ""
