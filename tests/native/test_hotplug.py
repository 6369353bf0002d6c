"""Devices that come and go under a running guest, which plays the operating system's part."""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellvisor.core.errors import Conflict, TryAgain
from tests.native import cellvisor
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.hotplug import Steered, eventually, starting

pytestmark = [pytest.mark.kvm, needs_kvm]


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    """Start the guest of tests/guest/hotplug.c with some words."""
    yield from starting(vm)


def test_disk_comes_works_and_goes(start: Callable[..., Steered], disk: Path) -> None:
    vm = start("removals=2", disks=[disk])
    assert vm.add() == {"id": "test0", "bdf": "0000:00:04.0"}
    times = vm.done()["times"]
    assert times["ready"] <= times["guest-notified"] <= times["enumerated"] <= times["done"]
    eventually(lambda: vm.devices()["test0"]["plug"] == "bound", "the driver")
    assert vm.running.wait_for("in.4=1af4:1042")
    assert vm.remove()["bdf"] == "0000:00:04.0"
    vm.done()
    assert "test0" not in vm.devices()
    assert [one["id"] for one in vm.events("device.removed")] == ["test0"]
    assert any(vm.disk.read_bytes())  # what the guest wrote arrived
    assert vm.add() == {"id": "test0", "bdf": "0000:00:04.0"}
    vm.done()
    vm.remove()
    said = vm.running.finish().check()
    assert (said.number("insertions"), said.number("removals")) == (2, 2)


def test_ids_count_on_and_slots_are_reused(start: Callable[..., Steered], disk: Path) -> None:
    vm = start("removals=9 drive=0", disks=[disk])
    first = vm.add(f"path={vm.disk}")
    assert first == {"id": "_disk1", "bdf": "0000:00:04.0"}
    assert vm.add(verb="add-rng") == {"id": "_rng2", "bdf": "0000:00:05.0"}
    assert vm.add("pci_device_id=9", verb="add-virtio", type="rng") == {"id": "_rng3", "bdf": "0000:00:09.0"}
    vm.done("_disk1")
    vm.remove("_disk1")
    vm.done("_disk1")
    assert vm.add(f"path={vm.disk}") == {"id": "_disk4", "bdf": "0000:00:04.0"}
    dry = vm.client.call("validate", verb="add-rng")
    assert (dry["id"], dry["bdf"], dry["options"]["src"]) == ("_rng5", "0000:00:06.0", "/dev/urandom")
    assert vm.client.call("capacity")["slots"] == {"total": 31, "free": 25, "next": 6}


def test_a_hundred_times_leaves_nothing_behind(start: Callable[..., Steered]) -> None:
    vm = start("removals=100 irq=poll")
    begun: dict[str, int] = {}
    for turn in range(100):
        vm.add()
        vm.done()
        vm.remove()
        vm.done()
        if turn == 4:
            begun = vm.footprint()
        if turn == 98:
            assert vm.footprint() == begun
    said = vm.running.finish().check()
    assert (said.number("insertions"), said.number("removals")) == (100, 100)


def test_msix_vectors_are_given_back(start: Callable[..., Steered]) -> None:
    vm = start("removals=20")
    for _ in range(20):
        vm.add()
        vm.done()
        vm.remove()
        vm.done()
    assert vm.running.finish().check().number("insertions") == 20


def test_removal_under_load(start: Callable[..., Steered]) -> None:
    vm = start("removals=5 load=1")
    for _ in range(5):
        vm.add()
        vm.done()
        time.sleep(0.1)
        vm.remove()
        vm.done()
    assert vm.running.finish().check().number("written") > 100


def test_an_eject_that_nobody_asked_for_is_refused(start: Callable[..., Steered], disk: Path) -> None:
    vm = start("unasked=2", disks=[disk])
    assert vm.events("eject.unexpected") == [{"device": "_disk0", "slot": 2}]
    assert vm.devices()["_disk0"]["state"] == "serving"
    assert "unasked.up=0x4" in vm.running.text
    vm.remove("_disk0")
    assert vm.done("_disk0")["times"]["done"] > 0
    assert vm.running.finish().check().number("removals") == 1


def test_a_guest_may_refuse(start: Callable[..., Steered]) -> None:
    vm = start("refuse=1 load=1")
    vm.add()
    vm.done()
    vm.remove()
    refused = vm.wait()
    assert refused["state"] == "refused"
    assert "it is busy" in refused["reason"]
    assert vm.devices()["test0"]["wanted"]
    vm.remove()
    vm.done()
    vm.running.finish().check()


def test_a_silent_guest_times_out_is_asked_again_and_cancelled(start: Callable[..., Steered], disk: Path) -> None:
    vm = start("deaf=1", disks=[disk])
    first = vm.remove("_disk0", timeout=0.3)
    assert vm.wait("_disk0")["state"] == "timed-out"
    assert not vm.devices()["_disk0"]["wanted"]
    assert vm.remove("_disk0", timeout=2)["operation"] == first["operation"]
    assert vm.client.call("ops", action="show", id="_disk0")["state"] == "guest-notified"
    assert vm.wait("_disk0")["state"] == "timed-out"
    assert vm.client.call("ops", action="cancel", id="_disk0")["state"] == "cancelled"
    device = vm.devices()["_disk0"]
    assert (device["wanted"], device["plug"], device["state"]) == (True, "enumerated", "serving")
    with pytest.raises(Conflict, match="is cancelled"):
        vm.client.call("ops", action="cancel", id=first["operation"])


