"""Many at once: clients, clients that die, VMs, devices."""

from __future__ import annotations

import contextlib
import json
import os
import random
import signal
import socket
import subprocess
import sys
import threading
from collections import Counter
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError, Conflict
from cellvisor.core.wire.control import TEXT
from cellvisor.ctl import dispatch
from cellvisor.ctl.client import Client
from cellvisor.ctl.sampling import Sampler
from tests.native import cellvisor
from tests.native.conftest import Vm
from tests.native.guest import make_disk, needs_kvm
from tests.native.hotplug import Steered, eventually, starting
from tests.native.steer import steer
from tests.native.storm import stop_load

pytestmark = [pytest.mark.kvm, needs_kvm]

LOAD_WORDS = "depth=4:bs=4096:reads=25:stoppable=1:count=100000000"
LOAD = f"test=blk-write span=1M {LOAD_WORDS.replace(':', ' ')}"
CLIENTS, ROUNDS = 50, 4
READS = ("ping", "info", "devices", "counters", "events", "capacity", "ops")


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    yield from starting(vm)


def read(client: Client, choose: random.Random) -> str:
    verb = choose.choice(READS)
    args: dict[str, Any] = {"processes": True} if verb == "info" and choose.random() < 0.3 else {}
    assert isinstance(client.call(verb, **args), dict), verb
    return verb


def pause_and_resume(client: Client, choose: random.Random) -> str:
    for verb in ("pause", "resume"):
        with contextlib.suppress(Conflict):  # somebody else was first
            client.call(verb)
    return "pause"


def plug(client: Client, choose: random.Random) -> str:
    """Add a device and remove it; the guest may be paused by others meanwhile, but not for long."""
    key = f"rng{choose.randrange(10**9)}"
    client.call("add-rng", **{TEXT: f"id={key}"})
    assert client.call("ops", action="wait", id=key, timeout=60)["state"] == "done"
    client.call("remove-device", id=key)
    assert client.call("ops", action="wait", id=key, timeout=60)["state"] == "done"
    return "plug"


