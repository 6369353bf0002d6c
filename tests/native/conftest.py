"""Fixtures: `vm` runs the guest under cellvisor in a directory of the test's own, `disk` is a raw disk of 64 MiB,
`network` a network namespace, `routed` one that passt can use."""

from __future__ import annotations

import contextlib
import os
import shutil
import signal
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any, Protocol

import pytest

from tests.native import cellvisor, netns, passts
from tests.native.guest import GuestResult, Running, make_disk


class Vm(Protocol):
    """What the `vm` fixture gives: call it to run a guest to its end, `start` to steer it meanwhile."""

    where: Path

    def __call__(self, cmdline: str, **options: Any) -> GuestResult: ...
    def start(self, cmdline: str, **options: Any) -> Running: ...


class _Vm:
    def __init__(self, where: Path) -> None:
        self.where = where
        self.started: list[Running] = []

    def __call__(self, cmdline: str, **options: Any) -> GuestResult:
        return cellvisor.run_cellvisor(cmdline, self.where, **options)

    def start(self, cmdline: str, **options: Any) -> Running:
        self.started.append(cellvisor.start_cellvisor(cmdline, self.where, **options))
        return self.started[-1]


@pytest.fixture
def vm(tmp_path: Path) -> Iterator[Vm]:
    """Run guests under cellvisor; what still runs at the end of the test is stopped, and nothing may outlive that."""
    made = _Vm(tmp_path)
    yield made
    for running in made.started:
        running.stop()
    if (tmp_path / "run").is_symlink():
        place = cellvisor.runtime_dir(tmp_path)
        end = time.monotonic() + 10.0
        while (left := cellvisor.processes(place)) and time.monotonic() < end:
            time.sleep(0.02)
        for pid in left:
            with contextlib.suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)
        shutil.rmtree(place, ignore_errors=True)
        assert not left, "processes that outlive their VM"


@pytest.fixture
def disk(tmp_path: Path) -> Path:
    """A sparse raw disk of 64 MiB."""
    return make_disk(tmp_path / "disk.raw")


@pytest.fixture
def network() -> Iterator[None]:
    """Have the test, and all that it starts, in a network namespace of its own."""
    with netns.namespace():
        yield


@pytest.fixture
def routed(network: None) -> Iterator[threading.Event]:
    """Have there a way out for passt, and a host that sends back what comes, until it is set that it is enough."""
    passts.make_route()
    with passts.echo() as enough:
        yield enough
