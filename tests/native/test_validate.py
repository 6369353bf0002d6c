"""A dry run is refused as the verb itself is, in the same words, and no dry run changes anything."""

from __future__ import annotations

import contextlib
import json
import os
import shutil
import socket
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import CellvisorError, from_wire
from cellvisor.ctl import dispatch
from cellvisor.ctl.client import Client
from cellvisor.devices.backends.disk import Disk
from tests.native import netns
from tests.native.conftest import Vm
from tests.native.guest import build, make_disk, needs_kvm
from tests.native.hotplug import Steered, eventually, starting
from tests.native.test_bad_disks import rows
from tests.native.test_hotplug_net import NET_REFUSALS, open_tap

pytestmark = [pytest.mark.kvm, needs_kvm]
MIB = 1 << 20
OVER = ("zmq", "http", "cli")
DEVICE_FLAG = {"resize-disk": "--disk", "swap-disk": "--disk", "set-link": "--net", "set-rate-limit": "--disk"}


@pytest.fixture
def start(vm: Vm) -> Iterator[Callable[..., Steered]]:
    yield from starting(vm)


def words(verb: str, args: dict[str, Any]) -> list[str] | None:
    """Return what a person would write after `cellvisor VERB`, None for what nobody can write."""
    key, rest = args.get("id"), {name: value for name, value in args.items() if name != "id"}
    if any(isinstance(value, dict | list | None) for value in args.values()):
        return None
    if verb.startswith("add-"):
        if "=" in args:
            return [str(args["="])]
        kind = args.get("type")
        text = ",".join(f"{name}={'on' if value is True else value}" for name, value in args.items() if name != "type")
        return [f"{kind},{text}" if kind else text]
    if verb == "remove-device":
        return [str(key)]
    flags = {"desired_size": "--size", "path": "--path", "link": "--link"}
    found = [DEVICE_FLAG[verb], str(key)] if key is not None else []
    if verb == "set-rate-limit":
        return [*found, "--limit", ",".join(f"{name}={value}" for name, value in rest.items())] if rest else None
    for name, value in rest.items():
        found += [flags[name], str(value)]
    return found


class Asking:
    """One way to ask the VM, for errors as they travel: (code, status, message, hint), or None."""

    def __init__(self, over: str, vm: Steered, http: str, capsys: pytest.CaptureFixture[str]) -> None:
        self.over, self.path, self.capsys = over, vm.client.path, capsys
        self.client = Client(http if over == "http" else self.path, timeout=60)

    def refusal(self, verb: str, args: dict[str, Any], *, dry: bool = False) -> tuple[object, ...] | None:
        if self.over == "cli":
            return self._typed(verb, args, dry)
        try:
            if dry:
                self.client.call("validate", **args, verb=verb)
            else:
                self.client.call(verb, **args)
        except CellvisorError as error:
            return tuple(error.as_wire().values())
        return None

    def _typed(self, verb: str, args: dict[str, Any], dry: bool) -> tuple[object, ...] | None:
        rest = words(verb, args)
        assert rest is not None
        with_vm = [self.path, *rest] if rest and rest[0][:1] != "-" else [*rest, self.path]
        self.capsys.readouterr()
        status = dispatch.run([*(["validate"] if dry else []), verb, *with_vm, "--json"])
        said = self.capsys.readouterr()
        if status == 0:
            return None
        return (status, *from_wire(json.loads(said.err)["error"]).as_wire().values())


def compare(vm: Steered, asking: Asking, asked: list[tuple[str, dict[str, Any]]]) -> int:
    """Have each asked for dry, which leaves no operation either, and in earnest; returns how many were refused."""
    before, devices = vm.footprint(), vm.devices()
    for verb, args in asked:
        operations = len(vm.operations())
        found = asking.refusal(verb, args, dry=True)
        assert found is not None, f"{verb} {args} would be done"
        eventually(lambda: vm.count() == before, f"what the dry run of {verb} {args} left")
        assert (vm.devices(), len(vm.operations())) == (devices, operations)
        assert asking.refusal(verb, args) == found, (verb, args)
        eventually(lambda: vm.count() == before, f"what {verb} {args} left")
    assert vm.devices() == devices
    return len(asked)


