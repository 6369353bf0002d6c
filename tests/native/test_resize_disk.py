"""A disk whose size changes while the guest looks: new capacity, one config interrupt each, whoever dies meanwhile."""

from __future__ import annotations

import os
import re
import signal
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.hotplug import eventually
from tests.native.steer import Steer, steer

pytestmark = [pytest.mark.kvm, needs_kvm]
MIB = 1 << 20
CONFIG_VECTOR = 0x30  # the guest's first
START, SIZES = 64 * MIB, (96 * MIB, 32 * MIB, 48 * MIB, 40 * MIB)


def script(path: Path) -> Path:
    """See each size of the disk in slot 1, one after the other, and its interrupt."""
    lines = ["test blk-info", "say ready"]
    for number, size in enumerate(SIZES, 1):
        lines += [f"wait64 1.config 0xffffffffffffffff {size // 512} 60000", f"irqwait {CONFIG_VECTOR} {number} 60000",
                  f"expect {number}", f"say seen{number}"]
    path.write_text("\n".join([*lines, "sleep 60000000"]))
    return path


def resize(vmm: Steer, size: int) -> None:
    answer = vmm.client.call("resize-disk", id=vmm.device()["id"], desired_size=size)
    assert vmm.client.call("ops", action="wait", id=answer["operation"])["state"] == "done"


def die_after(vmm: Steer, disk: Path, size: int) -> None:
    """Have the worker die when it has changed the file and before it tells."""
    nursery = vmm.pid("nursery")
    os.kill(nursery, signal.SIGSTOP)
    try:
        vmm.signal()
        os.truncate(disk, size)
    finally:
        os.kill(nursery, signal.SIGCONT)
    vmm.wait("device.restarted")


def test_a_disk_is_resized_under_the_guest(vm: Vm, disk: Path, tmp_path: Path) -> None:
    with steer(vm, "test=script", initramfs=script(tmp_path / "script"), disks=[f"path={disk}"]) as vmm:
        said = vmm.running.wait_for("say=ready")
        assert f"sectors={START // 512}" in said
        for number, size in enumerate(SIZES[:2], 1):
            resize(vmm, size)
            assert disk.stat().st_size == size
            vmm.running.wait_for(f"say=seen{number}")
        die_after(vmm, disk, SIZES[2])
        vmm.running.wait_for("say=seen3")
        vmm.signal()  # told already: its successor has no news
        vmm.wait("device.restarted")
        vmm.client.call("pause")
        resize(vmm, SIZES[3])
        vmm.client.call("resume")
        vmm.running.wait_for("say=seen4")
        vmm.client.call("reset")
        eventually(lambda: vmm.running.text.count("say=ready") == 2, "the guest's reboot")
        assert re.findall(r"^sectors=(\d+)$", vmm.running.text, re.M) == [str(START // 512), str(SIZES[3] // 512)]
        vmm.running.stop()


@pytest.mark.parametrize(("options", "size", "status", "message"), [
    ("", 0, 400, "desired_size=0: a disk cannot be empty"),
    ("", 1000, 400, "desired_size=1000 is not a multiple of 512"),
    ("", 1 << 62, 400, "is more than the file system of"),
    (",readonly=on", 32 * MIB, 400, "was opened with readonly=on"),
    (",sparse=off", 1 << 50, 409, "is full"),
])
def test_a_bad_size_is_refused_and_leaves_nothing(vm: Vm, disk: Path, options: str, size: int, status: int,
                                                  message: str) -> None:
    def look() -> tuple[Any, ...]:
        pid = vmm.device()["pid"]
        return pid, len(os.listdir(f"/proc/{pid}/fd")), disk.stat().st_size, disk.stat().st_blocks

    with steer(vm, "test=blk-info,script script=sleep,60000000", disks=[f"path={disk}{options}"]) as vmm:
        vmm.running.wait_for("sectors=")
        before = look()
        with pytest.raises(CellvisorError, match=message) as caught:
            resize(vmm, size)
        assert caught.value.status == status
        assert look() == before
        assert vmm.client.call("ops", action="show", id=vmm.device()["id"])["state"] == "refused"
        vmm.running.stop()


def test_a_parked_disk_keeps_its_size(vm: Vm, disk: Path) -> None:
    with steer(vm, "test=blk-info,script script=sleep,60000000", disks=[f"path={disk},restart_budget=0"]) as vmm:
        vmm.running.wait_for("sectors=")
        vmm.signal()
        vmm.wait("device.parked")
        with pytest.raises(CellvisorError, match="no process serves it") as caught:
            resize(vmm, 32 * MIB)
        assert caught.value.status == 409
        assert disk.stat().st_size == START
        vmm.running.stop()
