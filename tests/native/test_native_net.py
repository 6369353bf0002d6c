"""virtio-net under cellvisor on a real tap: frames both ways in every way a driver may set up its rings; kills."""

from __future__ import annotations

import json
import subprocess
import threading
from collections.abc import Iterator

import pytest

from tests.native import netns
from tests.native.conftest import Vm
from tests.native.guest import GuestResult, needs_kvm
from tests.native.netns import DATA, STOP, Peer, frame
from tests.native.steer import Steer, steer
from tests.native.storm import Storm

pytestmark = [pytest.mark.kvm, needs_kvm, netns.needs_tap]
CARD = "tap=tap0,mac=52:54:00:12:34:56"
KILLED = "restart_budget=1000000,restart_window=1,restart_backoff=[0]"


@pytest.fixture(autouse=True)
def network() -> Iterator[None]:
    """Have each test in a network namespace of its own."""
    with netns.namespace():
        yield


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


@pytest.mark.parametrize("options", [
    "irq=msix", "irq=intx mrg=0", "irq=poll tso=0", "mrg=0 tso=0 csum=0", "ctrl=0 event_idx=0", "indirect=0 segs=3",
    "qsize=256 rxbuf=128 bs=1400", "event_idx=0 indirect=0 segs=4 bs=1514 idle=spin",
])
def test_every_frame_comes_back_once(vm: Vm, options: str) -> None:
    said, peer = send(vm, f"count=500 {options}")
    said.check()
    assert said.number("sent") == said.number("received") == len(peer.seen) == 500
    assert [said.number(key) for key in ("lost", "doubled", "late")] == [0, 0, 0]
    assert not peer.broken
    assert not peer.doubled()


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


def blow(vmm: Steer, kills: int, seed: int) -> None:
    """Kill the card's process again and again."""
    storm = Storm(vmm.pid("nursery"), int(vmm.device("net")["pid"]), seed,
                  lambda: vmm.running.process.poll() is None)
    assert sum(1 for _ in storm.blow(kills)) == kills


def tell(capsys: pytest.CaptureFixture[str], said: GuestResult, kills: int) -> None:
    with capsys.disabled():
        print(f"\n{kills} kills: {said.number('received')} frames received, {said.number('lost')} lost, "
              f"{said.number('doubled')} doubled")


@pytest.mark.parametrize("pairs", [1, 2])
def test_kills_lose_a_frame_at_most_and_double_none(vm: Vm, pairs: int, capsys: pytest.CaptureFixture[str]) -> None:
    """Frames go out and come back; the guest fails on a doubled one."""
    kills = 40
    netns.make_tap(queues=pairs)
    with steer(vm, f"test=net-send count=100M depth=8 patience_ms=2000 pairs={pairs}", cpus=pairs,
               extra=["--net", f"{CARD},{KILLED},num_queues={2 * pairs}"]) as vmm, Peer() as peer:
        vmm.running.wait_for("features=")
        blow(vmm, kills, seed=pairs)
        peer.send(frame(STOP, 0))
        said = vmm.running.finish().check()
    assert "Traceback" not in vmm.running.log.read_text()
    assert not peer.doubled()
    assert not peer.broken
    assert said.number("received") > 20 * kills
    assert said.number("lost") <= 2 * pairs * kills, "one for each queue and kill"
    tell(capsys, said, kills)


def test_kills_while_frames_come_in(vm: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    kills = 40
    netns.make_tap()
    ended = threading.Event()
    with steer(vm, "test=net-receive rxbuf=200", extra=["--net", f"{CARD},{KILLED}"]) as vmm, Peer() as peer:

        def send() -> None:
            number = 0
            while not ended.wait(0.0005):
                number += 1
                peer.send(frame(DATA, number, 64 + number % 1400))

        vmm.running.wait_for("ready=1")
        sender = threading.Thread(target=send)
        sender.start()
        try:
            blow(vmm, kills, seed=3)
        finally:
            ended.set()
            sender.join()
        peer.send(frame(STOP, 0))
        said = vmm.running.finish().check()
    assert "Traceback" not in vmm.running.log.read_text()
    assert said.number("merged") > kills
    assert said.number("lost") <= kills, "one for each kill"
    tell(capsys, said, kills)


def test_link_and_announcement(vm: Vm) -> None:
    netns.make_tap()
    with steer(vm, "test=net-announce down=1", extra=["--net", f"{CARD},id=lan"]) as vmm:
        vmm.running.wait_for("ready=1")
        assert vmm.client.call("set-link", id="lan", link="down") == {"id": "lan", "link": "down"}
        vmm.running.wait_for("link=0")
        assert vmm.client.call("set-link", id="lan", link="up") == {"id": "lan", "link": "up"}
        assert vmm.running.finish().check().number("link") == 1


def test_large_segments_arrive_in_one_piece(vm: Vm) -> None:
    netns.make_tap()
    with Peer() as peer:
        said = vm("test=net-bench count=200 op=tx gso=1 bs=32K", extra=["--net", CARD]).check()
    assert said.number("sent") == 200
    assert not peer.broken
