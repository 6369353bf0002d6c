"""A card without a tap: the real passt speaks for the guest, outlives the card's process and is replaced when it dies.

The guest sends numbered UDP datagrams to its gateway, which stands for the host, where they are sent back.
"""

from __future__ import annotations

import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from contextlib import suppress
from pathlib import Path

import pytest

from tests.native import netns
from tests.native.cellvisor import runtime_dir
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.hotplug import eventually
from tests.native.passts import LOAD, helper, needs_passt, passts, wait_gone
from tests.native.steer import Steer, steer

pytestmark = [pytest.mark.kvm, needs_kvm, netns.needs_tap, needs_passt]
HEADERS = 42  # of Ethernet, IPv4 and UDP
KEEPS = "restart_budget=1000,restart_window=1,restart_backoff=[0]"


def wait_back(vmm: Steer, more: int) -> None:
    """Wait until so many more datagrams came back."""
    def back() -> int:
        return int(re.findall(r"back=(\d+)\r?\n", vmm.running.text)[-1])

    wanted, end = back() + more, time.monotonic() + 60
    while back() < wanted:
        assert time.monotonic() < end, vmm.running.text[-500:]
        time.sleep(0.02)


@pytest.mark.parametrize(("card", "size"), [("mtu=1500", 256), ("mac=52:54:00:00:00:01", 60000)])
def test_datagrams_go_out_and_come_back(vm: Vm, routed: threading.Event, card: str, size: int) -> None:
    said = vm(f"{LOAD} count=100 bs={size}", extra=["--net", card]).check()
    assert [said.number(key) for key in ("received", "lost", "doubled")] == [100, 0, 0]
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
    assert said.number("lost") == 0
    assert said.number("doubled") <= 2 * kills, "one for each queue and kill"
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


def show(vm: Vm, *words: str) -> str:
    """Return what `cellvisor` prints for these words."""
    program = str(Path(sys.executable).with_name("cellvisor"))
    return subprocess.run([program, *words], check=True, capture_output=True, text=True, timeout=120,
                          env={**os.environ, "XDG_RUNTIME_DIR": runtime_dir(vm.where)}).stdout


def test_passt_is_one_of_the_vm_s_processes(vm: Vm, routed: threading.Event) -> None:
    with steer(vm, f"{LOAD} count=100M", extra=["--net", f"mtu=1500,id=lan,{KEEPS}"]) as vmm:
        vmm.running.wait_for("back=16")
        (passt,) = passts()
        told = helper(vmm.client)
        assert (told["pid"], told["device"], told["parent"]) == (passt, "lan", vmm.device("net")["pid"])
        assert told["pss"] > told["pss_shmem"] == 0
        assert told["cpu"] >= 0
        vmm.mark()
        os.kill(passt, signal.SIGKILL)
        vmm.wait("backend.found")
        assert {helper(vmm.client)["pid"]} == passts() != {passt}
        eventually(lambda: not Path(f"/proc/{passt}").exists(), "nothing left of the one that was killed")
        before = vmm.signal("net")
        vmm.wait("device.restarted")
        assert {helper(vmm.client)["pid"]} == passts()
        assert helper(vmm.client)["parent"] == vmm.device("net")["pid"] != before
        (line,) = [line for line in show(vm, "tree").splitlines() if "passt" in line]
        assert re.search(r"passt \(lan\) +\d+ +\d+\.\d +0\.0$", line)
        (row,) = [row for row in json.loads(show(vm, "top", "--json"))["rows"] if row["kind"] == "passt"]
        assert (row["name"], row["pid"]) == ("lan", helper(vmm.client)["pid"])
        vmm.running.stop()
    wait_gone()


def test_passt_ends_with_core(vm: Vm, routed: threading.Event) -> None:
    with steer(vm, f"{LOAD} count=100M", extra=["--net", "mtu=1500"]) as vmm:
        vmm.running.wait_for("back=16")
        assert len(passts()) == 1
        os.kill(vmm.pid("core"), signal.SIGKILL)
        wait_gone()
        assert vmm.running.finish().status == 1


def test_a_port_of_the_host_leads_to_the_guest(vm: Vm, routed: threading.Event) -> None:
    """A datagram with number 0 ends the guest: it comes through the port, of the second passt too."""
    with steer(vm, f"{LOAD} count=100M bs=256", extra=["--net", "mtu=1500,forward=udp:5555:4000"]) as vmm:
        vmm.running.wait_for("back=16")
        vmm.mark()
        os.kill(next(iter(passts())), signal.SIGKILL)
        vmm.wait("backend.found")
        wait_back(vmm, 32)
        with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as sender:
            end = time.monotonic() + 60
            while vmm.running.process.poll() is None:
                assert time.monotonic() < end, vmm.running.text[-500:]
                with suppress(ConnectionRefusedError):  # the guest and its passt have ended
                    sender.sendto(bytes(256 - HEADERS), ("127.0.0.1", 5555))
                time.sleep(0.05)
        vmm.running.finish().check()
    wait_gone()


@pytest.mark.parametrize(("text", "message"), [
    ("tcp:2222:22", "forward=tcp:2222:22: passt cannot listen there (another process may do so; a port below 1024"),
    ("tcp:192.0.2.77:2223:22", "forward=tcp:192.0.2.77:2223:22: passt cannot listen there ("),
    ("tcp:22", "forward=tcp:22 is not PROTOCOL:PORT:GUESTPORT (tcp:2222:22, or with an address of the host: ")])
def test_a_port_that_cannot_be_had_is_one_line(vm: Vm, routed: threading.Event, text: str, message: str) -> None:
    with socket.create_server(("127.0.0.1", 2222)):
        said = vm("test=boot", extra=["--net", f"forward={text}"])
    assert said.status == 2
    (line,) = [line for line in said.stderr.splitlines() if line.startswith("cellvisor:")]
    assert message in line
    assert not passts()


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
