"""A nursery tells a new controlplane whom it has, and answers for the workers of one that died."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import subprocess
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.wire import fdpass
from cellvisor.core.wire.messages import FromNursery, ToNursery
from tests.fakes.core import FakeCore, NurseryProcess, gone


@contextlib.contextmanager
def sleeper() -> Iterator[subprocess.Popen[bytes]]:
    """A process that ends at the latest with the test."""
    with subprocess.Popen(["sleep", "60"]) as process:
        try:
            yield process
        finally:
            process.kill()


@pytest.fixture
def core(tmp_path: Path) -> Iterator[FakeCore]:
    with FakeCore(tmp_path) as core:
        yield core


def test_children_are_told_with_their_pidfds(core: FakeCore, tmp_path: Path) -> None:
    with NurseryProcess(tmp_path) as nursery:
        nursery.ask(ToNursery.CHILDREN)
        assert nursery.told() == {"k": FromNursery.CHILDREN, "children": []}
        pids = {}
        for name in ("dev0", "dev1"):
            core.start(nursery, "rng", {}, name, generation=4)
            pids[name] = core.spawned["pid"]
        nursery.sock.close()
        nursery.connect()
        fdpass.send(nursery.sock, {"k": ToNursery.CHILDREN})
        packet = fdpass.receive(nursery.sock)
        assert packet is not None
        body, pidfds = packet
        assert body["children"] == [["dev0", 4, pids["dev0"]], ["dev1", 4, pids["dev1"]]]
        signal.pidfd_send_signal(pidfds[1], signal.SIGKILL)
        assert nursery.told()["device"] == "dev1"
        assert not select.select([pidfds[0]], [], [], 0)[0]
        for pidfd in pidfds:
            os.close(pidfd)


@pytest.mark.parametrize("wrong", [{"pids": None}, {"pids": [1, 2]}, {"pids": "1"}, {}])
def test_wards_that_do_not_fit_their_descriptors_are_ignored(tmp_path: Path, wrong: dict[str, object]) -> None:
    with NurseryProcess(tmp_path) as nursery, sleeper() as worker:
        pidfd = os.pidfd_open(worker.pid)
        nursery.ask(ToNursery.CATALOG)
        nursery.told()
        before = len(os.listdir(f"/proc/{nursery.process.pid}/fd"))
        fdpass.send(nursery.sock, {"k": ToNursery.WARD, **wrong}, [pidfd])
        nursery.ask(ToNursery.CATALOG)
        assert nursery.told()["k"] == FromNursery.CATALOG
        assert len(os.listdir(f"/proc/{nursery.process.pid}/fd")) == before
        os.close(pidfd)


def test_wards_die_with_core(core: FakeCore, tmp_path: Path) -> None:
    with sleeper() as core_process, sleeper() as orphan, sleeper() as ended:
        core_pidfd, *pidfds = (os.pidfd_open(one.pid) for one in (core_process, orphan, ended))
        with NurseryProcess(tmp_path, core_pidfd) as nursery:
            core.start(nursery, "rng", {})
            for _ in range(2):  # told twice, and its own child too: all the same
                own = core.spawned
                fdpass.send(nursery.sock, {"k": ToNursery.WARD, "pids": [orphan.pid, ended.pid, own["pid"]]},
                            [*pidfds, own["pidfd"]])
            ended.kill()
            orphan.send_signal(signal.SIGSTOP)
            nursery.ask(ToNursery.CATALOG)
            assert nursery.told()["k"] == FromNursery.CATALOG  # it knows its wards by now
            core_process.kill()
            assert nursery.process.wait(10) == 0
            assert orphan.wait(10) == -signal.SIGKILL
            assert gone(own["pid"])
        for pidfd in (core_pidfd, *pidfds):
            os.close(pidfd)
