"""A device that is given up keeps the guest waiting until it is restarted by hand, or has its requests failed."""

from __future__ import annotations

import os
import signal
import struct
import subprocess
import sys
import time
from fcntl import F_OFD_SETLK, F_WRLCK, fcntl
from pathlib import Path

import pytest

from cellvisor.core.errors import Conflict, NotFound
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.owned import OwnedVm, wait_for
from tests.native.steer import Steer, steer

pytestmark = [pytest.mark.kvm, needs_kvm]
CELLVISOR = str(Path(sys.executable).with_name("cellvisor"))
LOAD = "test=blk-write reads=30 depth=16 span=8M flush=50 duration_ms=4000 progress_ms=100"


def park(vmm: Steer) -> None:
    """Kill a disk that is not restarted."""
    pid = vmm.signal("blk")
    parked = vmm.wait("device.parked")
    assert parked["pid"] == pid
    assert parked["reason"].endswith("killed by SIGKILL")
    assert vmm.device()["state"] == "parked"


def test_requests_wait_until_it_is_restarted(vm: Vm, disk: Path) -> None:
    with steer(vm, LOAD, disks=[f"path={disk},restart_budget=0,id=data"]) as vmm:
        vmm.running.wait_for("progress=")
        with pytest.raises(Conflict, match="data: is serving, not parked"):
            vmm.client.call("restart-device", id="data")
        with pytest.raises(NotFound):
            vmm.client.call("restart-device", id="nobody")
        park(vmm)
        answer = vmm.client.call("restart-device", id="data")
        assert answer["generation"] == 2
        assert vmm.device()["state"] == "serving"
        said = vmm.running.finish().check()
    assert said.number("errors") == 0


def test_the_budget_is_per_window(vm: Vm, disk: Path) -> None:
    options = "restart_budget=2,restart_window=600,restart_backoff=[0]"
    with steer(vm, LOAD, disks=[f"path={disk},id=data,{options}"]) as vmm:
        for generation in (2, 3):
            vmm.signal("blk")
            assert vmm.wait("device.restarted")["generation"] == generation
        park(vmm)
        vmm.client.call("restart-device", id="data")
        vmm.signal("blk")  # the budget is full again
        assert vmm.wait("device.restarted")["generation"] == 5
        said = vmm.running.finish().check()
    assert said.number("errors") == 0


def test_a_drained_device_fails_every_request_and_can_come_back(vm: Vm, disk: Path) -> None:
    load = "test=blk-bench op=randwrite depth=16 span=8M duration_ms=6000 progress_ms=100 tolerate=1"
    with steer(vm, load, disks=[f"path={disk},restart_budget=0,id=data"]) as vmm:
        vmm.running.wait_for("progress=")
        park(vmm)
        vmm.client.call("drain-device", id="data")
        assert vmm.device()["state"] == "draining"
        before = vmm.running.text.count("progress=")
        while vmm.running.text.count("progress=") < before + 2:
            time.sleep(0.05)
        vmm.client.call("restart-device", id="data")
        assert vmm.device()["state"] == "serving"
        said = vmm.running.finish().check()
    assert 0 < said.number("errors") < said.number("requests")


def test_a_driver_s_reset_of_a_parked_device_ends(vm: Vm, disk: Path, tmp_path: Path) -> None:
    status = "1.common+20"
    lines = ["test blk-info", "say ready", "sleep 2000000", f"w8 {status} 0", f"wait8 {status} 0xff 0 10000",
             "say reset", "sleep 1000000", "test blk-info", "say again"]
    script = tmp_path / "script"
    script.write_text("\n".join(lines) + "\n")
    with steer(vm, "test=script", initramfs=script, disks=[f"path={disk},restart_budget=0,id=data"]) as vmm:
        assert vmm.device()["slot"] == 1
        vmm.running.wait_for("say=ready")
        park(vmm)
        vmm.wait("device.drained")
        assert vmm.device()["state"] == "parked"
        vmm.running.wait_for("say=reset")
        vmm.client.call("restart-device", id="data")
        said = vmm.running.finish().check()
    assert said.text.count("serial=data") == 2


def test_a_machine_reset_with_a_parked_device_ends(vm: Vm, disk: Path) -> None:
    with steer(vm, LOAD, disks=[f"path={disk},restart_budget=0,id=data"]) as vmm:
        vmm.running.wait_for("progress=")
        park(vmm)
        vmm.client.call("reset")
        vmm.wait("device.drained")  # its process may end a moment later than the reset that it finished
        vmm.wait("vm.rebooted")
        vmm.running.wait_for("guest=1\n", 10)
        vmm.client.call("restart-device", id="data")
        said = vmm.running.finish().check()
    assert said.number("errors") == 0
    assert said.text.count("test=blk-write") == 2


def test_a_stranger_who_took_the_lock_is_named_and_nothing_replayed(vm: Vm, disk: Path) -> None:
    with steer(vm, LOAD, disks=[f"path={disk},id=data"]) as vmm:
        vmm.running.wait_for("progress=")
        nursery = vmm.pid("nursery")
        os.kill(nursery, signal.SIGSTOP)
        vmm.signal("blk")
        with disk.open("r+b") as stranger:
            while True:
                try:
                    fcntl(stranger, F_OFD_SETLK, struct.pack("@hhqqi4x", F_WRLCK, 0, 0, 0, 0))
                    break
                except BlockingIOError:
                    continue
            before = disk.read_bytes()
            os.kill(nursery, signal.SIGCONT)
            reason = vmm.wait("device.parked")["reason"]
            assert f"path={disk} is in use by" in reason
            assert f"(pid {os.getpid()})" in reason
            assert disk.read_bytes() == before
        vmm.client.call("restart-device", id="data")
        said = vmm.running.finish().check()
    assert said.number("errors") == 0


def test_a_driver_s_reset_that_begins_while_nobody_steers_ends(disk: Path, tmp_path: Path) -> None:
    status = "2.common+20"  # after the console
    lines = ["test blk-info", "say ready", "sleep 6000000", f"w8 {status} 0", "say resetting",
             f"wait8 {status} 0xff 0 60000", "say done"]
    script = tmp_path / "script"
    script.write_text("\n".join(lines) + "\n")
    with OwnedVm(tmp_path, "test=script", [f"path={disk},restart_budget=0,id=data"], "--initramfs", str(script)) as vm:
        vm.running.wait_for("say=ready")
        os.kill(vm.pids("worker", "data")[0], signal.SIGKILL)
        vm.wait_event("device.parked")
        nursery, = vm.pids("nursery")
        os.kill(nursery, signal.SIGSTOP)  # it must not start a successor
        vm.kill_controlplane()
        os.kill(nursery, signal.SIGKILL)
        assert "resetting" not in vm.running.text
        wait_for(lambda: "say=resetting" in vm.running.text, "the guest")
        with subprocess.Popen([CELLVISOR, "adopt", "web"], env=vm.environ, stderr=subprocess.DEVNULL) as successor:
            vm.wait_event("device.drained")
            assert "say=done" in vm.finish().text
            assert successor.wait(10) == 0
