"""Descriptors over AF_UNIX from a peer that lies: nothing leaks, nothing but UsageError comes out."""

from __future__ import annotations

import array
import os
import socket
from collections.abc import Iterator
from pathlib import Path

import pytest

from cellvisor.core.errors import UsageError
from cellvisor.core.wire import fdpass
from cellvisor.core.wire.messages import pack

Pair = tuple[socket.socket, socket.socket]


@pytest.fixture
def pair() -> Iterator[Pair]:
    left, right = socket.socketpair(socket.AF_UNIX, socket.SOCK_SEQPACKET)
    yield left, right
    left.close()
    right.close()


def open_descriptors() -> int:
    return len(os.listdir("/proc/self/fd"))


def raw(sock: socket.socket, data: bytes, fds: list[int]) -> None:
    sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, array.array("i", fds))])


def test_descriptors_arrive_in_order_and_close_on_exec(pair: Pair) -> None:
    files = [os.memfd_create(name) for name in "ab"]
    os.write(files[0], b"A")
    os.write(files[1], b"B")
    fdpass.send(pair[0], {"names": ["a", "b"]}, files)
    packet = fdpass.receive(pair[1])
    assert packet is not None
    body, fds = packet
    assert body == {"names": ["a", "b"]}
    assert [os.pread(fd, 1, 0) for fd in fds] == [b"A", b"B"]
    assert not any(os.get_inheritable(fd) for fd in fds)
    for fd in files + fds:
        os.close(fd)


@pytest.mark.parametrize("data", [b"", b"\xc1", pack({"a": 1})[:-1], b"\x93\x01\x02\x03"])
def test_descriptors_of_a_bad_packet_are_closed(pair: Pair, data: bytes) -> None:
    fd = os.memfd_create("x")
    before = open_descriptors()
    raw(pair[0], data, [fd, fd, fd])
    with pytest.raises(UsageError):
        fdpass.receive(pair[1])
    assert open_descriptors() == before
    os.close(fd)


def test_too_many_descriptors_are_all_closed(pair: Pair) -> None:
    fd = os.memfd_create("x")
    before = open_descriptors()
    raw(pair[0], pack({}), [fd] * (fdpass.MAX_FDS + 3))
    with pytest.raises(UsageError, match="cut"):
        fdpass.receive(pair[1])
    assert open_descriptors() == before
    os.close(fd)


def test_too_long_a_packet_is_refused_on_both_sides(pair: Pair) -> None:
    with pytest.raises(ValueError, match="at most"):
        fdpass.send(pair[0], {"x": b"0" * fdpass.MAX_PACKET})
    with pytest.raises(ValueError, match="251 descriptors"):
        fdpass.send(pair[0], {}, [0] * 251)
    pair[0].send(pack({"x": b"0" * fdpass.MAX_PACKET}))
    with pytest.raises(UsageError, match="cut"):
        fdpass.receive(pair[1])


def test_gone_peer_is_none(pair: Pair) -> None:
    pair[0].close()
    assert fdpass.receive(pair[1]) is None


def test_peer_that_resets_is_none(tmp_path: Path) -> None:
    """Closing with unread data resets the other side instead of ending it."""
    with fdpass.listen(str(tmp_path / "s")) as listener, fdpass.connect(str(tmp_path / "s")) as client:
        server, _ = listener.accept()
        fdpass.send(client, {"never": "read"})
        server.close()
        assert fdpass.receive(client) is None


def test_nothing_to_read_is_not_the_end(pair: Pair) -> None:
    pair[1].setblocking(False)
    with pytest.raises(BlockingIOError):
        fdpass.receive(pair[1])


def test_failed_listen_and_connect_leave_no_socket(tmp_path: Path) -> None:
    before = open_descriptors()
    with pytest.raises(OSError):
        fdpass.connect(str(tmp_path / "nobody"))
    with pytest.raises(OSError):
        fdpass.listen(str(tmp_path / "missing" / "s"))
    assert open_descriptors() == before
