"""The controlplane's nurseries, by links that only note: whom each one forks, and what is left of a dead one."""

from __future__ import annotations

import asyncio
import os
import signal
import subprocess
from collections.abc import Callable
from pathlib import Path
from typing import Any, cast

import pytest

from cellvisor.controlplane import nurseries as module
from cellvisor.controlplane.events import EventLog
from cellvisor.controlplane.fleet import Fleet
from cellvisor.controlplane.nurseries import Nurseries
from cellvisor.controlplane.nurserylink import NurseryLink
from cellvisor.controlplane.processes import Child
from cellvisor.controlplane.rundir import RunDir
from cellvisor.core.errors import Internal
from tests.unit.test_recovery_fleet import Vm

LONG = 20.0


class Link:
    """A nursery whose process is `pid`."""

    made: list[Link]
    pid = 0

    def __init__(self, path: str, *callbacks: Any) -> None:
        self.is_open, self.forked = True, list[str]()
        self.made.append(self)

    async def spawn(self, device: str, generation: int, **rest: Any) -> tuple[int, int]:
        self.forked.append(f"{device}/{generation}")
        return 0, -1

    def close(self) -> None:
        self.is_open = False


class Place:
    """A run directory."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def file(self, name: str) -> str:
        return str(self.path / name)


def fail(number: int) -> Child:
    raise OSError(f"no nursery {number}")


def make(path: Path, launch: Callable[[int], Child] = fail) -> Nurseries:
    return Nurseries(launch, Child("core", 0, -1), cast("RunDir", Place(path)), EventLog(), lambda *about: None,
                     list, lambda: None)


def test_another_device_of_that_name_comes_from_the_present_nursery(tmp_path: Path) -> None:
    async def run() -> None:
        vm, nurseries, links = Vm(), make(tmp_path), [Link(""), Link("")]
        nurseries._links.update(enumerate(cast("list[NurseryLink]", links)))
        fleet = Fleet(cast("Any", vm), nurseries, vm.events, "/nowhere")
        await fleet.start(vm.device)
        nurseries.present = 1  # somebody else was upgraded
        fleet.forget("data")
        await fleet.start(vm.device)
        fleet.retire("data")
        await fleet.start(vm.device)
        assert [link.forked for link in links] == [["data/1", "data/2"], ["data/3"]]

    Link.made = []
    asyncio.run(run())


def test_a_nursery_that_dies_while_adopted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        nurseries = make(tmp_path)
        assert await asyncio.wait_for(nurseries.find(0, {}), LONG) == {}
        assert [link.is_open for link in Link.made] == [False]
        assert nurseries.pids() == []

    with subprocess.Popen(["true"]) as process:
        process.wait()
    Link.made = []
    monkeypatch.setattr(Link, "pid", process.pid)
    monkeypatch.setattr(module, "NurseryLink", Link)
    monkeypatch.setattr(module, "REPLACE_DELAYS", (0.0,))
    (tmp_path / "nursery.sock").touch()
    asyncio.run(run())


def test_a_nursery_that_is_given_up_while_it_starts_is_killed(tmp_path: Path) -> None:
    async def run() -> None:
        ready, sink = os.pipe2(os.O_CLOEXEC)
        with subprocess.Popen(["sleep", "60"]) as process:
            try:
                child = Child("nursery", process.pid, os.pidfd_open(process.pid), ready, process)
                nurseries = make(tmp_path, lambda number: child)
                starting = asyncio.create_task(nurseries.start())
                await asyncio.sleep(0)
                starting.cancel()
                with pytest.raises(asyncio.CancelledError):
                    await starting
                assert process.returncode == -signal.SIGKILL
                assert nurseries.pids() == []
            finally:
                process.kill()
                os.close(sink)

    asyncio.run(run())


def test_who_wants_a_process_when_no_nursery_could_be_started_has_it_tried_again(
        tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    async def run() -> None:
        vm, nurseries, link = Vm(), make(tmp_path), Link("")
        fleet = Fleet(cast("Any", vm), nurseries, vm.events, "/nowhere")
        await asyncio.wait_for(nurseries.find(0, {}), LONG)
        with pytest.raises(Internal, match="data: there is no nursery"):
            await asyncio.wait_for(fleet.start(vm.device), LONG)

        async def start() -> int:
            nurseries._links[7] = cast("NurseryLink", link)
            nurseries._processes[7] = Child("nursery", 0, -1)
            return 7

        monkeypatch.setattr(nurseries, "start", start)
        monkeypatch.setattr(nurseries, "ward", lambda: None)
        await asyncio.wait_for(fleet.start(vm.device), LONG)
        assert link.forked == ["data/2"]

    Link.made = []
    monkeypatch.setattr(module, "REPLACE_DELAYS", (0.0,))
    asyncio.run(run())
