"""Every verb of the table over ZeroMQ and over HTTP, against one running VM with a fake core and nursery."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
import zmq
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from cellvisor.core.errors import CellvisorError
from cellvisor.core.wire import control, places
from cellvisor.core.wire.control import VERBS, Verb
from cellvisor.core.wire.messages import pack, unpack
from cellvisor.ctl.client import Client
from tests.fakes import ch_remote

RUN = Path(__file__).parents[1] / "fakes" / "control_run.py"


@dataclass
class Vm:
    """A started `cellvisor run --api-socket`; `socket` is its HTTP socket."""

    directory: Path
    process: subprocess.Popen[str]

    @property
    def socket(self) -> str:
        return str(self.directory / "http.sock")

    def over_zmq(self, verb: Verb, args: dict[str, Any]) -> tuple[int, Any]:
        """Return (200, answer) or (status, message)."""
        with Client("web", timeout=30) as client:
            try:
                return 200, client.call(verb.name, **args)
            except CellvisorError as error:
                return error.status, error.message

    def over_http(self, verb: Verb, args: dict[str, Any]) -> tuple[int, Any]:
        """Return (200 or 204, answer) or (status, message), asked as ch-remote would."""
        try:
            if verb.reads:
                query = "&".join(f"{key}={str(value).lower()}" for key, value in args.items())
                answer = ch_remote.call(self.socket, "GET", verb.http_path + (f"?{query}" if query else ""))
            else:
                answer = ch_remote.call(self.socket, "PUT", verb.http_path, json.dumps(args) if args else None)
        except ch_remote.Failed as error:
            return error.status, json.loads(error.body or "")[0]
        return (204, None) if answer is None else (200, json.loads(answer) if answer else {})


OVER: dict[str, Callable[[Vm, Verb, dict[str, Any]], tuple[int, Any]]] = {"zmq": Vm.over_zmq, "http": Vm.over_http}


def start(directory: Path, *flags: str) -> Vm:
    (directory / "kernel").write_bytes(b"kernel")
    argv = [sys.executable, str(RUN), "--name", "web", "--api-socket", str(directory / "http.sock"), *flags]
    process = subprocess.Popen(argv, stdin=subprocess.DEVNULL, text=True, stderr=subprocess.PIPE)
    vm = Vm(directory, process)
    until = time.monotonic() + 60
    while not os.path.exists(vm.socket) or state(vm) not in ("Running", "Empty"):
        assert process.poll() is None
        assert time.monotonic() < until
        time.sleep(0.02)
    return vm


def state(vm: Vm) -> str:
    status, info = vm.over_http(VERBS["info"], {})
    return str(info["state"]) if status == 200 else "Empty"


def finish(vm: Vm) -> None:
    vm.process.terminate()
    _, err = vm.process.communicate(timeout=60)
    assert places.running() == {}
    assert not os.path.exists(vm.socket)
    assert "Traceback" not in err


@pytest.fixture(scope="module")
def booted(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Vm]:
    """One VM for the module, running."""
    base = tmp_path_factory.mktemp("vm")
    patch = pytest.MonkeyPatch()
    patch.setenv("XDG_RUNTIME_DIR", str(base))
    vm = start(base, "--kernel", str(base / "kernel"), "--disk", "path=a")
    yield vm
    finish(vm)
    patch.undo()


@pytest.fixture
def empty(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Vm]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    vm = start(tmp_path)
    yield vm
    finish(vm)


ARGS: dict[str, dict[str, Any]] = {
    "info": {"processes": True}, "events": {"since": 1}, "add-disk": {"path": "x", "id": "more"},
    "add-net": {"tap": "x", "id": "card"}, "add-rng": {}, "add-console": {"mode": "null"},
    "add-virtio": {"type": "blk", "path": "x"},
    "validate": {"verb": "add-disk", "path": "x"}, "remove-device": {"id": "_disk0"},
    "resize-disk": {"id": "_disk0", "desired_size": 1 << 20}, "restart-device": {"id": "_disk0"},
    "swap-disk": {"id": "_disk0", "path": "y"},
    "set-rate-limit": {"id": "_disk0", "bw_size": 1 << 20, "bw_refill_time": 100},
    "set-link": {"id": "_disk0", "link": "up"}, "drain-device": {"id": "_disk0"}, "upgrade-device": {"id": "_disk0"},
}
ENDING = ("shutdown", "shutdown-vmm", "delete")
WRONG = {"console": 404, "restart-device": 409, "set-link": 400, "drain-device": 409, "create": 409, "boot": 409}


def is_silent(verb: Verb) -> bool:
    """Cloud Hypervisor's verbs that change something mostly answer with 204."""
    return bool(verb.path) and not verb.reads and not verb.answers


