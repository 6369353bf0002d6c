"""A network card's process is killed again and again under numbered frames: none comes twice, hardly any is lost.

The guest sends, the host sends back, both count. What the host has not seen was lost by the queue that sends, what
it has seen and the guest has not by the queue that receives: at most one frame for each death.
"""

from __future__ import annotations

import json
import os
import signal
import time

import pytest

from tests.native import netns
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.netns import STOP, Peer, frame
from tests.native.steer import Steer, steer
from tests.native.storm import OPTIONS, Storm

pytestmark = [pytest.mark.kvm, needs_kvm, netns.needs_tap, pytest.mark.usefixtures("network")]
LOAD = "test=net-send depth=32 patience_ms=500 count=4M"
Counted = tuple[int, int, int]  # frames sent, seen by the host, back in the guest


def stop(vmm: Steer, peer: Peer) -> None:
    """Tell the guest to end: more than once, for whoever serves the card may lose a frame too."""
    end = time.monotonic() + 60
    while vmm.running.process.poll() is None and time.monotonic() < end:
        peer.offer(frame(STOP, 0))
        time.sleep(0.05)


def finish(vmm: Steer, peer: Peer) -> Counted:
    """End the load; fails if a frame was doubled or broken."""
    stop(vmm, peer)
    said = vmm.running.finish().check()
    assert "Traceback" not in vmm.running.log.read_text()
    assert not peer.doubled()
    assert not peer.broken
    assert said.number("doubled") == 0
    sent, seen, received = said.number("sent"), len(peer.seen), said.number("received")
    assert sent >= seen >= received
    assert said.number("lost") == sent - received
    return sent, seen, received


def survive(vm: Vm, options: str, kills: int, seed: int, *, pairs: int = 1) -> str:
    """Blow; returns what was lost as text."""
    monitor = vm.where / "events.json"
    netns.make_tap(queues=pairs)
    with steer(vm, f"{LOAD} {options} pairs={pairs}", cpus=pairs, extra=[
            "--net", f"tap=tap0,num_queues={2 * pairs},{OPTIONS}", "--event-monitor", f"path={monitor}"]) as vmm, \
            Peer() as peer:
        vmm.running.wait_for("features=")
        storm = Storm(vmm.pid("nursery"), int(vmm.device("net")["pid"]), seed,
                      lambda: vmm.running.process.poll() is None)
        for _ in storm.blow(kills):
            pass
        sent, seen, received = finish(vmm, peer)
    deaths = [event["properties"] for text in monitor.read_text().split("\n\n") if text
              for event in [json.loads(text)] if event["event"] == "device-died"]
    assert [death["generation"] for death in deaths] == list(range(1, kills + 1)), "each death was a kill"
    assert all("killed by SIGKILL" in death["reason"] for death in deaths)
    assert sent > 10 * kills
    assert sent - seen <= kills * pairs
    assert seen - received <= kills * pairs
    return (f"{kills} kills, seed {seed}, {pairs} pairs, {options}: {sent} frames, none twice, "
            f"{sent - seen} lost going out, {seen - received} coming in")


@pytest.mark.parametrize(("options", "pairs"), [
    ("rxbuf=128 bs=1400", 1), ("mrg=0 tso=0 indirect=0 event_idx=0", 1), ("bs=600", 2)])
def test_30_kills(vm: Vm, options: str, pairs: int, capsys: pytest.CaptureFixture[str]) -> None:
    told = survive(vm, options, 30, os.getpid(), pairs=pairs)
    with capsys.disabled():
        print(f"\n{told}")


def test_upgrades_lose_nothing_and_a_hang_hardly_anything(vm: Vm) -> None:
    netns.make_tap()
    with steer(vm, f"{LOAD} bs=1400", extra=["--net", "tap=tap0,hang_timeout=1"]) as vmm, Peer() as peer:
        vmm.running.wait_for("features=")
        for _ in range(3):
            vmm.client.call("upgrade-device", id=vmm.device("net")["id"])
        before = len(peer.seen)
        vmm.signal("net", signal.SIGSTOP)
        vmm.wait("device.restarted")
        end = time.monotonic() + 60
        while len(peer.seen) < before + 200 and time.monotonic() < end:
            time.sleep(0.02)
        sent, seen, received = finish(vmm, peer)
    assert sent > before + 200
    assert sent - seen <= 1
    assert seen - received <= 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_1000_kills(vm: Vm, capsys: pytest.CaptureFixture[str]) -> None:
    told = survive(vm, "rxbuf=512 bs=1400", 1000, 2026)
    with capsys.disabled():
        print(f"\n{told}")
