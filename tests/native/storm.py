"""A storm of kills: the process of one device dies again and again, at seeded moments, while a guest uses it.

Some deaths come when it serves, some while its successor is still starting or recovering. Its process is found
among the nursery's children, so it can be hit before it has said a word.
"""

from __future__ import annotations

import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path

from tests.native.guest import GuestResult

PATIENCE = 60.0  # seconds without a new process of the device: it was given up
EARLY = 0.25  # of the kills: before or soon after it serves
# Few blocks: a write that is done once more, later, then hits one that was written again meanwhile.
LOAD = "test=blk-write depth=32 span=1M bs=4096 reads=25 flush=101 stoppable=1 count=100000000 gaps_us=3000"
OPTIONS = "restart_budget=1000000,restart_window=1,restart_backoff=[0]"


@dataclass(frozen=True, slots=True)
class Process:
    """A line of /proc/PID/stat: what identifies a process, and its parent."""

    pid: int
    parent: int
    state: str
    began: int

    @classmethod
    def read(cls, pid: int) -> Process | None:
        """Look at a process; None if there is none."""
        try:
            words = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
        except OSError:
            return None
        return cls(pid, int(words[1]), words[0], int(words[19]))


class Children:
    """The living children of a process. Looking costs little when nothing changed: seen strangers are skipped."""

    def __init__(self, parent: int) -> None:
        self.parent = parent
        self._strangers: set[int] = set()

    def pids(self) -> list[int]:
        """Return them, zombies left out."""
        there = {int(name) for name in os.listdir("/proc") if name.isdecimal()}
        self._strangers &= there
        found = [(pid, Process.read(pid)) for pid in there - self._strangers]
        self._strangers |= {pid for pid, seen in found if seen is None or seen.parent != self.parent}
        return sorted(pid for pid, seen in found if seen and seen.parent == self.parent and seen.state not in "ZX")

    def forget(self) -> None:
        """Look at everybody again: a number may have been given out anew."""
        self._strangers.clear()


class Storm:
    """Kills the process `pid`, a child of `nursery`, and whoever follows it there. `alive` tells of the VM.

    A share of `early` is killed within 20 ms, the others after `shortest` to `longest` seconds. Between two looks
    for a successor it sleeps for `rest` seconds.
    """

    def __init__(self, nursery: int, pid: int, seed: int, alive: Callable[[], bool], *, early: float = EARLY,
                 shortest: float = 0.02, longest: float = 0.15, rest: float = 0.0005) -> None:
        self._children = Children(nursery)
        self._others = set(self._children.pids()) - {pid}
        self._random = random.Random(seed)
        self._alive = alive
        self._early, self._shortest, self._longest, self._rest = early, shortest, longest, rest
        self._last = 0

    def blow(self, kills: int) -> Iterator[int]:
        """Kill that often; yields how often after each time. Ends early if the VM does: the guest says why."""
        for number in range(1, kills + 1):
            pid = self._next()
            if not pid:
                return
            early = self._random.random() < self._early
            between = (0.0, 0.02) if early else (self._shortest, self._longest)
            time.sleep(self._random.uniform(*between))
            try:
                os.kill(pid, signal.SIGKILL)
            except ProcessLookupError:
                assert self._ended(), f"process {pid} ended by itself"
                return
            yield number

    def _ended(self) -> bool:
        end = time.monotonic() + 5.0
        while self._alive() and time.monotonic() < end:
            time.sleep(0.02)
        return not self._alive()

    # Wait for the successor; 0 when the VM has ended.
    def _next(self) -> int:
        end, look_again = time.monotonic() + PATIENCE, time.monotonic() + 0.5
        while True:
            fresh = [pid for pid in self._children.pids() if pid not in self._others and pid != self._last]
            if fresh:
                self._last = fresh[0]
                return fresh[0]
            now = time.monotonic()
            if not self._alive():
                return 0
            assert now < end, f"nobody follows process {self._last} within {PATIENCE:g} s"
            if now > look_again:
                look_again = now + 0.5
                self._children.forget()
            time.sleep(self._rest)


def stop_load(disk: Path) -> None:
    """Tell a load that is `stoppable` to end: its guest reads the last sector now and then."""
    with disk.open("r+b", buffering=0) as file:
        file.seek(-512, os.SEEK_END)
        file.write(b"\1" + bytes(7))


def longest_stalls(said: GuestResult, count: int) -> list[float]:
    """Return the `count` longest times without a completion in ms, ascending (to a sixteenth, the last exactly)."""
    found = sorted(int(us) / 1000 for us, times in said.all("gap.").items() for _ in range(int(times)))[-count:]
    return [*found[:-1], said.number("stall_us") / 1000] if found else []
