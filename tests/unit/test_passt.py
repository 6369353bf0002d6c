"""The stream of frames to and from passt, and what happens when it ends. The test is passt."""

from __future__ import annotations

import contextlib
import os
import signal
import socket
import sys
import time
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from cellvisor.core.errors import UsageError
from cellvisor.core.wire.options import build
from cellvisor.devices.backends import passt, passtdaemon
from cellvisor.devices.backends.passt import LENGTH, LONGEST, Passt
from cellvisor.devices.virtio.net import Net
from tests.fakes.host import FakeHost

HEADER = bytes(12)


@pytest.fixture
def ends() -> Iterator[tuple[Passt, socket.socket]]:
    """Our end and passt's."""
    ours, theirs = socket.socketpair()
    one = Passt(ours.detach())
    theirs.settimeout(10)
    yield one, theirs
    one.close()
    theirs.close()


def message(frame: bytes) -> bytes:
    return LENGTH.pack(len(frame)) + frame


def read(one: Passt, *sizes: int) -> bytes:
    """Read a frame into views of these sizes, the last of them large."""
    views = [memoryview(bytearray(size)) for size in (*sizes, 1 << 17)]
    size = one.read(views)
    return b"".join(views)[:size]


def test_frames_come_whole_or_not_at_all(ends: tuple[Passt, socket.socket]) -> None:
    one, theirs = ends
    frames = [bytes([number]) * size for number, size in enumerate((14, 60, 1514, LONGEST), 1)]
    stream = b"".join(map(message, frames))
    seen = []
    for piece in (stream[:3], stream[3:10], stream[10:18], stream[18:90], stream[90:1700], stream[1700:]):
        theirs.sendall(piece)
        while data := read(one, 5, 9, 100):
            seen.append(data)
    assert seen == [HEADER + frame for frame in frames]


def test_a_frame_that_was_not_taken_is_the_successor_s(ends: tuple[Passt, socket.socket]) -> None:
    one, theirs = ends
    theirs.sendall(message(b"x" * 60) + message(b"y" * LONGEST) + message(b"z" * 60))
    assert read(one) == HEADER + b"x" * 60
    for wanted in (b"x" * 60, b"y" * LONGEST, b"z" * 60):
        for _ in range(2):
            with contextlib.closing(Passt(os.dup(one.fd))) as successor:
                assert read(successor, 5) == HEADER + wanted
        with contextlib.closing(Passt(os.dup(one.fd))) as successor:
            assert read(successor) == HEADER + wanted
            successor.taken()
            successor.taken()
    with contextlib.closing(Passt(os.dup(one.fd))) as successor:
        assert read(successor) == b""


@pytest.mark.parametrize("size", [0, 13, LONGEST + 1, 0xFFFFFFFF])
def test_a_length_that_makes_no_sense_ends_the_connection(ends: tuple[Passt, socket.socket], size: int) -> None:
    one, theirs = ends
    theirs.sendall(LENGTH.pack(size) + bytes(100_000))
    assert read(one) == b""
    assert passt.has_ended(one.fd)
    assert theirs.recv(1) == b""


def test_frames_go_whole_or_not_at_all(ends: tuple[Passt, socket.socket]) -> None:
    one, theirs = ends
    frames = [bytes([number]) * (14 + 7919 * number % (LONGEST - 13)) for number in range(60)]
    stream, got, refused = b"".join(map(message, frames)), bytearray(), 0
    for frame in frames:
        while not one.write([memoryview(HEADER), memoryview(frame)]):
            refused += 1
            got += theirs.recv(1 << 20)
    while len(got) < len(stream):
        got += theirs.recv(1 << 20)
    assert bytes(got) == stream
    assert refused


@pytest.mark.parametrize("size", [0, 13, LONGEST + 1])
def test_what_is_no_frame_is_refused_and_harms_nothing(ends: tuple[Passt, socket.socket], size: int) -> None:
    one, theirs = ends
    with pytest.raises(OSError, match=f"a frame of {size} bytes"):
        one.write([memoryview(HEADER + bytes(size))])
    assert one.write([memoryview(HEADER + bytes(60))])
    assert theirs.recv(1000) == message(bytes(60))


def test_emptied_it_goes_on_with_the_next_frame(ends: tuple[Passt, socket.socket]) -> None:
    one, theirs = ends
    theirs.sendall(message(bytes(60)) * 20)
    one.empty(memoryview(bytearray(1 << 17)))
    theirs.sendall(message(b"x" * 60))
    assert read(one) == HEADER + b"x" * 60


