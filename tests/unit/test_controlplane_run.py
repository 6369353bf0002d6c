"""`cellvisor run` from start to end with a fake core and nursery: exit statuses, signals, and what is left: nothing."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import Conflict, NotFound, UsageError
from cellvisor.core.wire import places
from cellvisor.ctl.client import Client

RUN = Path(__file__).parents[1] / "fakes" / "control_run.py"
Start = Callable[..., "subprocess.Popen[str]"]


def processes_of(directory: str) -> list[int]:
    """Return the processes whose environment says that they belong to this test."""
    mark = f"XDG_RUNTIME_DIR={directory}".encode()
    found = []
    for name in os.listdir("/proc"):
        if name.isdecimal() and int(name) != os.getpid():
            try:
                if mark in Path(f"/proc/{name}/environ").read_bytes().split(b"\0"):
                    found.append(int(name))
            except OSError:
                continue
    return found


def wait_for(condition: Callable[[], Any], what: str) -> Any:
    until = time.monotonic() + 30
    while time.monotonic() < until:
        found = condition()
        if found:
            return found
        time.sleep(0.02)
    raise AssertionError(f"waited in vain for {what}")


@pytest.fixture
def start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Start]:
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "kernel").write_bytes(b"kernel")
    started: list[subprocess.Popen[str]] = []

    def begin(*flags: str, fake: dict[str, Any] | None = None, **more: Any) -> subprocess.Popen[str]:
        environ = {**os.environ, "CELLVISOR_FAKE": json.dumps(fake or {})}
        argv = [sys.executable, str(RUN), "--kernel", str(tmp_path / "kernel"), "--name", "web", *flags]
        process = subprocess.Popen(argv, env=environ, text=True, stdin=subprocess.DEVNULL,
                                   stdout=subprocess.PIPE, stderr=subprocess.PIPE, **more)
        started.append(process)
        return process

    yield begin
    for process in started:
        process.kill()
        process.communicate()
    wait_for(lambda: not processes_of(str(tmp_path)), "processes to be gone")


def finish(process: subprocess.Popen[str], tmp_path: Path) -> tuple[int, str]:
    """Return exit status and stderr; nothing of the VM may be left."""
    _, err = process.communicate(timeout=60)
    assert os.listdir(tmp_path / "cellvisor") == []
    assert processes_of(str(tmp_path)) == []
    return process.returncode, err


def running(state: str = "Running") -> Client:
    wait_for(places.running, "the VM to be there")
    client = Client("web")
    wait_for(lambda: client.call("info")["state"] == state, state)
    return client


def test_power_off_is_success(start: Start, tmp_path: Path) -> None:
    report = tmp_path / "report.json"
    monitor = tmp_path / "events.json"
    process = start("--disk", "path=a", "--report", str(report), "--event-monitor", f"path={monitor}",
                    fake={"do": ["power-off"]})
    assert finish(process, tmp_path) == (0, "")
    body = json.loads(report.read_text())
    assert body["end"] == "the guest powered off"
    assert [one["role"] for one in body["processes"]][:3] == ["controlplane", "core", "nursery"]
    assert [one["device"] for one in body["processes"][3:]] == ["__console", "_disk0", "__rng"]
    assert all(one["pss"] > 0 for one in body["processes"] if one["role"] == "nursery")
    names = [one["name"] for one in body["stages"]]
    assert names[:3] == ["core-ready", "configured", "devices-ready"]
    assert "first guest instruction" in names
    assert [one["ms"] for one in body["stages"]] == sorted(one["ms"] for one in body["stages"])
    records = [json.loads(record) for record in monitor.read_text().split("\n\n") if record.strip()]
    assert [(one["source"], one["event"]) for one in records if one["source"] != "vm"] == [
        ("vmm", "starting"), ("vmm", "shutdown")]
    assert ("vm", "booted") in [(one["source"], one["event"]) for one in records]
    assert set(records[0]) == {"timestamp", "source", "event", "properties"}


@pytest.mark.parametrize(("fake", "status", "line"), [
    ({"do": ["die-at-start"]}, 2, "cellvisor: /dev/kvm: no such fake"),
    ({"refuse": {"configure": "--memory: size=512M: no room"}}, 2, "cellvisor: --memory: size=512M: no room"),
    ({"refuse": {"boot": "--kernel x: truncated"}}, 2, "cellvisor: --kernel x: truncated"),
    ({"fail": {"_disk0": "path=a is locked by pid 7"}}, 2, "cellvisor: _disk0: path=a is locked by pid 7"),
    ({"do": ["crash"]}, 1, "cellvisor: the VM crashed: an instruction nobody knows"),
    ({"do": ["die-at-boot"]}, 1, "cellvisor: core killed by SIGKILL: the VM is gone"),
])
def test_failures_are_one_line(start: Start, tmp_path: Path, fake: dict[str, Any], status: int, line: str) -> None:
    assert finish(start("--disk", "path=a", fake=fake), tmp_path) == (status, line + "\n")


@pytest.mark.parametrize(("flags", "line"), [
    (["--disk", "path=a,spam=1"], "cellvisor: --disk: unknown key 'spam' (known keys: "),
    (["--disk", "path=a,pci_device_id=40"], "cellvisor: --disk: pci_device_id=40 is outside the range 0..32"),
    (["--device-type", "nope"], "cellvisor: --device-type: no device type 'nope'"),
    (["--event-monitor", "path=/no/such/dir"], "cellvisor: --event-monitor /no/such/dir: No such file"),
    (["--log-file", "/no/such/dir"], "cellvisor: --log-file /no/such/dir: No such file"),
])
def test_usage_errors_are_one_line_and_status_2(start: Start, tmp_path: Path, flags: list[str], line: str) -> None:
    process = start(*flags)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 2
    assert err.startswith(line)
    assert err.count("\n") == 1
    assert processes_of(str(tmp_path)) == []
    assert places.running() == {}


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_signals_end_it_cleanly(start: Start, tmp_path: Path, number: int) -> None:
    process = start()
    with running():
        process.send_signal(number)
        assert finish(process, tmp_path) == (128 + number, "")


def test_signals_while_it_starts(start: Start, tmp_path: Path) -> None:
    """Whenever it comes, nothing is left; before Python listens to signals the default action is as clean."""
    for delay in (0.0, 0.1, 0.2, 0.3, 0.4, 0.6):
        process = start()
        time.sleep(delay)
        process.send_signal(signal.SIGTERM)
        process.communicate(timeout=60)
        assert process.returncode in (128 + signal.SIGTERM, -signal.SIGTERM)
        wait_for(lambda: not processes_of(str(tmp_path)), "processes to be gone")
        assert places.running() == {}


def test_the_second_signal_kills_a_deaf_core_at_once(start: Start, tmp_path: Path) -> None:
    process = start(fake={"do": ["deaf"]})
    with running():
        process.send_signal(signal.SIGINT)
        time.sleep(0.5)
        assert process.poll() is None
        began = time.monotonic()
        process.send_signal(signal.SIGINT)
        status, _ = finish(process, tmp_path)
        assert status == 130
        assert time.monotonic() - began < 4  # a deaf core is otherwise waited for twice 5 s


def test_a_deaf_core_is_killed(start: Start, tmp_path: Path) -> None:
    process = start(fake={"do": ["deaf"]})
    with running() as client:
        client.call("shutdown")
        assert finish(process, tmp_path)[0] == 0


def test_a_dead_worker_is_replaced_and_parked_when_its_budget_is_spent(start: Start, tmp_path: Path) -> None:
    process = start("--disk", "path=a,restart_budget=1")
    with running() as client:
        first = next(one for one in client.call("devices")["devices"] if one["id"] == "_disk0")
        assert first["state"] == "serving"
        os.kill(first["pid"], signal.SIGKILL)
        event = next(event for event in client.events() if event["event"] == "device.restarted")
        assert event["properties"]["generation"] == 2
        devices = lambda: {one["id"]: one["pid"] for one in client.call("devices")["devices"]}  # noqa: E731
        second = wait_for(lambda: devices()["_disk0"], "its successor")
        os.kill(second, signal.SIGKILL)
        event = next(event for event in client.events() if event["event"] == "device.parked")
        assert event["properties"]["reason"] == "killed by SIGKILL"
        after = {one["id"]: one["state"] for one in client.call("devices")["devices"]}
        assert after == {"__console": "serving", "_disk0": "parked", "__rng": "serving"}
        assert client.call("info")["state"] == "Running"
        client.call("restart-device", id="_disk0")
        assert "serving" in {one["state"] for one in client.call("devices")["devices"] if one["id"] == "_disk0"}
        with pytest.raises(Conflict, match="not parked"):
            client.call("drain-device", id="_disk0")
        client.call("shutdown")
    status, err = finish(process, tmp_path)
    assert status == 0
    assert "ERROR _disk0 parked: killed by SIGKILL" in err


def test_a_dead_nursery_is_an_event_and_the_vm_goes_on(start: Start, tmp_path: Path) -> None:
    process = start()
    with running() as client:
        nursery = next(one for one in client.call("info", processes=True)["processes"] if one["role"] == "nursery")
        os.kill(nursery["pid"], signal.SIGKILL)
        assert any(event["event"] == "nursery.died" for event in client.events())
        assert client.call("info")["state"] == "Running"
        client.call("shutdown")
    assert finish(process, tmp_path)[0] == 0


def test_verbs(start: Start, tmp_path: Path) -> None:
    process = start("--cpus", "boot=2", "--disk", "path=a")
    with running() as client:
        assert client.call("ping")["pid"] == process.pid
        info = client.call("info")
        assert info["config"]["cpus"] == {"boot_vcpus": 2, "max_vcpus": 2}
        assert info["device_tree"]["_disk0"]["pci_bdf"] == "0000:00:02.0"
        client.call("pause")
        assert client.call("info")["state"] == "Paused"
        with pytest.raises(Conflict, match="paused already"):
            client.call("pause")
        client.call("resume")
        client.call("reboot")
        client.call("power-button")
        with pytest.raises(UsageError, match="not supported yet"):
            client.call("snapshot")
        with pytest.raises(UsageError, match="did you mean pause"):
            client.call("puase")
        client.call("shutdown")
        assert client.wait_gone(20)
        with pytest.raises(NotFound, match="has ended"):
            client.call("ping")
    assert finish(process, tmp_path)[0] == 0


def test_one_name_one_vm(start: Start, tmp_path: Path) -> None:
    first = start()
    with running():
        second = start()
        _, err = second.communicate(timeout=60)
        assert second.returncode == 2
        assert f"--name web: a VM of this name is running (process {first.pid})" in err
        first.send_signal(signal.SIGTERM)
        assert finish(first, tmp_path)[0] == 143


def test_events_follow_to_the_end(start: Start, tmp_path: Path) -> None:
    process = start()
    with running() as client:
        seen = []
        for event in client.events():
            seen.append(event)
            if event["event"] == "vm.booted":
                client.call("pause")
            if event["event"] == "vm.paused":
                client.call("shutdown")
        assert [event["seq"] for event in seen] == sorted({event["seq"] for event in seen})
        assert [event["event"] for event in seen][-1] == "vmm.shutdown"
    finish(process, tmp_path)
