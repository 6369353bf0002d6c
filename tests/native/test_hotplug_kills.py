"""Controlplane, nursery or worker killed between every two steps of adding and of removing (fakes/crash_run.py)."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path

import pytest

from cellvisor.core.errors import CellvisorError
from cellvisor.ctl.client import Client
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.hotplug import Steered, eventually, starting
from tests.native.owned import CRASH_RUN

pytestmark = [pytest.mark.kvm, needs_kvm]

WORKER = "cv-test0"
SETTLED = ("serving", "enumerated", True)


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    yield from starting(vm)


@pytest.mark.parametrize("when", ["before", "during"])
@pytest.mark.parametrize("victim", ["self", "cv-nursery", WORKER])
def test_hotplug_killed_between_every_two_steps(start: Callable[..., Steered], tmp_path: Path, victim: str,
                                                when: str) -> None:
    """Whatever dies, each operation ends, the device is wholly there or wholly gone, and can come and go again."""
    order = tmp_path / "order"
    vm = start("removals=9999 drive=0", program=[sys.executable, str(CRASH_RUN)], environ={"CRASH_ORDER": str(order)})
    before = vm.footprint()
    for verb in ("add-disk", "remove-device"):
        for number in range(40):
            _have(vm, verb == "remove-device")
            order.write_text(f"{when} {number} {victim}")
            _ask(vm, verb)
            with suppress(FileNotFoundError):  # carried out
                order.unlink()
                break  # it had fewer steps
            if victim == "self":
                vm.reconnect()
            _check(vm, f"{verb}, {when} {number}")
        else:
            pytest.fail(f"{verb} has no end of steps")
        assert number >= (4 if verb == "add-disk" else 2)
    _have(vm, False)
    kept = ("free slots", "workers", "core memfd maps")
    after = vm.footprint()
    assert {key: after[key] for key in kept} == {key: before[key] for key in kept}


def _have(vm: Steered, there: bool) -> None:
    if there and "test0" not in vm.devices():
        vm.add()
        vm.done()
    elif not there and "test0" in vm.devices():
        vm.remove()
        vm.done()


def _ask(vm: Steered, verb: str) -> None:
    """Ask and wait for the outcome, as far as there is somebody to tell it."""
    args = {"path": str(vm.disk)} if verb == "add-disk" else {}
    with Client(vm.client.path, timeout=30) as client, suppress(CellvisorError):
        client.call(verb, id="test0", **args)
        client.call("ops", action="wait", id="test0", timeout=30)


def _check(vm: Steered, what: str) -> None:
    for operation in vm.operations():
        assert vm.wait(operation["id"])["state"] in ("done", "refused"), (what, operation)

    def settled() -> bool:
        devices = vm.devices()
        one = devices.get("test0")
        return one is None or (one["state"], one["plug"], one["wanted"]) == SETTLED

    eventually(settled, f"{what}: {vm.devices()}")