def test_another_one_follows_after_ever_longer_waits(monkeypatch: pytest.MonkeyPatch) -> None:
    host, started = FakeHost(), list[socket.socket]()
    monkeypatch.setattr(passt, "BACKOFF", (0.0, 0.01))

    def start(arguments: Sequence[str]) -> tuple[socket.socket, int]:
        assert arguments == ["--mtu", "1400"]
        ours, theirs = socket.socketpair()
        started.append(theirs)
        if len(started) in (2, 3):
            ours.close()
            raise UsageError("passt does not start: no reason")
        return ours, -1

    monkeypatch.setattr(passtdaemon, "start", start)
    one = passt.open_passt(build(Net.Options, {"mtu": 1400}), host)
    assert one.mtu == 1400
    started[0].close()
    assert passt.has_ended(one.fd)
    found: list[bool] = []
    number, end = one.fd, time.monotonic() + 60
    for _ in range(2):  # told twice, it starts one
        one.lost(host, lambda: found.append(True))
    while not found and time.monotonic() < end:
        host.reactor.turn(0.1)
    assert host.logged == ["backend lost: passt has ended", *["passt does not start: no reason"] * 2,
                           "backend found: another passt was started"]
    assert one.fd == number
    assert not os.get_blocking(number)
    assert one.write([memoryview(HEADER + bytes(60))])
    assert started[3].recv(1000) == message(bytes(60))
    successor = passt.open_passt(build(Net.Options, {}), host)
    assert len(started) == 4, "it takes over the one that is there"
    started[3].sendall(message(b"x" * 60))
    assert read(successor) == HEADER + b"x" * 60
    for thing in (one, successor):
        thing.close()
    os.close(host.store["passt"])
    assert passt.has_ended(started[3].fileno()), "it ends with the last copy of our end"
    for thing in started:
        thing.close()
    host.reactor.close()


@pytest.mark.parametrize(("options", "wanted"), [
    ({}, True), ({"mac": "52:54:00:00:00:01", "mtu": 1500}, True), ({"tap": "tap0"}, False), ({"fd": [7]}, False),
    ({"ip": "10.0.0.1", "mask": "255.0.0.0"}, False), ({"host_mac": "52:54:00:00:00:01"}, False)])
def test_it_is_for_cards_without_a_word_about_the_host(options: dict[str, Any], wanted: bool) -> None:
    assert passt.is_wanted(build(Net.Options, options)) == wanted


def test_it_has_one_pair_of_queues() -> None:
    with pytest.raises(UsageError, match="num_queues=4 without tap or fd: passt has one pair"):
        passt.open_passt(build(Net.Options, {"num_queues": 4}), FakeHost())


PROGRAM = """#!{python}
import os, socket, sys
ours = socket.socket(fileno=int(sys.argv[sys.argv.index("--fd") + 1]))
if os.fork():
    os._exit(0)
os.setsid()
os.closerange(0, 3)
room = ours.getsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF)
ours.sendall(f"{{os.getpid()}} {{room}} {{' '.join(sys.argv[4:])}}".encode())
ours.recv(1)
"""


@pytest.fixture
def reaper() -> Iterator[None]:
    """Let this process be one for the test alone."""
    yield
    passtdaemon.lib.prctl(passtdaemon.lib.PR_SET_CHILD_SUBREAPER, 0, 0, 0, 0)


@pytest.mark.usefixtures("reaper")
def test_it_is_started_with_room_and_known_by_its_pidfd(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    program = tmp_path / "passt"
    program.write_text(PROGRAM.format(python=sys.executable))
    program.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setattr(passtdaemon, "START_SECONDS", 60.0)
    host, (ours, pidfd) = FakeHost(), passtdaemon.start(["--mtu", "1400"])
    passtdaemon.keep(host, ours, pidfd)
    ours.settimeout(60)
    pid, room, *rest = ours.recv(1000).decode().split()
    assert rest == ["--mtu", "1400"]
    limit = int(Path("/proc/sys/net/core/wmem_max").read_text())
    assert int(room) >= 2 * min(passtdaemon.BUFFER, limit)  # socket(7): the kernel doubles it
    signal.pidfd_send_signal(host.store["process:passt"], signal.SIGKILL)
    assert ours.recv(1) == b"", "it is this process"
    end = time.monotonic() + 60
    while Path(f"/proc/{pid}").exists():
        assert time.monotonic() < end, "nobody reaps it"
        host.reactor.turn(0.1)
    ours.close()
    for fd in host.store.values():
        os.close(fd)
    host.reactor.close()


def test_emptied_it_throws_away_what_waits_however_much_that_is(ends: tuple[Passt, socket.socket]) -> None:
    one, theirs = ends
    theirs.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
    theirs.setblocking(False)
    sent = 0
    with contextlib.suppress(BlockingIOError):
        while True:
            assert theirs.send(message(bytes(60)) * 100) == 6400
            sent += 100
    one.empty(memoryview(bytearray(1 << 17)))
    assert read(one) == b"", sent


@pytest.mark.parametrize(("options", "wanted"), [
    ({}, []), ({"mtu": 1400}, ["--mtu", "1400"]),
    ({"forward": ["tcp:2222:22"]}, ["-t", "127.0.0.1/2222:22", "-u", "none"]),
    ({"forward": ["udp:0.0.0.0:53:5353", "tcp:192.0.2.1:1:65535"]},
     ["-u", "0.0.0.0/53:5353", "-t", "192.0.2.1/1:65535"])])
def test_what_it_is_told(options: dict[str, Any], wanted: list[str]) -> None:
    assert passt.arguments(build(Net.Options, options)) == wanted


@pytest.mark.parametrize("text", [
    "", "2222:22", "sctp:1:2", "tcp:1", "tcp:0:22", "tcp:1:65536", "tcp:a:22", "tcp:-1:22", "tcp:127.0.0.256:1:2",
    "tcp::1:2", "tcp:1:2:3:4", "tcp:1:\u0662", "tcp:/1:2", "tcp:1 :2"])
def test_ports_that_are_none_are_refused(text: str) -> None:
    with pytest.raises(UsageError) as caught:
        passt.arguments(build(Net.Options, {"forward": ["tcp:2222:22", text]}))
    assert f"forward={text} is not PROTOCOL:PORT:GUESTPORT (tcp:2222:22, or with an address" in str(caught.value)
