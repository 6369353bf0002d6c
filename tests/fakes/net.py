"""A network card in the test's own process, on taps that are socket pairs: a datagram is a frame."""

from __future__ import annotations

import socket
import struct
from typing import Any

import pytest

from cellvisor.core.abi import net
from cellvisor.devices.backends.tap import Tap
from cellvisor.devices.virtio import net as module
from tests.fakes.driver import FakeGuest
from tests.fakes.host import Rig

RX, TX, CTRL = 0, 1, 2
MAC = bytes.fromhex("525400123456")
OTHER = bytes.fromhex("020000000001")
PLAIN = net.F_MRG_RXBUF | net.F_STATUS | net.F_CTRL_VQ | net.F_CTRL_RX | net.F_CTRL_VLAN | net.F_GUEST_ANNOUNCE


def frame(size: int = 60, *, to: bytes = MAC, kind: bytes = b"\x08\x00", seed: int = 0) -> bytes:
    return to + OTHER + kind + bytes((seed + index) & 0xFF for index in range(size - 14))


class FakeTap(Tap):
    """A queue whose other end is `peer`; tells what it was asked to be."""

    def __init__(self, peers: list[socket.socket], name: str = "fake0") -> None:
        ours, peer = socket.socketpair(socket.AF_UNIX, socket.SOCK_DGRAM)
        ours.setblocking(False)
        ours.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        peer.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, 1 << 20)
        peer.settimeout(10)
        self.fd, self.name = ours.detach(), name
        self.flags, self.used, self.cable, self.takes_several = -1, True, True, True
        peers.append(peer)

    @property
    def mtu(self) -> int:
        return 1400

    def offload(self, flags: int) -> None:
        self.flags = flags

    def use(self, wanted: bool) -> None:
        self.used = wanted

    def carrier(self, there: bool) -> None:
        self.cable = there


class Card(Rig):
    """A card and the hosts' ends of its taps."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, features: int | None = PLAIN, **options: Any) -> None:
        self.peers: list[socket.socket] = []
        count = options.get("num_queues", 2) // 2
        monkeypatch.setattr(module, "open_taps", lambda options, host: [FakeTap(self.peers) for _ in range(count)])
        options = {"mac": "52:54:00:12:34:56", **options}
        super().__init__(module.Net, options, features=features, guest=FakeGuest(8 << 20))
        self.own_guest = True

    @property
    def taps(self) -> list[Any]:
        return [pair.tap for pair in self.device.pairs]

    def come(self, *frames: bytes, pair: int = 0) -> None:
        """Have frames come in on the host's side, and serve them."""
        for frame in frames:
            self.peers[pair].send(bytes(12) + frame)
        for _ in range(len(frames) + 2):
            self.host.reactor.turn(0)

    def room(self, *sizes: int, pair: int = 0) -> list[int]:
        """Offer receive buffers."""
        heads = [self.drivers[2 * pair].add([], [size]) for size in sizes]
        self.kick(2 * pair)
        return heads

    def received(self, pair: int = 0) -> list[bytes]:
        """Return whole frames, put together as a driver does."""
        driver = self.drivers[2 * pair]
        used, found = driver.used(), []
        while used:
            head, length = used.pop(0)
            data = driver.data(head, length)
            for _ in range(struct.unpack_from("<H", data, 10)[0] - 1):
                head, length = used.pop(0)
                data += driver.data(head, length)
            found.append(data[12:])
        return found

    def order(self, kind: int, command: int, data: bytes = b"", *, control: int = CTRL) -> int:
        """Give a control command and return its acknowledgement."""
        return self.request([bytes([kind, command]), data] if data else [bytes([kind, command])], [1], control)[0]

    def config(self) -> tuple[bytes, int, int, int]:
        """Return mac, status, pairs and MTU as published last."""
        return net.CONFIG.unpack(self.host.configs[-1] if self.host.configs else self.spec.config)

    def close(self) -> None:
        super().close()
        for peer in self.peers:
            peer.close()
