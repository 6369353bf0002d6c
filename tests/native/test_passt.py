"""A card without a tap: the real passt speaks for the guest, outlives the card's process and is replaced when it dies.

The guest sends numbered UDP datagrams to its gateway, which stands for the host, where they are sent back.
"""

from __future__ import annotations

import os
import re
import signal
import socket
import subprocess
import threading
import time
from collections.abc import Iterator
from pathlib import Path

import pytest

from tests.debian import Missing, need
from tests.native import netns
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.steer import Steer, steer

try:
    need("passt", "passt")
    _lacking = ""
except Missing as missing:
    _lacking = str(missing)
pytestmark = [pytest.mark.kvm, needs_kvm, netns.needs_tap, pytest.mark.skipif(bool(_lacking), reason=_lacking)]
GUEST, GATEWAY, PORT = "10.9.9.2", "10.9.9.1", 7777
LOAD = f"test=net-udp ip={GUEST} host={GATEWAY} port={PORT}"
KEEPS = "restart_budget=1000,restart_window=1,restart_backoff=[0]"


def ip(*words: str) -> None:
    subprocess.run([need("ip", "iproute2"), *words], check=True, timeout=60)


@pytest.fixture
def routed(network: None) -> Iterator[threading.Event]:
    """Have a route to nowhere, whose address the guest gets, and a UDP port that sends all back; set: it is enough."""
    ip("link", "set", "lo", "up")
    ip("addr", "add", f"{GUEST}/24", "dev", netns.make_tap("way0"))
    ip("route", "add", "default", "via", GATEWAY)
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as port:
        port.bind(("127.0.0.1", PORT))

        def serve() -> None:
            while True:
                data, sender = port.recvfrom(70000)
                if not data:
                    return
                port.sendto(bytes(8) + data[8:] if enough.is_set() else data, sender)

        enough = threading.Event()
        thread = threading.Thread(target=serve, name="echo")
        thread.start()
        try:
            yield enough
        finally:
            with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as last:
                last.sendto(b"", ("127.0.0.1", PORT))
            thread.join(10)


def passts() -> set[int]:
    """Return the passt processes of this network namespace; zombies do not count."""
    ours, found = os.stat("/proc/thread-self/ns/net").st_ino, set()
    for entry in Path("/proc").iterdir():
        try:
            if entry.name.isdecimal() and (entry / "comm").read_text().startswith("passt") \
                    and (entry / "stat").read_text().rpartition(")")[2].split()[0] not in "ZX" \
                    and os.stat(entry / "ns/net").st_ino == ours:
                found.add(int(entry.name))
        except OSError:
            pass  # it is gone
    return found


def wait_back(vmm: Steer, more: int) -> None:
    """Wait until so many more datagrams came back."""
    def back() -> int:
        return int(re.findall(r"back=(\d+)\r?\n", vmm.running.text)[-1])

    wanted, end = back() + more, time.monotonic() + 60
    while back() < wanted:
        assert time.monotonic() < end, vmm.running.text[-500:]
        time.sleep(0.02)


def wait_gone() -> None:
    end = time.monotonic() + 30
    while passts():
        assert time.monotonic() < end, "passt outlives its VM"
        time.sleep(0.02)


@pytest.mark.parametrize(("card", "size"), [("mtu=1500", 256), ("mac=52:54:00:00:00:01", 60000)])
def test_datagrams_go_out_and_come_back(vm: Vm, routed: threading.Event, card: str, size: int) -> None:
    said = vm(f"{LOAD} count=100 bs={size}", extra=["--net", card]).check()
    assert (said.number("received"), said.number("lost")) == (100, 0)
    wait_gone()


def test_passt_outlives_the_card_and_ends_with_the_vm(vm: Vm, routed: threading.Event) -> None:
    kills = 10
    with steer(vm, f"{LOAD} count=100M", extra=["--net", f"mtu=1500,{KEEPS}"]) as vmm:
        vmm.running.wait_for("back=16")
        (passt,) = passts()
        for _ in range(kills):
            vmm.signal("net")
            vmm.wait("device.restarted")
            wait_back(vmm, 16)
        assert passts() == {passt}
        routed.set()
        said = vmm.running.finish().check()
    assert said.number("lost") <= 2 * kills, "one for each queue and kill"
    wait_gone()


def test_another_passt_follows_one_that_died(vm: Vm, routed: threading.Event) -> None:
    with steer(vm, f"{LOAD} count=100M", extra=["--net", "mtu=1500"]) as vmm:
        vmm.running.wait_for("back=16")
        for _ in range(2):
            vmm.mark()
            (before,) = passts()
            os.kill(before, signal.SIGKILL)
            assert vmm.wait("backend.lost")["device"] == vmm.wait("backend.found")["device"] == vmm.device("net")["id"]
            wait_back(vmm, 32)
            assert passts() != {before}
        assert "device.died" not in [event["event"] for event in vmm.events(0)]
        assert vmm.device("net")["state"] == "serving"
        vmm.running.stop()
    wait_gone()


def test_a_host_without_a_route_is_told_of(vm: Vm, network: None) -> None:
    said = vm("test=boot", extra=["--net", "mtu=1500"])
    assert said.status != 0
    (line,) = [line for line in said.stderr.splitlines() if line.startswith("cellvisor:")]
    assert "passt does not start:" in line


def test_no_passt_is_one_line_with_the_name_of_the_package(
        vm: Vm, network: None, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("PATH", str(tmp_path))
    said = vm("test=boot", extra=["--net", "mac=52:54:00:00:00:01"])
    assert said.status != 0
    (line,) = [line for line in said.stderr.splitlines() if line.startswith("cellvisor:")]
    assert "no tap or fd is given, and passt is not installed" in line
    assert "apt install passt" in line
