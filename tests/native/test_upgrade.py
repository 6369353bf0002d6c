"""Live upgrade: a device's file changes on disk, and the new code serves the same running guest under load."""

from __future__ import annotations

import contextlib
import os
import signal
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError, Conflict, NotFound
from tests.fakes.site import install
from tests.native.guest import needs_kvm
from tests.native.owned import OwnedVm, wait_for
from tests.native.storm import stop_load

pytestmark = [pytest.mark.kvm, needs_kvm]

LOAD = "test=blk-write depth=8 span=8M reads=20 flush=37 stoppable=1 count=100000000"
CODE = '''
from dataclasses import replace
from cellvisor.devices.virtio.blk import Blk

class Mine(Blk):
    verb = ""
    reads = {reads}

    def __init__(self, options, host):
        super().__init__(options, host)
        {start}

    @property
    def spec(self):
        return replace(super().spec, private_size=64)

    def on_activate(self, features):
        super().on_activate(features)
        self.found = self.host.load()
        self.host.save(b"by {code}", {version})

    def counters(self):
        return {{"code": {code}, "found": self.found[0]}}
'''


class Site:
    """A directory on PYTHONPATH with a device type `mine`, a disk that tells which code it runs."""

    def __init__(self, where: Path) -> None:
        self.path = install(where, "mine", "")

    def write(self, code: int, *, reads: tuple[int, ...] = (1,), version: int = 1, start: str = "pass") -> None:
        """Put the next version of the file on disk."""
        text = CODE.format(code=code, reads=reads, version=version, start=start)
        (self.path / "mine_device.py").write_text(text + "#" * code)  # its size tells Python that it changed


@pytest.fixture
def site(tmp_path: Path) -> Site:
    made = Site(tmp_path)
    made.write(1)
    return made


@contextlib.contextmanager
def running(where: Path, disk: Path, plan: list[str] | None = None) -> Iterator[OwnedVm]:
    """A guest under load; once the test is content, the guest's journal has to be, too."""
    with OwnedVm(where, LOAD, (), "--device-type", f"mine,path={disk},id=data", plan=plan,
                 environ={"PYTHONPATH": str(where / "site")}) as vm:
        vm.wait_event("device.activated", device="data")
        yield vm
        stop_load(disk)
        vm.finish()


def code(vm: OwnedVm) -> dict[str, int]:
    """Return the counters of the device."""
    told: dict[str, Any] = vm.call("counters")["data"]
    return dict(told)


def life(vm: OwnedVm) -> tuple[str, int]:
    """Return state and generation of the device."""
    one = next(one for one in vm.call("devices")["devices"] if one["id"] == "data")
    return str(one["state"]), int(one["generation"])


def test_new_code_serves_the_same_guest(tmp_path: Path, disk: Path, site: Site) -> None:
    with running(tmp_path, disk) as vm:
        assert code(vm) == {"code": 1, "found": 0}
        first, = vm.pids("nursery")
        for number in range(2, 6):
            site.write(number)
            done, = vm.call("upgrade-device", id="data")["upgraded"]
            assert (done["id"], done["generation"]) == ("data", number)
            assert vm.wait_event("device.upgraded", generation=number)["ms"] > 0
            wait_for(lambda: code(vm) == {"code": number, "found": 1}, f"code {number}")  # noqa: B023
            wait_for(lambda: len(vm.pids("nursery")) == 2, "nurseries that nobody needs to end")
            assert first in vm.pids("nursery"), "the other devices are at home there"
        assert life(vm) == ("serving", 5)
        assert {one["generation"] for one in vm.call("devices")["devices"] if one["id"] != "data"} == {1}
        vm.call("upgrade-device", id="all")
        wait_for(lambda: len(vm.pids("nursery")) == 1, "the old nurseries to end")
        assert vm.pids("nursery") != [first]


