"""A controlplane that kills itself or another at a step. `CRASH_PLAN` names a file; each takes its first line:

    before N         SIGKILL instead of step N (from 0)
    during N         SIGKILL a moment after step N was begun, its answer may have come or not
    before NAME N    the same, counting only steps of that name
    never            nothing

`CRASH_ORDER` names a file that may come later, "WHEN N VICTIM"; steps are counted from its coming on. VICTIM is the
name of a process (cv-nursery, cv-DEVICE) or "self". The file goes when it is carried out.

Steps are: a process started (core, nursery), descriptors left in core (leave_descriptors), a request to core (its
verb), a nursery opened (open), a worker forked (spawn).
"""

from __future__ import annotations

import asyncio
import contextlib
import os
import signal
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

from cellvisor.controlplane import adopt, processes
from cellvisor.controlplane.__main__ import main
from cellvisor.controlplane.corelink import CoreLink
from cellvisor.controlplane.nurseries import Nurseries
from cellvisor.controlplane.nurserylink import NurseryLink

DURING_SECONDS = 0.001


class Crash:
    """Counts steps and dies at one."""

    def __init__(self, when: str, name: str, number: int) -> None:
        self._when, self._name, self._number, self._count = when, name, number, 0

    def _is_now(self, name: str) -> bool:
        if self._name not in ("", name):
            return False
        self._count += 1
        return self._count - 1 == self._number

    def _die(self) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def sync(self, step: Callable[..., Any]) -> Callable[..., Any]:
        def wrapped(*args: Any, **more: Any) -> Any:
            now = self._is_now(step.__name__)
            if now and self._when == "before":
                self._die()
            result = step(*args, **more)
            if now and self._when == "during":
                self._die()
            return result
        return wrapped

    def awaited(self, step: Callable[..., Any]) -> Callable[..., Any]:
        async def wrapped(*args: Any, **more: Any) -> Any:
            now = self._is_now(str(args[1]) if step.__name__ == "request" else step.__name__)
            if now and self._when == "before":
                self._die()
            if now and self._when == "during":
                asyncio.get_running_loop().call_later(DURING_SECONDS, self._die)
            return await step(*args, **more)
        return wrapped

    def arm(self) -> None:
        """Put it around every step."""
        for cls, name in ((processes.Launcher, "core"), (processes.Launcher, "nursery")):
            setattr(cls, name, self.sync(getattr(cls, name)))
        adopt.leave_descriptors = self.sync(adopt.leave_descriptors)
        for cls, name in ((CoreLink, "request"), (Nurseries, "open"), (NurseryLink, "spawn")):
            setattr(cls, name, self.awaited(getattr(cls, name)))


class Order(Crash):
    """Looks for the order at each step."""

    def __init__(self, path: Path) -> None:
        super().__init__("", "", -1)
        self._path, self._text = path, ""

    def _is_now(self, name: str) -> bool:
        text = ""
        with contextlib.suppress(FileNotFoundError):
            text = self._path.read_text()
        if text != self._text:
            self._text, self._count = text, 0
            self._when, self._number = (text.split()[0], int(text.split()[1])) if text else ("", -1)
        return bool(text) and super()._is_now(name)

    def _die(self) -> None:
        try:
            self._path.unlink()
        except FileNotFoundError:
            return  # taken back
        victim = self._text.split()[2]
        for pid in [os.getpid()] if victim == "self" else named(victim):
            os.kill(pid, signal.SIGKILL)


def named(name: str) -> list[int]:
    """Return the processes of that name among those of this VM."""
    mine, found = f"XDG_RUNTIME_DIR={os.environ['XDG_RUNTIME_DIR']}".encode(), []
    for entry in filter(str.isdecimal, os.listdir("/proc")):
        with contextlib.suppress(OSError):
            if (Path(f"/proc/{entry}/comm").read_text().strip() == name
                    and mine in Path(f"/proc/{entry}/environ").read_bytes().split(b"\0")):
                found.append(int(entry))
    return found


def take_line(plan: Path) -> str:
    """Take the first line out of the plan."""
    first, _, rest = plan.read_text().partition("\n")
    plan.write_text(rest)
    return first


if __name__ == "__main__":
    words = take_line(Path(os.environ["CRASH_PLAN"])).split() if "CRASH_PLAN" in os.environ else []
    if "CRASH_ORDER" in os.environ:
        Order(Path(os.environ["CRASH_ORDER"])).arm()
    elif len(words) > 1:
        Crash(words[0], " ".join(words[1:-1]), int(words[-1])).arm()
    sys.exit(main(programs=processes.Programs(successor=(sys.executable, os.path.abspath(__file__), "adopt",
                                                         "--as-successor"))))
