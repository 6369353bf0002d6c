"""Metrics: the text, the door for scrapers, and the files in deploy/ that rely on the names."""

from __future__ import annotations

import asyncio
import json
import os
import re
import socket
import stat
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from cellvisor.controlplane import metrics, metricsdoor
from cellvisor.core.errors import TryAgain, UsageError
from cellvisor.core.wire.control import Request
from cellvisor.ctl.client import Client
from tests.debian import need

DEPLOY = Path(__file__).parents[2] / "deploy"
RUN = Path(__file__).parents[1] / "fakes" / "control_run.py"
SAMPLE = re.compile(r'([a-z_]+)\{(?:[a-z]+="(?:[^"\\]|\\.)*",?)+\} -?[0-9.e+-]+')
ANSWERS: dict[str, Any] = {
    "info": {"state": "Running", "uptime": 1.5, "memory_actual_size": 512, "config": {"cpus": {"boot_vcpus": 1}},
             "core": {"resets": 2, "vcpus": [{"entries": 7, "cpu": 0.25}]},
             "processes": [{"role": "core", "pid": 1, "pss": 3, "cpu": 1.0},
                           {"role": "worker", "pid": 2, "device": "d"}]},
    "devices": {"devices": [{"id": 'd"\\\n', "type": "blk", "state": "serving", "generation": 3}]},
    "counters": {'d"\\\n': {"read_ops": 5}},
    "ops": {"operations": [{"state": "done"}, {"state": "done"}]},
}


def samples(text: str) -> dict[str, str]:
    """Return {name{labels}: value}; every line must be right, every family told once and before its samples."""
    found, family = {}, ""
    told: list[str] = []
    for line in text.splitlines():
        if line.startswith("#"):
            _, word, family, rest = line.split(" ", 3)
            told.append(f"{word} {family}")
            assert word == "HELP" or rest == metrics.FAMILIES[family][0]
            continue
        match = SAMPLE.fullmatch(line)
        assert match and match[1] == family, line
        key, _, value = line.rpartition(" ")
        assert key not in found
        found[key] = value
    assert len(told) == len(set(told))
    return found


def collect(answers: dict[str, Any]) -> dict[str, str]:
    async def serve(request: Request) -> Any:
        if request.verb not in answers:
            raise TryAgain("not now")
        return answers[request.verb]
    return samples(asyncio.run(metrics.collect(serve, "web")))


def test_text() -> None:
    found = collect(ANSWERS)
    assert found['cellvisor_vm_state{vm="web",state="Running"}'] == "1"
    assert found['cellvisor_vm_state{vm="web",state="Paused"}'] == "0"
    assert found['cellvisor_vm_uptime_seconds{vm="web"}'] == "1.5"
    assert found['cellvisor_vcpu_cpu_seconds_total{vm="web",vcpu="0"}'] == "0.25"
    assert found['cellvisor_process_pss_bytes{vm="web",role="core",device="",pid="1"}'] == "3072"
    assert found[r'cellvisor_device_restarts_total{vm="web",device="d\"\\\n",type="blk"}'] == "2"
    assert found[r'cellvisor_device_counter_total{vm="web",device="d\"\\\n",type="blk",counter="read_ops"}'] == "5"
    assert found['cellvisor_operations{vm="web",state="done"}'] == "2"
    assert {key.partition("{")[0] for key in found} == set(metrics.FAMILIES)


def test_what_does_not_answer_is_left_out() -> None:
    assert set(collect({})) == {f'cellvisor_vm_state{{vm="web",state="{state}"}}' for state in metrics.VM_STATES}


def test_names_are_prometheus_names() -> None:
    for name, (kind, help) in metrics.FAMILIES.items():
        assert re.fullmatch("cellvisor_[a-z_]+", name)
        assert (kind == "counter") == name.endswith("_total")
        assert help.endswith(".")


def test_dashboard_names_metrics_that_exist() -> None:
    board = json.loads((DEPLOY / "grafana" / "cellvisor.json").read_text())
    shown = [target["expr"] for panel in board["panels"] for target in panel["targets"]]
    named = {name for text in shown for name in re.findall(r"cellvisor_\w+", text)}
    assert "cellvisor_vm_state" in named
    assert named <= set(metrics.FAMILIES)
    for text in shown:
        for labels in re.findall(r"\{([^}]*)\}", text):
            assert set(re.findall(r"(\w+)=", labels)) <= {"vm", "state", "device", "counter"}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])


