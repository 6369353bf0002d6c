"""The controlplane, the nursery or core is killed at any moment: the guest does not notice, or nothing is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from tests.native.guest import needs_kvm
from tests.native.owned import OwnedVm, wait_for

pytestmark = [pytest.mark.kvm, needs_kvm]

LOAD = "test=blk-write depth=8 reads=20 flush=37"
LONG = f"{LOAD} count=40000"
CELLVISOR = str(Path(sys.executable).with_name("cellvisor"))


@pytest.mark.parametrize("when", ["before", "during"])
def test_killed_between_every_two_steps_of_boot(tmp_path: Path, disk: Path, when: str) -> None:
    """Until core keeps its state the VM is gone with it; from then on a successor finishes the boot."""
    outcomes = []
    for number in range(60):
        with OwnedVm(tmp_path, f"{LOAD} count=50", [disk], plan=[f"{when} {number}"]) as vm:
            if vm.running.process.wait(60) == 0:
                break  # it had fewer steps
            adopted = wait_for(lambda: not vm.processes() or vm.running.text or vm.answers(), "what follows")
            if adopted is True and not vm.running.text:
                outcomes.append("gone")
                continue
            vm.finish(tidy=False)
            outcomes.append("ok")
    else:
        pytest.fail("a boot has no end of steps")
    assert len(outcomes) >= 12, outcomes
    assert outcomes == sorted(outcomes), f"once recorded, always adopted: {outcomes}"
    assert outcomes.count("gone") <= 5


@pytest.mark.parametrize("second", [f"{when} {number}" for number in range(8) for when in ("before", "during")][::3])
def test_the_successor_is_killed_too(tmp_path: Path, disk: Path, second: str) -> None:
    with OwnedVm(tmp_path, f"{LOAD} count=50", [disk], plan=["before 9", second]) as vm:
        vm.running.process.wait(60)
        vm.finish()


def test_killed_under_load_again_and_again(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.running.wait_for("test=blk-write")
        vm.wait_event("device.activated")
        before = {one["id"]: (one["pid"], one["generation"]) for one in vm.call("devices")["devices"]}
        for generation in (2, 3, 4):
            vm.kill_controlplane()
            vm.wait_adopted(generation)
            assert vm.call("info")["state"] == "Running"
        after = {one["id"]: (one["pid"], one["generation"]) for one in vm.call("devices")["devices"]}
        assert after == before, "a worker was restarted for nothing"
        vm.finish()


def test_what_happens_while_nobody_steers(tmp_path: Path, disk: Path) -> None:
    """A worker dies together with the controlplane: the successor starts the next incarnation."""
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        worker, = vm.pids("worker", "_disk0")
        vm.kill_controlplane()
        os.kill(worker, signal.SIGKILL)
        vm.wait_event("device.restarted", device="_disk0", generation=2)
        vm.finish()


def test_worker_ends_after_an_adoption(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        vm.kill_controlplane()
        vm.wait_adopted()
        os.kill(vm.pids("worker", "_disk0")[0], signal.SIGKILL)
        died = vm.wait_event("device.died", device="_disk0", generation=1)
        assert "SIGKILL" in died["reason"]
        vm.wait_event("device.restarted", device="_disk0", generation=2)
        vm.finish()


def test_shutdown_after_an_adoption_leaves_nothing(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        vm.kill_controlplane()
        vm.wait_adopted()
        vm.call("shutdown")
        vm.wait_gone()


def test_sigterm_ends_the_successor_and_everything(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        vm.kill_controlplane()
        vm.wait_adopted()
        os.kill(vm.answers()["pid"], signal.SIGTERM)  # type: ignore[index]
        vm.wait_gone()


def test_power_off_while_nobody_steers(tmp_path: Path, disk: Path) -> None:
    """The successor is held up until the guest has powered off: it finds that, and cleans up."""
    with OwnedVm(tmp_path, f"{LOAD} count=3000", [disk]) as vm:
        vm.wait_event("device.activated")
        nursery, = vm.pids("nursery")
        os.kill(nursery, signal.SIGSTOP)
        vm.kill_controlplane()
        wait_for(lambda: "result=ok" in vm.running.text, "the guest")
        os.kill(nursery, signal.SIGCONT)
        vm.finish()


def test_adopt_is_refused_while_somebody_steers(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        for name, status, line in (("web", 5, f"controlplane is alive (process {vm.running.process.pid})"),
                                   ("nobody", 3, "no VM 'nobody' is running")):
            done = subprocess.run([CELLVISOR, "adopt", name], env=vm.environ, capture_output=True, text=True,
                                  check=False)
            assert (done.returncode, done.stdout) == (status, "")
            assert line in done.stderr
            assert done.stderr.count("\n") == 1
        vm.call("shutdown")
        vm.wait_gone()


def test_adopted_by_hand_when_the_nursery_died_too(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        nursery, = vm.pids("nursery")
        os.kill(nursery, signal.SIGSTOP)  # it must not be the quicker one
        vm.kill_controlplane()
        os.kill(nursery, signal.SIGKILL)
        assert vm.answers() is None
        with subprocess.Popen([CELLVISOR, "adopt", "web"], env=vm.environ, stderr=subprocess.DEVNULL) as successor:
            vm.wait_adopted()
            assert vm.answers()["pid"] == successor.pid  # type: ignore[index]
            assert vm.pids("nursery") != [nursery]
            os.kill(vm.pids("worker", "_disk0")[0], signal.SIGKILL)
            vm.wait_event("device.restarted", device="_disk0", generation=2)
            vm.finish()
            assert successor.wait(10) == 0


# ---- the nursery


def test_nursery_is_replaced_and_workers_live_on(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        before = sorted(vm.pids("worker"))
        nursery, = vm.pids("nursery")
        for number in (0, 0, 0):  # the number of one that is gone is free again
            os.kill(nursery, signal.SIGKILL)
            vm.wait_event("nursery.died", pid=nursery)
            nursery = wait_for(lambda: next((pid for pid in vm.pids("nursery") if pid != nursery), 0),  # noqa: B023
                               "another nursery")
            vm.wait_event("nursery.started", pid=nursery, number=number)
        assert sorted(vm.pids("worker")) == before
        os.kill(vm.pids("worker", "_disk0")[0], signal.SIGKILL)
        vm.wait_event("device.restarted", device="_disk0", generation=2)
        vm.finish()


def test_nursery_and_worker_die_together(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        for _ in range(3):
            wait_for(lambda: vm.pids("nursery"), "a nursery")
            (nursery,), (worker,) = vm.pids("nursery"), vm.pids("worker", "_disk0")
            os.kill(nursery, signal.SIGKILL)
            os.kill(worker, signal.SIGKILL)
            vm.wait_event("device.died", device="_disk0", pid=worker)
            wait_for(lambda: vm.pids("worker", "_disk0") not in ([], [worker]), "the next worker")  # noqa: B023
        vm.finish()


def test_nursery_that_hangs_is_replaced(tmp_path: Path, disk: Path) -> None:
    """Nobody notices until a worker is wanted; then it is killed, and the worker comes from another one."""
    with OwnedVm(tmp_path, f"{LOAD} count=60000", [disk]) as vm:
        vm.wait_event("device.activated")
        (nursery,), (worker,) = vm.pids("nursery"), vm.pids("worker", "_disk0")
        os.kill(nursery, signal.SIGSTOP)
        os.kill(worker, signal.SIGKILL)
        vm.wait_event("nursery.died", pid=nursery)
        vm.wait_event("device.restarted", device="_disk0")
        assert vm.pids("worker", "_disk0") not in ([], [worker])
        vm.finish()


# ---- core


@pytest.mark.parametrize("orphans", [False, True], ids=["its nursery alive", "their nursery replaced"])
def test_nothing_is_left_a_second_after_core(tmp_path: Path, disk: Path, orphans: bool) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        core, = vm.pids("core")
        if orphans:
            nursery, = vm.pids("nursery")
            os.kill(nursery, signal.SIGKILL)
            vm.wait_event("nursery.started")
            os.kill(vm.pids("worker", "__rng")[0], signal.SIGSTOP)  # one that cannot end by itself
        os.kill(core, signal.SIGKILL)
        time.sleep(1.0)
        assert set(vm.processes()) <= {vm.running.process.pid}
        assert vm.running.process.wait(10) == 1
        assert "core killed by SIGKILL: the VM is gone" in vm.running.log.read_text()
        vm.wait_gone()


def test_core_killed_after_an_adoption(tmp_path: Path, disk: Path) -> None:
    """Its new controlplane is not its parent: it says that it cannot know why."""
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        core, = vm.pids("core")
        vm.kill_controlplane()
        vm.wait_adopted()
        os.kill(core, signal.SIGKILL)
        vm.wait_gone(5.0)
        assert "core died, reason unknown: the VM is gone" in vm.running.log.read_text()


def test_core_and_controlplane_killed_together(tmp_path: Path, disk: Path) -> None:
    with OwnedVm(tmp_path, LONG, [disk]) as vm:
        vm.wait_event("device.activated")
        core, = vm.pids("core")
        vm.kill_controlplane()
        os.kill(core, signal.SIGKILL)
        wait_for(lambda: not vm.processes(), "everything to be gone", 10.0)


# ---- the terminal


def test_the_terminal_is_given_back_by_the_successor(tmp_path: Path) -> None:
    """It was raw for the guest; the shell that is back in the foreground must not find it so. The guest writes on."""
    with OwnedVm(tmp_path, "test=console repeat=100000000 text=x", (), "--console", "tty", "-v", terminal=True) as vm:
        vm.wait_event("vm.booted")
        assert not vm.is_cooked()
        wait_for(lambda: b"x\nx" in vm.screen(), "the guest's output")
        vm.kill_controlplane()
        wait_for(vm.is_cooked, "the terminal")
        vm.wait_adopted()
        vm.screen()
        wait_for(lambda: b"x\r\nx" in vm.screen(), "the guest's output")
        vm.call("shutdown")
        vm.wait_gone()
        assert vm.is_cooked()


def test_what_is_typed_is_not_the_guests_any_more(tmp_path: Path) -> None:
    """It reads the terminal like the shell, but after an adoption it must not take one key."""
    with OwnedVm(tmp_path, "test=console lines=1000", (), "--console", "tty", "-v", terminal=True) as vm:
        vm.wait_event("device.activated", device="__console")
        assert vm.type(b"for the guest\n") == b""
        wait_for(lambda: "line.0=FOR THE GUEST" in vm.running.text, "the guest to read")
        vm.kill_controlplane()
        vm.wait_adopted()
        assert vm.type(b"for the shell\n") == b"for the shell\n"
        os.kill(vm.pids("worker", "__console")[0], signal.SIGKILL)
        vm.wait_event("device.restarted", device="__console")
        assert vm.type(b"not for its successor either\n") == b"not for its successor either\n"
        assert vm.running.text.count("line.") == 1
        vm.call("shutdown")
        vm.wait_gone()
