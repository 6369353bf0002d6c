"""What a worker may do to the descriptors that core gives it, takes from it, or waits for."""

from __future__ import annotations

import contextlib
import fcntl
import os
import socket
import struct
import time
from collections.abc import Callable
from typing import Any

from cellvisor.core.wire import fdpass, places
from cellvisor.core.wire.messages import pack
from tests.fakes.liar import MIB, Liar, errno_of, sleep, tell, wait


def deposits(liar: Liar) -> None:
    """10,000 deposits, each under its own name."""
    liar.behave()
    wait()
    refused = 0
    with open("/dev/null", "rb") as null:
        for number in range(10_000):
            refused += not liar.ask({"deposit": f"name{number}"}, null.fileno())["ok"]
    tell(refused)
    sleep()


def replaced(liar: Liar) -> None:
    """10,000 deposits under one name."""
    liar.behave()
    wait()
    with open("/dev/null", "rb") as null:
        for _ in range(10_000):
            assert liar.ask({"deposit": "name0"}, null.fileno())["ok"]
    tell("done")
    sleep()


def bad_packets(liar: Liar) -> None:
    """Packets of every wrong kind, each on a connection of its own."""
    liar.behave()
    wait()
    null = os.open("/dev/null", os.O_RDONLY)
    me = {"identity": liar.identity}
    bodies: list[Any] = [
        {}, me, {**me, "take": 1}, {**me, "get": 7}, {**me, "get": ""}, {**me, "get": "x" * 129},
        {**me, "deposit": None}, {**me, "deposit": "n"}, {**me, "pidfd": "honest"},
        {"identity": 5, "take": True}, {"identity": "x" * 99999}, {**me, "deposit": ["n"]}, {**me, "x" * 60000: 1}]
    packets = [(pack(body), [null]) for body in bodies]
    packets += [(b"", [null] * 3), (b"\xc1", [null] * 250), (b"x" * ((1 << 17) + 5), [null]),
                (pack({**me, "deposit": "n"}), [null] * 2), (pack({**me, "deposit": "n"}), [null] * 253),
                (pack(me)[:-3], []), (b"\x90", []), (b"\xdf\xff\xff\xff\xff", [])]
    for data, fds in packets:
        sock = liar.connect()
        with contextlib.suppress(OSError):
            sock.sendmsg([data], [(socket.SOL_SOCKET, socket.SCM_RIGHTS, struct.pack(f"{len(fds)}i", *fds))]
                         if fds else [])
            while sock.recv(4096):
                pass
        sock.close()
    tell(len(packets))
    sleep()


def connections(liar: Liar) -> None:
    """1,000 connections to each socket that say nothing and stay."""
    liar.behave()
    wait()
    kept = []
    for number in range(2000):
        sock = socket.socket(socket.AF_UNIX, socket.SOCK_SEQPACKET if number % 2 else socket.SOCK_STREAM)
        sock.connect(os.path.join(liar.run_dir, places.FDS if number % 2 else places.CORE))
        kept.append(sock)
    tell(len(kept))
    sleep()


def packet_flood(liar: Liar) -> None:
    """Requests for descriptors whose answers nobody reads."""
    liar.behave()
    wait()
    data = pack({"identity": liar.identity, "get": "nothing"})
    liar.fds.settimeout(None)
    tell("flooding")
    for _ in range(100_000):
        liar.fds.send(data)
    tell("done")
    sleep()


def slow_close(liar: Liar) -> None:
    """Sockets that take a minute to close when core is the last to hold them: deposited, replaced, thrown at it."""
    liar.behave()
    wait()
    listener = socket.create_server(("127.0.0.1", 0))
    tell("sending")
    for number in range(400):
        near = socket.create_connection(listener.getsockname())
        far, _ = listener.accept()
        far.detach()  # nobody reads it
        near.setblocking(False)
        with contextlib.suppress(BlockingIOError):
            while True:
                near.send(bytes(MIB))
        near.setblocking(True)
        near.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, struct.pack("ii", 1, 60))
        fdpass.send(liar.fds, {"identity": liar.identity, "deposit": f"name{number % 2}"}, [near.fileno()])
        os.close(near.detach())
        answer = fdpass.receive(liar.fds)
        if answer is None or not answer[0]["ok"]:
            break
        if number == 5:
            tell("some")
            wait()
    tell("end")
    sleep()


# ---- shared memory and eventfds

def resize(liar: Liar) -> None:
    """ftruncate on guest RAM, its table and the state; other ways to hurt who maps them."""
    liar.behave()
    found: dict[str, list[str]] = {}
    for name in ("ram", "table", "state"):
        fd = liar.given[name]
        size = os.fstat(fd).st_size
        tries: list[Callable[[], Any]] = [lambda fd=fd, to=to: os.ftruncate(fd, to)  # type: ignore[misc]
                                          for to in (0, 4096, size * 2)]
        tries.append(lambda fd=fd: fcntl.fcntl(fd, 1033, 0x0008))  # type: ignore[misc]  # F_ADD_SEALS, F_SEAL_WRITE
        tries.append(lambda fd=fd, size=size: os.posix_fallocate(fd, size, 4096))  # type: ignore[misc]
        if name == "table":
            tries.append(lambda fd=fd: os.pwrite(fd, b"x", 0))  # type: ignore[misc]
            tries.append(lambda fd=fd: _reopen_and_write(fd))  # type: ignore[misc]
        found[name] = [errno_of(one) for one in tries]
        found[name].append("same" if os.fstat(fd).st_size == size else "resized")
    tell(found)
    sleep()


def _reopen_and_write(fd: int) -> None:
    again = os.open(f"/proc/self/fd/{fd}", os.O_RDWR)
    try:
        os.pwrite(again, b"x", 0)
    finally:
        os.close(again)


def scribble(liar: Liar) -> None:
    """Garbage all over the state memfd, again and again, while it answers pings or not."""
    liar.behave()
    wait()
    size = os.fstat(liar.given["state"]).st_size
    for seed in range(200):
        os.pwrite(liar.given["state"], os.urandom(size) if seed % 2 else b"\xff" * size, 0)
        time.sleep(0.005)
    tell("done")
    sleep()


def full_eventfds(liar: Liar) -> None:
    """Every eventfd that core shares with it: blocking, and full."""
    liar.behave()
    wait()
    for name, fd in liar.given.items():
        if name in ("ram", "table", "state"):
            continue
        with contextlib.suppress(OSError):
            os.set_blocking(fd, False)
            while True:
                os.eventfd_write(fd, (1 << 64) - 2)
        os.set_blocking(fd, True)
    with contextlib.suppress(OSError):  # the other end of the pings, if it can be had
        pipe = os.open(f"/proc/self/fd/{liar.given['ping']}", os.O_WRONLY | os.O_NONBLOCK)
        while True:
            os.write(pipe, bytes(4096))
    tell(sorted(liar.given))
    sleep()


def empty_eventfds(liar: Liar) -> None:
    """Every eventfd blocking, and emptied as fast as it can."""
    liar.behave()
    wait()
    shared = [fd for name, fd in liar.given.items() if name.startswith(("call", "kick"))]
    tell("emptying")
    while True:
        for fd in shared:
            os.eventfd_write(fd, 1)
            os.set_blocking(fd, False)
            with contextlib.suppress(BlockingIOError):
                os.eventfd_read(fd)
            os.set_blocking(fd, True)
