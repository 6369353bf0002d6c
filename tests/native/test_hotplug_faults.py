"""Hotplug when something is wrong: no room, bad input, races, and processes killed between any two steps."""

from __future__ import annotations

import os
import signal
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cellvisor.core.errors import CellvisorError, Conflict, NotFound
from cellvisor.core.wire.control import TEXT
from cellvisor.ctl.client import Client
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.hotplug import Steered, eventually, starting, vm_processes

pytestmark = [pytest.mark.kvm, needs_kvm]


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    """Start the guest of tests/guest/hotplug.c with some words."""
    yield from starting(vm)


def test_31_slots_and_no_more(start: Callable[..., Steered]) -> None:
    vm = start("insertions=29 removals=29")
    added = [vm.add(verb="add-rng")["id"] for _ in range(29)]
    with pytest.raises(Conflict, match="no free slot, all 31 are taken") as refused:
        vm.add(verb="add-rng")
    assert refused.value.status == 409
    assert vm.client.call("capacity")["slots"] == {"total": 31, "free": 0, "next": None}
    for key in added:
        vm.done(key)
    for key in added:
        vm.remove(key)
    for key in added[:-1]:
        with suppress(NotFound):  # the guest powers off after the last one
            vm.wait(key)
    vm.running.finish().check()


