"""A network namespace with taps, and the host's end of them: it answers, counts and sends the guest's test frames.

Frames are those of tests/guest/net.h. `namespace` moves the calling thread: all that it starts or opens meanwhile
lives in the new namespace, which is gone with the last of it.
"""

from __future__ import annotations

import ctypes
import errno
import fcntl
import os
import select
import socket
import struct
import subprocess
import threading
import time
import zlib
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from types import TracebackType

import pytest

from tests.debian import need
from tests.native.guest import GuestResult

CLONE_NEWNET = 0x40000000
TUNSETIFF, TUNSETPERSIST = 0x400454CA, 0x400454CB
IFF_TAP, IFF_NO_PI, IFF_VNET_HDR, IFF_MULTI_QUEUE = 0x0002, 0x1000, 0x4000, 0x0100
SIOCGIFFLAGS, SIOCSIFFLAGS, SIOCSIFMTU, IFF_UP = 0x8913, 0x8914, 0x8922, 1
# Ways in which a driver may set up its rings, as net-send takes them.
DRIVERS = ("irq=msix", "irq=intx mrg=0", "irq=poll tso=0", "mrg=0 tso=0 csum=0", "ctrl=0 event_idx=0",
           "indirect=0 segs=3", "qsize=256 rxbuf=128 bs=1400", "event_idx=0 indirect=0 segs=4 bs=1514 idle=spin")
TYPE = 0x88B5
ECHO, DATA, STOP, UNCHECKED = 1, 2, 3, 0x80
HEAD = struct.Struct("<12s2sBBIQQ")  # addresses, type, kind, pair, crc, number, time
_libc = ctypes.CDLL(None, use_errno=True)


def _usable() -> str:
    if not os.access("/dev/net/tun", os.R_OK | os.W_OK):
        return "/dev/net/tun is missing or not ours to open"
    return "" if os.geteuid() == 0 else "a network namespace of our own needs root"


unusable = _usable()
needs_tap = pytest.mark.skipif(bool(unusable), reason=unusable or "taps can be used")


@contextmanager
def namespace() -> Iterator[None]:
    """Be in a network namespace of one's own. Raises OSError where that is forbidden."""
    home = os.open("/proc/thread-self/ns/net", os.O_RDONLY)
    try:
        if _libc.unshare(CLONE_NEWNET):
            raise OSError(ctypes.get_errno(), "unshare: no network namespace")
        try:
            yield
        finally:
            if _libc.setns(home, CLONE_NEWNET):
                raise OSError(ctypes.get_errno(), "setns: no way back")
    finally:
        os.close(home)


def make_tap(name: str = "tap0", *, queues: int = 1, mtu: int = 1500) -> str:
    """Make a tap that stays, up and without IPv6, so that nobody but the tests speaks on it."""
    flags = IFF_TAP | IFF_NO_PI | IFF_VNET_HDR | (IFF_MULTI_QUEUE if queues > 1 else 0)
    with open("/dev/net/tun", "r+b", buffering=0) as tun:
        fcntl.ioctl(tun, TUNSETIFF, struct.pack("16sH22x", name.encode(), flags))
        fcntl.ioctl(tun, TUNSETPERSIST, 1)
    with suppress(OSError):
        Path(f"/proc/sys/net/ipv6/conf/{name}/disable_ipv6").write_text("1")
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as control:
        fcntl.ioctl(control, SIOCSIFMTU, struct.pack("16si20x", name.encode(), mtu))
        (now,) = struct.unpack_from("H", fcntl.ioctl(control, SIOCGIFFLAGS, struct.pack("16s24x", name.encode())), 16)
        fcntl.ioctl(control, SIOCSIFFLAGS, struct.pack("16sH22x", name.encode(), now | IFF_UP))
    return name


def reflect(tap: str) -> None:
    """Have the kernel send the echo frames of measurements back out of the tap that they come in by."""
    tc = need("tc", "iproute2")
    for words in (["qdisc", "add", "dev", tap, "clsact"],
                  ["filter", "add", "dev", tap, "ingress", "protocol", "all", "u32", "match", "u8",
                   hex(ECHO | UNCHECKED), "0xff", "at", "0", "action", "mirred", "egress", "redirect", "dev", tap]):
        subprocess.run([tc, *words], check=True, timeout=60)


def frame(kind: int, number: int, size: int = 64, pair: int = 0, *, to: bytes = b"\xff" * 6) -> bytes:
    """Make a test frame of `size` bytes with its checksum."""
    head = HEAD.pack(to + b"\x02host.", TYPE.to_bytes(2, "big"), kind, pair, 0, number, 0)
    whole = head + bytes((number + index) & 0xFF for index in range(size - HEAD.size))
    return whole[:16] + zlib.crc32(whole[20:]).to_bytes(4, "little") + whole[20:]


class Peer:
    """The host's end of a tap. As a context manager it sends back what asks for it, and counts by pair and number."""

    def __init__(self, tap: str = "tap0") -> None:
        self.seen: Counter[tuple[int, int]] = Counter()
        self.broken = 0
        self.refused = 0  # what the tap had no room for
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(TYPE))
        self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 8 << 20)
        self._socket.bind((tap, TYPE))
        self._stop, self._wake = os.pipe()
        self._thread = threading.Thread(target=self._serve, name="peer")

    def offer(self, data: bytes) -> bool:
        """Send one frame to the guest; False if the tap's queue is full."""
        try:
            self._socket.send(data, socket.MSG_DONTWAIT)
        except OSError as error:
            if error.errno not in (errno.ENOBUFS, errno.EAGAIN):
                raise
            self.refused += 1
            return False
        return True

    def send(self, data: bytes) -> None:
        """Send one frame to the guest; waits where the tap's queue is full."""
        while not self.offer(data):
            time.sleep(0.001)

    def doubled(self) -> list[tuple[int, int]]:
        """Return (pair, number) of the frames that came twice."""
        return [key for key, times in self.seen.items() if times > 1]

    def _serve(self) -> None:
        while True:
            ready, _, _ = select.select([self._socket, self._stop], [], [])
            if self._stop in ready:
                return
            with suppress(BlockingIOError):
                while True:
                    self._take(*self._socket.recvfrom(70000, socket.MSG_DONTWAIT))

    def _take(self, data: bytes, source: tuple[str, int, int, int, bytes]) -> None:
        if source[2] == socket.PACKET_OUTGOING or len(data) < HEAD.size:
            return
        _, _, kind, pair, crc, number, _ = HEAD.unpack_from(data)
        if not kind & UNCHECKED:
            self.broken += zlib.crc32(data[20:]) != crc
            self.seen[pair, number] += 1
        if kind & ~UNCHECKED == ECHO:
            self.send(data[6:12] + b"\x02host." + data[12:])

    def __enter__(self) -> Peer:
        self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        os.write(self._wake, b"x")
        self._thread.join(10)
        for descriptor in (self._stop, self._wake):
            os.close(descriptor)
        self._socket.close()


def check_echoes(said: GuestResult, peer: Peer, count: int) -> None:
    """See that of `count` frames that the guest sent each came to the peer and back, once and whole."""
    said.check()
    assert said.number("sent") == said.number("received") == len(peer.seen) == count
    assert [said.number(key) for key in ("lost", "doubled", "late")] == [0, 0, 0]
    assert not peer.broken
    assert not peer.doubled()