@pytest.mark.parametrize("over", OVER)
def test_it_is_refused_as_the_verb_is(start: Callable[..., Steered], disk: Path, tmp_path: Path, over: str,
                                      capsys: pytest.CaptureFixture[str]) -> None:
    http = str(tmp_path / "http.sock")
    vm = start("removals=99", disks=[disk], extra=["--api-socket", http, "--rate-limit-group", "id=g"])
    asked = [("add-disk", options) for options, _, _ in rows(tmp_path)]
    fine, other = str(tmp_path / "fine"), str(tmp_path / "other-name")
    os.link(disk, other)
    (tmp_path / "file").touch()
    occupied = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    occupied.bind(str(tmp_path / "taken"))
    occupied.listen()
    asked += [
        ("add-rng", {"src": f"{tmp_path}/nope"}), ("add-rng", {"src": str(tmp_path)}),
        ("add-rng", {"id": "__rng"}), ("add-rng", {"pci_device_id": 2}), ("add-rng", {"hang_timeout": -1}),
        ("add-console", {"mode": "tty"}), ("add-console", {"mode": "loud"}), ("add-console", {"mode": "file"}),
        ("add-console", {"file": f"{tmp_path}/no/such"}), ("add-console", {"file": str(tmp_path)}),
        ("add-console", {"socket": f"{tmp_path}/no/such"}), ("add-console", {"socket": f"{tmp_path}/file"}),
        ("add-console", {"socket": f"{tmp_path}/taken"}), ("add-console", {"socket": f"{tmp_path}/{'x' * 108}"}),
        ("add-virtio", {"type": "gpu"}), ("add-virtio", {"type": "blk", "path": f"{tmp_path}/nope"}),
        ("add-net", {"mac": "01:00:00:00:00:01"}), ("add-net", {"num_queues": 4}), ("add-net", {"num_queues": 3}),
        ("remove-device", {"id": "nope"}),
        *(("resize-disk", {"id": key, "desired_size": size}) for key, size in (
            ("nope", MIB), ("__rng", MIB), ("_disk0", 0), ("_disk0", 777), ("_disk0", 2**62))),
        *(("swap-disk", {"id": key, "path": path}) for key, path in (
            ("nope", fine), ("__rng", fine), ("_disk0", f"{tmp_path}/nope"), ("_disk0", f"{tmp_path}/odd"),
            ("_disk0", f"{tmp_path}/empty"), ("_disk0", str(tmp_path)), ("_disk0", f"{tmp_path}/locked"),
            ("_disk0", other))),
        ("set-link", {"id": "_disk0", "link": "up"}), ("set-link", {"id": "nope", "link": "up"}),
        ("set-rate-limit", {"id": "__rng", "bw_size": 1}), ("set-rate-limit", {"id": "_disk0", "ops_size": 7}),
        ("set-rate-limit", {"id": "nope", "bw_size": 0}),
    ]
    if over == "cli":
        asked = [(verb, args) for verb, args in asked if words(verb, args) is not None]
    else:
        asked += [("boot", {}), ("create", {}), ("set-rate-limit", {"group": "nope"}), ("set-rate-limit", {})]
    holder = Disk(str(tmp_path / "locked"))
    with contextlib.closing(holder), contextlib.closing(Asking(over, vm, http, capsys).client) as client:
        client.call("ping")  # its connection is counted before, too
        asking = Asking(over, vm, http, capsys)
        asking.client.close()
        asking.client = client
        assert compare(vm, asking, asked) > 55
    occupied.close()
    assert not (tmp_path / "no").exists()


@netns.needs_tap
@pytest.mark.usefixtures("network")
@pytest.mark.parametrize("over", OVER)
def test_a_network_card_is_refused_as_the_verb_is(start: Callable[..., Steered], tmp_path: Path, over: str,
                                                  capsys: pytest.CaptureFixture[str]) -> None:
    netns.make_tap()
    busy = open_tap("busy")
    http = str(tmp_path / "http.sock")
    vm = start(extra=["--api-socket", http])
    asking = Asking(over, vm, http, capsys)
    asking.client.call("ping")
    asked = [("add-net", {"=": options}) for options, _ in NET_REFUSALS if over != "cli" or "fd=" not in options]
    compare(vm, asking, asked)
    assert {name for _, name in socket.if_nameindex()} == {"lo", "tap0", "busy"}
    assert asking.refusal("add-net", {"=": "tap=tap0"}, dry=True) is None
    assert asking.refusal("add-net", {"=": "tap=new0,ip=10.0.0.1,mask=255.0.0.0"}, dry=True) is None
    assert {name for _, name in socket.if_nameindex()} == {"lo", "tap0", "busy"}
    asking.client.close()
    os.close(open_tap("tap0"))  # nobody holds it
    os.close(busy)


