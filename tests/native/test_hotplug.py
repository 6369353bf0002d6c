"""Devices that come and go under a running guest, which plays the operating system's part (tests/guest/hotplug.c)."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError, Conflict, NotFound, TryAgain
from cellvisor.core.wire.control import TEXT
from cellvisor.ctl.client import Client
from tests.native import cellvisor
from tests.native.conftest import Vm
from tests.native.guest import Running, make_disk, needs_kvm

pytestmark = [pytest.mark.kvm, needs_kvm]


class Steered:
    """A running VM with a client; `disk` is the image to add."""

    def __init__(self, vm: Vm, running: Running) -> None:
        self.vm, self.running = vm, running
        self.disk = make_disk(vm.where / "added.raw", 16 << 20)
        self.directory = Path(cellvisor.runtime_dir(vm.where)) / "cellvisor"
        self.client: Client = eventually(lambda: self.connect(self.directory), "the API")

    def reconnect(self) -> None:
        self.client.close()
        self.client = eventually(lambda: self.connect(self.directory), "the next controlplane")

    def connect(self, directory: Path) -> Client | None:
        for name in directory.iterdir() if directory.exists() else ():
            with suppress(CellvisorError):
                client = Client(str(name), timeout=60)
                try:
                    client.call("ping")
                    return client
                except CellvisorError:
                    client.close()
        return None

    def another_client(self) -> Client:
        return Client(self.client.path, timeout=60)

    def add(self, text: str = "", verb: str = "add-disk", **more: Any) -> dict[str, Any]:
        options = f"path={self.disk},id=test0" if verb == "add-disk" and not text else text
        answer = self.client.call(verb, **more, **{TEXT: options})
        return {"id": answer["id"], "bdf": answer["bdf"]}

    def remove(self, key: str = "test0", **more: Any) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.call("remove-device", id=key, **more)
        return answer

    def wait(self, key: str = "test0", timeout: float = 30) -> dict[str, Any]:
        answer: dict[str, Any] = self.client.call("ops", action="wait", id=key, timeout=timeout)
        return answer

    def done(self, key: str = "test0") -> dict[str, Any]:
        operation = self.wait(key)
        assert operation["state"] == "done", (operation, self.running.text)
        return operation

    def devices(self) -> dict[str, dict[str, Any]]:
        return {one["id"]: one for one in self.client.call("devices")["devices"]}

    def operations(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.call("ops", action="list")["operations"]
        return found

    def events(self, name: str) -> list[dict[str, Any]]:
        return [one["properties"] for one in self.client.call("events")["events"] if one["event"] == name]

    def processes(self) -> list[dict[str, Any]]:
        found: list[dict[str, Any]] = self.client.call("info", processes=True)["processes"]
        return found

    def footprint(self) -> dict[str, int]:
        """Count what must not grow, once it has settled: core lets a worker's last descriptors go when it has seen
        its end, which may be after the answer."""
        before, now = {}, self.count()
        while before != now:
            time.sleep(0.1)
            before, now = now, self.count()
        return now

    def count(self) -> dict[str, int]:
        """Count descriptors of each kind of process, mappings of core, processes, slots."""
        counted = {"free slots": self.client.call("capacity")["slots"]["free"]}
        for one in self.processes():
            if one["role"] != "worker":
                counted[f"{one['role']} fds"] = len(os.listdir(f"/proc/{one['pid']}/fd"))
            counted[f"{one['role']}s"] = counted.get(f"{one['role']}s", 0) + 1
            if one["role"] == "core":
                maps = Path(f"/proc/{one['pid']}/maps").read_text()
                counted["core memfd maps"] = maps.count("/memfd:")
        return counted


def eventually(condition: Callable[[], Any], what: str, timeout: float = 30) -> Any:
    until = time.monotonic() + timeout
    while not (found := condition()):
        assert time.monotonic() < until, f"waited in vain for {what}"
        time.sleep(0.02)
    return found


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    """Start the guest with `test=hotplug WORDS` and wait until it listens."""
    made: list[Steered] = []

    def begin(words: str = "", *, listening: bool = True, **options: Any) -> Steered:
        running = vm.start(f"test=hotplug {words}", **{"console": "null", **options})
        made.append(Steered(vm, running))
        if listening:
            running.wait_for("listening=1")
        return made[-1]

    yield begin
    for steered in made:
        steered.client.close()


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
    assert vm.remove("_disk0", timeout=0.3)["operation"] == first["operation"]
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
    assert vm.wait(timeout=0.2)["state"] == "guest-notified"
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


@pytest.mark.parametrize(("text", "status", "message"), [
    ("path=/nowhere/at/all", 400, "/nowhere/at/all"),
    ("path={disk},id=_disk0", 409, "id=_disk0"),
    ("path={disk},id=__x", 400, "id=__x"),
    ("path={disk},pci_device_id=0", 400, "pci_device_id=0 is reserved"),
    ("path={disk},pci_device_id=32", 400, "pci_device_id=32 is outside the range 0..32"),
    ("path={disk},pci_device_id=2", 409, "Valid PCI device identifier but already used: 2"),
    ("path={locked}", 400, "is in use by"),
    ("path={odd}", 400, "odd.raw"),
    ("path={disk},colour=red", 400, "colour"),
    ("readonly=on", 400, "path"),
])
def test_bad_input_leaves_nothing_half_made(start: Callable[..., Steered], disk: Path, text: str, status: int,
                                            message: str) -> None:
    vm = start("removals=99", disks=[disk])
    (vm.vm.where / "odd.raw").write_bytes(b"x" * 777)
    before, devices = vm.footprint(), vm.devices()
    text = text.format(disk=vm.disk, locked=disk, odd=vm.vm.where / "odd.raw")
    with pytest.raises(CellvisorError) as refused:
        vm.add(text)
    assert refused.value.status == status
    assert message in str(refused.value)
    eventually(lambda: vm.footprint() == before, "everything to be released")
    assert vm.devices() == devices
    assert vm.add()["bdf"] == "0000:00:04.0"


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
    time.sleep(0.2)
    os.kill(vm.devices()["test0"]["pid"], signal.SIGKILL)
    eventually(lambda: vm.devices()["test0"]["state"] == "parked", "the device to be given up")
    vm.remove()
    vm.done()
    assert "failed.3=" in vm.running.finish().check().text  # what it waited for came back, as an error


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


def vm_processes(vm: Steered) -> list[int]:
    """Return the workers of test0, by the name that a worker gives itself."""
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal():
            with suppress(OSError):
                if Path(f"/proc/{name}/comm").read_text().strip() == "cv-test0":
                    environ = Path(f"/proc/{name}/environ").read_bytes()
                    if cellvisor.runtime_dir(vm.vm.where).encode() in environ:
                        found.append(int(name))
    return found


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