def test_a_device_that_no_guest_looks_at_is_cancelled(start: Callable[..., Steered]) -> None:
    vm = start("deaf=1")
    before = vm.footprint()
    vm.add()
    eventually(lambda: vm.wait(timeout=0.2)["state"] == "guest-notified", "the guest to be told")
    assert vm.devices()["test0"]["plug"] == "inserting"
    assert vm.client.call("ops", action="cancel", id="test0")["state"] == "cancelled"
    eventually(lambda: "test0" not in vm.devices(), "the device to be gone")
    eventually(lambda: vm.footprint() == before, "everything to be released")


def test_no_addition_is_lost_while_the_guest_boots(start: Callable[..., Steered]) -> None:
    vm = start("insertions=20 removals=0 delay=700", listening=False)
    for _ in range(20):
        vm.add(verb="add-rng")
        time.sleep(0.02)
    said = vm.running.finish().check()
    assert len(re.findall(r"^in\.\d+=1af4:1044", said.text, re.M)) == 20


def test_what_is_asked_while_paused_happens_after(start: Callable[..., Steered], disk: Path) -> None:
    vm = start("insertions=1 removals=1", disks=[disk])
    vm.client.call("pause")
    assert vm.add()["bdf"] == "0000:00:04.0"
    vm.remove("_disk0")
    assert {one["state"] for one in vm.operations()} == {"guest-notified"}
    vm.client.call("resume")
    vm.done("test0")
    vm.done("_disk0")
    vm.running.finish().check()


def test_a_reset_completes_what_is_pending(start: Callable[..., Steered], disk: Path) -> None:
    vm = start("deaf=1", disks=[disk])
    vm.add()
    vm.remove("_disk0")
    vm.client.call("reset")
    assert vm.done("test0")["reason"] == "there since the reboot"
    assert vm.done("_disk0")["reason"] == "by reset"
    listed = vm.devices()
    assert (listed["test0"]["slot"], listed["test0"]["plug"]) == (4, "enumerated")
    assert "_disk0" not in listed
    vm.client.call("reset")
    assert list(vm.devices()) == ["__console", "__rng", "test0"]


def test_additions_during_resets_are_not_lost(start: Callable[..., Steered]) -> None:
    vm = start("removals=99 drive=0")
    stop = threading.Event()

    def reset() -> None:
        with vm.another_client() as client:
            while not stop.is_set():
                client.call("reset")

    thread = threading.Thread(target=reset)
    thread.start()
    try:
        added = [vm.add(verb="add-rng")["id"] for _ in range(12)]
    finally:
        stop.set()
        thread.join(60)
    for key in added:
        vm.done(key)
    assert {vm.devices()[key]["plug"] for key in added} == {"enumerated"}
    assert vm.client.call("info")["state"] == "Running"


def test_a_reboot_keeps_slots_and_leaks_nothing(start: Callable[..., Steered], disk: Path) -> None:
    vm = start("removals=99", disks=[disk])
    vm.add(f"path={vm.disk},id=test0,pci_device_id=7")
    vm.done()
    vm.client.call("reset")
    begun = vm.footprint()
    for _ in range(10):
        vm.client.call("reset")
        assert vm.devices()["test0"]["slot"] == 7
    assert vm.footprint() == begun


def test_the_command_line_shows_progress(start: Callable[..., Steered]) -> None:
    vm = start("removals=2 drive=0")
    program = str(Path(sys.executable).with_name("cellvisor"))
    environment = {**os.environ, "XDG_RUNTIME_DIR": cellvisor.runtime_dir(vm.vm.where)}

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([program, *words], env=environment, capture_output=True, text=True, timeout=60,
                              check=False)

    added = run("add-disk", f"path={vm.disk},id=test0")
    assert added.returncode == 0, added.stderr
    assert re.search(r"^test0 0000:00:03.0: done after \d+ ms$", added.stdout, re.M)
    removed = json.loads(run("remove-device", "test0", "--json").stdout)
    assert removed["operation"]["state"] == "done"
    told = json.loads(run("add-rng", "--json", "--no-wait").stdout)
    assert (told["id"], told["bdf"]) == ("_rng0", "0000:00:03.0")
    assert run("ops", "wait", "_rng0").returncode == 0
    listed = run("ops").stdout
    assert [line.split()[1] for line in listed.splitlines()[1:]] == ["add-disk", "remove-device", "add-rng"]
    failed = run("add-disk", "path=/nowhere")
    assert (failed.returncode, failed.stderr.count("\n")) == (2, 1)
    assert run("capacity").stdout.startswith("PCI slots: 28 of 31 free, next: 4")
    assert run("validate", "add-disk", f"path={vm.disk}").stdout.startswith("would become _disk")


def test_time_outs_have_their_own_exit_status(start: Callable[..., Steered]) -> None:
    vm = start("deaf=1")
    vm.remove("__rng", timeout=0.1)
    with pytest.raises(TryAgain, match="timed-out"):
        from cellvisor.ctl import plugging

        raise plugging.outcome(vm.wait("__rng"))