@pytest.fixture
def waiting() -> Iterator[Client]:
    """A client of a process that waits for a VM to be created."""
    place = tempfile.mkdtemp(prefix="cv-")
    http = f"{place}/http"
    command = [str(Path(sys.executable).with_name("cellvisor")), "run", "--api-socket", http]
    process = subprocess.Popen(command, stdin=subprocess.DEVNULL, env=dict(os.environ, XDG_RUNTIME_DIR=place))
    eventually(lambda: os.path.exists(http) or process.poll() is not None, "the API")
    with Client(http, timeout=60) as client:
        yield client
        client.call("shutdown-vmm")
    assert process.wait(60) == 0
    shutil.rmtree(place)


def test_a_configuration_and_its_boot(waiting: Client, tmp_path: Path) -> None:
    """`create` says what is wrong with the words, `boot` what with the files; a dry run of each says it first."""
    fine = make_disk(tmp_path / "fine", MIB)
    order = {"payload": {"kernel": str(build())}, "console": {"mode": "Off"}}
    good, late = {**order, "disks": [{"path": str(fine)}]}, {**order, "disks": [{"path": f"{tmp_path}/nope"}]}

    def refusal(verb: str, /, **args: Any) -> dict[str, object]:
        with pytest.raises(CellvisorError) as caught:
            waiting.call(verb, **args)
        return caught.value.as_wire()

    asked: list[tuple[str, dict[str, Any]]] = [
        ("boot", {}), ("add-rng", {}), ("create", {}), ("create", {"spam": 1}),
        ("create", {"payload": {"kernel": f"{tmp_path}/nope"}}),
        ("create", {**order, "disks": [{"path": "x", "id": "__x"}]})]
    for verb, args in asked:
        assert refusal("validate", **args, verb=verb) == refusal(verb, **args)
    assert [one["id"] for one in waiting.call("validate", **good, verb="create")["devices"]] == ["_disk0", "__rng"]
    refusal("info")
    waiting.call("create", **late)
    said = refusal("validate", verb="boot")
    assert str(said["message"]).startswith("_disk0: path=")
    assert refusal("boot") == said
    waiting.call("delete")
    waiting.call("create", **good)
    assert [one["id"] for one in waiting.call("validate", verb="boot")["devices"]] == ["_disk0", "__rng"]
    assert waiting.call("info")["state"] == "Created"


def test_a_run_that_is_only_tried(tmp_path: Path) -> None:
    place, serial = tempfile.mkdtemp(prefix="cv-"), tmp_path / "serial"
    fine = make_disk(tmp_path / "fine", MIB)

    def run(*flags: str) -> tuple[int, list[str]]:
        command = [str(Path(sys.executable).with_name("cellvisor")), "run", "--kernel", str(build()),
                   "--cmdline", "test=boot", "--console", "off", "--serial", f"file={serial}", *flags]
        done = subprocess.run(command, stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=60,
                              env=dict(os.environ, XDG_RUNTIME_DIR=place), check=False)
        said = done.stdout + done.stderr  # a slow machine's processes may log how they came to end
        return done.returncode, [line for line in said.splitlines() if line.startswith("cellvisor:")]

    assert run("--disk", f"path={fine}", "--dry-run") == (0, [])
    assert not serial.exists(), "the guest has not run"
    for flags in (("--disk", f"path={tmp_path}/nope"), ("--disk", f"path={fine},id=__x"), ("--disk", "spam=1"),
                  ("--rng", f"src={tmp_path}"), ("--net", "fd=77"), ("--device-type", "blk,path=/")):
        said = run(*flags, "--dry-run")
        assert (said[0], len(said[1])) == (2, 1)
        assert run(*flags) == said
    assert os.listdir(f"{place}/cellvisor") == []
    shutil.rmtree(place)
