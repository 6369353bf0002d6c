"""What a controlplane leaves behind: the record, core's custody of it, and the pilot's lock."""

from __future__ import annotations

import asyncio
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from cellvisor.controlplane import blob, flags, rundir
from cellvisor.controlplane.blob import Life, Record
from cellvisor.controlplane.config import VmConfig
from cellvisor.controlplane.inventory import Device
from cellvisor.controlplane.keeping import Keeping
from cellvisor.core.custody import MAX_BLOB, Custody
from cellvisor.core.errors import CellvisorError, Conflict, NotFound, UsageError
from cellvisor.core.wire import places
from cellvisor.core.wire.messages import pack, unpack


@pytest.fixture
def record(tmp_path: Path) -> Record:
    kernel = tmp_path / "kernel"
    kernel.write_bytes(b"kernel")
    given = flags.parse(["--kernel", str(kernel), "--disk", "path=a,serial=7", "--memory", "size=1G",
                         "--cpus", "boot=2", "--serial", "file=/tmp/x", "--name", "web", "-v",
                         "--rate-limit-group", "id=g,ops_size=5,ops_refill_time=7"])
    assert given.payload is not None
    disk = Device("_disk0", "blk", "disk", 2, {"path": "a", "serial": "7"})
    config = VmConfig(given.cpus, given.memory, given.payload, given.serial, (disk,), {"__serial": "/dev/pts/9"},
                      given.groups)
    return Record(flags=given, config=config, began=7, created=True, configured=True,
                  inventory={"count": 1, "blocked": [], "devices": []},
                  lives={"_disk0": Life(3, "token", True, "because", True, [1.5, 2.5])}, present=2,
                  homes={"_disk0": 1}, terminal=[1, 2, 3, 4, 5, 6, [b"\3", b"\x1c", 1]], memory_effects={"thp": "on"},
                  parts={"plug": [1, 2]})


def test_record_survives_the_way_through_core(record: Record) -> None:
    assert blob.read(record.pack()) == record
    assert len(record.pack()) < 10_000


def test_a_process_without_a_vm_has_a_record(record: Record) -> None:
    given = flags.parse(["--api-socket", "/tmp/api"])
    empty = Record(flags=given, config=record.config, began=1)
    assert blob.read(empty.pack()) == empty
    assert blob.read(empty.pack()).flags.order is None


def test_another_version_is_refused_by_name(record: Record) -> None:
    body = unpack(record.pack())
    with pytest.raises(Conflict, match=f"state has version 99, this cellvisor reads {blob.VERSION}"):
        blob.read(pack({**body, "v": 99}))


@pytest.mark.parametrize("change", [
    {"flags": None}, {"config": {}}, {"lives": []}, {"lives": {"a": {"generation": 1}}}, {"surprise": 1},
])
def test_nonsense_is_one_error(record: Record, change: dict[str, Any]) -> None:
    with pytest.raises(UsageError):
        blob.read(pack({**unpack(record.pack()), **change}))


@given(st.binary(max_size=200))
def test_garbage_is_one_error(data: bytes) -> None:
    with pytest.raises(CellvisorError):
        blob.read(data)


# ---- core's side


def test_core_listens_to_the_youngest_with_the_token() -> None:
    custody = Custody("secret")
    assert custody.identity == "controlplane/1/secret"
    assert custody.admits("controlplane/1/secret")
    for stranger in ("controlplane/2/wrong", "controlplane/2", "controlplane//secret", "controlplane/-2/secret",
                     "controlplane/2/secret/x", "disk0/2/secret", "controlplane/²/secret", "",
                     f"controlplane/{10**9}/secret"):
        assert not custody.admits(stranger)
        assert custody.generation == 1
    assert custody.admits("controlplane/3/secret")
    assert custody.identity == "controlplane/3/secret"
    assert not custody.admits("controlplane/1/secret")
    assert not custody.admits("controlplane/2/secret")
    assert custody.admits("controlplane/3/secret")