# What ch-remote's subcommands ask, by its own documentation.
CH_REMOTE = {
    "GET": "vmm.ping vm.info vm.counters",
    "PUT": "vmm.shutdown vm.create vm.delete vm.boot vm.pause vm.resume vm.shutdown vm.reboot vm.power-button vm.nmi "
           "vm.resize vm.resize-disk vm.resize-zone vm.add-device vm.add-user-device vm.add-disk vm.add-fs "
           "vm.add-generic-vhost-user vm.add-pmem vm.add-net vm.add-vdpa vm.add-vsock vm.remove-device vm.snapshot "
           "vm.restore vm.coredump vm.receive-migration vm.send-migration"}


@pytest.mark.parametrize("method", CH_REMOTE)
def test_every_path_of_ch_remote_is_a_verb(method: str) -> None:
    assert set(CH_REMOTE[method].split()) == {
        verb.path for verb in VERBS.values() if verb.path and verb.reads == (method == "GET")}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize("name", [name for name in VERBS if name not in ENDING])
def test_every_verb(booted: Vm, name: str, over: str) -> None:
    verb = VERBS[name]
    ask = OVER[over]
    if name == "resume":
        booted.over_zmq(VERBS["pause"], {})
    args = dict(ARGS.get(name, {}))
    if "id" in args and name.startswith("add-"):
        args["id"] += over
    status, answer = ask(booted, verb, args)
    if name == "pause":
        booted.over_zmq(VERBS["resume"], {})
    if not verb.ready:
        assert (status, answer) == (400, f"{name}: not supported yet")
        return
    if name == "remove-device" and over == "http" and status == 409:
        assert "remov" in answer  # ZeroMQ asked first
        return
    assert status == WRONG.get(name, 204 if over == "http" and is_silent(verb) else 200), answer
    expect = CHECKS.get(name)
    if expect is not None and status == 200:
        assert expect(answer), answer


CHECKS: dict[str, Callable[[Any], bool]] = {
    "ping": lambda answer: {"build_version", "version", "pid", "features"} <= set(answer),
    "info": lambda answer: {"config", "state", "memory_actual_size", "device_tree", "processes"} <= set(answer)
    and set(answer["device_tree"]["_disk0"]) == {"id", "resources", "parent", "children", "pci_bdf"},
    "counters": lambda answer: answer["_disk0"] == {"read_bytes": 4096},
    "events": lambda answer: all(event["seq"] > 1 for event in answer["events"]),
    "add-disk": lambda answer: answer["id"].startswith("more") and answer["bdf"].startswith("0000:00:"),
    "validate": lambda answer: answer["bdf"].startswith("0000:00:"),
}