@pytest.mark.parametrize("text", ["id=same", "pci_device_id=20"])
def test_two_clients_race_and_one_wins(start: Callable[..., Steered], text: str) -> None:
    vm = start("removals=99 drive=0")
    answers: list[object] = []
    gate = threading.Barrier(4)

    def run() -> None:
        with vm.another_client() as client:
            gate.wait(30)
            try:
                answers.append(client.call("add-rng", **{TEXT: text}))
            except CellvisorError as error:
                answers.append(error)

    threads = [threading.Thread(target=run) for _ in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(60)
    losers = [one for one in answers if isinstance(one, Conflict) and one.status == 409]
    assert (len(answers), len(losers)) == (4, 3), answers
    assert len(vm.devices()) == 3


def test_unknown_devices_and_operations(start: Callable[..., Steered]) -> None:
    vm = start()
    with pytest.raises(NotFound, match="no device 'nope'"):
        vm.remove("nope")
    for action in ("show", "wait", "cancel"):
        with pytest.raises(NotFound, match="no operation 'op77'"):
            vm.client.call("ops", action=action, id="op77")
        with pytest.raises(CellvisorError, match="id is missing"):
            vm.client.call("ops", action=action)


def test_taken_away_by_the_host_alone(start: Callable[..., Steered], disk: Path) -> None:
    vm = start("deaf=1", disks=[disk])
    vm.remove("_disk0", host_only=True)
    assert vm.done("_disk0")["reason"] == "by force"
    assert "_disk0" not in vm.devices()
    # The guest may still believe in slot 2: nobody gets it until the guest lets go or is reset.
    assert vm.client.call("validate", verb="add-rng")["bdf"] == "0000:00:04.0"
    vm.client.call("reset")
    eventually(lambda: vm.client.call("validate", verb="add-rng")["bdf"] == "0000:00:02.0", "the slot")


@pytest.mark.parametrize("moment", ["added", "asked"])
def test_a_worker_killed_between_the_steps(start: Callable[..., Steered], moment: str) -> None:
    vm = start("removals=5 irq=poll")
    for _ in range(5):
        vm.add()
        if moment == "added":
            os.kill(vm.devices()["test0"]["pid"], signal.SIGKILL)
        vm.done()
        if moment == "asked":
            vm.client.call("pause")
            vm.remove()
            os.kill(vm.devices()["test0"]["pid"], signal.SIGKILL)
            vm.client.call("resume")
        else:
            vm.remove()
        vm.done()
    vm.running.finish().check()


def test_a_parked_device_leaves_through_its_drain(start: Callable[..., Steered]) -> None:
    vm = start("load=1 errors=1")
    vm.add(f"path={vm.disk},id=test0,restart_budget=0")
    vm.done()
    eventually(lambda: vm.client.call("counters")["test0"]["write_ops"], "the guest's first write")
    os.kill(vm.devices()["test0"]["pid"], signal.SIGKILL)
    eventually(lambda: vm.devices()["test0"]["state"] == "parked", "the device to be given up")
    vm.remove()
    vm.done()
    assert "failed.3=" in vm.running.finish().check().text  # what it waited for came back, as an error


def test_a_dead_device_that_is_to_leave_waits_no_longer(start: Callable[..., Steered]) -> None:
    vm = start("load=1")
    vm.add(f"path={vm.disk},id=test0,restart_backoff=[600]")
    vm.done()
    os.kill(vm.devices()["test0"]["pid"], signal.SIGKILL)
    eventually(lambda: vm.devices()["test0"]["state"] == "dead", "the death to be noticed")
    vm.remove()
    vm.done()
    vm.running.finish().check()


def test_a_device_given_up_while_it_leaves_is_drained(start: Callable[..., Steered]) -> None:
    vm = start("load=1 errors=1")
    vm.add(f"path={vm.disk},id=test0,restart_budget=0")
    vm.done()
    eventually(lambda: vm.client.call("counters")["test0"]["write_ops"], "the guest's first write")
    vm.client.call("pause")
    vm.remove()
    os.kill(vm.devices()["test0"]["pid"], signal.SIGKILL)
    eventually(lambda: vm.devices()["test0"]["state"] != "serving", "the death to be noticed")
    vm.client.call("resume")
    vm.done()
    vm.running.finish().check()


def test_a_controlplane_killed_between_the_steps(start: Callable[..., Steered]) -> None:
    vm = start("removals=999 drive=0")
    before = vm.footprint()
    for turn in range(12):
        verb = "add" if "test0" not in vm.devices() else "remove"
        pilot = next(one["pid"] for one in vm.processes() if one["role"] == "controlplane")

        def kill(pilot: int = pilot, delay: float = turn * 0.003) -> None:
            time.sleep(delay)
            os.kill(pilot, signal.SIGKILL)

        thread = threading.Thread(target=kill)
        thread.start()
        with Client(vm.client.path, timeout=2) as client, suppress(CellvisorError):
            if verb == "add":
                client.call("add-disk", path=str(vm.disk), id="test0")
            else:
                client.call("remove-device", id="test0")
        thread.join()
        vm.reconnect()
        for operation in vm.operations():
            assert vm.wait(operation["id"])["state"] in ("done", "refused"), (turn, operation)
        states = {key: (one["state"], one["plug"], one["wanted"]) for key, one in vm.devices().items()}
        assert states.pop("test0", ("serving", "enumerated", True)) == ("serving", "enumerated", True), (turn, states)
    if "test0" in vm.devices():
        vm.remove()
        vm.done()
    after = vm.footprint()
    assert {key: after[key] for key in ("free slots", "workers", "core memfd maps")} == {
        key: before[key] for key in ("free slots", "workers", "core memfd maps")}


def test_a_worker_killed_at_its_start_refuses_the_addition(start: Callable[..., Steered]) -> None:
    vm = start("removals=99 drive=0")
    before = vm.footprint()
    outcomes: set[int] = set()
    for turn in range(6):
        stop = threading.Event()

        def hunt(delay: float = turn * 0.002, stop: threading.Event = stop) -> None:
            while not stop.is_set():
                for one in vm_processes(vm):
                    with suppress(ProcessLookupError):
                        time.sleep(delay)
                        os.kill(one, signal.SIGKILL)
                        return

        thread = threading.Thread(target=hunt)
        thread.start()
        try:
            vm.add()
            outcomes.add(200)
        except CellvisorError as error:
            outcomes.add(error.status)
        stop.set()
        thread.join(30)
        if "test0" in vm.devices():
            vm.done()
            vm.remove()
            vm.done()
        eventually(lambda: vm.footprint() == before, "everything to be released")
    assert outcomes <= {200, 400, 409}
