"""A disk that gets another image while its guest looks: opened first, told to the driver, kept whoever dies over it."""

from __future__ import annotations

import os
import sys
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError
from cellvisor.ctl.client import Client
from cellvisor.devices.backends.disk import Disk
from tests.native.conftest import Vm
from tests.native.guest import make_disk, needs_kvm
from tests.native.hotplug import Steered, eventually, starting
from tests.native.owned import CRASH_RUN
from tests.native.steer import steer

pytestmark = [pytest.mark.kvm, needs_kvm]
MIB = 1 << 20


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    yield from starting(vm)


def image(path: Path, size: int, first: int) -> Path:
    make_disk(path, size)
    with path.open("r+b") as file:
        file.write(first.to_bytes(8, "little"))
    return path


def is_free(path: Path) -> bool:
    try:
        Disk(str(path)).close()
    except CellvisorError:
        return False
    return True


def shown(path: Path, first: int) -> str:
    return f"capacity={path.stat().st_size // 512} first={first:#x}\n"


def test_the_guest_sees_the_other_image(vm: Vm, tmp_path: Path) -> None:
    one, two = image(tmp_path / "one.raw", 64 * MIB, 0x111), image(tmp_path / "two.raw", 16 * MIB, 0x222)
    with steer(vm, "test=blk-capacity changes=3", disks=[f"path={one},id=data"]) as vmm:
        vmm.running.wait_for(shown(one, 0x111))
        pid = vmm.device()["pid"]
        vmm.client.call("swap-disk", id="data", path=str(two))
        vmm.running.wait_for(shown(two, 0x222))
        assert (is_free(one), is_free(two), vmm.device()["pid"]) == (True, False, pid)
        vmm.signal()
        vmm.wait("device.restarted")  # the successor has the new one, and no news for the driver
        assert vmm.client.call("info")["config"]["disks"][0]["path"] == str(two)
        vmm.client.call("pause")
        vmm.client.call("swap-disk", id="data", path=str(one))
        vmm.client.call("resume")
        eventually(lambda: vmm.running.text.count(shown(one, 0x111)) == 2, "the first image again")
        vmm.client.call("swap-disk", id="data", path=str(two))
        said = vmm.running.finish().check()
    assert said.text.count("capacity=") == 4
    assert is_free(two)


def test_a_bad_image_is_refused_and_leaves_nothing(start: Callable[..., Steered], tmp_path: Path) -> None:
    vm = start("removals=1 drive=0")
    vm.add()
    vm.done()
    odd, empty, locked, fine = (tmp_path / name for name in ("odd.raw", "empty.raw", "locked.raw", "fine.raw"))
    odd.write_bytes(b"x" * 1000)
    empty.touch()
    make_disk(locked, MIB)
    os.link(vm.disk, tmp_path / "other-name.raw")
    holder = Disk(str(locked))
    before = vm.footprint(), worker_fds(vm)
    for args, status, message in (
            ({"path": str(tmp_path / "none.raw")}, 400, f"path={tmp_path}/none.raw: No such file"),
            ({"path": str(odd)}, 400, f"path={odd}: size 1000 is not a multiple of 512"),
            ({"path": str(empty)}, 400, "it is empty"),
            ({"path": str(tmp_path)}, 400, f"path={tmp_path}: Is a directory"),
            ({"path": str(locked)}, 409, f"path={locked} is in use by "),
            ({"path": str(tmp_path / "other-name.raw")}, 409, "is what the disk has already"),
            ({"path": ""}, 400, "path= is not a file name"),
            ({"path": str(fine), "id": "nope"}, 404, "no device 'nope'"),
            ({"path": str(fine), "id": "__rng"}, 400, "id=__rng is not a disk but rng"),
            ({"id": "test0"}, 400, "path is missing")):
        with pytest.raises(CellvisorError) as caught:
            vm.client.call("swap-disk", **{"id": "test0", **args})
        assert (caught.value.status, message in str(caught.value)) == (status, True), str(caught.value)
    assert (vm.footprint(), worker_fds(vm)) == before
    assert not is_free(vm.disk)
    assert vm.client.call("info")["config"]["disks"][-1]["path"] == str(vm.disk)
    holder.close()
    vm.remove()
    vm.running.finish().check()


def worker_fds(vm: Steered) -> int:
    return len(os.listdir(f"/proc/{vm.devices()['test0']['pid']}/fd"))


@pytest.mark.parametrize("victim", ["self", "cv-test0"])
def test_killed_between_every_two_steps_of_a_swap(start: Callable[..., Steered], tmp_path: Path, victim: str) -> None:
    """Afterwards the disk has the one image or the other, the same as is recorded, and the other is free."""
    order = tmp_path / "order"
    vm = start("removals=99 drive=0", program=[sys.executable, str(CRASH_RUN)], environ={"CRASH_ORDER": str(order)})
    vm.add(f"path={vm.disk},id=test0,restart_budget=1000")
    vm.done()
    images = [str(vm.disk), str(make_disk(tmp_path / "other.raw", 8 * MIB))]
    for number in range(20):
        now, pid = recorded(vm), vm.devices()["test0"]["pid"]
        order.write_text(f"before {number} {victim}")
        with Client(vm.client.path, timeout=30) as client, suppress(CellvisorError):
            client.call("swap-disk", id="test0", path=images[1 - images.index(now)])
        if order.exists():
            order.unlink()  # it had fewer steps
            break
        if victim == "self":
            vm.reconnect()
        else:
            eventually(lambda pid=pid: vm.devices()["test0"]["pid"] not in (pid, 0, None), "the successor")
        eventually(lambda: agrees(vm, images), f"step {number}: one image, the recorded one")
    assert number >= 3, number
    assert recorded(vm) != now, "at last nobody was killed"
    vm.remove()
    vm.done()
    assert all(is_free(Path(one)) for one in images)


def recorded(vm: Steered) -> str:
    return next(str(one["path"]) for one in vm.client.call("info")["config"]["disks"] if one["id"] == "test0")


def agrees(vm: Steered, images: list[str]) -> bool:
    device: dict[str, Any] = vm.devices()["test0"]
    held = [one for one in images if not is_free(Path(one))]
    return device["state"] == "serving" and held == [recorded(vm)]
