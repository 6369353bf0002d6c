"""A device's process that hangs is killed and replaced; one that waits for its back end gets longer; a stopped
core blames nobody."""

from __future__ import annotations

import os
import signal
import time
from pathlib import Path

import pytest

from tests.fakes.site import install
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.steer import steer

pytestmark = [pytest.mark.kvm, needs_kvm]
LOAD = "test=blk-write reads=30 depth=16 span=8M flush=50"


def test_a_stopped_worker_is_replaced_under_load(vm: Vm, disk: Path) -> None:
    with steer(vm, f"{LOAD} duration_ms=5000 progress_ms=200", disks=[f"path={disk},hang_timeout=0.5"]) as vmm:
        vmm.running.wait_for("progress=")
        pid = vmm.signal("blk", signal.SIGSTOP)
        died = vmm.wait("device.died")
        assert died["pid"] == pid
        assert "no sign of life for 0.5 s" in died["reason"]
        again = vmm.wait("device.restarted")
        assert again["generation"] == 2
        said = vmm.running.finish().check()
    assert said.number("errors") == 0
    assert said.number("stall_us") > 400_000


def test_an_idle_worker_that_hangs_is_found_too(vm: Vm) -> None:
    with steer(vm, "test=boot end=stay", extra=["--rng", "src=/dev/urandom,hang_timeout=0.5"]) as vmm:
        vmm.signal("rng", signal.SIGSTOP)
        assert "no sign of life" in vmm.wait("device.died")["reason"]
        vmm.wait("device.restarted")


def test_a_stopped_core_blames_nobody(vm: Vm, disk: Path) -> None:
    with steer(vm, f"{LOAD} duration_ms=6000 progress_ms=200", disks=[f"path={disk},hang_timeout=0.5"]) as vmm:
        vmm.running.wait_for("progress=")
        vmm.mark()
        core = vmm.pid("core")
        os.kill(core, signal.SIGSTOP)
        time.sleep(3)
        os.kill(core, signal.SIGCONT)
        said = vmm.running.finish().check()
        assert said.number("errors") == 0
    log = vmm.running.log.read_text()
    assert "died" not in log


# What waits for its disk shows it; what merely does not turn its loop does not.
SLOW = '''
import time
from dataclasses import dataclass
from cellvisor.core.abi import virtio
from cellvisor.devices.device import option
from cellvisor.devices.virtio.blk import Blk

class Slow(Blk):
    verb = ""
    help = "answers one sector late"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(Blk.Options):
        bad: int = option(4000, help="sector")
        late: float = option(2.0, help="seconds")
        inside: bool = option(True, help="in the call to the back end")
        until: int = option(2, help="first generation that is quick")

    def _request(self, chain):
        slow = virtio.BLK_REQUEST.unpack(chain.read(virtio.BLK_REQUEST.size))[2] == self.options.bad
        if slow and self.host.generation < self.options.until and not self.options.inside:
            time.sleep(self.options.late)
        return super()._request(chain)

    def _place(self, sector, size):
        if sector == self.options.bad and self.host.generation < self.options.until and self.options.inside:
            time.sleep(self.options.late)
        return super()._place(sector, size)
'''


@pytest.mark.parametrize(("options", "reason"), [
    ("inside=on,late=2,io_timeout=10", ""),
    ("inside=on,late=60,io_timeout=1.5", "its back end has not answered for 1.5 s"),
    ("inside=off,late=60,io_timeout=10", "no sign of life for 0.5 s"),
])
def test_calls_to_the_back_end_have_their_own_limit(vm: Vm, disk: Path, tmp_path: Path, options: str, reason: str,
                                                    monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path, "slow", SLOW)))
    with steer(vm, "test=blk-write op=write count=1000 depth=8 span=8M",
               extra=["--device-type", f"slow,path={disk},hang_timeout=0.5,{options}"]) as vmm:
        if reason:
            assert reason in vmm.wait("device.died")["reason"]
        said = vmm.running.finish().check()
    assert said.number("errors") == 0
    assert ("died" in vmm.running.log.read_text()) == bool(reason)
