"""The disk's process is killed while the guest resets the machine over and over: every reset ends, nothing is lost."""

from __future__ import annotations

import contextlib
import os
import random
import signal
import time
from pathlib import Path

import pytest

from tests.native.guest import needs_kvm
from tests.native.owned import OwnedVm, wait_for

pytestmark = [pytest.mark.kvm, needs_kvm]

KILLS = 20


@pytest.mark.parametrize("seed", [1, 2])
def test_worker_killed_while_the_machine_resets(tmp_path: Path, disk: Path, seed: int) -> None:
    """A reset waits until the next incarnation has passed the fence; each boot counts itself on the disk once."""
    chance = random.Random(seed)
    boots = 150
    with OwnedVm(tmp_path, f"test=blk-boots boots={boots}", [f"path={disk},restart_budget=1000,id=data"]) as vm:
        vm.running.wait_for("boot=2\n")
        killed = -1
        for _ in range(KILLS):
            def other_worker(last: int = killed) -> int:
                pids = [one["pid"] for one in vm.call("devices")["devices"]
                        if one["id"] == "data" and one["state"] == "serving"]
                return next((pid for pid in pids if pid not in (None, last)), 0)

            killed = wait_for(other_worker, "the next incarnation")
            time.sleep(chance.uniform(0, 0.06))
            os.kill(killed, signal.SIGKILL)
        wait_for(lambda: f"boot={boots}\n" in vm.running.text, lambda: f"boot {boots}: {vm.running.text[-300:]}", 120.0)
        said = vm.finish().text
    assert [int(line[5:]) for line in said.splitlines() if line.startswith("boot=")] == list(range(1, boots + 1))


def test_killed_worker_and_controlplane_while_the_machine_resets(tmp_path: Path, disk: Path) -> None:
    boots = 100
    with OwnedVm(tmp_path, f"test=blk-boots boots={boots}", [f"path={disk},restart_budget=1000,id=data"]) as vm:
        vm.running.wait_for("boot=2\n")
        for generation in (2, 3, 4):
            worker = wait_for(lambda: vm.pids("worker", "data"), "a worker")[0]
            with contextlib.suppress(ProcessLookupError):  # killed before and not noticed yet
                os.kill(worker, signal.SIGKILL)
            vm.kill_controlplane()
            vm.wait_adopted(generation)
        vm.finish()