@pytest.mark.parametrize("over", OVER)
@pytest.mark.parametrize(("name", "args", "status", "message"), [
    ("info", {"processses": True}, 400, "info: unknown key 'processses'"),
    ("resize-disk", {"id": "nope", "desired_size": 1}, 404, "no device 'nope'"),
    ("resize-disk", {"id": "__rng", "desired_size": 1}, 400, "resize-disk: id=__rng is not a disk but rng"),
    ("resize-disk", {"id": "_disk0", "desired_size": -1}, 400, "desired_size=-1 is out of range"),
    ("resize-disk", {"id": "_disk0", "desired_size": "1X"}, 400, "desired_size=1X is not a size"),
    ("resize-disk", {"id": "_disk0"}, 400, "resize-disk: desired_size is missing"),
    ("swap-disk", {"id": "nope", "path": "y"}, 404, "no device 'nope'"),
    ("swap-disk", {"id": "__rng", "path": "y"}, 400, "swap-disk: id=__rng is not a disk but rng"),
    ("swap-disk", {"id": "_disk0", "path": ""}, 400, "swap-disk: path= is not a file name"),
    ("swap-disk", {"id": "_disk0"}, 400, "swap-disk: path is missing"),
    ("set-rate-limit", {"id": "nope"}, 404, "no device 'nope'"),
    ("set-rate-limit", {"id": "__rng"}, 400, "set-rate-limit: id=__rng is not a device with limits but rng"),
    ("set-rate-limit", {"id": "_disk0", "ops_size": 7}, 400, "set-rate-limit: ops_size=7 needs ops_refill_time"),
    ("set-rate-limit", {"bw_size": 7}, 400, "set-rate-limit: give id (of a disk) or group"),
    ("set-rate-limit", {"group": "nope"}, 404, "no rate limit group 'nope'"),
    ("set-rate-limit", {"id": "_disk0", "ops_size": -1}, 400, "ops_size=-1 is out of range"),
    ("set-rate-limit", {"id": "_disk0", "ops": 1}, 400, "unknown key 'ops'"),
    ("remove-device", {"id": "nope"}, 404, "no device 'nope'"),
    ("add-disk", {"path": "x", "id": "_disk0"}, 409, "id=_disk0 is used"),
    ("add-disk", {"path": "x", "rate_limit_group": "nope"}, 400, "rate_limit_group=nope is not a rate limit group"),
    ("add-disk", {"path": "x", "rate_limiter_config": {"ops": {"size": 1}}}, 400, "ops_size=1 needs ops_refill_time"),
    ("add-disk", {"path": "x", "id": "__x"}, 400, "id=__x begins with two underscores"),
    ("add-disk", {"path": "x", "pci_device_id": 32}, 400, "pci_device_id=32 is outside the range"),
    ("add-disk", {"path": "x", "pci_device_id": 2}, 409, "already used: 2"),
    ("add-disk", {"path": ["x"]}, 400, "path=['x'] is not a string"),
    ("create", {}, 409, "create: a VM was created already"),
    ("boot", {}, 409, "boot: the VM is Running already"),
])
def test_refusals(booted: Vm, name: str, args: dict[str, Any], status: int, message: str, over: str) -> None:
    tried = OVER[over](booted, VERBS["validate"], {**args, "verb": name})
    found, text = OVER[over](booted, VERBS[name], args)
    assert (found, message in str(text)) == (status, True), text
    if name == "info":
        assert tried == (400, "validate: verb='info' is not one that can be tried")
    else:
        assert tried == (found, text)


@pytest.mark.parametrize("over", OVER)
def test_a_vm_is_created_booted_and_ended_in_one_process(empty: Vm, over: str) -> None:
    def ask(name: str, **args: Any) -> tuple[int, Any]:
        return OVER[over](empty, VERBS[name], args)

    done: tuple[int, Any] = (200, {}) if over == "zmq" else (204, None)
    stays: tuple[int, Any] = (200, {"ends": False}) if over == "zmq" else (204, None)
    for name in ("info", "boot", "pause", "shutdown", "counters"):
        assert ask(name) == (404, f"{name}: no VM was created")
    assert ask("ping")[0] == 200
    assert ask("delete") == stays
    wrong = {"payload": {"kernel": str(empty.directory / "kernel")}, "disks": [{"path": "a", "spam": 1}]}
    assert ask("create", **wrong)[0] == 400
    assert ask("create", cpus={"boot_vcpus": 0}) == (400, "cpus: boot_vcpus=0 is below 1")
    assert ask("create") == (400, "create: payload is missing")
    good: dict[str, Any] = {
        "cpus": {"boot_vcpus": 2, "max_vcpus": 2}, "memory": {"size": 1 << 30, "shared": False},
        "payload": {"kernel": str(empty.directory / "kernel"), "cmdline": "quiet"},
        "disks": [{"path": "a"}], "net": None, "console": {"mode": "Null"}}
    assert ask("create", **good) == done
    assert ask("info")[1]["state"] == "Created"
    assert ask("pause") == (409, "pause: the VM is not running")
    status, _ = ask("add-disk", path="b")
    assert status == (200 if over == "zmq" else 204)
    for _ in range(2):
        pid = ask("ping")[1]["pid"]
        assert ask("boot") == done
        info = ask("info")[1]
        assert (info["state"], info["memory_actual_size"]) == ("Running", 1 << 30)
        assert list(info["device_tree"]) == ["__console", "_disk0", "__rng", "_disk1"]
        assert ask("shutdown") == stays
        assert ask("info")[1]["state"] == "Created"
        assert ask("shutdown") == (409, "shutdown: the VM is not running")
        assert ask("ping")[1]["pid"] == pid == empty.process.pid
    shown = ask("info")[1]["config"]
    assert ask("boot") == done
    assert ask("delete") == stays
    assert ask("info")[0] == 404
    assert ask("create", **shown) == done  # what info shows can be created again
    assert ask("info")[1]["config"] == shown
    names = [event["event"] for event in ask("events")[1]["events"]]
    assert [name for name in names if name in ("vm.created", "vm.booted", "vm.shutdown", "vm.deleted")] == [
        "vm.created", *["vm.booted", "vm.shutdown"] * 3, "vm.deleted", "vm.created"]
    assert ask("shutdown-vmm")[0] == 200
    assert empty.process.wait(30) == 0


