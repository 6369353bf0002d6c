"""Byte channels: nothing blocks, nothing spins, nothing is lost while somebody is there."""

from __future__ import annotations

import os
import pty
import socket
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from cellvisor.core.errors import Conflict, UsageError
from cellvisor.core.wire.bytechannel import BACKLOG, ByteChannel, ReactorLoop, Target, target
from cellvisor.core.wire.reactor import Reactor


class Bench:
    """A reactor, the channel under test and what came in."""

    def __init__(self) -> None:
        self.reactor = Reactor()
        self.turns = 0
        self.kept: dict[str, int] = {}
        self.channels: list[ByteChannel] = []
        self.came = bytearray()
        self.rest = b""

    def open(self, where: Target, **more: object) -> ByteChannel:
        def on_input() -> None:
            self.came += channel.read(4096)

        def on_output() -> None:
            self.rest = self.rest[channel.write(self.rest):]

        channel = ByteChannel(ReactorLoop(self.reactor), where, on_input=on_input, on_output=on_output,
                              keep=lambda name, fd: self.kept.update({name: os.dup(fd)}),
                              **more)  # type: ignore[arg-type]
        self.channels.append(channel)
        return channel

    def until(self, done: Callable[[], bool], seconds: float = 10) -> None:
        end = time.monotonic() + seconds
        while not done():
            assert time.monotonic() < end, "nothing happened"
            self.reactor.turn(0.05)
            self.turns += 1

    def idle(self, seconds: float) -> int:
        before, end = self.turns, time.monotonic() + seconds
        while time.monotonic() < end:
            self.reactor.turn(0.05)
            self.turns += 1
        return self.turns - before


@pytest.fixture
def bench() -> Iterator[Bench]:
    bench = Bench()
    yield bench
    for channel in bench.channels:
        channel.close()
    for fd in bench.kept.values():
        os.close(fd)
    bench.reactor.close()


def reading(fd: int, seconds: float = 10) -> bytes:
    end = time.monotonic() + seconds
    while time.monotonic() < end:
        try:
            return os.read(fd, 1 << 20)
        except BlockingIOError:
            time.sleep(0.01)
    raise AssertionError("nothing to read")


@pytest.mark.parametrize("mode", ["off", "null"])
def test_nowhere_takes_everything(bench: Bench, mode: str) -> None:
    channel = bench.open(Target(mode))
    assert channel.write(b"x" * 100000) == 100000
    assert channel.read(10) == b""


def test_file_is_truncated_or_appended(bench: Bench, tmp_path: Path) -> None:
    path = tmp_path / "log"
    path.write_bytes(b"old")
    assert bench.open(Target("file", str(path))).write(b"one") == 3
    assert bench.open(Target("file", str(path)), append=True).write(b"two") == 3
    assert path.read_bytes() == b"onetwo"
    with pytest.raises(UsageError, match="file=/nowhere/x: No such file"):
        bench.open(Target("file", "/nowhere/x"))


