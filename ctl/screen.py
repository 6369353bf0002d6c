"""The full screen of `top`: this thread draws and reads keys, another one asks the VMs, so that no VM can stall it.

    sampler thread:  look at the VMs --> latest snapshot --> wait for the interval
    this thread:     keys, window size, snapshot --> draw;   p and R --> a thread that does it
"""

from __future__ import annotations

import contextlib
import os
import select
import signal
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator, Sequence
from typing import Any

from cellvisor.core.errors import CellvisorError
from cellvisor.ctl import toptable
from cellvisor.ctl.client import Client
from cellvisor.ctl.sampling import NOBODY, STATES_OF_NOBODY, Row, Sampler, Snapshot

TICK = 0.25  # seconds until the window's size is looked at again
LATE = 1.0   # seconds after which the picture does not wait for a VM
SHOWN = 5.0  # seconds for which is told what came of a key
UP, DOWN = ("\x1b[A", "\x1bOA", "k"), ("\x1b[B", "\x1bOB", "j")
CTRL_C = "\x03"
HELP = "j k select  s sort  a all processes  p pause or resume  R new process for device  q quit"


class Watcher:
    """Samples in a thread of its own; what is asked for is done in others, so that a slow pause stops no picture."""

    def __init__(self, make: Callable[[], Sampler], interval: float) -> None:
        self.latest: Snapshot | None = None
        self.failure: Exception | None = None
        self._said, self._said_at = "", 0.0
        self._sampler, self._interval = make(), interval
        self._wake, self._stop = threading.Event(), threading.Event()
        self._thread = threading.Thread(target=self._run, daemon=True)
        self._thread.start()

    def ask(self, action: str, row: Row) -> None:
        """Have "pause" or "restart" done to what `row` is about."""
        paused = self.latest is not None and self.latest.states.get(row.vm) == "Paused"
        self._say(f"{row.vm}: {action} {row.name if action == 'restart' else ''}...")

        def act() -> None:
            self._say(_act(self._sampler.where(row.vm), action, row, paused))
            self._wake.set()

        threading.Thread(target=act, daemon=True).start()

    def _say(self, text: str) -> None:
        self._said, self._said_at = text, time.monotonic()

    @property
    def said(self) -> str:
        """Return what came of the last key, while that is new."""
        return self._said if time.monotonic() < self._said_at + SHOWN else ""

    def stop(self) -> None:
        """End, without waiting long for a VM that does not answer."""
        self._stop.set()
        self._wake.set()
        self._thread.join(0.5)

    def _run(self) -> None:
        try:
            while not self._stop.is_set():
                began = time.monotonic()
                self.latest = self._sampler.sample(LATE)
                self._wake.wait(max(0.05, began + self._interval - time.monotonic()))
                self._wake.clear()
        except Exception as error:
            self.failure = error
        finally:
            self._sampler.close()


def _act(where: str | None, action: str, row: Row, paused: bool) -> str:
    """Do it and tell what came of it."""
    if action == "restart" and row.kind != "device":
        return f"{row.name} is no device: select one with j and k"
    try:
        with Client(where) as client:
            if action == "pause":
                client.call("resume" if paused else "pause")
                return f"{row.vm}: {'resumed' if paused else 'paused'}"
            # A device that serves gets a new process without losing anything; a parked one a new budget.
            client.call("restart-device" if row.state in STATES_OF_NOBODY else "upgrade-device", id=row.name)
            return f"{row.vm}: {row.name} has a new process"
    except CellvisorError as error:
        return f"{row.vm}: {error}"


