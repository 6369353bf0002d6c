"""ZMTP 3.0 with the NULL mechanism, the side that accepts, for messages of one part (rfc.zeromq.org/spec/23).

    greeting --64 bytes--> hello --READY--> open --frame--> open       anything else: UsageError

libzmq limits a frame but not how many a message has, and keeps them all until the last: a peer could fill our
memory. Here no more is held than one message of a known size, and nothing of a peer that has not said who it is.
"""

from __future__ import annotations

from struct import Struct

from cellvisor.core.errors import UsageError

GREETING = b"\xff" + bytes(8) + b"\x7f\x03\x00NULL".ljust(55, b"\0")
MAX_COMMAND = 512
MAX_IDENTITY = 255
_LONG = Struct(">Q")
_VALUE = Struct(">I")
_MORE, _IS_LONG, _IS_COMMAND = 1, 2, 4


def frame(data: bytes) -> bytes:
    """Return `data` as the only part of a message."""
    if len(data) < 256:
        return bytes((0, len(data))) + data
    return bytes((_IS_LONG,)) + _LONG.pack(len(data)) + data


def ready(kind: bytes, identity: bytes = b"") -> bytes:
    """Return the READY command of a socket of type `kind`."""
    body = b"\x05READY"
    for name, value in ((b"Socket-Type", kind), (b"Identity", identity)):
        body += bytes((len(name),)) + name + _VALUE.pack(len(value)) + value
    return bytes((_IS_COMMAND, len(body))) + body


class Decoder:
    """What one peer sends. feed() it, then ask for what is complete. `most`: bytes of a message, may be changed."""

    def __init__(self, most: int) -> None:
        self.most = most
        self.identity: bytes | None = None  # once READY came
        self._data = bytearray()
        self._greeted = False

    def feed(self, data: bytes) -> None:
        """Take bytes; never more at a time than one is willing to hold."""
        self._data += data

    def hello(self) -> bool:
        """Tell whether the peer has said who it is. Raises UsageError."""
        data = self._data
        if not self._greeted:
            if not GREETING.startswith(data[:1]) or (len(data) > 9 and data[9] != 0x7F):
                raise UsageError("does not speak ZMTP")
            if len(data) < len(GREETING):
                return False
            if data[10] < 3 or data[12:32] != GREETING[12:32]:
                raise UsageError(f"speaks ZMTP {data[10]} with mechanism {bytes(data[12:32])!r}, not NULL")
            del data[:len(GREETING)]
            self._greeted = True
        if self.identity is None:
            found = self._frame(MAX_COMMAND)
            if found is None:
                return False
            flags, body = found
            if not flags & _IS_COMMAND or not body.startswith(b"\x05READY"):
                raise UsageError("does not say READY")
            self.identity = _properties(body[6:]).get(b"identity", b"")
        return True

    def next(self) -> bytes | None:
        """Return the next message, None if more bytes are needed. Only after hello(). Raises UsageError."""
        found = self._frame(self.most)
        if found is None:
            return None
        flags, body = found
        if flags & _IS_COMMAND:
            raise UsageError(f"command {body[:12]!r}")
        return body

    def _frame(self, most: int) -> tuple[int, bytes] | None:
        data = self._data
        if not data:
            return None
        flags = data[0]
        if flags & ~(_IS_LONG | _IS_COMMAND):
            raise UsageError("message of several parts" if flags & _MORE else f"frame flags {flags:#x}")
        head = 9 if flags & _IS_LONG else 2
        if len(data) < head:
            return None
        size = _LONG.unpack_from(data, 1)[0] if flags & _IS_LONG else data[1]
        if size > most:
            raise UsageError(f"message of {size} bytes, at most {most}")
        if len(data) < head + size:
            return None
        body = bytes(data[head:head + size])
        del data[:head + size]
        return flags, body


def _properties(body: bytes) -> dict[bytes, bytes]:
    found: dict[bytes, bytes] = {}
    at = 0
    while at < len(body):
        start = at + 1 + body[at]
        if start + 4 > len(body):
            raise UsageError("READY is cut")
        size = _VALUE.unpack_from(body, start)[0]
        if start + 4 + size > len(body):
            raise UsageError("READY is cut")
        found[body[at + 1:start].lower()] = body[start + 4:start + 4 + size]
        at = start + 4 + size
    return found