@pytest.mark.parametrize("text", ["tcp://0.0.0.0:9000", "tcp://127.0.0.1", "tcp://127.0.0.1:0", "tcp://127.0.0.1:x",
                                  "tcp://127.0.0.1:65536", "http://x", "", "/" + "x" * 107])
def test_bad_places(text: str) -> None:
    with pytest.raises(UsageError, match="--metrics"):
        metricsdoor.check_place(text)


def ask(family: int, where: Any, data: bytes) -> bytes:
    """Send `data`, return all that comes."""
    with socket.socket(family) as sock:
        sock.settimeout(60)
        sock.connect(where)
        sock.sendall(data)
        answer = b""
        while part := sock.recv(65536):
            answer += part
    return answer


@pytest.fixture
def port() -> int:
    with socket.socket() as sock:
        sock.bind(("127.0.0.1", 0))
        return int(sock.getsockname()[1])


@pytest.fixture(params=["path", "tcp"])
def scraped(request: pytest.FixtureRequest, tmp_path: Path, port: int,
            monkeypatch: pytest.MonkeyPatch) -> Iterator[tuple[int, Any]]:
    """Family and address of the metrics of a VM with fakes for core and nursery."""
    monkeypatch.setenv("XDG_RUNTIME_DIR", str(tmp_path))
    (tmp_path / "kernel").write_bytes(b"kernel")
    path = str(tmp_path / "m")
    where = path if request.param == "path" else f"tcp://127.0.0.1:{port}"
    process = subprocess.Popen([sys.executable, str(RUN), "--kernel", str(tmp_path / "kernel"), "--name", "web",
                                "--disk", "path=a", "--event-monitor", f"path={tmp_path / 'events'}",
                                "--metrics", where], stdin=subprocess.DEVNULL)
    try:
        while not (tmp_path / "events").exists() or "booted" not in (tmp_path / "events").read_text():
            assert process.poll() is None
        yield (socket.AF_UNIX, path) if request.param == "path" else (socket.AF_INET, ("127.0.0.1", port))
    finally:
        process.terminate()
        process.wait(60)
    assert not os.path.exists(path)


def test_a_vm_is_scraped(scraped: tuple[int, Any]) -> None:
    family, where = scraped
    head, _, body = ask(family, where, b"GET /metrics HTTP/1.1\r\nHost: x\r\n\r\n").partition(b"\r\n\r\n")
    assert head.startswith(b"HTTP/1.1 200 OK\r\nContent-Type: text/plain; version=0.0.4")
    found = samples(body.decode())
    assert found['cellvisor_vm_state{vm="web",state="Running"}'] == "1"
    assert found['cellvisor_device_counter_total{vm="web",device="_disk0",type="blk",counter="read_bytes"}'] == "4096"
    assert any(key.startswith('cellvisor_process_cpu_seconds_total{vm="web",role="controlplane"') for key in found)
    assert ask(family, where, b"HEAD / HTTP/1.0\r\n\r\n").endswith(b"\r\n\r\n")
    assert ask(family, where, b"GET /other HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 404 ")
    assert ask(family, where, b"PUT /metrics HTTP/1.0\r\n\r\n").startswith(b"HTTP/1.1 405 ")


def test_the_door_does_not_stall_the_vm(scraped: tuple[int, Any]) -> None:
    family, where = scraped
    silent = [socket.socket(family) for _ in range(metricsdoor.MAX_CLIENTS)]
    try:
        for sock in silent:
            sock.connect(where)
            sock.sendall(b"GET /")
        with Client("web") as client:
            assert client.call("ping")["name"] == "web"
    finally:
        for sock in silent:
            sock.close()
    if family == socket.AF_UNIX:
        assert stat.S_IMODE(os.stat(where).st_mode) == 0o600


def test_the_systemd_unit_is_right(tmp_path: Path) -> None:
    program = need("systemd-analyze", "systemd")
    text = (DEPLOY / "systemd" / "cellvisor@.service").read_text()
    for line in ("KillMode=process", "OOMPolicy=continue", "Restart=always"):
        assert f"\n{line}\n" in text
    unit = tmp_path / "cellvisor@web.service"
    unit.write_text(text)
    done = subprocess.run([program, "verify", "--man=no", str(unit)], capture_output=True, text=True, timeout=60)
    assert (done.returncode, [line for line in done.stderr.splitlines() if "cellvisor" in line]) == (0, [])