@pytest.mark.parametrize("wrong", [None, "text", 7, b"", bytes(MAX_BLOB + 1), bytearray(b"x")])
def test_core_judges_only_size_and_type(wrong: object) -> None:
    assert Custody.checked(bytes(MAX_BLOB)) == bytes(MAX_BLOB)
    with pytest.raises(UsageError, match="blob: "):
        Custody.checked(wrong)


# ---- the pilot's lock


def claim_elsewhere(base: Path, *, hold_name: bool) -> None:
    """Claim `web` in a process that dies; its "core" (a sleep) inherits the name's lock if `hold_name`."""
    script = ("import subprocess, sys\nfrom cellvisor.controlplane import rundir\n"
              f"claimed = rundir.claim('web', {str(base)!r})\n")
    if hold_name:
        script += ("child = subprocess.Popen(['sleep', '60'], pass_fds=[claimed.lock_fd], stdout=subprocess.DEVNULL)\n"
                   "claimed.note(core=child.pid)\n")
    subprocess.run([sys.executable, "-c", script], check=True)


def test_adopting_needs_a_living_vm_and_a_dead_controlplane(tmp_path: Path) -> None:
    with pytest.raises(NotFound, match="no VM 'web' is running"):
        rundir.adopt("web", str(tmp_path))
    claim_elsewhere(tmp_path, hold_name=False)
    with pytest.raises(NotFound, match="no VM 'web' is running"):
        rundir.adopt("web", str(tmp_path))
    first = rundir.claim("web", str(tmp_path))
    with pytest.raises(Conflict, match=f"its controlplane is alive .process {os.getpid()}") as refusal:
        rundir.adopt("web", str(tmp_path))
    assert refusal.value.code == "in-charge"
    first.remove()


def test_one_successor_at_a_time_each_with_a_higher_generation(tmp_path: Path) -> None:
    claim_elsewhere(tmp_path, hold_name=True)
    core = (places.holder(str(tmp_path / "web")) or {})["core"]
    try:
        second = rundir.adopt("web", str(tmp_path))
        assert second.generation == 2
        with pytest.raises(Conflict, match=f"process {os.getpid()}"):
            rundir.adopt("web", str(tmp_path))
        with pytest.raises(Conflict, match="a VM of this name is running"):
            rundir.claim("web", str(tmp_path))
        token = second.token
        second.let_go()
        third = rundir.adopt("web", str(tmp_path))
        assert (third.generation, third.token) == (3, token)
        lock = os.open(third.file(places.LOCK), os.O_RDWR)
        third.inherit(lock)
        assert places.holder(third.path) == {"pid": os.getpid(), "core": core}
        third.let_go()
        os.close(lock)
    finally:
        os.kill(core, 9)


def test_a_successor_that_did_not_get_the_name_removes_nothing(tmp_path: Path) -> None:
    claim_elsewhere(tmp_path, hold_name=True)
    core = (places.holder(str(tmp_path / "web")) or {})["core"]
    rundir.adopt("web", str(tmp_path)).remove()
    assert sorted(os.listdir(tmp_path / "web")) == [places.LOCK, places.PILOT]
    os.kill(core, 9)


def test_what_changes_while_core_takes_our_state_is_kept_too() -> None:
    async def run() -> None:
        state, kept, taken = [0], list[int](), asyncio.Event()

        async def keep() -> None:
            kept.append(state[0])
            await taken.wait()

        keeping = Keeping(keep)
        for state[0] in (1, 2, 3):
            keeping.changed()
            await asyncio.sleep(0)
        assert kept == [1]
        taken.set()
        while len(kept) < 2:
            await asyncio.sleep(0)
        state[0] = 4
        keeping.changed()
        for _ in range(10):
            await asyncio.sleep(0)
        assert kept == [1, 3, 4]

    asyncio.run(run())
