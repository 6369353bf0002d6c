"""A controlplane that kills itself at a step. `CRASH_PLAN` names a file; each controlplane takes its first line:

    before N         SIGKILL instead of step N (from 0)
    during N         SIGKILL a moment after step N was begun, its answer may have come or not
    before NAME N    the same, counting only steps of that name
    never            nothing
Steps are: a process started (core, nursery), descriptors left in core (leave_descriptors), a request to core (its
verb), a nursery opened (open), a worker forked (spawn).
"""

from __future__ import annotations

import asyncio
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


def take_line(plan: Path) -> str:
    """Take the first line out of the plan."""
    first, _, rest = plan.read_text().partition("\n")
    plan.write_text(rest)
    return first


if __name__ == "__main__":
    words = take_line(Path(os.environ["CRASH_PLAN"])).split()
    if len(words) > 1:
        Crash(words[0], " ".join(words[1:-1]), int(words[-1])).arm()
    sys.exit(main(programs=processes.Programs(successor=(sys.executable, os.path.abspath(__file__), "adopt",
                                                         "--as-successor"))))
