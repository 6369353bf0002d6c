"""The guest's network driver, shown right against QEMU's card on a tap: each test passes, and sees what is broken."""

from __future__ import annotations

import socket
import threading
from pathlib import Path

import pytest

from tests.debian import Missing, need
from tests.native import netns
from tests.native.guest import GuestResult, Running
from tests.native.netns import DATA, DRIVERS, STOP, Peer, check_echoes, frame
from tests.native.qemu import card, start_qemu

try:
    need("qemu-system-x86_64", "qemu-system-x86")
    _lacking = ""
except Missing as missing:
    _lacking = str(missing)
pytestmark = [pytest.mark.skipif(bool(_lacking), reason=_lacking), netns.needs_tap,
              pytest.mark.usefixtures("network")]


def start(cmdline: str, where: Path, *, pairs: int = 1, more: str = "", cpus: int = 1) -> Running:
    """Start QEMU on a fresh tap0."""
    netns.make_tap(queues=pairs)
    return start_qemu(cmdline, where, extra=card(pairs=pairs, more=more), cpus=cpus)


def send(cmdline: str, where: Path, **options: int) -> tuple[GuestResult, Peer]:
    """Run net-send against a peer that sends back."""
    with start(f"test=net-send {cmdline}", where, **options) as running, Peer() as peer:
        said = running.finish()
    return said, peer


def test_info_tells_what_the_device_says(tmp_path: Path) -> None:
    with start("test=net-info", tmp_path, more=",host_mtu=1400") as running:
        said = running.finish().check()
    assert said.values["mac"] == "52:54:0:12:34:56"
    assert (said.number("mtu"), said.number("link"), said.number("control")) == (1400, 1, 1)


@pytest.mark.parametrize("options", DRIVERS)
def test_every_frame_comes_back_once(tmp_path: Path, options: str) -> None:
    said, peer = send(f"count=500 {options}", tmp_path)
    check_echoes(said, peer, 500)


def test_several_pairs(tmp_path: Path) -> None:
    said, peer = send("count=200 pairs=2", tmp_path, pairs=2, cpus=2)
    said.check()
    assert said.number("received") == 400
    assert {pair for pair, _ in peer.seen} == {0, 1}


def test_a_doubled_frame_ends_the_run_and_a_lost_one_is_counted(tmp_path: Path) -> None:
    class Faulty(Peer):
        def send(self, data: bytes) -> None:
            number = int.from_bytes(data[20:28], "little")
            for _ in range(0 if number == 7 else 2 if number == 9 else 1):
                super().send(data)

    with start("test=net-send count=20 patience_ms=300", tmp_path) as running, Faulty():
        said = running.finish()
    assert said.reason == "1 frames came back twice"
    assert (said.values["twice.0"], said.number("lost"), said.number("received")) == ("9", 1, 19)


def test_a_changed_byte_is_noticed(tmp_path: Path) -> None:
    class Faulty(Peer):
        def send(self, data: bytes) -> None:
            super().send(data[:-1] + bytes([data[-1] ^ 1]))

    with start("test=net-send count=20", tmp_path) as running, Faulty():
        assert "wrong checksum" in running.finish().reason


def test_the_guest_counts_what_is_lost_doubled_and_late(tmp_path: Path) -> None:
    with start("test=net-receive", tmp_path) as running, Peer() as peer:
        running.wait_for("ready=1")
        for number in (1, 2, 4, 3, 6, 7, 7):
            peer.send(frame(DATA, number))
        peer.send(frame(STOP, 0))
        said = running.finish()
    assert [said.number(key) for key in ("received", "highest", "lost", "doubled", "late")] == [7, 7, 1, 1, 1]
    assert said.reason == "1 frames came twice"


@pytest.mark.parametrize("options", ["", "mrg=0", "rxbuf=200"])
def test_echo_sends_all_back(tmp_path: Path, options: str) -> None:
    with start(f"test=net-echo {options}", tmp_path) as running, Peer() as peer:
        running.wait_for("ready=1")
        for number in range(1, 301):
            peer.send(frame(DATA, number, 28 + number * 4))
            if number % 50 == 0:  # a tap's queue and the guest's are finite
                wait_until(lambda number=number: len(peer.seen) == number)  # type: ignore[misc]
        peer.send(frame(STOP, 0))
        said = running.finish().check()
        wait_until(lambda: len(peer.seen) == 301)
    assert said.number("echoed") == 301
    assert (said.number("merged") > 0) == (options == "rxbuf=200")
    assert not peer.broken


def wait_until(done: object) -> None:
    """Wait for a condition; fails after a minute."""
    assert callable(done)
    for _ in range(6000):
        if done():
            return
        threading.Event().wait(0.01)
    pytest.fail("what was waited for did not come in 60 s")


def monitor(path: Path, command: str) -> None:
    """Give QEMU a command."""
    with socket.socket(socket.AF_UNIX) as line:
        line.connect(str(path))
        line.sendall(f"{command}\n".encode())
        said = b""
        while said.count(b"(qemu)") < 2:
            said += line.recv(4096)


@pytest.mark.parametrize(("options", "commands", "last"), [
    ("", ["announce_self"], "announced"), ("down=1", ["set_link n0 off", "set_link n0 on"], "link")])
def test_announce_and_link(tmp_path: Path, options: str, commands: list[str], last: str) -> None:
    netns.make_tap()
    place = tmp_path / "monitor"
    with start_qemu(f"test=net-announce {options}", tmp_path,
                    extra=[*card(), "-monitor", f"unix:{place},server=on,wait=off"]) as running:
        running.wait_for("ready=1")
        for command in commands:
            monitor(place, command)
            running.wait_for("link=0" if options else "announced=1")
        assert running.finish().check().number(last) == 1


def test_control_commands(tmp_path: Path) -> None:
    with start("test=net-control", tmp_path, pairs=2) as running:
        said = running.finish().check()
    told = said.all("ctrl.")
    assert [key for key, ack in told.items() if ack == "1"] == [
        "table_short", "mac_short", "vlan_wild", "pairs_none", "pairs_many", "announce_ack", "unknown_class",
        "unknown_command", "empty"]
    assert said.number("mac_tail") == 0x77


@pytest.mark.parametrize("op", ["rr", "tx", "tx gso=1 bs=32K", "tx gso=1 bs=60000 segs=4", "rx"])
def test_bench_reports(tmp_path: Path, op: str) -> None:
    with start(f"test=net-bench count=300 op={op}", tmp_path) as running, Peer() as peer:
        if op == "rx":
            running.wait_for("ready=1")
            for number in range(200):
                peer.send(frame(DATA, number, 1000))
            peer.send(frame(STOP, 0))
        said = running.finish().check()
    assert said.number("pps") > 0
    assert said.number("received" if op in ("rr", "rx") else "sent") >= 200


def test_a_load_ends_when_told(tmp_path: Path) -> None:
    with start("test=net-send count=1M", tmp_path) as running, Peer() as peer:
        running.wait_for("features=")
        wait_until(lambda: len(peer.seen) > 100)
        peer.send(frame(STOP, 0))
        said = running.finish().check()
    assert said.number("received") == said.number("sent") < 1 << 20
