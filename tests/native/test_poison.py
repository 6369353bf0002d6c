"""A request that kills its device's process whenever it runs: it alone fails, all others are served."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.fakes.site import install
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.steer import steer

pytestmark = [pytest.mark.kvm, needs_kvm]

# A disk that dies of one sector, for good or only the first time.
DEVICE = '''
import os, signal
from dataclasses import dataclass
from cellvisor.core.abi import virtio
from cellvisor.devices.device import option
from cellvisor.devices.virtio.blk import Blk

class Brittle(Blk):
    verb = ""
    help = "dies of a sector"

    @dataclass(frozen=True, slots=True, kw_only=True)
    class Options(Blk.Options):
        bad: int = option(4000, help="sector")
        how: str = option("signal", help="how it dies")
        until: int = option(100, help="first generation that survives it")

    def _request(self, chain):
        kind, _, sector = virtio.BLK_REQUEST.unpack(chain.read(virtio.BLK_REQUEST.size))
        if kind == virtio.BLK_T_OUT and sector == self.options.bad and self.host.generation < self.options.until:
            if self.options.how == "signal":
                os.kill(os.getpid(), signal.SIGSEGV)
            raise RuntimeError("cannot digest it")
        return super()._request(chain)
'''


@pytest.fixture
def brittle(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> str:
    """Have the VMs of this test know the type `brittle`."""
    monkeypatch.setenv("PYTHONPATH", str(install(tmp_path, "brittle", DEVICE)))
    return "brittle"


LOAD = "test=blk-write op=write count=1000 depth=32 bs=4K span=8M tolerate=1 event_idx=0"


@pytest.mark.parametrize("how", ["signal", "exception"])
def test_a_poisonous_request_fails_alone(vm: Vm, disk: Path, brittle: str, how: str) -> None:
    with steer(vm, LOAD, extra=["--device-type", f"{brittle},path={disk},how={how}"]) as vmm:
        poison = vmm.wait("device.poison")
        assert poison["queue"] == 0
        deaths = vmm.names().count("device.died")
        said = vmm.running.finish().check()
    assert deaths == 3
    assert said.number("errors") == 1
    assert said.number("requests") == 1000
    assert said.number("verified.0") == 999


def test_a_request_that_survives_the_second_time_is_served(vm: Vm, disk: Path, brittle: str) -> None:
    with steer(vm, LOAD, extra=["--device-type", f"{brittle},path={disk},until=3"]) as vmm:
        vmm.wait("device.restarted")
        said = vmm.running.finish().check()
    assert said.number("errors") == 0
    assert said.number("verified.0") == 1000