def test_a_boot_that_fails_leaves_a_vm_that_can_be_booted(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    monkeypatch.setenv("CELLVISOR_FAKE", json.dumps({"fail": {"_disk0": "path=a is locked by pid 7"}}))
    vm = start(tmp_path)
    kernel = str(tmp_path / "kernel")
    assert vm.over_http(VERBS["create"], {"payload": {"kernel": kernel}, "disks": [{"path": "a"}]})[0] == 204
    for _ in range(2):
        assert vm.over_http(VERBS["boot"], {}) == (400, "_disk0: path=a is locked by pid 7")
        assert state(vm) == "Created"
    assert vm.over_http(VERBS["delete"], {})[0] == 204
    assert vm.over_http(VERBS["create"], {"payload": {"kernel": kernel}})[0] == 204
    assert vm.over_http(VERBS["boot"], {})[0] == 204
    finish(vm)


JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-2**63, 2**64 - 1) | st.floats(allow_nan=False) | st.text(max_size=20),
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=10), inner, max_size=4), max_leaves=8)
KEYS = st.sampled_from(["id", "path", "desired_size", "type", "verb", "timeout", "action", "seen", "since", "processes",
                        "host_only", "readonly", "pci_device_id", "pci_segment", "mode", "file", "=", "payload",
                        "cpus", "memory", "disks", "console", "serial", "rng", "virtio", "rate_limiter_config",
                        "bw_size", "ops_size", "ops_refill_time"])
VALUES = JSON | st.sampled_from(["_disk0", "__rng", "list", "wait", "cancel", "add-disk", "blk", "x" * 5000, 2**63])
FUZZED = [name for name in VERBS if name not in (*ENDING, "pause", "remove-device", "drain-device", "upgrade-device")]


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.sampled_from(FUZZED), st.dictionaries(KEYS | st.text(max_size=10), VALUES, max_size=4))
def test_no_arguments_crash_it(booted: Vm, name: str, args: dict[str, Any]) -> None:
    if args.get("action") == "wait" or name == "ops":
        args = {**args, "timeout": 0}
    for ask in OVER.values():
        if ask is Vm.over_http and VERBS[name].reads:
            continue  # its arguments are a query
        status, answer = ask(booted, VERBS[name], args)
        assert status in (200, 204, 400, 404, 409, 429), (name, args, answer)
    assert booted.process.poll() is None


@settings(max_examples=150, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(st.binary(max_size=200) | st.dictionaries(
    st.sampled_from(["v", "id", "verb", "args", "x"]),
    VALUES | st.sampled_from(sorted(FUZZED)) | st.binary()).map(pack))
def test_no_message_crashes_it(booted: Vm, data: bytes) -> None:
    context = zmq.Context()
    with context.socket(zmq.DEALER) as sock:
        sock.setsockopt(zmq.LINGER, 0)
        sock.connect(f"ipc://{places.vm_dir('web')}/{places.API}")
        sock.send(data)
        assert sock.poll(30_000)
        body = unpack(sock.recv())
        assert body["v"] == control.VERSION
        assert body.get("error", {}).get("status") != 500
    context.term()
