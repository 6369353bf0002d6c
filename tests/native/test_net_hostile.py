"""A driver that breaks the rules of a network card: it may need a reset, which heals it; the others notice nothing.

After each case the card must carry a frame to the host and back.
"""

from __future__ import annotations

import os
import time
from pathlib import Path

import pytest

from tests.native import netns
from tests.native.conftest import Vm
from tests.native.guest import needs_kvm
from tests.native.netns import DATA, Peer, frame
from tests.native.test_hostile_guest import SERVED, besieged
from tests.native.test_native_hostile import FATAL as FATAL_RINGS

pytestmark = [pytest.mark.kvm, needs_kvm, netns.needs_tap, pytest.mark.usefixtures("network")]
CARD = ["--net", "tap=tap0"]
RECEIVES, SENDS, COMMANDS = range(3)
# What no device can make sense of. Of the rest it says how many chains are used: a frame that nobody takes is dropped.
FATAL = {
    "tx-empty", "tx-short", "tx-writable", "tx-hole", "tx-wraps", "rx-empty", "rx-short", "rx-readable", "rx-hole",
    "rx-wraps", "rx-huge", "control-empty", "control-hole", "control-ack-hole", "control-no-ack", "control-empty-ack",
    "control-only-ack", "control-one-byte",
}
USED = {
    "tx-header-only": 1, "tx-runt": 1, "tx-split-header": 1, "tx-writable-tail": 1, "tx-large": 1, "tx-flags": 1,
    "tx-gso-unknown": 1, "tx-gso-size-0": 1, "tx-gso-far": 1, "tx-csum-far": 1, "rx-no-room": 0, "rx-crumbs": 117,
    "rx-split-header": 1, "rx-large": 1, "control-no-data": 1, "control-much-data": 1, "control-long-ack": 1,
    "control-table-lies": 1, "control-table-far": 1,
}


@pytest.mark.parametrize("options", ["", "indirect=0 event_idx=0"])
def test_frames_and_commands_that_make_no_sense(vm: Vm, disk: Path, options: str) -> None:
    netns.make_tap()
    with besieged(vm, f"test=net-hostile,{SERVED} settle=200 {options}", disks=[disk], extra=CARD) as vmm, \
            Peer() as peer:
        text = vmm.running.wait_for("result=")
    told = dict(line.removeprefix("net.").split("=") for line in text.splitlines() if line.startswith("net."))
    assert {name for name in FATAL if told[name] != "needs-reset"} == set()
    assert {name: told[name] for name in USED} == {name: str(used) for name, used in USED.items()}
    assert not peer.doubled()


@pytest.mark.parametrize("queue", [RECEIVES, SENDS, COMMANDS])
def test_bad_rings_end_in_needs_reset_and_a_reset_heals(vm: Vm, disk: Path, queue: int) -> None:
    netns.make_tap()
    said = vm(f"test=hostile,{SERVED} type=net queue={queue} settle=2000 case={','.join(sorted(FATAL_RINGS))}",
              disks=[disk], extra=CARD).check()
    assert {name for name, found in said.all("hostile.").items() if found != "needs-reset"} == set()
    assert said.number("cases") == len(FATAL_RINGS)


@pytest.mark.parametrize("queue", [RECEIVES, SENDS, COMMANDS])
def test_a_second_cpu(vm: Vm, disk: Path, queue: int) -> None:
    """It rewrites descriptors, rings, headers and registers, while frames come in."""
    netns.make_tap()
    attack = f"test=race,net-send,{SERVED} type=net queue={queue} ms=1500 registers=1 seed={os.getpid()} count=200"
    with besieged(vm, attack, disks=[disk], cpus=2, extra=CARD) as vmm, Peer() as peer:
        vmm.running.wait_for("test=race")
        flood = frame(DATA, 1, 300)
        while "race.rounds" not in vmm.running.text and vmm.running.process.poll() is None:
            for _ in range(20):
                peer.offer(flood)
            time.sleep(0.001)
        text = vmm.running.wait_for("result=")
    assert "race.flips=0\n" not in text
    assert "received=200\n" in text


@pytest.mark.parametrize("again", ["resubmit", "toggle"])
def test_one_head_and_resets_without_end(vm: Vm, disk: Path, again: str) -> None:
    netns.make_tap()
    attack = f"test={again},net-send,{SERVED} type=net"
    with besieged(vm, attack, disks=[disk], extra=CARD) as vmm, Peer():
        text = vmm.running.wait_for("result=")
    assert "received=1000\n" in text