def test_code_that_cannot_read_the_state_is_refused(tmp_path: Path, disk: Path, site: Site) -> None:
    with running(tmp_path, disk) as vm:
        before = vm.pids("worker", "data")
        site.write(2, reads=(2, 3), version=2)
        with pytest.raises(Conflict, match="saved state has version 1, the new code reads 2, 3") as refusal:
            vm.call("upgrade-device", id="data")
        assert refusal.value.code == "upgrade-refused"
        assert (vm.pids("worker", "data"), life(vm)) == (before, ("serving", 1))
        wait_for(lambda: len(vm.pids("nursery")) == 1, "the new nursery to end")
        site.write(3, reads=(1, 2), version=2)
        vm.call("upgrade-device", id="data")
        wait_for(lambda: code(vm) == {"code": 3, "found": 1}, "code 3")


@pytest.mark.parametrize("start", ["raise RuntimeError('out of order')", "import os; os._exit(7)",
                                   "import os, signal; os.kill(os.getpid(), signal.SIGSEGV)"])
def test_code_that_cannot_start_gives_way_to_the_old(tmp_path: Path, disk: Path, site: Site, start: str) -> None:
    with running(tmp_path, disk) as vm:
        site.write(2, start=start)
        with pytest.raises(Conflict, match="the new code cannot serve") as refusal:
            vm.call("upgrade-device", id="data")
        assert refusal.value.code == "upgrade-failed"
        assert life(vm) == ("serving", 3)
        wait_for(lambda: code(vm) == {"code": 1, "found": 1}, "code 1")
        wait_for(lambda: len(vm.pids("nursery")) == 1, "the new nursery to end")
        os.kill(vm.pids("worker", "data")[0], signal.SIGKILL)  # its home is the old nursery
        vm.wait_event("device.restarted", device="data", generation=4)
        wait_for(lambda: code(vm)["code"] == 1, "code 1")


def test_code_that_cannot_be_loaded_is_refused(tmp_path: Path, disk: Path, site: Site) -> None:
    with running(tmp_path, disk) as vm:
        (site.path / "mine_device.py").write_text("class Mine(\n")
        with pytest.raises(NotFound, match=r"no type mine on disk any more .*SyntaxError"):
            vm.call("upgrade-device", id="data")
        with pytest.raises(NotFound, match="no device 'nobody'"):
            vm.call("upgrade-device", id="nobody")
        assert life(vm) == ("serving", 1)


def test_a_paused_vm_can_be_upgraded(tmp_path: Path, disk: Path, site: Site) -> None:
    with running(tmp_path, disk) as vm:
        vm.call("pause")
        site.write(2)
        vm.call("upgrade-device", id="data")
        said = vm.running.text
        assert vm.call("info")["state"] == "Paused"
        assert vm.running.text == said
        vm.call("resume")
        wait_for(lambda: code(vm) == {"code": 2, "found": 1}, "code 2")


@pytest.mark.parametrize("step", ["open 1", "quiesce 0", "release 0", "attach 3", "spawn 3"])
@pytest.mark.parametrize("when", ["before", "during"])
def test_controlplane_killed_over_it(tmp_path: Path, disk: Path, site: Site, when: str, step: str) -> None:
    """One code or the other serves afterwards, and no nursery is too many."""
    with running(tmp_path, disk, plan=[f"{when} {step}"]) as vm:
        site.write(2)
        with contextlib.suppress(CellvisorError):
            vm.call("upgrade-device", id="data")
        vm.running.process.wait(30)
        vm.wait_adopted()
        wait_for(lambda: life(vm)[0] == "serving", "the device")
        wait_for(lambda: "code" in code(vm), "an answer")
        found = code(vm)["code"]
        wait_for(lambda: len(vm.pids("nursery")) == (1 if found == 1 else 2), "nurseries that nobody needs to end")
        site.write(3)
        vm.call("upgrade-device", id="all")
        wait_for(lambda: code(vm)["code"] == 3, "code 3")
        wait_for(lambda: len(vm.pids("nursery")) == 1, "the old nurseries to end")
