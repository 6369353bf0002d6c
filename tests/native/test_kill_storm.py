"""A disk's process is killed again and again under random 4 KiB writes at depth 32: nothing is lost, late or doubled.

The guest keeps a journal (block, sequence, crc), checks each block that it reads meanwhile and every one at the
end, and every completion: of a request that is outstanding, with the status and length it must have.
"""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.steer import steer
from tests.native.storm import LOAD, OPTIONS, Storm, longest_stalls, stop_load

pytestmark = [pytest.mark.kvm, needs_kvm]


def survive(vm: Vm, disk: Path, kills: int, seed: int) -> str:
    """Blow, check that the guest noticed nothing but pauses; returns these as text."""
    with steer(vm, f"{LOAD} seed={seed}", disks=[f"path={disk},{OPTIONS}"]) as vmm:
        vmm.running.wait_for("features=")
        storm = Storm(vmm.pid("nursery"), int(vmm.device()["pid"]), seed, lambda: vmm.running.process.poll() is None)
        for _ in storm.blow(kills):
            pass
        stop_load(disk)  # the guest learns it from who serves the disk after the last kill
        said = vmm.running.finish().check()
    log = vmm.running.log.read_text()
    assert log.count(": starting its successor") == log.count("killed by SIGKILL: starting") == kills, log[-4000:]
    assert "Traceback" not in log, log[-4000:]
    assert said.number("errors") == 0
    assert said.number("writes") > 10 * kills
    assert said.number("verified.0") > 250
    assert said.number("requests") == sum(said.number(what) for what in ("reads", "writes", "flushes"))
    stalls = longest_stalls(said, kills)
    return (f"{kills} kills, seed {seed}: {said.number('writes')} writes and {said.number('reads')} reads, "
            f"0 errors; stall in ms: min {stalls[0]:.1f}, p50 {stalls[len(stalls) // 2]:.1f}, "
            f"p99 {stalls[int(len(stalls) * 0.99)]:.1f}, max {stalls[-1]:.1f}")


@pytest.mark.parametrize("seed", [1])
def test_60_kills(vm: Vm, disk: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    told = survive(vm, disk, 60, seed)
    with capsys.disabled():
        print(f"\n{told}")


@pytest.mark.slow
@pytest.mark.timeout(900)
@pytest.mark.parametrize("seed", [2026])
def test_1000_kills(vm: Vm, disk: Path, seed: int, capsys: pytest.CaptureFixture[str]) -> None:
    told = survive(vm, disk, 1000, seed)
    with capsys.disabled():
        print(f"\n{told}")