class Screen:
    """What is shown: order, selection, and which rows."""

    def __init__(self) -> None:
        self.order = 0
        self.everything = False
        self._selected: tuple[str, str] | None = None

    def shown(self, snapshot: Snapshot | None) -> list[Row]:
        """Return the rows in order."""
        found = [row for row in (snapshot.rows if snapshot else ())
                 if self.everything or row.kind in ("device", "vcpu", NOBODY)]
        return toptable.ordered(found, toptable.ORDERS[self.order])

    def selected(self, rows: Sequence[Row]) -> int:
        """Return the number of the selected row: the first device, until another is chosen or it goes."""
        found = {(row.vm, row.name): number for number, row in reversed(list(enumerate(rows)))}
        if self._selected not in found:
            self._selected = next((key for key, number in reversed(found.items()) if rows[number].kind == "device"),
                                  None)
        return found.get(self._selected, 0) if self._selected else 0

    def press(self, key: str, snapshot: Snapshot | None) -> tuple[str, Row | None]:
        """Take a key; returns an action ("pause", "restart" or "") and the row that it is about."""
        rows = self.shown(snapshot)
        at = self.selected(rows)
        if key == "s":
            self.order = (self.order + 1) % len(toptable.ORDERS)
        elif key == "a":
            self.everything = not self.everything
        elif key in (*UP, *DOWN) and rows:
            chosen = rows[max(0, min(len(rows) - 1, at + (1 if key in DOWN else -1)))]
            self._selected = (chosen.vm, chosen.name)
        elif key in ("p", "R") and rows:
            return {"p": "pause", "R": "restart"}[key], rows[at]
        return "", None


@contextlib.contextmanager
def keys(fd: int) -> Iterator[None]:
    """Have keys one by one, Ctrl-C and Ctrl-Z too; the terminal is given back whatever happens, signals included."""
    def leave(number: int, frame: Any) -> None:
        raise SystemExit(128 + number)

    saved = termios.tcgetattr(fd)
    handlers = {number: signal.signal(number, leave) for number in (signal.SIGTERM, signal.SIGHUP, signal.SIGINT)}
    try:
        tty.setcbreak(fd, termios.TCSANOW)
        changed = termios.tcgetattr(fd)
        changed[3] &= ~termios.ISIG
        termios.tcsetattr(fd, termios.TCSANOW, changed)
        yield
    finally:
        with contextlib.suppress(termios.error):  # the terminal itself may be gone
            termios.tcsetattr(fd, termios.TCSAFLUSH, saved)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def run(make: Callable[[], Sampler], interval: float, fd: int = 0) -> int:
    """Show it until somebody quits or the VM that was named is gone. Raises CellvisorError for the latter."""
    from rich.console import Console
    from rich.live import Live

    console = Console()
    screen, watcher = Screen(), Watcher(make, interval)
    drawn: tuple[Any, ...] = ()
    try:
        with keys(fd), Live(console=console, screen=True, auto_refresh=False) as live:
            while watcher.failure is None:
                seen = (id(watcher.latest), watcher.said, screen.order, screen.everything, console.size)
                if seen != drawn:
                    rows = screen.shown(watcher.latest)
                    live.update(toptable.drawing(watcher.latest, rows, screen.selected(rows), screen.order,
                                                 watcher.said or HELP, console.size), refresh=True)
                    drawn = seen
                for key in _pressed(fd):
                    if key in ("q", CTRL_C):
                        return 130 if key == CTRL_C else 0
                    action, row = screen.press(key, watcher.latest)
                    if row is not None:
                        watcher.ask(action, row)
                    drawn = ()
            raise watcher.failure
    finally:
        watcher.stop()


def _pressed(fd: int) -> list[str]:
    """Return the keys that come within a tick; "q" when there is nobody to press any."""
    if not select.select([fd], [], [], TICK)[0]:
        return []
    data = os.read(fd, 64).decode(errors="replace")
    if not data:
        return ["q"]
    found = []
    while data:
        size = 3 if data.startswith(("\x1b[", "\x1bO")) else 1
        found.append(data[:size])
        data = data[size:]
    return found


def once(make: Callable[[], Sampler], interval: float) -> Snapshot:
    """Look twice, `interval` seconds apart, and return the second look, which has rates."""
    sampler = make()
    try:
        sampler.sample()
        time.sleep(interval)
        return sampler.sample()
    finally:
        sampler.close()
