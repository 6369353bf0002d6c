"""A worker's two ways to core: messages over ZeroMQ, and descriptors over AF_UNIX (core/fds.py)."""

from __future__ import annotations

import os
from typing import Any

import zmq

from cellvisor.core import log
from cellvisor.core.errors import Internal
from cellvisor.core.wire import fdpass
from cellvisor.core.wire.messages import MAX_MESSAGE, ToCore, pack
from cellvisor.core.wire.places import CORE, FDS

ANSWER_SECONDS = 30.0  # core answers in well under a millisecond; it may be booting a big guest
LINGER_MS = 1000


class Channel:
    """Connected from the start, as `identity`. Raises OSError or zmq.ZMQError if core is not in `run_dir`."""

    def __init__(self, identity: str, run_dir: str) -> None:
        self._identity = identity
        self._log = log.get("worker")
        self._context = zmq.Context()
        self.messages: zmq.Socket[bytes] = self._context.socket(zmq.DEALER)
        self.messages.setsockopt(zmq.IDENTITY, identity.encode())
        self.messages.setsockopt(zmq.LINGER, LINGER_MS)
        self.messages.setsockopt(zmq.MAXMSGSIZE, MAX_MESSAGE)
        self.messages.connect(f"ipc://{os.path.join(run_dir, CORE)}")
        self.fds = fdpass.connect(os.path.join(run_dir, FDS))
        self.fds.settimeout(ANSWER_SECONDS)

    def send(self, kind: ToCore, **body: Any) -> None:
        """Send a message; it is dropped if core takes none."""
        try:
            self.messages.send(pack({"k": kind, **body}), zmq.NOBLOCK)
        except zmq.Again:
            self._log.error("core takes no messages: %s dropped", kind)

    def ask(self, body: dict[str, Any], *fds: int) -> tuple[dict[str, Any], list[int]]:
        """Ask on the descriptor socket and wait for the answer. Raises Internal."""
        try:
            fdpass.send(self.fds, {"identity": self._identity, **body}, fds)
            answer = fdpass.receive(self.fds)
        except TimeoutError:
            raise Internal(f"core gave no answer to {next(iter(body))} in {ANSWER_SECONDS:.0f} s") from None
        if answer is None:
            raise Internal("core hung up on the descriptor socket")
        return answer

    def is_open(self) -> bool:
        """Read the descriptor socket, which core says nothing on by itself; False if it hung up."""
        try:
            return fdpass.receive(self.fds) is not None
        except OSError:
            return False

    def forget(self) -> None:
        """Drop what is still to be sent: nobody is there."""
        self.messages.setsockopt(zmq.LINGER, 0)

    def close(self) -> None:
        """Send what is queued, for a second at most, and disconnect."""
        self.messages.close()
        self._context.term()
