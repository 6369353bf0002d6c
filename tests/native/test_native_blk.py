"""virtio-blk under cellvisor: what is written is there, in every way a driver may set up its rings and interrupts."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.conftest import Vm
from tests.native.guest import make_disk, needs_kvm

pytestmark = [pytest.mark.kvm, needs_kvm]


@pytest.mark.parametrize("how", ["irq=msix", "irq=intx", "irq=poll", "irq=msix idle=spin"])
@pytest.mark.parametrize("ring", ["", "indirect=0", "event_idx=0 segs=3", "qsize=16 indirect=0 event_idx=0"])
def test_every_written_block_is_verified(vm: Vm, disk: Path, how: str, ring: str) -> None:
    said = vm(f"test=blk-write count=500 depth=4 reads=20 flush=37 {how} {ring}", disks=[disk]).check()
    assert said.number("requests") == 500
    assert said.number("verified.0") > 200
    assert said.number("errors") == 0


def test_deep_queue_and_large_blocks(vm: Vm, disk: Path) -> None:
    said = vm("test=blk-write count=2000 depth=32 reads=30 bs=16K segs=8 span=32M", disks=[disk]).check()
    assert said.number("requests") == 2000


def test_data_outlives_the_vm(vm: Vm, disk: Path) -> None:
    load = "count=200 depth=1 span=2M seed=9 flush=50"
    written = vm(f"test=blk-write {load}", disks=[disk]).check()
    again = vm(f"test=blk-verify {load}", disks=[disk]).check()
    assert again.number("verified.0") == written.number("verified.0") > 100
    assert any(disk.read_bytes()[:2 << 20])


def test_every_operation_and_its_refusals(vm: Vm, disk: Path) -> None:
    said = vm("test=blk-ops,blk-info", disks=[f"path={disk},serial=SERIAL-7"]).check()
    assert said.values["serial"] == "SERIAL-7"
    assert said.number("sectors") == (64 << 20) // 512
    assert said.values["write_zeroes"] == said.values["flush"] == "ok"


def test_read_only_disks_refuse_writes(vm: Vm, disk: Path) -> None:
    said = vm("test=blk-ops,blk-info", disks=[f"path={disk},readonly=on"]).check()
    assert said.number("read_only") == 1
    assert said.values["write_read_only"] == "ioerr"
    assert not any(disk.read_bytes())


def test_masked_vectors_stay_pending(vm: Vm, disk: Path) -> None:
    assert vm("test=msix", disks=[disk]).check().number("delivered") == 1


def test_several_queues_on_several_cpus(vm: Vm, disk: Path) -> None:
    said = vm("test=blk-write smp=1 queues=2 count=300 depth=4", disks=[f"path={disk},num_queues=2"], cpus=2).check()
    assert said.number("queues") == 2
    assert said.number("requests") == 600
    assert said.number("verified.1") > 100


def test_two_disks_are_two_devices(vm: Vm, tmp_path: Path, disk: Path) -> None:
    other = make_disk(tmp_path / "other.raw", 32 << 20)
    said = vm("test=blk-info,blk-write disk=1 count=100 depth=2", disks=[disk, other]).check()
    assert said.number("sectors") == (32 << 20) // 512
    assert not any(disk.read_bytes())
    assert any(other.read_bytes())


def test_bench_reports_latency(vm: Vm, disk: Path) -> None:
    said = vm("test=blk-bench op=randread count=2000 depth=8", disks=[disk]).check()
    order = [said.number(f"lat_{what}_ns") for what in ("min", "p50", "p99", "max")]
    assert order == sorted(order)
    assert said.number("reads") == 2000
