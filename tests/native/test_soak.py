"""A VM that is used without pause: plugged, killed, upgraded, paused, asked by ever new clients. Nothing may grow.

`make soak` takes 10 minutes; as one of the tests it takes some seconds. CELLVISOR_SOAK_SECONDS says how long.
"""

from __future__ import annotations

import contextlib
import os
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellvisor.ctl.client import Client
from tests.native import cellvisor
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.hotplug import Steered, eventually, starting
from tests.native.storm import OPTIONS

pytestmark = [pytest.mark.kvm, needs_kvm]

SECONDS = float(os.environ.get("CELLVISOR_SOAK_SECONDS", "4"))
WARM = 3            # turns after which the short soak counts; a long one takes a fourth of its time
MOST_PSS = 4096     # KiB that a role's processes may differ by: the allocator's moods
UPGRADE_EVERY = 10  # turns


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    yield from starting(vm)


def die(vm: Steered, key: str) -> None:
    """Kill a device's process and wait for the next one."""
    one = vm.devices()[key]
    os.kill(one["pid"], signal.SIGKILL)
    eventually(lambda: (now := vm.devices()[key])["state"] == "serving" and now["generation"] > one["generation"],
               f"the successor of {key}", 60)


def turn(vm: Steered, http: str, number: int) -> None:
    """Everything once: a disk comes, its process dies under load, it goes; the VM pauses, clients come."""
    # Not the slot that was left just now: the guest looks whether that is empty.
    vm.add(f"path={vm.disk},id=test0,pci_device_id={5 + number % 20}")
    vm.done()
    die(vm, "test0")
    vm.remove()
    vm.done()
    die(vm, "__rng")
    if number < 2 or number % UPGRADE_EVERY == 0:
        vm.client.call("upgrade-device", id="__rng")
    for where in (vm.client.path, http):
        with Client(where, 60) as client:
            client.call("pause")
            client.call("resume")
            for verb in ("info", "counters", "events", "ops"):
                client.call(verb)
            assert next(client.events(follow=False))["seq"]


def measure(vm: Steered) -> tuple[dict[str, int], dict[str, int]]:
    """Return what must be the same, and KiB of PSS by role, without guest RAM."""
    same = vm.footprint() | {"memory slots": vm.client.call("info")["core"]["memory_slots"]}
    pss: dict[str, int] = {}
    for one in vm.processes():
        pss[one["role"]] = pss.get(one["role"], 0) + one["pss"] - one["pss_shmem"]
    return same, pss


@pytest.mark.timeout(SECONDS + 300)
def test_nothing_grows(vm: Vm, start: Callable[..., Steered], capsys: pytest.CaptureFixture[str]) -> None:
    http = os.path.join(cellvisor.runtime_dir(vm.where), "http")
    log = Path(vm.where, "log")
    steered = start("removals=1000000000 irq=poll load=1", extra=[
        "--api-socket", http, "--log-file", str(log), "--rng", OPTIONS])
    began, number = time.monotonic(), 0

    def work(seconds: float, least: int) -> None:
        nonlocal number
        until, last = began + seconds, number + least
        while time.monotonic() < until or number < last:
            turn(steered, http, number)
            number += 1

    work(SECONDS / 4, WARM)
    time.sleep(1.0)  # the last that died is seen off
    warm, (same, before) = number, measure(steered)
    work(SECONDS, WARM)
    with contextlib.suppress(AssertionError):  # likewise
        eventually(lambda: measure(steered)[0] == same, "what it had before")
    now, after = measure(steered)
    with capsys.disabled():
        print(f"\n{number} turns in {time.monotonic() - began:.0f} s, measured after {warm} and at the end: {now}, "
              f"KiB of PSS {before} and {after}, log {log.stat().st_size >> 10} KiB")
    assert now == same
    assert same["memory slots"] > 0
    assert set(after) == set(before)
    grown = {role: after[role] - before[role] for role in after}
    assert max(grown.values()) < MOST_PSS, f"KiB that PSS grew: {grown}"
    assert "Traceback" not in log.read_text()
