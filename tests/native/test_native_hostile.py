"""A driver that breaks every rule: its device may stop, nothing else may notice."""

from __future__ import annotations

from pathlib import Path

import pytest

from tests.native.conftest import Vm
from tests.native.guest import needs_kvm

pytestmark = [pytest.mark.kvm, needs_kvm]

# What no device can make sense of ends in NEEDS_RESET; of the rest it is enough that the device recovers.
FATAL = {
    "loop-self", "loop-two", "next-wild", "address-hole", "address-wraps", "address-bar", "address-lapic",
    "address-end", "length-huge", "indirect-loop", "indirect-next-wild", "indirect-address-hole",
    "indirect-nested", "indirect-odd", "indirect-empty", "indirect-huge", "indirect-hole",
    "indirect-and-next", "indirect-end", "head-wild", "head-ffff", "avail-ahead", "avail-far", "rings-hole",
    "rings-wrap", "rings-end", "rings-bar", "indirect-bar", "rings-lapic", "rings-ecam",
}


@pytest.mark.parametrize("kind", ["blk", "rng", "console"])
def test_bad_rings_end_in_needs_reset_and_a_reset_heals(vm: Vm, disk: Path, kind: str) -> None:
    said = vm(f"test=hostile,blk-info,rng type={kind} settle=5000", disks=[disk], console="null", timeout=280).check()
    outcomes = said.all("hostile.")
    assert len(outcomes) == said.number("cases") == 47
    assert {name for name in FATAL if outcomes[name] != "needs-reset"} == set()
    assert outcomes["live-registers"].startswith("used")
    assert said.number("features_ok_without_version_1") == 0
    assert said.number("features_ok_with_all_features") == 0
    assert all(size in (0, 1) or size & (size - 1) == 0 for size in map(int, said.all("size.").values()))


def test_a_needs_reset_device_leaves_the_others_alone(vm: Vm, disk: Path) -> None:
    script = "test=hostile,blk-write,rng type=console case=loop-two count=200 depth=4"
    said = vm(script, disks=[disk], console="null").check()
    assert said.number("verified.0") > 100


def test_every_access_to_every_bar(vm: Vm, disk: Path) -> None:
    said = vm("test=sweep,blk-ops,rng dense=64", disks=[disk], console="null", timeout=280).check()
    assert {key for key in said.values if key.startswith("sweep.")} == {"sweep.1", "sweep.2", "sweep.3"}


def test_every_access_to_configuration_space(vm: Vm, disk: Path) -> None:
    said = vm("test=cfgsweep,blk-ops,rng", disks=[disk], console="null", timeout=280).check()
    assert said.number("accesses") > 50000


@pytest.mark.parametrize("span", ["from=0 to=0x7ff write=1", "from=0x800 to=0xffff step=7 write=1", "to=0xfff all=1"])
def test_every_port(vm: Vm, disk: Path, span: str) -> None:
    said = vm(f"test=portsweep,blk-ops,boot {span}", disks=[disk], timeout=280).check()
    assert said.number("accesses") > 1000


def test_moving_a_bar_moves_its_registers(vm: Vm, disk: Path, tmp_path: Path) -> None:
    script = tmp_path / "script"
    script.write_text(
        "r16 1.common+18\nset queues $last\nset new 0xd8000000\nset off 1.common-1.bar0\n"
        "cw16 1 4 0\ncw32 1 0x10 $new\ncw32 1 0x14 0\ncw16 1 4 6\n"
        "r16 $new+$off+18\nexpect $queues\n"
        "cw16 1 4 4\nr16 $new+$off+18\nexpect 0xffff\n"  # decode is off: nobody answers
        "cw16 1 4 6\nr16 $new+$off+18\nexpect $queues\n")
    vm("test=script", disks=[disk], initramfs=script).check()


def test_moving_a_live_bar_moves_its_doorbells(vm: Vm, disk: Path) -> None:
    said = vm("test=blk-write,blk-move,blk-write count=200 depth=4", disks=[disk]).check()
    assert said.number("moved_requests") == 32
