"""How much is measured, and the directory in which it is."""

from __future__ import annotations

import contextlib
import shutil
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from tests.native import cellvisor
from tests.native.guest import Running
from tests.native.steer import Steer, steer

Tell = Callable[[str], None]


@dataclass(frozen=True, slots=True)
class Effort:
    """Numbers of samples. `cell_ms` is how long one load of the comparison runs, `rounds` how often all do."""

    kills: int = 200
    upgrades: int = 8
    forks: int = 50
    asks: int = 2000
    boots: int = 8
    workers: tuple[int, ...] = (1, 8, 30)
    requests: int = 10_000
    depths: tuple[int, ...] = (1, 8, 32)
    steady_depths: tuple[int, ...] = (1, 8, 32)
    cell_ms: int = 200
    rounds: int = 12
    seconds: float = 90.0  # after which the comparison begins no further round


QUICK = Effort(kills=30, upgrades=2, forks=15, asks=200, boots=3, workers=(1, 8), requests=2000, steady_depths=(32,),
               cell_ms=60, rounds=2, seconds=15.0)


@dataclass(slots=True)
class Place:
    """Where VMs of a measurement live; has what steer() asks of a test's `vm`."""

    where: Path
    tell: Tell
    started: list[Running] = field(default_factory=list)

    def start(self, cmdline: str, **options: Any) -> Running:
        """Start a guest; leave() ends it if nothing else does."""
        self.started.append(cellvisor.start_cellvisor(cmdline, self.where, **options))
        return self.started[-1]

    def __call__(self, cmdline: str, **options: Any) -> Any:
        """Run a guest to its end."""
        return cellvisor.run_cellvisor(cmdline, self.where, **options)

    @contextlib.contextmanager
    def steer(self, cmdline: str, **options: Any) -> Iterator[Steer]:
        """Have a guest run in the block, and end it after it."""
        try:
            with steer(self, cmdline, **options) as vmm:
                yield vmm
        finally:
            self.leave()

    def disk(self, name: str, size: int = 64 << 20) -> Path:
        """Return a raw disk whose every block is written: holes would make reads cheaper than they are."""
        path = self.where / name
        if not path.exists() or path.stat().st_size != size:
            with path.open("wb") as file:
                for block in range(0, size, 1 << 20):
                    file.write((block + 1).to_bytes(8, "little") * (1 << 17))
        return path

    def directory(self, name: str) -> Path:
        """Return a directory for another VMM's files."""
        path = self.where / name
        path.mkdir(exist_ok=True)
        return path

    def leave(self) -> None:
        """End what runs and remove its run directory."""
        for running in self.started:
            running.stop()
        self.started.clear()
        link = self.where / "run"
        if link.is_symlink():
            shutil.rmtree(cellvisor.runtime_dir(self.where), ignore_errors=True)
            link.unlink()


def wait_until(condition: Callable[[], bool], what: str, seconds: float = 60.0) -> None:
    """Wait for a condition. Raises RuntimeError naming `what` that did not come."""
    end = time.monotonic() + seconds
    while not condition():
        if time.monotonic() > end:
            raise RuntimeError(f"no {what} within {seconds:g} s")
        time.sleep(0.005)
