"""Network cards of lab guests: their addresses, a storm of kills for one, and what both of its ends count."""

from __future__ import annotations

import socket
import struct
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType

from cellvisor.ctl.client import Client
from tests.lab.guest import Linux
from tests.lab.hotplug import device, eventually
from tests.native.storm import OPTIONS, Storm

MAC = "52:54:00:12:34:%02d"
# A card that a busy machine starves is not hanging: every death is to be a kill.
CARE = f"{OPTIONS},hang_timeout=600"
# The socket module lacks these of asm-generic/socket.h, linux/socket.h, linux/if_packet.h and linux/if_ether.h.
SO_RCVBUFFORCE, SOL_PACKET, PACKET_STATISTICS, ETH_P_ALL = 33, 263, 6, 3
HEADERS = 14 + 20 + 8  # bytes of a datagram's frame: Ethernet, IPv4, UDP
PROTOCOL, UDP = 23, 17  # of an IPv4 packet: its place in the frame


def configure(guest: Linux, card: int) -> str:
    """Give the card with this number its address and return its name; the host is 10.88.card.1."""
    guest.run("modprobe virtio_net")
    find = f"grep -l {MAC % (card + 1)} /sys/class/net/*/address | cut -d/ -f5"
    name: str = eventually(lambda: guest.try_run(find).output.strip(), f"card {card}")
    guest.run(f"ip addr add 10.88.{card}.2/24 dev {name} && ip link set {name} up")
    eventually(lambda: guest.try_run(f"ping -c 1 -W 5 10.88.{card}.1").status == 0, "an answer to a ping")
    return name


def storm(guest: Linux, client: Client, key: str, seed: int) -> Storm:
    """Return a storm for the process of a device, at the pace of the lab."""
    processes = client.call("info", processes=True)["processes"]
    nursery = next(one["pid"] for one in processes if one["role"] == "nursery")
    pid = eventually(lambda: device(client, key).get("pid"), f"a process of {key}")
    return Storm(nursery, pid, seed, lambda: guest.process.poll() is None, shortest=0.1, longest=0.5, rest=0.01)


@dataclass(frozen=True, slots=True)
class Counts:
    """What one end counts since its start: an interface's traffic, and what its kernel's protocols did."""

    received: int  # bytes
    sent: int
    came: int      # frames: a tap counts them when the card has read them, and a guest when its card is done with them
    went: int
    dropped: int   # frames to send that the interface had no room for
    protocols: dict[str, int]  # of /proc/net/snmp, like "Udp:InErrors"

    @classmethod
    def of_guest(cls, guest: Linux, name: str) -> Counts:
        """Read a guest's."""
        return cls._parse(guest.run("cat /proc/net/dev"), guest.run("cat /proc/net/snmp"), name)

    @classmethod
    def of_host(cls, name: str) -> Counts:
        """Read those of the caller's network namespace."""
        place = Path("/proc/thread-self/net")
        return cls._parse((place / "dev").read_text(), (place / "snmp").read_text(), name)

    def since(self, before: Counts, key: str) -> int:
        """Return by how much one of the `protocols`' counters has grown."""
        return self.protocols[key] - before.protocols[key]

    @classmethod
    def _parse(cls, interfaces: str, protocols: str, name: str) -> Counts:
        line = next(line for line in interfaces.splitlines() if line.split(":")[0].strip() == name)
        numbers = [int(word) for word in line.partition(":")[2].split()]  # 8 of what came, 8 of what went
        lines = [line.split() for line in protocols.splitlines()]
        said = {names[0] + key: int(value) for names, values in zip(lines[::2], lines[1::2], strict=True)
                for key, value in zip(names[1:], values[1:], strict=True)}
        return cls(numbers[0], numbers[8], numbers[1], numbers[9], numbers[11], said)


class Capture:
    """The numbers of iperf3's datagrams of `size` bytes that pass a tap, kept by the kernel until take()."""

    ROOM = 512 << 20  # bytes, some 600 for a small frame: the kernel's share of it all

    def __init__(self, tap: str, size: int) -> None:
        self._size = size
        self._socket = socket.socket(socket.AF_PACKET, socket.SOCK_RAW, socket.htons(ETH_P_ALL))
        self._socket.setsockopt(socket.SOL_SOCKET, SO_RCVBUFFORCE, self.ROOM)
        self._socket.bind((tap, ETH_P_ALL))

    def take(self) -> tuple[list[int], list[int]]:
        """Return those that came from the guest and those that went to it, in their order."""
        came: list[int] = []
        went: list[int] = []
        while True:
            try:
                data, source = self._socket.recvfrom(2048, socket.MSG_DONTWAIT)
            except BlockingIOError:
                break
            if len(data) == HEADERS + self._size and data[PROTOCOL] == UDP:
                number = int.from_bytes(data[HEADERS + 8:HEADERS + 12], "big")  # behind seconds and microseconds
                (went if source[2] == socket.PACKET_OUTGOING else came).append(number)
        _, lost = struct.unpack("II", self._socket.getsockopt(SOL_PACKET, PACKET_STATISTICS, 8))
        assert not lost, f"{lost} frames found no room here"
        return came, went

    def __enter__(self) -> Capture:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None,
                 trace: TracebackType | None) -> None:
        self._socket.close()
