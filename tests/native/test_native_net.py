"""virtio-net under cellvisor on a real tap: frames both ways in every way a driver may set up its rings, limits."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from tests.native import netns
from tests.native.cellvisor import runtime_dir
from tests.native.conftest import Vm
from tests.native.guest import GuestResult, needs_kvm
from tests.native.hotplug import eventually
from tests.native.netns import DATA, DRIVERS, STOP, Peer, check_echoes, frame
from tests.native.steer import steer

pytestmark = [pytest.mark.kvm, needs_kvm, netns.needs_tap, pytest.mark.usefixtures("network")]
CARD = "tap=tap0,mac=52:54:00:12:34:56"


def send(vm: Vm, cmdline: str, *, card: str = CARD, pairs: int = 1, cpus: int = 1) -> tuple[GuestResult, Peer]:
    """Run net-send against a peer that sends back."""
    netns.make_tap(queues=pairs)
    with Peer() as peer:
        said = vm(f"test=net-send {cmdline}", extra=["--net", card], cpus=cpus)
    return said, peer


def describe(name: str) -> tuple[str, int, str, int] | None:
    """Return MAC, MTU, IPv4 address and prefix of an interface of this namespace, None if it is not there."""
    told = subprocess.run(["ip", "-j", "-4", "addr", "show", "dev", name], capture_output=True, text=True, timeout=60)
    if told.returncode:
        return None
    (link,) = json.loads(subprocess.check_output(["ip", "-j", "link", "show", "dev", name], timeout=60))
    (at,) = json.loads(told.stdout)[0]["addr_info"]
    return link["address"], link["mtu"], at["local"], at["prefixlen"]


@pytest.mark.parametrize("options", DRIVERS)
def test_every_frame_comes_back_once(vm: Vm, options: str) -> None:
    said, peer = send(vm, f"count=500 {options}")
    check_echoes(said, peer, 500)


def test_several_pairs(vm: Vm) -> None:
    said, peer = send(vm, "count=200 pairs=2", card=f"{CARD},num_queues=4", pairs=2, cpus=2)
    said.check()
    assert said.number("received") == 400
    assert {pair for pair, _ in peer.seen} == {0, 1}


def test_info_and_control_commands(vm: Vm) -> None:
    netns.make_tap(queues=2, mtu=1400)
    said = vm("test=net-info,net-control", extra=["--net", f"{CARD},num_queues=4"]).check()
    assert said.values["mac"] == "52:54:0:12:34:56"
    assert (said.number("mtu"), said.number("link"), said.number("control")) == (1400, 1, 1)
    told = said.all("ctrl.")
    assert [key for key, ack in told.items() if ack == "1"] == [
        "table_short", "mac_short", "vlan_wild", "pairs_none", "pairs_many", "announce_ack", "unknown_class",
        "unknown_command", "empty"]


def test_a_tap_is_made_with_address_and_mtu(vm: Vm) -> None:
    card = "tap=made0,ip=10.77.0.1,mask=255.255.255.0,mtu=1300,host_mac=02:00:00:00:00:77"
    with steer(vm, "test=net-receive", extra=["--net", card]) as vmm:
        vmm.running.wait_for("ready=1")
        assert describe("made0") == ("02:00:00:00:00:77", 1300, "10.77.0.1", 24)
        with Peer("made0") as peer:
            peer.send(frame(DATA, 1))
            peer.send(frame(STOP, 0))
        assert vmm.running.finish().check().number("received") == 1
    assert describe("made0") is None


@pytest.mark.parametrize(("limits", "seconds"), [
    ("ops_size=50,ops_refill_time=100", 0.8),   # 500 a second each way, of which the first 50 are there
    ("bw_size=32K,bw_refill_time=250", 0.7),    # 128 KiB a second of 125 KiB, 32 KiB are there
])
def test_limits(vm: Vm, limits: str, seconds: float) -> None:
    said, peer = send(vm, "count=500 bs=256", card=f"{CARD},{limits}")
    said.check()
    assert said.number("received") == len(peer.seen) == 500
    assert said.number("elapsed_us") >= seconds * 1e6


def test_a_limit_changes_while_the_guest_runs(vm: Vm) -> None:
    netns.make_tap()
    with steer(vm, "test=net-send count=100 patience_ms=60000",
               extra=["--net", f"{CARD},ops_size=1,ops_refill_time=3600000"]) as vmm, Peer():
        vmm.running.wait_for("features=")
        vmm.signal("net")
        vmm.wait("device.restarted")
        vmm.client.call("set-rate-limit", id=vmm.device("net")["id"], ops_size=0)
        assert vmm.running.finish().check().number("received") >= 99, "a death may cost one"


def test_an_announcement_is_asked_for(vm: Vm) -> None:
    netns.make_tap()
    with steer(vm, "test=net-announce", extra=["--net", f"{CARD},id=lan"]) as vmm:
        vmm.running.wait_for("ready=1")
        vmm.client.call("set-link", id="lan", link="announce")
        assert vmm.running.finish().check().number("announced") == 1


def test_an_interface_that_is_down_or_deleted_is_no_end(vm: Vm) -> None:
    netns.make_tap()
    with steer(vm, "test=net-receive", extra=["--net", CARD]) as vmm:
        vmm.running.wait_for("ready=1")
        for command in (["set", "tap0", "down"], ["set", "tap0", "up"]):
            subprocess.run(["ip", "link", *command], check=True)
        with Peer() as peer:
            peer.send(frame(DATA, 1))
        eventually(lambda: vmm.client.call("counters")["_net0"]["rx_frames"] == 1, "a frame")
        subprocess.run(["ip", "link", "del", "tap0"], check=True)
        eventually(lambda: "tap tap0 is gone" in vmm.running.log.read_text(), "the notice")
        assert vmm.device("net")["generation"] == 1
        netns.make_tap()
        vmm.client.call("upgrade-device", id="_net0")
        assert vmm.device("net")["core"]["title"] == "virtio-net on tap0, 52:54:00:12:34:56"
        with Peer() as peer:
            peer.send(frame(DATA, 2))
            peer.send(frame(STOP, 0))
        assert vmm.running.finish().check().number("received") == 2


def test_link_goes_and_returns(vm: Vm) -> None:
    netns.make_tap()
    with steer(vm, "test=net-announce down=1", extra=["--net", f"{CARD},id=lan"]) as vmm:
        vmm.running.wait_for("ready=1")
        command = [str(Path(sys.executable).with_name("cellvisor")), "set-link", "--net", "lan", "--link", "down"]
        said = subprocess.check_output(command, env=dict(os.environ, XDG_RUNTIME_DIR=runtime_dir(vm.where)), text=True)
        assert said == "vm0: the link of lan is down\n"
        vmm.running.wait_for("link=0")
        assert vmm.client.call("set-link", id="lan", link="up") == {"id": "lan", "link": "up"}
        assert vmm.running.finish().check().number("link") == 1


def test_large_segments_arrive_in_one_piece(vm: Vm) -> None:
    netns.make_tap()
    with Peer() as peer:
        said = vm("test=net-bench count=200 op=tx gso=1 bs=32K", extra=["--net", CARD]).check()
    assert said.number("sent") == 200
    assert not peer.broken