def test_fifty_clients_mix_reads_and_changes(vm: Vm, start: Callable[..., Steered]) -> None:
    """Half of them by ZeroMQ, half by HTTP; 10 plug, 10 pause, 30 look. Nobody is refused, and nothing is left."""
    http = os.path.join(cellvisor.runtime_dir(vm.where), "http")
    steered = start("removals=100000", extra=["--api-socket", http])
    before, devices = steered.footprint(), set(steered.devices())
    done: Counter[str] = Counter()
    failed: list[str] = []

    def work(number: int) -> None:
        choose = random.Random(number)
        act = plug if number < 10 else pause_and_resume if number < 20 else read
        try:
            with Client(http if number % 2 else steered.client.path, timeout=60) as client:
                for _ in range(ROUNDS if act is not read else 3 * ROUNDS):
                    done[act(client, choose)] += 1
                    done[read(client, choose)] += 1
        except Exception as error:
            failed.append(f"client {number}: {type(error).__name__}: {error}")

    threads = [threading.Thread(target=work, args=(number,)) for number in range(CLIENTS)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert done["plug"] == done["pause"] == 10 * ROUNDS
    assert sum(done[verb] for verb in READS) == 20 * ROUNDS + 30 * 6 * ROUNDS
    assert steered.client.call("info")["state"] == "Running"
    assert set(steered.devices()) == devices
    assert steered.footprint() == before


DIES = """import os, signal, sys, time
from cellvisor.core.wire.control import request
from cellvisor.core.wire.messages import pack
from cellvisor.ctl.client import Client
client = Client(sys.argv[1])
client._link._socket.send(pack(request("dying" + sys.argv[2], sys.argv[2], eval(sys.argv[3]))))
time.sleep(0.2)  # for the thread that sends
os.kill(os.getpid(), signal.SIGKILL)
"""


def test_clients_that_die_over_a_request(vm: Vm, start: Callable[..., Steered]) -> None:
    """What was asked for is done; the VM answers others meanwhile and keeps nothing of the dead."""
    http = os.path.join(cellvisor.runtime_dir(vm.where), "http")
    steered = start("removals=100000", extra=["--api-socket", http])
    before = steered.footprint()
    asked = {"pause": {}, "ops": {"action": "wait", "id": "nothing", "timeout": 60}, "info": {"processes": True}}
    dead = [subprocess.Popen([sys.executable, "-c", DIES, steered.client.path, verb, repr(args)])
            for verb, args in asked.items()]
    assert [one.wait(60) for one in dead] == [-signal.SIGKILL] * 3
    eventually(lambda: steered.client.call("info")["state"] == "Paused", "the pause that a dead client asked for")
    for data in (b"PUT /api/v1/vm.resume HTTP/1.1\r\nHost: x\r\n\r\n", b"PUT /api/v1/vm.resume HTTP/1.1\r\nContent-Le",
                 b"PUT /api/v1/vm.add-disk HTTP/1.1\r\nContent-Length: 100\r\n\r\n{",
                 b"GET /api/v1/vm.info HTTP/1.1\r\n\r\n"):
        with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as sock:
            sock.connect(http)
            sock.sendall(data)
    eventually(lambda: steered.client.call("info")["state"] == "Running", "the resume that a dead client asked for")
    eventually(lambda: steered.footprint() == before, "what was opened for the dead is closed")


def test_eight_vms_side_by_side(vm: Vm, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    place = cellvisor.runtime_dir(vm.where)
    monkeypatch.setenv("XDG_RUNTIME_DIR", place)
    started = []
    with contextlib.ExitStack() as stack:
        for number in range(8):
            where = vm.where / str(number)
            where.mkdir()
            (where / "run").symlink_to(place)
            disk = make_disk(where / "disk.raw", 16 << 20)
            started.append((disk, stack.enter_context(cellvisor.start_cellvisor(
                f"{LOAD} seed={number}", where, disks=[disk], memory=64, extra=["--name", f"vm{number}"]))))
        for _, running in started:
            running.wait_for("features=")
        assert dispatch.run(["ls", "--json"]) == 0
        listed = json.loads(capsys.readouterr().out)
        assert [(one["name"], one["state"], one["devices"]) for one in listed] == [
            (f"vm{number}", "Running", 2) for number in range(8)]
        assert len({one["pid"] for one in listed}) == 8
        sampler = Sampler(None, everyone=True)
        sampler.sample(60.0)
        seen = sampler.sample(60.0)
        sampler.close()
        assert not seen.errors
        assert sorted({row.vm for row in seen.rows if row.type == "blk" and row.iops}) == [f"vm{n}" for n in range(8)]
        for disk, _ in started:
            stop_load(disk)
        for _, running in started:
            said = running.finish().check()
            assert said.number("errors") == 0 and said.number("verified.0") > 0


def test_thirty_one_devices_in_one_vm(vm: Vm) -> None:
    """Every slot is taken; each disk works, and again after all 31 processes have been killed at once."""
    disks = [make_disk(vm.where / f"disk{number}.raw", 2 << 20) for number in range(30)]
    tests = ",".join(f"blk-write:disk={number}:count=8" for number in range(30))
    with steer(vm, f"test={tests},blk-write:disk=29:{LOAD_WORDS},{tests} span=1M", disks=disks) as vmm:
        vmm.running.wait_for("test=blk-write", 120)
        listed = vmm.client.call("devices")["devices"]
        assert [one["slot"] for one in listed] == list(range(1, 32))
        assert {one["state"] for one in listed} == {"serving"}
        assert vmm.client.call("capacity")["slots"] == {"total": 31, "free": 0, "next": None}
        with pytest.raises(CellvisorError, match="slot"):
            vmm.client.call("add-rng", **{TEXT: ""})
        eventually(lambda: vmm.running.text.count("features=") == 31, "the load on the last disk", 120)
        pids = [one["pid"] for one in listed]
        for pid in pids:
            os.kill(pid, signal.SIGKILL)
        eventually(lambda: all((one["state"], one["generation"]) == ("serving", 2) and one["pid"] not in pids
                               for one in vmm.client.call("devices")["devices"]), "31 successors", 60)
        stop_load(disks[-1])
        said = vmm.running.finish().check()
    assert said.number("errors") == 0
    assert said.text.count("verified.0=") == 61
