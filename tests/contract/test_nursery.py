"""The nursery as a process: it forks, reports, kills, and never outlives core or leaves anything behind."""

from __future__ import annotations

import os
import select
import signal
import subprocess
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.wire import fdpass
from cellvisor.core.wire.messages import FromNursery, ToCore, ToNursery, ToWorker
from cellvisor.core.wire.options import validate
from tests.fakes.core import FakeCore, NurseryProcess, gone, kill
from tests.fakes.site import install


@pytest.fixture
def core(tmp_path: Path) -> Iterator[FakeCore]:
    with FakeCore(tmp_path) as core:
        yield core


@pytest.fixture
def nursery(tmp_path: Path) -> Iterator[NurseryProcess]:
    with NurseryProcess(tmp_path) as nursery:
        yield nursery


def test_catalog_describes_every_type(nursery: NurseryProcess) -> None:
    nursery.ask(ToNursery.CATALOG)
    told = nursery.told()
    assert told["k"] == FromNursery.CATALOG
    assert set(told["types"]) >= {"blk", "rng", "console"}
    assert told["types"]["blk"]["verb"] == "disk"
    assert validate({"path": "/x", "readonly": True}, told["types"]["blk"]["schema"])
    assert Path(told["types"]["rng"]["file"]).name == "rng.py"


def test_spawned_worker_greets_and_its_pidfd_works(core: FakeCore, nursery: NurseryProcess) -> None:
    core.start(nursery, "rng", {})
    pid, pidfd = core.spawned["pid"], core.spawned["pidfd"]
    assert core.spawned["device"] == "dev0"
    assert core.spawned["generation"] == 1
    assert os.getsid(pid) == pid, "not in a session of its own"
    assert os.getsid(nursery.process.pid) == nursery.process.pid
    assert Path(f"/proc/{pid}/comm").read_text() == "cv-dev0\n"
    assert Path(f"/proc/{pid}/oom_score_adj").read_text() == "500\n"
    os.kill(pid, signal.SIGINT)
    assert not select.select([pidfd], [], [], 0.1)[0], "Ctrl-C reached a worker"
    signal.pidfd_send_signal(pidfd, signal.SIGKILL)
    assert nursery.told() == {"k": FromNursery.EXITED, "device": "dev0", "generation": 1, "pid": pid,
                              "status": "signal 9"}
    assert gone(pid)


def test_worker_inherits_only_what_it_needs(core: FakeCore, nursery: NurseryProcess) -> None:
    core.start(nursery, "rng", {}, "dev0")
    core.start(nursery, "rng", {}, "dev1")
    names = [os.readlink(f"/proc/{core.spawned['pid']}/fd/{fd}")
             for fd in os.listdir(f"/proc/{core.spawned['pid']}/fd")]
    assert sum(name.startswith("socket:") for name in names) == 2, f"core's two, nothing else: {names}"
    assert sum(name.endswith("/log") for name in names) == 1, names
    assert sum("fake-ram" in name for name in names) == 1, names
    assert not [name for name in names if "pidfd" in name], names


def test_exit_status_is_reported(core: FakeCore, nursery: NurseryProcess) -> None:
    link = core.start(nursery, "rng", {})
    link.send(ToWorker.END)
    assert nursery.told()["status"] == "exit 0"
    nursery.spawn(core.run_dir, "rng", {"src": "/nowhere"}, "dev1")
    assert core.told(ToCore.FAILED, "dev1")["reason"] == "src=/nowhere: No such file or directory"
    assert nursery.told()["status"] == "exit 1"
    nursery.spawn(core.run_dir, "rng", {"sauce": "x"}, "dev2")
    assert "unknown key 'sauce' (known keys: " in core.told(ToCore.FAILED, "dev2")["reason"]
    assert nursery.told()["status"] == "exit 1"


def test_kill(core: FakeCore, nursery: NurseryProcess) -> None:
    core.start(nursery, "rng", {}, generation=4)
    nursery.ask(ToNursery.KILL, device="dev0", generation=3)
    assert nursery.told()["error"]["message"] == "no worker dev0/3"
    nursery.ask(ToNursery.KILL, device="dev0", generation=4)
    assert nursery.told()["status"] == "signal 9"


