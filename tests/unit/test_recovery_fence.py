"""The fence: nothing is replayed before the dead incarnation's last I/O has ended; a stranger is named, not raced."""

from __future__ import annotations

import logging
import os
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from cellvisor.core.abi import virtio
from cellvisor.core.errors import Conflict
from cellvisor.core.wire.messages import ToCore
from cellvisor.devices.backends import disk as module
from cellvisor.devices.backends.disk import Disk, wait_released
from tests.fakes.core import FakeCore, NurseryProcess, kill

HOLD = ("import sys; from cellvisor.devices.backends.disk import Disk;"
        "d = Disk(sys.argv[1], readonly=len(sys.argv) > 2);"
        "print('locked', flush=True); sys.stdin.read()")


@pytest.fixture
def image(tmp_path: Path) -> Path:
    path = tmp_path / "image"
    path.write_bytes(bytes(1 << 20))
    return path


@contextmanager
def held(image: Path, *how: str) -> Iterator[subprocess.Popen[bytes]]:
    """Have another process hold the image's lock; it lets go when its stdin is closed."""
    with subprocess.Popen([sys.executable, "-c", HOLD, str(image), *how], stdin=subprocess.PIPE,
                          stdout=subprocess.PIPE) as other:
        assert other.stdout is not None
        assert other.stdout.readline() == b"locked\n"
        yield other
        if other.stdin is not None:
            other.stdin.close()


def release(other: subprocess.Popen[bytes]) -> None:
    assert other.stdin is not None
    other.stdin.close()
    other.wait()


def test_a_first_opener_does_not_wait(image: Path) -> None:
    with held(image):
        began = time.monotonic()
        with pytest.raises(Conflict):
            Disk(str(image))
        assert time.monotonic() - began < 5


def test_a_successor_waits_and_gets_it(image: Path) -> None:
    with held(image) as other:
        os.kill(other.pid, 9)
        Disk(str(image), patience=30).close()


def test_a_stranger_is_named_when_patience_ends(image: Path) -> None:
    with held(image) as other, pytest.raises(Conflict, match=f"is in use by .*\\(pid {other.pid}\\)"):
        Disk(str(image), patience=0.2)


def test_waiting_is_told_once(image: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    monkeypatch.setattr(module, "TELL_SECONDS", 0.05)
    monkeypatch.setattr(logging.getLogger("cellvisor"), "propagate", True)
    with held(image) as other, pytest.raises(Conflict):
        Disk(str(image), patience=0.3)
    assert [str(other.pid) in record.getMessage() for record in caplog.records] == [True]


def test_released_means_nobody_or_somebody_who_lives(image: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    wait_released(str(image), 0)
    wait_released(str(image) + ".gone", 0)
    for how in ([], ["readonly"]):
        with held(image, *how):
            wait_released(str(image), 0)  # it can only have it because the dead one has let go
    with held(image) as other:
        monkeypatch.setattr(module, "holder", lambda fd: module.NOBODY)  # as io_uring's leftovers look
        with pytest.raises(Conflict, match=r"I/O of a dead process has been under way for 0.1 s"):
            wait_released(str(image), 0.1)
        release(other)
        wait_released(str(image), 5)


def header(kind: int, sector: int = 0) -> bytes:
    return bytes(virtio.BLK_REQUEST.pack(kind, 0, sector))


@pytest.mark.parametrize("drain", [False, True])
def test_nothing_is_replayed_before_the_lock_is_granted(image: Path, tmp_path: Path, drain: bool) -> None:
    """What waited when the worker died is written only after a holder has let go; a drain incarnation does not
    wait for one who lives, and does not write."""
    with FakeCore(tmp_path) as core, NurseryProcess(tmp_path) as nursery:
        link = core.start(nursery, "blk", {"path": str(image)})
        link.activate()
        link.call("counters")
        os.kill(core.spawned["pid"], 19)
        head = link.drivers[0].add([header(virtio.BLK_T_OUT), b"x" * 512], [1])
        link.drivers[0].offer()
        kill(core.spawned["pid"])
        assert nursery.told()["status"] == "signal 9"
        with held(image) as other:
            nursery.spawn(core.run_dir, "blk", {"path": str(image)}, generation=2, drain=drain)
            end = time.monotonic() + 0.5
            while time.monotonic() < end:
                core.serve()
            assert image.read_bytes() == bytes(1 << 20)
            assert ([kind for _, kind in core.messages] != []) == drain
            release(other)
        core.told(ToCore.HELLO)
        core.told(ToCore.READY)
        link.activate(again=True)
        assert link.used(1) == {head: 1}
        status = link.drivers[0].data(head)[0]
    assert status == (virtio.BLK_S_IOERR if drain else virtio.BLK_S_OK)
    assert image.read_bytes()[:512] == (bytes(512) if drain else b"x" * 512)