def test_pty_carries_bytes_and_survives_hang_up(bench: Bench) -> None:
    channel = bench.open(Target("pty"))
    assert channel.path.startswith("/dev/pts/")
    assert channel.write(b"boot\n") == 5  # nobody there yet: kept
    assert bench.idle(0.5) < 30
    for turn in range(2):
        slave = os.open(channel.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
        bench.until(lambda: channel.there)
        if turn == 0:
            bench.reactor.turn(0)
            assert reading(slave) == b"boot\n"
        assert channel.write(b"hello\n") == 6
        assert reading(slave) == b"hello\n"
        bench.came.clear()
        os.write(slave, b"\x03key\r")
        bench.until(lambda: bytes(bench.came) == b"\x03key\r")
        os.close(slave)
        bench.until(lambda: not channel.there)
        assert bench.idle(0.5) < 30, "spins while nobody is there"


def test_pty_is_taken_over(bench: Bench) -> None:
    first = bench.open(Target("pty"))
    path = first.path
    slave = os.open(path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    first.close()
    second = bench.open(Target("pty"), given={"pty": os.dup(bench.kept["pty"])})
    assert second.path == path
    bench.until(lambda: second.there)
    assert second.write(b"again") == 5
    assert reading(slave) == b"again"
    os.close(slave)


def test_slow_reader_gets_every_byte_once(bench: Bench) -> None:
    channel = bench.open(Target("pty"))
    slave = os.open(channel.path, os.O_RDWR | os.O_NOCTTY | os.O_NONBLOCK)
    bench.until(lambda: channel.there)
    sent = bytes(range(256)) * 400
    bench.rest = sent[channel.write(sent):]
    assert bench.rest
    got = bytearray()
    while len(got) < len(sent):
        got += reading(slave)
        bench.reactor.turn(0)
    assert bytes(got) == sent
    os.close(slave)


def test_socket_serves_one_client_after_the_other(bench: Bench, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    channel = bench.open(Target("socket", path))
    channel.write(b"x" * BACKLOG + b"early")
    for name in (b"one", b"two"):
        with socket.socket(socket.AF_UNIX) as client:
            client.connect(path)
            client.settimeout(10)
            bench.until(lambda: channel.there)
            if name == b"one":
                bench.reactor.turn(0)
                seen = b""
                while len(seen) < BACKLOG:
                    seen += client.recv(BACKLOG)
                assert len(seen) == BACKLOG
                assert seen.endswith(b"early")
            client.sendall(name)
            bench.until(lambda name=name: bytes(bench.came).endswith(name))  # type: ignore[misc]
            assert channel.write(b"to " + name) == 6
            assert client.recv(100) == b"to " + name
        bench.until(lambda: not channel.there)
        assert bench.idle(0.3) < 30
    assert set(bench.kept) == {"listener", "client"}
    channel.close(unlink=True)
    assert not os.path.exists(path)


def test_socket_path_in_use_is_refused_and_stale_one_replaced(bench: Bench, tmp_path: Path) -> None:
    path = str(tmp_path / "s")
    bench.open(Target("socket", path))
    with pytest.raises(Conflict, match="somebody listens there"):
        bench.open(Target("socket", path))
    bench.channels[0].close()
    os.close(bench.kept.pop("listener"))
    bench.open(Target("socket", path))
    plain = tmp_path / "plain"
    plain.touch()
    with pytest.raises(Conflict, match="is no socket"):
        bench.open(Target("socket", str(plain)))
    with pytest.raises(UsageError, match="at most 107"):
        bench.open(Target("socket", "/" + "x" * 120))


def test_client_that_leaves_mid_write_frees_the_writer(bench: Bench, tmp_path: Path) -> None:
    channel = bench.open(Target("socket", str(tmp_path / "s")))
    client = socket.socket(socket.AF_UNIX)
    client.connect(str(tmp_path / "s"))
    bench.until(lambda: channel.there)
    bench.rest = b"x" * (8 << 20)
    bench.rest = bench.rest[channel.write(bench.rest):]
    assert bench.rest
    client.close()
    bench.until(lambda: not bench.rest)


def test_terminal_of_the_user_stays_blocking(bench: Bench) -> None:
    master, slave = pty.openpty()
    channel = bench.open(Target("tty"), given={"tty": os.dup(slave)})
    assert os.get_blocking(slave)
    assert channel.write(b"out") == 3
    assert os.read(master, 10) == b"out"
    os.write(master, b"in\n")
    bench.until(lambda: bytes(bench.came) == b"in\n")
    os.close(slave)
    os.close(master)
    bench.until(lambda: not channel.there)
    assert bench.idle(0.3) < 30


def test_tty_with_input_from_nowhere(bench: Bench, tmp_path: Path) -> None:
    out = os.open(tmp_path / "out", os.O_RDWR | os.O_CREAT)
    channel = bench.open(Target("tty"), given={"tty": out, "tty-in": os.open("/dev/null", os.O_RDONLY)})
    assert channel.write(b"text") == 4
    assert (tmp_path / "out").read_bytes() == b"text"
    assert bench.idle(0.3) < 30


def test_target_from_option_keys() -> None:
    assert target("tty") == Target("tty")
    assert target("tty", file="/x") == Target("file", "/x")
    assert target("socket", socket="/s") == Target("socket", "/s")
    with pytest.raises(UsageError, match="file=/x and socket=/s together"):
        target("tty", "/x", "/s", "--console")
    with pytest.raises(UsageError, match="--console: file has no path"):
        target("file", flag="--console")
