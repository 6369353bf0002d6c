"""A disk's process is killed again and again under random 4 KiB writes at depth 32: nothing is lost, late or doubled.

The guest keeps a journal (block, sequence, crc), checks each block that it reads meanwhile and every one at the
end, and every completion: of a request that is outstanding, with the status and length it must have.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.steer import steer
from tests.native.storm import LOAD, OPTIONS, Storm, longest_stalls, stop_load

pytestmark = [pytest.mark.kvm, needs_kvm]


def records(monitor: Path) -> list[dict[str, Any]]:
    """Read what `--event-monitor` wrote."""
    return [json.loads(text) for text in monitor.read_text().split("\n\n") if text]


def survive(vm: Vm, disk: Path, kills: int, seed: int) -> str:
    """Blow, check that the guest noticed nothing but pauses; returns these as text."""
    monitor = disk.with_name("events.json")
    with steer(vm, f"{LOAD} seed={seed}", disks=[f"path={disk},{OPTIONS}"],
               extra=["--event-monitor", f"path={monitor}"]) as vmm:
        vmm.running.wait_for("features=")
        storm = Storm(vmm.pid("nursery"), int(vmm.device()["pid"]), seed, lambda: vmm.running.process.poll() is None)
        for _ in storm.blow(kills):
            pass
        stop_load(disk)  # the guest learns it from who serves the disk after the last kill
        said = vmm.running.finish().check()
    deaths = [event["properties"] for event in records(monitor) if event["event"] == "device-died"]
    assert [death["generation"] for death in deaths] == list(range(1, kills + 1)), "each death was a kill"
    assert all("killed by SIGKILL" in death["reason"] for death in deaths)
    assert "Traceback" not in vmm.running.log.read_text()
    assert said.number("errors") == 0
    assert said.number("writes") > kills
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