@pytest.mark.parametrize(("body", "message"), [
    ({"type": "warp"}, "unknown device type 'warp' (known types: blk, console, net, rng"),
    ({"type": 3}, "unknown device type '3'"),
    ({"device": ""}, "device='' is not a string"),
    ({"generation": -1}, "generation=-1 is not a number"),
    ({"options": []}, "options is no map"),
    ({"k": "dance"}, "unknown request 'dance'"),
])
def test_bad_requests_are_answered(nursery: NurseryProcess, body: dict[str, object], message: str) -> None:
    good: dict[str, object] = {"k": ToNursery.SPAWN, "device": "d", "generation": 1, "type": "rng",
                               "options": {}, "token": "t", "run_dir": str(nursery.run_dir)}
    fdpass.send(nursery.sock, {**good, **body})
    told = nursery.told()
    assert told["k"] == FromNursery.ERROR
    assert message in f"{told['error']['message']} ({told['error']['hint']}"


def test_one_worker_per_generation(core: FakeCore, nursery: NurseryProcess) -> None:
    core.start(nursery, "rng", {})
    nursery.ask(ToNursery.SPAWN, device="dev0", generation=1, type="rng", options={}, token="t",
                run_dir=str(core.run_dir))
    assert nursery.told()["error"]["code"] == "conflict"


def test_next_controlplane_hears_what_happened_meanwhile(core: FakeCore, nursery: NurseryProcess) -> None:
    core.start(nursery, "rng", {})
    pid = core.spawned["pid"]
    nursery.sock.close()
    time.sleep(0.2)
    assert nursery.process.poll() is None
    kill(pid)
    assert gone(pid)
    nursery.connect()
    assert nursery.told()["status"] == "signal 9"


def test_garbage_only_costs_the_connection(nursery: NurseryProcess) -> None:
    nursery.sock.send(b"\xff\xff garbage")
    assert nursery.sock.recv(10) == b""
    nursery.sock.close()
    nursery.connect()
    nursery.ask(ToNursery.CATALOG)
    assert nursery.told()["k"] == FromNursery.CATALOG


def test_quit_ends_every_worker(core: FakeCore, nursery: NurseryProcess) -> None:
    pids = []
    for name in ("dev0", "dev1", "dev2"):
        core.start(nursery, "rng", {}, name)
        pids.append(core.spawned["pid"])
    os.kill(pids[1], signal.SIGSTOP)
    nursery.ask(ToNursery.QUIT)
    assert nursery.process.wait(10) == 0
    assert all(gone(pid) for pid in pids)
    assert not (core.run_dir / "nursery.sock").exists()


def test_death_of_core_ends_everything_within_a_second(core: FakeCore, tmp_path: Path) -> None:
    with subprocess.Popen(["sleep", "60"]) as stand_in:
        pidfd = os.pidfd_open(stand_in.pid)
        with NurseryProcess(tmp_path, pidfd) as nursery:
            pids = []
            for name in ("dev0", "dev1"):
                core.start(nursery, "rng", {}, name)
                pids.append(core.spawned["pid"])
            os.kill(pids[0], signal.SIGSTOP)  # a hung worker must go too
            stand_in.kill()
            assert nursery.process.wait(10) == 0
            assert all(gone(pid) for pid in pids)
        os.close(pidfd)


def test_worker_ends_with_core_even_without_a_nursery(core: FakeCore, nursery: NurseryProcess) -> None:
    core.start(nursery, "rng", {})
    pid = core.spawned["pid"]
    nursery.process.kill()
    nursery.process.wait()
    os.kill(pid, 0)
    core.hang_up()
    assert _ended(core.spawned["pidfd"])


def _ended(pidfd: int) -> bool:
    return bool(select.select([pidfd], [], [], 10)[0])


def test_worker_without_a_core_gives_up(nursery: NurseryProcess, tmp_path: Path) -> None:
    nursery.spawn(tmp_path / "elsewhere", "rng", {})
    assert nursery.told()["status"] == "exit 1"
    assert "cannot reach core" in nursery.log()


def test_broken_plugin_is_reported_and_left_out(tmp_path: Path) -> None:
    plugin = install(tmp_path, "broken", "raise RuntimeError('out of order')\n", "rng = os:path\n")
    with NurseryProcess(tmp_path, environ={"PYTHONPATH": str(plugin)}) as nursery:
        nursery.ask(ToNursery.CATALOG)
        told = nursery.told()
    assert "broken" not in told["types"]
    assert told["broken"]["broken"] == "RuntimeError: out of order"
    assert "there is a type rng already" in told["broken"]["rng"]
    assert Path(told["types"]["rng"]["file"]).name == "rng.py"


def test_nursery_has_one_thread(core: FakeCore, nursery: NurseryProcess) -> None:
    core.start(nursery, "rng", {})
    assert len(os.listdir(f"/proc/{nursery.process.pid}/task")) == 1
