"""What a driver orders on a network card's control queue (virtio 1.2, 5.1.6.5), which frames it takes above all."""

from __future__ import annotations

import struct

from cellvisor.core.abi import net

HEAD = 16  # bytes of a frame that decide: destination, source, type, VLAN tag
MAX_ADDRESSES = 64  # of each table; with more everything of that kind passes
_BROADCAST = b"\xff" * 6
_VLAN = b"\x81\x00"
_MODES = {net.CTRL_RX_PROMISC: "promiscuous", net.CTRL_RX_ALLMULTI: "all_multicast",
          net.CTRL_RX_ALLUNI: "all_unicast", net.CTRL_RX_NOMULTI: "no_multicast",
          net.CTRL_RX_NOUNI: "no_unicast", net.CTRL_RX_NOBCAST: "no_broadcast"}
_FIXED = struct.Struct("<6sBBBB")  # own address, modes, VLANs filtered, addresses of both tables
_VLANS = 4096
_ORDERS = struct.Struct("<IHB")  # activation, pairs in use, announcement asked for; then the filter
MAX_STATE = _ORDERS.size + _FIXED.size + 2 * MAX_ADDRESSES * 6 + _VLANS // 8


class Filter:
    """A card's receive filter. It begins open, as a card without a driver does."""

    def __init__(self, mac: bytes, *, vlans: bool = False) -> None:
        """Start for address `mac`; `vlans`: frames of a VLAN pass only once it was added."""
        self.mac = mac
        self.modes = dict.fromkeys(_MODES.values(), False) | {"promiscuous": True}
        self._vlans = bytearray(_VLANS // 8) if vlans else None
        self._unicast: frozenset[bytes] | None = frozenset()  # None: too many, all pass
        self._multicast: frozenset[bytes] | None = frozenset()

    @property
    def is_open(self) -> bool:
        """Say that every frame passes."""
        return self.modes["promiscuous"]

    def passes(self, head: bytes) -> bool:
        """Judge a frame by its first HEAD bytes."""
        modes, to = self.modes, head[:6]
        if modes["promiscuous"] or len(head) < HEAD:
            return True
        if self._vlans is not None and head[12:14] == _VLAN:
            number = (head[14] << 8 | head[15]) & (_VLANS - 1)
            if not self._vlans[number >> 3] >> (number & 7) & 1:
                return False
        if not to[0] & 1:
            return not modes["no_unicast"] and (to == self.mac or modes["all_unicast"] or self._unicast is None
                                                or to in self._unicast)
        if to == _BROADCAST:
            return not modes["no_broadcast"]
        return not modes["no_multicast"] and (modes["all_multicast"] or self._multicast is None
                                              or to in self._multicast)

    def obey(self, kind: int, command: int, data: bytes) -> bool:
        """Do a command of class CTRL_RX, CTRL_MAC (tables) or CTRL_VLAN; False if it makes no sense."""
        if kind == net.CTRL_RX:
            if command not in _MODES or len(data) != 1:
                return False
            self.modes[_MODES[command]] = bool(data[0])
            return True
        if kind == net.CTRL_MAC:
            return self._set_tables(data)
        number = int.from_bytes(data, "little")
        if self._vlans is None or command not in (net.CTRL_VLAN_ADD, net.CTRL_VLAN_DEL) or len(data) != 2 \
                or number >= _VLANS:
            return False
        bit = 1 << (number & 7)
        self._vlans[number >> 3] = self._vlans[number >> 3] & ~bit | (bit if command == net.CTRL_VLAN_ADD else 0)
        return True

    def _set_tables(self, data: bytes) -> bool:
        found: list[frozenset[bytes] | None] = []
        at = 0
        for _ in range(2):  # single addresses, then groups
            count = int.from_bytes(data[at:at + 4], "little")
            if len(data) < at + 4 or count > (len(data) - at - 4) // 6:
                return False
            found.append(_addresses(data, at + 4, count))
            at += 4 + 6 * count
        if at != len(data):
            return False
        self._unicast, self._multicast = found
        return True

    def pack(self) -> bytes:
        """Return all that unpack() needs, at most MAX_STATE bytes."""
        modes = sum(1 << index for index, name in enumerate(_MODES.values()) if self.modes[name])
        tables = [self._unicast, self._multicast]
        counts = [MAX_ADDRESSES + 1 if table is None else len(table) for table in tables]
        addresses = b"".join(b"".join(sorted(table or ())) for table in tables)
        return _FIXED.pack(self.mac, modes, self._vlans is not None, *counts) + addresses + (self._vlans or b"")

    @classmethod
    def unpack(cls, data: bytes) -> Filter:
        """Undo pack(). Raises ValueError for anything else."""
        if len(data) < _FIXED.size:
            raise ValueError(f"filter: {len(data)} bytes")
        mac, modes, vlans, *counts = _FIXED.unpack_from(data)
        found = cls(mac, vlans=bool(vlans))
        found.modes = {name: bool(modes >> index & 1) for index, name in enumerate(_MODES.values())}
        at = _FIXED.size
        tables: list[frozenset[bytes] | None] = []
        for count in counts:
            tables.append(_addresses(data, at, count))
            at += 6 * count if count <= MAX_ADDRESSES else 0
        found._unicast, found._multicast = tables
        if len(data) != at + (_VLANS // 8 if vlans else 0):
            raise ValueError(f"filter: {len(data)} bytes")
        if found._vlans is not None:
            found._vlans[:] = data[at:]
        return found


class Orders:
    """All that one driver ordered: the `filter`, how many `pairs` of at `most` it uses, whether it is to announce."""

    def __init__(self, mac: bytes, *, most: int = 1, vlans: bool = False) -> None:
        self.filter = Filter(mac, vlans=vlans)
        self.most, self.pairs, self.announce = most, 1, False

    def obey(self, kind: int, command: int, data: bytes) -> bool:
        """Do a command, which may be done again by a successor; False if it makes no sense."""
        if kind in (net.CTRL_RX, net.CTRL_VLAN) or (kind, command) == (net.CTRL_MAC, net.CTRL_MAC_TABLE_SET):
            return self.filter.obey(kind, command, data)
        if (kind, command, len(data)) == (net.CTRL_MAC, net.CTRL_MAC_ADDR_SET, 6):
            self.filter.mac = data
            return True
        if (kind, command, len(data)) == (net.CTRL_ANNOUNCE, net.CTRL_ANNOUNCE_ACK, 0) and self.announce:
            self.announce = False
            return True
        if (kind, command, len(data)) == (net.CTRL_MQ, net.CTRL_MQ_VQ_PAIRS_SET, 2):
            pairs = int.from_bytes(data, "little")
            if 1 <= pairs <= self.most:
                self.pairs = pairs
                return True
        return False

    def pack(self, activation: int) -> bytes:
        """Return all that restore() needs, at most MAX_STATE bytes."""
        return _ORDERS.pack(activation, self.pairs, self.announce) + self.filter.pack()

    @classmethod
    def restore(cls, data: bytes, activation: int, most: int) -> Orders | None:
        """Undo pack(); None for another driver's, or what was never packed."""
        if len(data) < _ORDERS.size or _ORDERS.unpack_from(data)[0] != activation:
            return None
        found = cls(bytes(6), most=most)
        _, pairs, announce = _ORDERS.unpack_from(data)
        try:
            found.filter = Filter.unpack(data[_ORDERS.size:])
        except ValueError:
            return None
        found.pairs, found.announce = min(max(pairs, 1), most), bool(announce)
        return found


def _addresses(data: bytes, at: int, count: int) -> frozenset[bytes] | None:
    if count > MAX_ADDRESSES:
        return None
    return frozenset(data[at + 6 * index:at + 6 * index + 6] for index in range(count))
