"""A block request in steady state is seen by the guest, KVM and one worker: no message, no exit to userspace."""

from __future__ import annotations

import time
from pathlib import Path
from typing import Any

import pytest

from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.steer import Steer, steer

pytestmark = [pytest.mark.kvm, needs_kvm]
REQUESTS = 10_000
EXITS = ("io", "mmio", "settled")


def bytes_read(pid: int) -> int:
    """Return what a process has read with system calls; other than asking it, this costs no message."""
    lines = Path(f"/proc/{pid}/io").read_text().splitlines()
    return int(next(line for line in lines if line.startswith("rchar:")).split()[1])


def look(vmm: Steer) -> tuple[dict[str, int], dict[str, int]]:
    """Return core's counts of messages, and of exits by kind over all vCPUs."""
    core: dict[str, Any] = vmm.client.call("info")["core"]
    return core["messages"], {kind: sum(vcpu[kind] for vcpu in core["vcpus"]) for kind in EXITS}


@pytest.mark.parametrize("depth", [1, 32])
def test_ten_thousand_requests_cost_no_message_and_no_exit(vm: Vm, disk: Path, depth: int) -> None:
    with steer(vm, f"test=blk-bench op=randread depth={depth} duration_ms=120000", disks=[disk]) as vmm:
        vmm.running.wait_for("features=")
        pid = int(vmm.device()["pid"])
        begin = bytes_read(pid)
        while bytes_read(pid) == begin:
            time.sleep(0.02)
        messages, exits = look(vmm)
        begin = bytes_read(pid)
        while bytes_read(pid) < begin + REQUESTS * 4096:
            assert vmm.running.process.poll() is None
            time.sleep(0.02)
        later, exits_later = look(vmm)
    assert exits_later == exits
    assert later["from_workers"] == messages["from_workers"] > 0
    assert later["to_workers"] == messages["to_workers"] > 0
    assert later["from_controlplane"] == messages["from_controlplane"] + 1, "the question itself"
    assert later["to_controlplane"] == messages["to_controlplane"] + 1


def test_the_counters_count(vm: Vm, disk: Path) -> None:
    with steer(vm, "test=blk-bench op=randread progress_ms=100 duration_ms=120000", disks=[disk]) as vmm:
        vmm.running.wait_for("progress=")
        messages, exits = look(vmm)
        vmm.client.call("pause")
        vmm.client.call("resume")
        later, exits_later = look(vmm)
        end = time.monotonic() + 60
        while exits_later["settled"] == exits["settled"] and time.monotonic() < end:
            later, exits_later = look(vmm)
        plain, full = (vmm.client.call("info", processes=asked)["core"]["vcpus"][0] for asked in (False, True))
    assert set(full) - set(plain) == {"cpu"}, "CPU time is for who asks what the VM costs"
    assert later["to_workers"] >= messages["to_workers"] + 4, "PAUSE and RESUME for two workers"
    assert later["from_workers"] >= messages["from_workers"] + 2
    assert exits_later["settled"] > exits["settled"], "what the guest says goes through the serial port"
