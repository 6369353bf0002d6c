"""Disks with limits: they hold whoever dies, nothing is lost, and pause, reset and removal do not wait for tokens."""

from __future__ import annotations

import os
import signal
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError
from tests.native.conftest import Vm
from tests.native.guest import make_disk, needs_kvm
from tests.native.hotplug import eventually
from tests.native.owned import OwnedVm
from tests.native.steer import steer

pytestmark = [pytest.mark.kvm, needs_kvm]
OFTEN = "restart_budget=10000,restart_backoff=[0]"
LOAD = "test=blk-write reads=30 depth=32 span=1M flush=50 progress_ms=50"
HOUR = 3_600_000
STUCK = {"ops_size": 1, "ops_refill_time": HOUR}


def held_up(ask: Callable[..., Any], key: str = "_disk0") -> None:
    eventually(lambda: ask("counters")[key].get("throttled"), "the limit to hold")


@pytest.mark.parametrize(("limits", "count", "seconds"), [
    ("ops_size=100,ops_refill_time=100", 2000, 1.5),  # 1,000 a second, of which the first 100 are there
    ("bw_size=1M,bw_refill_time=250", 1500, 1.0),     # 4 MiB a second of 6 and more
])
def test_a_limit_from_the_start(vm: Vm, disk: Path, limits: str, count: int, seconds: float) -> None:
    said = vm(f"{LOAD} count={count}", disks=[f"path={disk},{limits}"]).check()
    assert said.number("errors") == 0
    assert said.number("elapsed_us") >= seconds * 1e6


def test_limits_while_processes_die(vm: Vm, disk: Path) -> None:
    with steer(vm, f"{LOAD} duration_ms=4000", disks=[f"path={disk},ops_size=200,ops_refill_time=100,{OFTEN}"]) as vmm:
        vmm.running.wait_for("progress=")
        for _ in range(5):
            vmm.signal()
            vmm.wait("device.restarted")
        vmm.client.call("pause")
        vmm.client.call("resume")
        held_up(vmm.client.call)
        said = vmm.running.finish().check()
    assert said.number("errors") == 0
    assert said.number("requests") <= 2000 * (said.number("elapsed_us") / 1e6) + 200 + 32


def test_limits_change_and_outlive_every_process(disk: Path, tmp_path: Path) -> None:
    """One request an hour holds the guest up until it is taken back: a death, an adoption, an upgrade, a reset."""
    with OwnedVm(tmp_path, f"{LOAD} count=2000", [f"path={disk},{OFTEN}"]) as vm:
        vm.wait_event("device.activated")
        vm.call("set-rate-limit", id="_disk0", **STUCK)
        held_up(vm.call)
        for wrong, message in (({"bw_size": 5}, "bw_size=5 needs bw_refill_time"),
                               ({"group": "g"}, "id=_disk0 and group=g")):
            with pytest.raises(CellvisorError, match=message):
                vm.call("set-rate-limit", id="_disk0", **wrong)
        vm.call("pause")
        vm.call("resume")
        os.kill(vm.pids("worker", "_disk0")[0], signal.SIGKILL)
        vm.wait_event("device.restarted", generation=2)
        held_up(vm.call)
        vm.kill_controlplane()
        vm.wait_adopted()
        options = vm.call("info")["config"]["disks"][0]
        assert (options["ops_size"], options["bw_size"]) == (1, 0)
        vm.call("upgrade-device", id="_disk0")
        held_up(vm.call)
        vm.call("reset")  # does not wait for an hour
        vm.wait_event("vm.rebooted")
        held_up(vm.call)
        assert served(vm.call) <= 1
        vm.call("set-rate-limit", id="_disk0", ops_size=0)
        said = vm.finish()
    assert said.number("errors") == 0


def served(ask: Callable[..., Any]) -> int:
    return sum(one["read_ops"] + one["write_ops"] for one in ask("counters").values() if "read_ops" in one)


def test_a_group_is_one_budget_for_all_its_disks(disk: Path, tmp_path: Path) -> None:
    """20 requests in an hour, whichever process or controlplane asks for them."""
    other = str(make_disk(tmp_path / "other.raw"))
    group = ["--rate-limit-group", f"id=g,ops_size=20,ops_refill_time={HOUR}", "id=h"]
    with OwnedVm(tmp_path, f"{LOAD} count=2000", [f"path={disk},rate_limit_group=g,{OFTEN}"], *group) as vm:
        vm.wait_event("device.activated")
        held_up(vm.call)
        assert 0 < served(vm.call) <= 20
        os.kill(vm.pids("worker", "_disk0")[0], signal.SIGKILL)
        vm.wait_event("device.restarted", generation=2)
        held_up(vm.call)
        assert served(vm.call) == 0, "a successor counts from 0 and finds the same empty budget"
        vm.kill_controlplane()
        vm.wait_adopted()
        for wrong, message in (({"rate_limit_group": "x"}, "rate_limit_group=x is not a rate limit group of this VM"),
                               ({"rate_limit_group": "g", "bw_size": 5, "bw_refill_time": 5}, "beside rate_limit")):
            with pytest.raises(CellvisorError, match=message) as caught:
                vm.call("add-disk", path=other, **wrong)
            assert caught.value.status == 400
        vm.call("add-disk", path=other, id="other", rate_limit_group="g")
        with pytest.raises(CellvisorError, match="shares the limits of rate_limit_group=g"):
            vm.call("set-rate-limit", id="other", ops_size=0)
        vm.call("remove-device", id="other", host_only=True)
        groups = vm.call("info")["config"]["rate_limit_groups"]
        assert [one["id"] for one in groups] == ["g", "h"]
        assert groups[0]["rate_limiter_config"]["ops"]["size"] == 20
        vm.call("set-rate-limit", group="g", ops_size=0)
        said = vm.finish()
    assert said.number("errors") == 0


def test_a_held_up_disk_can_leave(vm: Vm, disk: Path) -> None:
    with steer(vm, f"{LOAD} count=2000", disks=[f"path={disk},ops_size=1,ops_refill_time={HOUR}"]) as vmm:
        held_up(vmm.client.call)
        vmm.client.call("remove-device", id="_disk0", host_only=True)
        vmm.wait("device.removed")
        vmm.running.stop()
