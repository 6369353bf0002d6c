"""This terminal and a console of a VM on another machine: every byte both ways through its API, until the escape key.

    one question of each kind is under way at a time:  read since N    write what was typed    resize
"""

from __future__ import annotations

import base64
import os
import select
import sys
import time
from typing import Any

from cellvisor.core.errors import CellvisorError, NotFound, TryAgain
from cellvisor.ctl import attach
from cellvisor.ctl.client import Client
from cellvisor.ctl.curvelink import CurveLink

READ_SECONDS = 2.0  # the answer comes then, if nothing else does
TICK = 0.25         # seconds until the window's size is looked at again
SILENCE = 10.0      # seconds without an answer: as good as no connection
TYPED = 4096        # bytes of one write
WAITING = 64 << 10  # bytes typed that a guest has not taken yet; more are not


class _Left(Exception):
    """The user left; the text says how."""


class FarConsole:
    """Console `device` of the VM that `client` is connected to, and this terminal."""

    def __init__(self, client: Client, device: str, stdin: int = 0, stdout: int = 1) -> None:
        self._client, self._device, self._stdin, self._stdout = client, device, stdin, stdout
        self._since = -1
        self._typed = b""
        self._has_ended = False  # stdin
        self._size: tuple[int, int] | None = None
        self._not_before = 0.0
        self._asked: dict[str, tuple[str, float]] = {}  # what is under way: its key and when it was asked

    def run(self) -> str:
        """Copy until Ctrl-], the end of stdin or the console's; returns which, as a sentence. Raises CellvisorError."""
        with attach.raw(self._stdin):
            try:
                while True:
                    try:
                        self._step(self._link())
                    except TryAgain as error:
                        self._begin_again(error)
            except _Left as left:
                return str(left)

    def _link(self) -> CurveLink:
        assert self._client.far is not None
        return self._client.far

    def _step(self, link: CurveLink) -> None:
        """Ask what is to be asked, wait for what comes, take it. Raises TryAgain if the connection broke."""
        self._ask(link)
        wants_more = not self._has_ended and (len(self._typed) < WAITING or os.isatty(self._stdin))
        ready = link.wait([self._stdin] if wants_more else [], TICK)
        if self._stdin in ready:
            self._take_keys()
        if -1 in ready:
            self._take_answer(*link.receive())
        elif not link.is_alive():
            raise link.lost()
        elif any(time.monotonic() > asked + SILENCE for _, asked in self._asked.values()):
            raise link.lost(f"no answer for {SILENCE:g} s")

    def _ask(self, link: CurveLink) -> None:
        def send(action: str, **args: Any) -> None:
            body = {"action": action, "id": self._device, **args}
            self._asked[action] = (link.send("console", body), time.monotonic())

        if time.monotonic() < self._not_before:
            return
        if "read" not in self._asked:
            send("read", since=self._since, timeout=READ_SECONDS)
        if self._typed and "write" not in self._asked:
            send("write", data=base64.b64encode(self._typed[:TYPED]).decode(), timeout=READ_SECONDS)
        size = attach.size(self._stdin)
        if size is not None and size != self._size and "resize" not in self._asked:
            self._size = size
            send("resize", columns=size[0], rows=size[1])
        if self._has_ended and not self._typed:
            raise _Left("stdin ended")

    def _take_keys(self) -> None:
        data = os.read(self._stdin, attach.CHUNK)
        keys, escape, _ = data.partition(attach.ESCAPE)
        if escape:
            raise _Left("left")
        self._has_ended = not data
        if len(self._typed) < WAITING:
            self._typed += keys

    def _take_answer(self, key: object, answer: Any) -> None:
        action = next((name for name, (asked, _) in self._asked.items() if asked == key), None)
        if action is None:
            return
        del self._asked[action]
        if isinstance(answer, CellvisorError):
            if action == "resize" or isinstance(answer, TryAgain):  # its device has no process just now
                self._not_before = time.monotonic() + TICK
                return
            if isinstance(answer, NotFound) and self._since >= 0:
                raise _Left("the console was closed")
            raise answer
        if action == "write":
            self._typed = self._typed[answer["written"]:]
        elif action == "read":
            if answer["lost"]:
                self._say(f"{answer['lost']} bytes are not shown: the guest is faster than this connection")
            self._since = answer["next"]
            attach.write(self._stdout, base64.b64decode(answer["data"]))
            if answer["closed"]:
                raise _Left("the console was closed")

    def _begin_again(self, error: TryAgain) -> None:
        """Connect to a successor. What was typed and not answered may have come or not: it is not typed twice."""
        if "write" in self._asked:
            self._typed = self._typed[TYPED:]
        self._asked, self._size = {}, None
        self._say(f"{error.message}; trying again, Ctrl-] leaves")
        self._client.connect_again(self._look_for_escape)
        self._say("connected again")

    def _look_for_escape(self) -> None:
        while not self._has_ended and select.select([self._stdin], [], [], 0)[0]:
            self._take_keys()

    def _say(self, text: str) -> None:
        print(f"\r\n[{self._client.name}: {text}]\r\n", end="", file=sys.stderr, flush=True)
