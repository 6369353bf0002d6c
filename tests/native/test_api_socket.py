"""A VM with core, nursery and guest as they are, steered over HTTP by `ch-remote`'s bytes."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.fakes import ch_remote
from tests.native.guest import build, needs_kvm

pytestmark = [pytest.mark.kvm, needs_kvm]


class Machine:
    """A process that waits for vm.create."""

    def __init__(self, directory: str) -> None:
        self.directory = Path(directory)
        self.socket = f"{directory}/http"
        command = [str(Path(sys.executable).with_name("cellvisor")), "run", "--api-socket", self.socket, "--name", "vm",
                   "--event-monitor", f"path={directory}/events"]
        self.process = subprocess.Popen(command, stdin=subprocess.DEVNULL,
                                        env=dict(os.environ, XDG_RUNTIME_DIR=directory))
        wait_for(lambda: os.path.exists(self.socket))

    def get(self, command: str) -> Any:
        return json.loads(ch_remote.call(self.socket, "GET", command) or "")

    def put(self, command: str, body: dict[str, Any] | None = None) -> Any:
        answer = ch_remote.call(self.socket, "PUT", command, None if body is None else json.dumps(body))
        return json.loads(answer) if answer else None

    def config(self) -> dict[str, Any]:
        with open(self.directory / "disk", "wb") as disk:
            disk.truncate(16 << 20)
        return {"cpus": {"boot_vcpus": 2, "max_vcpus": 2}, "memory": {"size": 256 << 20},
                "payload": {"kernel": str(build()), "cmdline": "test=hotplug"}, "console": {"mode": "Off"},
                "disks": [{"path": str(self.directory / "disk")}],
                "serial": {"mode": "File", "file": str(self.directory / "serial")}}

    def listens(self) -> bool:
        return "listening=1" in (self.directory / "serial").read_text()

    def processes(self) -> set[int]:
        return {entry["pid"] for entry in self.get("vm.info?processes=true")["processes"]}


def wait_for(condition: Callable[[], Any]) -> None:
    until = time.monotonic() + 60
    while not condition():
        assert time.monotonic() < until
        time.sleep(0.02)


@pytest.fixture
def machine() -> Iterator[Machine]:
    directory = tempfile.mkdtemp(prefix="cv-")
    machine = Machine(directory)
    yield machine
    with contextlib.suppress(OSError, ch_remote.Failed):
        machine.put("vmm.shutdown")
    assert machine.process.wait(30) == 0
    assert os.listdir(f"{directory}/cellvisor") == []
    shutil.rmtree(directory)


def test_created_booted_and_ended_twice_in_one_process(machine: Machine) -> None:
    machine.put("vm.create", machine.config())
    seen: set[int] = set()
    for _ in range(2):
        machine.put("vm.boot")
        wait_for(machine.listens)
        info = machine.get("vm.info")
        assert (info["state"], info["memory_actual_size"]) == ("Running", 256 << 20)
        assert info["device_tree"]["_disk0"]["pci_bdf"] == "0000:00:01.0"
        assert set(machine.get("vm.counters")) == {"_disk0", "__rng"}
        machine.put("vm.pause")
        assert machine.get("vm.info")["state"] == "Paused"
        machine.put("vm.resume")
        machine.put("vm.nmi")
        present = machine.processes()
        assert len(present) == 5
        assert seen & present == ({machine.process.pid} if seen else set())
        seen |= present
        machine.put("vm.shutdown")
        assert machine.get("vm.info")["state"] == "Created"
        os.truncate(machine.directory / "serial", 0)
    machine.put("vm.delete")
    records = [json.loads(text) for text in (machine.directory / "events").read_text().split("\n\n") if text]
    names = [f"{record['source']}.{record['event']}" for record in records]
    assert names[0] == "vmm.starting"
    assert names[-1] == "vm.deleted"
    for name in ("vm.booting", "vm.booted", "vm.pausing", "vm.paused", "vm.resuming", "vm.resumed", "vm.shutdown"):
        assert names.count(name) == 2, name


def test_a_boot_that_fails_changes_nothing(machine: Machine) -> None:
    config = machine.config()
    kernel = machine.directory / "kernel"
    kernel.write_bytes(b"no kernel")
    machine.put("vm.create", {**config, "payload": {"kernel": str(kernel)}})
    with pytest.raises(ch_remote.Failed) as caught:
        machine.put("vm.boot")
    assert (caught.value.status, str(kernel) in str(caught.value.body)) == (400, True)
    shutil.copy(build(), kernel)
    machine.put("vm.boot")
    assert machine.get("vm.info")["state"] == "Running"


def test_a_successor_serves_the_same_socket(machine: Machine) -> None:
    machine.put("vm.create", machine.config())
    machine.put("vm.boot")
    wait_for(machine.listens)
    workers = machine.processes() - {machine.process.pid}
    machine.process.kill()
    machine.process.wait()

    def served() -> bool:
        with contextlib.suppress(OSError, EOFError):
            return bool(machine.get("vmm.ping")["pid"] != machine.process.pid)
        return False

    wait_for(served)
    assert machine.get("vm.info")["state"] == "Running"
    assert machine.processes() - {machine.get("vmm.ping")["pid"]} == workers
    machine.put("vm.shutdown")
    machine.put("vm.boot")
    assert machine.get("vm.info")["state"] == "Running"
    pid = machine.get("vmm.ping")["pid"]
    machine.put("vmm.shutdown")
    wait_for(lambda: not os.path.exists(f"/proc/{pid}"))
    machine.process.returncode = 0  # ended by the test


def test_signals_end_an_empty_process(machine: Machine) -> None:
    machine.process.send_signal(signal.SIGTERM)
    assert machine.process.wait(30) == 143
    machine.process.returncode = 0


# What `ch-remote add-disk path=PATH,id=test0` makes of its text: every key it knows, in its order.
ADD_DISK = ('{"path":%s,"readonly":false,"direct":false,"iommu":false,"num_queues":1,"queue_size":128,'
            '"vhost_user":false,"vhost_socket":null,"rate_limit_group":null,"rate_limiter_config":null,"id":"test0",'
            '"disable_io_uring":false,"disable_aio":false,"pci_segment":0,"pci_device_id":null,"serial":null,'
            '"queue_affinity":null,"backing_files":false,"sparse":true,"image_type":%s,"lock_granularity":%s}')


@pytest.mark.parametrize(("image_type", "granularity"), [("Raw", "Full"), ("Unknown", "ByteRange")])
def test_ch_remote_adds_and_removes_a_disk(machine: Machine, image_type: str, granularity: str) -> None:
    machine.put("vm.create", machine.config())
    machine.put("vm.boot")
    wait_for(machine.listens)
    shutil.copy(machine.directory / "disk", machine.directory / "more")
    body = ADD_DISK % tuple(json.dumps(word) for word in (str(machine.directory / "more"), image_type, granularity))
    answer = ch_remote.call(machine.socket, "PUT", "vm.add-disk", body)
    assert answer == '{"id":"test0","bdf":"0000:00:03.0"}'
    assert ch_remote.call(machine.socket, "PUT", "vm.remove-device", '{"id":"test0"}') is None
    wait_for(lambda: "test0" not in machine.get("vm.info")["device_tree"])
